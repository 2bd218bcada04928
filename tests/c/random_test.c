#include "check.h"

#include "random.h"

/* The first outputs of splitmix64 seeded with 1234567, as published with the generator's reference implementations. */
static void published_vectors(void) {
    dss_random_t random = {1234567};
    CHECK_EQUAL(dss_random_next(&random), 6457827717110365317u);
    CHECK_EQUAL(dss_random_next(&random), 3203168211198807973u);
    CHECK_EQUAL(dss_random_next(&random), 9817491932198370423u);
}

static void streams_differ_by_seed_purpose_and_index(void) {
    uint64_t drawn[8];
    unsigned count = 0;
    for (uint64_t seed = 0; seed < 2; seed++) {
        for (uint64_t index = 0; index < 2; index++) {
            for (int purpose = DSS_RANDOM_PLAN; purpose <= DSS_RANDOM_CALLS; purpose++) {
                dss_random_t random = dss_random_stream(seed, (dss_random_purpose_t)purpose, index);
                drawn[count++] = dss_random_next(&random);
            }
        }
    }
    for (unsigned a = 0; a < count; a++)
        for (unsigned b = a + 1; b < count; b++)
            CHECK_FOR(drawn[a] != drawn[b], "%u and %u", a, b);
}

/* Chi-squared against uniform; the bounds are beyond the 1e-6 quantile, and the stream is fixed. */
static void bounded_draws_are_uniform(void) {
    dss_random_t random = dss_random_stream(7, DSS_RANDOM_PLAN, 0);
    for (uint32_t bound = 1; bound <= 17; bound++) {
        uint32_t seen[17] = {0};
        const uint32_t draw_count = 20000;
        double chi_squared = 0;
        for (uint32_t i = 0; i < draw_count; i++) {
            const uint32_t value = dss_random_below(&random, bound);
            CHECK_FOR(value < bound, "%u of %u", value, bound);
            seen[value]++;
        }
        for (uint32_t value = 0; value < bound; value++) {
            const double expected = (double)draw_count / bound;
            chi_squared += (seen[value] - expected) * (seen[value] - expected) / expected;
        }
        CHECK_FOR(chi_squared < 60, "bound %u: %g", bound, chi_squared);
    }
}

/* With a bound of 3 * 2^30 a plain multiply-and-shift gives every third value a quarter of all draws instead of a third. */
static void large_bounds_have_no_bias(void) {
    dss_random_t random = dss_random_stream(8, DSS_RANDOM_PLAN, 0);
    uint32_t seen[3] = {0};
    const uint32_t draw_count = 90000;
    for (uint32_t i = 0; i < draw_count; i++)
        seen[dss_random_below(&random, 3u << 30) % 3]++;
    for (uint32_t residue = 0; residue < 3; residue++)
        CHECK_NEAR(seen[residue], draw_count / 3.0, 1000);
}

static void shuffles_reach_every_order_equally(void) {
    dss_random_t random = dss_random_stream(9, DSS_RANDOM_PLAN, 0);
    uint32_t seen[256] = {0};
    unsigned order_count = 0;
    for (uint32_t i = 0; i < 24000; i++) {
        uint32_t values[4] = {0, 1, 2, 3};
        dss_random_shuffle(&random, values, 4);
        seen[values[0] | values[1] << 2 | values[2] << 4 | values[3] << 6]++;
    }
    for (unsigned order = 0; order < 256; order++) {
        order_count += seen[order] > 0;
        if (seen[order])
            CHECK_NEAR(seen[order], 1000, 160);
    }
    CHECK_EQUAL(order_count, 24);
}

int main(void) {
    RUN(published_vectors);
    RUN(streams_differ_by_seed_purpose_and_index);
    RUN(bounded_draws_are_uniform);
    RUN(large_bounds_have_no_bias);
    RUN(shuffles_reach_every_order_equally);
}
