#include "check.h"

static void counts_keep_stripes_large_enough(void) {
    static const struct {
        size_t total_bytes;
        uint32_t period;
        size_t min_stripe_bytes;
        uint32_t expected;
    } rows[] = {
        {0, 8, 1 << 20, 1},
        {1, 8, 1 << 20, 1},
        {(2 << 20) - 1, 8, 1 << 20, 1},
        {2 << 20, 8, 1 << 20, 2},
        {64 << 20, 8, 1 << 20, 8},
        {64 << 20, 1, 1, 1},
        {64 << 20, 0, 1, 1},
        {5, 8, 0, 5},
        {0, 8, 0, 1},
        {SIZE_MAX, 1024, 1, 1024},
        {9 << 20, 8, 1 << 20, 8},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
        CHECK_EQUAL(dss_stripe_count(rows[i].total_bytes, rows[i].period, rows[i].min_stripe_bytes), rows[i].expected);
}

static void check_stripes(size_t element_count, uint32_t stripe_count) {
    CHECK_EQUAL(dss_stripe_begin(element_count, stripe_count, 0), 0);
    CHECK_EQUAL(dss_stripe_begin(element_count, stripe_count, stripe_count), element_count);
    for (uint32_t stripe = 0; stripe < stripe_count; stripe++) {
        const size_t begin = dss_stripe_begin(element_count, stripe_count, stripe);
        const size_t length = dss_stripe_begin(element_count, stripe_count, stripe + 1) - begin;
        const size_t fair = element_count / stripe_count;
        if (element_count / 64 >= stripe_count) {
            CHECK_EQUAL(begin % 64, 0);
            CHECK_FOR(length + 64 > fair && length <= fair + 128, "%zu in %u: stripe %u has %zu", element_count, stripe_count,
                      stripe, length);
        } else {
            CHECK_FOR(length == fair || length == fair + 1, "%zu in %u: stripe %u has %zu", element_count, stripe_count, stripe,
                      length);
        }
    }
}

static void stripes_tile_the_vector_evenly(void) {
    for (size_t element_count = 0; element_count < 3000; element_count += 7)
        for (uint32_t stripe_count = 1; stripe_count <= 17; stripe_count++)
            check_stripes(element_count, stripe_count);
    check_stripes(1u << 24, 8);
    check_stripes((1u << 24) + 1, 1024);
}

static void the_largest_vectors_do_not_overflow(void) {
    check_stripes(SIZE_MAX, 1024);
    check_stripes(SIZE_MAX / 2 + 3, 1023);
    CHECK_EQUAL(dss_stripe_begin(SIZE_MAX, UINT32_MAX, UINT32_MAX), SIZE_MAX);
    CHECK(dss_stripe_begin(SIZE_MAX, UINT32_MAX, UINT32_MAX - 1) < SIZE_MAX);
    CHECK(dss_stripe_begin(SIZE_MAX, UINT32_MAX, UINT32_MAX - 1) > SIZE_MAX / UINT32_MAX * (UINT32_MAX - 2));
}

static void a_stripe_past_the_end_begins_at_the_end(void) {
    CHECK_EQUAL(dss_stripe_begin(1000, 4, 5), 1000);
    CHECK_EQUAL(dss_stripe_begin(1000, 0, 0), 1000);
}

int main(void) {
    RUN(counts_keep_stripes_large_enough);
    RUN(stripes_tile_the_vector_evenly);
    RUN(the_largest_vectors_do_not_overflow);
    RUN(a_stripe_past_the_end_begins_at_the_end);
}
