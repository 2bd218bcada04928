#include "check.h"

#include "half_reference.h"

#define DTYPE_COUNT 8
#define REDUCTION_COUNT 7
#define MAX_BYTES 8u

/* ---- one element, without the library ----------------------------------------------------------------------------------- */

static size_t bytes_of(dss_dtype_t dtype) {
    static const size_t bytes[DTYPE_COUNT] = {4, 8, 2, 2, 1, 1, 4, 8};
    return bytes[dtype];
}

static int is_half(dss_dtype_t dtype) {
    return dtype == DSS_FLOAT16 || dtype == DSS_BFLOAT16;
}

static int is_floating(dss_dtype_t dtype) {
    return dtype == DSS_FLOAT32 || dtype == DSS_FLOAT64 || is_half(dtype);
}

static dss_dtype_t accumulator_of(dss_dtype_t dtype) {
    return is_half(dtype) ? DSS_FLOAT32 : dtype;
}

static half_format_t format_of(dss_dtype_t dtype) {
    return dtype == DSS_FLOAT16 ? float16_format : bfloat16_format;
}

static double get_float(dss_dtype_t dtype, const unsigned char *element) {
    float f32;
    double f64;
    uint16_t half;
    if (is_half(dtype)) {
        memcpy(&half, element, sizeof half);
        return reference_widen(format_of(dtype), half);
    }
    if (dtype == DSS_FLOAT64) {
        memcpy(&f64, element, sizeof f64);
        return f64;
    }
    memcpy(&f32, element, sizeof f32);
    return f32;
}

static void put_float(dss_dtype_t dtype, unsigned char *element, double value) {
    if (is_half(dtype)) {
        const uint16_t nan = 0x7fff;
        const uint16_t half = isnan(value) ? nan : reference_narrow(format_of(dtype), value);
        memcpy(element, &half, sizeof half);
    } else if (dtype == DSS_FLOAT32) {
        const float f32 = (float)value;
        memcpy(element, &f32, sizeof f32);
    } else {
        memcpy(element, &value, sizeof value);
    }
}

/* The bits, extended to 64 by the dtype's sign. */
static uint64_t get_integer(dss_dtype_t dtype, const unsigned char *element) {
    int8_t i8;
    int32_t i32;
    int64_t i64;
    switch (dtype) {
    case DSS_INT8:
        memcpy(&i8, element, 1);
        return (uint64_t)(int64_t)i8;
    case DSS_INT32:
        memcpy(&i32, element, 4);
        return (uint64_t)(int64_t)i32;
    case DSS_INT64:
        memcpy(&i64, element, 8);
        return (uint64_t)i64;
    default:
        return *element;
    }
}

static void put_integer(dss_dtype_t dtype, unsigned char *element, uint64_t value) {
    const uint8_t u8 = (uint8_t)value;
    const uint32_t u32 = (uint32_t)value;
    memcpy(element, bytes_of(dtype) == 1 ? (const void *)&u8 : bytes_of(dtype) == 4 ? (const void *)&u32 : &value, bytes_of(dtype));
}

static uint64_t reduce_integers(dss_reduction_t reduction, uint64_t l, uint64_t r) {
    const int is_less = (int64_t)l < (int64_t)r;
    switch (reduction) {
    case DSS_SUM:
        return l + r;
    case DSS_PRODUCT:
        return l * r;
    case DSS_MIN:
        return is_less ? l : r;
    case DSS_MAX:
        return is_less ? r : l;
    case DSS_BAND:
        return l & r;
    case DSS_BOR:
        return l | r;
    default:
        return l ^ r;
    }
}

/* In float32 or float64, each operation rounded for itself. */
static double reduce_floats(dss_dtype_t accumulator, dss_reduction_t reduction, double l, double r, double scale) {
    if (reduction == DSS_MIN || reduction == DSS_MAX) {
        const int right = l == r ? !signbit(l) : r < l; /* the smaller is the right one */
        return isnan(l) || isnan(r) ? (double)NAN : right == (reduction == DSS_MIN) ? r : l;
    }
    if (accumulator == DSS_FLOAT64) {
        volatile double result = reduction == DSS_SUM ? l + r : l * r;
        return result * scale;
    }
    volatile float result = reduction == DSS_SUM ? (float)l + (float)r : (float)l * (float)r;
    result = result * (float)scale;
    return result;
}

/* `target` is of dtype `target_dtype`, the dtype itself or its accumulator; so is `left`. */
static void reduce_one(dss_dtype_t dtype, dss_dtype_t target_dtype, dss_reduction_t reduction, const unsigned char *left,
                       const unsigned char *right, double scale, unsigned char *target) {
    if (is_floating(dtype))
        put_float(target_dtype, target,
                  reduce_floats(accumulator_of(dtype), reduction, get_float(target_dtype, left), get_float(dtype, right), scale));
    else
        put_integer(dtype, target, reduce_integers(reduction, get_integer(dtype, left), get_integer(dtype, right)));
}

/* To the bit; of NaN there are many. */
static int is_same(dss_dtype_t dtype, const unsigned char *a, const unsigned char *b) {
    if (is_floating(dtype) && isnan(get_float(dtype, a)))
        return isnan(get_float(dtype, b));
    return memcmp(a, b, bytes_of(dtype)) == 0;
}

static int is_defined(dss_dtype_t dtype, int reduction) {
    return reduction <= DSS_MAX || !is_floating(dtype);
}

/* ---- vectors ------------------------------------------------------------------------------------------------------------ */

#define MAX_COUNT 1100u
#define VECTOR_BYTES (MAX_COUNT * MAX_BYTES + 32)

/* Any bits at all, numbers of like size, and what arithmetic stumbles over. */
static void put_random(dss_dtype_t dtype, unsigned char *element, uint64_t *random) {
    static const double specials[] = {0.0,     -0.0,     1,          INFINITY,   -INFINITY,  NAN,         0x1p-24,
                                      0x1p-14, 0x1p-149, -0x1p-1074, 0x1.fcp127, 0x1.ffcp15, -0x1.ffcp15, 0x1.fffffep127};
    const uint64_t bits = check_random(random);
    memcpy(element, &bits, bytes_of(dtype));
    if (is_floating(dtype) && bits >> 62 == 1)
        put_float(dtype, element, specials[check_random_below(random, sizeof specials / sizeof specials[0])]);
    else if (is_floating(dtype) && bits >> 62 > 1)
        put_float(dtype, element, ldexp((double)(int64_t)bits, -60));
}

static void fill_random(dss_dtype_t dtype, unsigned char *vector, size_t count, uint64_t *random) {
    for (size_t i = 0; i < count; i++)
        put_random(dtype, vector + i * bytes_of(dtype), random);
}

typedef enum place { APART, ON_LEFT, ON_RIGHT, PLACE_COUNT } place_t;

/* Every vector begins at an address of its own, between guards. */
static void check_combine(dss_dtype_t dtype, dss_reduction_t reduction, double scale, size_t count, size_t offset, place_t place,
                          uint64_t *random) {
    static unsigned char memory[3][VECTOR_BYTES];
    static unsigned char before[3][VECTOR_BYTES];
    const size_t bytes = bytes_of(dtype);
    const size_t begin[] = {8 + offset, 8 + 3 * offset % 8, 8 + 5 * offset % 8};
    const int target = place == APART ? 2 : place == ON_RIGHT;
    memset(memory, 0x5a, sizeof memory);
    fill_random(dtype, memory[0] + begin[0], count, random);
    fill_random(dtype, memory[1] + begin[1], count, random);
    memcpy(before, memory, sizeof before);
    CHECK_STATUS(
        dss_combine(dtype, reduction, memory[0] + begin[0], memory[1] + begin[1], scale, memory[target] + begin[target], count),
        DSS_OK);
    for (size_t i = 0; i < count; i++) {
        const unsigned char *left = before[0] + begin[0] + i * bytes;
        const unsigned char *right = before[1] + begin[1] + i * bytes;
        unsigned char *result = memory[target] + begin[target] + i * bytes;
        unsigned char expected[MAX_BYTES];
        reduce_one(dtype, dtype, reduction, left, right, scale, expected);
        CHECK_FOR(is_same(dtype, expected, result), "%s %s, element %zu of %zu, offset %zu, place %d, scale %g",
                  dss_reduction_name(reduction), dss_dtype_name(dtype), i, count, offset, (int)place, scale);
        memcpy(result, before[target] + begin[target] + i * bytes, bytes);
    }
    CHECK_FOR(memcmp(memory, before, sizeof before) == 0, "%s %s wrote beyond its %zu elements", dss_reduction_name(reduction),
              dss_dtype_name(dtype), count);
}

static void every_length_alignment_and_place_matches_the_reference(void) {
    static const size_t counts[] = {0, 1, 2, 3, 7, 8, 15, 17, 31, 33, 511, 512, 513, MAX_COUNT - 1};
    uint64_t random = 1;
    for (int d = 0; d < DTYPE_COUNT; d++)
        for (int r = 0; r < REDUCTION_COUNT; r++)
            for (size_t c = 0; is_defined((dss_dtype_t)d, r) && c < sizeof counts / sizeof counts[0]; c++)
                for (size_t offset = 0; offset < 4; offset++)
                    check_combine((dss_dtype_t)d, (dss_reduction_t)r, 1, counts[c], offset, (place_t)((c + offset) % PLACE_COUNT),
                                  &random);
}

static void floating_sums_are_scaled(void) {
    static const double scales[] = {0.5, 0.25, 1.0 / 3, 0.2};
    uint64_t random = 2;
    for (int d = 0; d < 4; d++)
        for (int s = 0; s < 4; s++)
            for (int place = 0; place < PLACE_COUNT; place++)
                for (size_t count = 600; count < 620; count++)
                    check_combine((dss_dtype_t)d, DSS_SUM, scales[s], count, 1, (place_t)place, &random);
}

/* Subnormals, infinity, NaN and all between. */
static void every_half_meets_a_few_others(void) {
    static const uint16_t others[] = {0x0000, 0x8000, 0x0001, 0x8400, 0x3c00, 0xbf81, 0x7bff, 0x7c00, 0xff80, 0x7fff};
    static uint16_t halves[65536];
    static uint16_t partners[65536];
    static uint16_t results[65536];
    for (uint32_t i = 0; i < 65536; i++)
        halves[i] = (uint16_t)i;
    for (int d = DSS_FLOAT16; d <= DSS_BFLOAT16; d++)
        for (int r = DSS_SUM; r <= DSS_MAX; r++)
            for (unsigned o = 0; o < sizeof others / sizeof others[0]; o++) {
                for (uint32_t i = 0; i < 65536; i++)
                    partners[i] = others[o];
                CHECK_STATUS(dss_combine((dss_dtype_t)d, (dss_reduction_t)r, halves, partners, 1, results, 65536), DSS_OK);
                for (uint32_t i = 0; i < 65536; i++) {
                    unsigned char expected[2];
                    reduce_one((dss_dtype_t)d, (dss_dtype_t)d, (dss_reduction_t)r, (unsigned char *)&halves[i],
                               (unsigned char *)&partners[i], 1, expected);
                    CHECK_FOR(is_same((dss_dtype_t)d, expected, (unsigned char *)&results[i]), "%s %s of %#x and %#x became %#x",
                              dss_reduction_name((dss_reduction_t)r), dss_dtype_name((dss_dtype_t)d), halves[i], partners[i],
                              results[i]);
                }
            }
}

/* All members of a group must come to the same bits, also where they hold the operands the other way round; for NaN as well. */
static void min_and_max_know_no_sides(void) {
    static unsigned char left[VECTOR_BYTES];
    static unsigned char right[VECTOR_BYTES];
    static unsigned char results[2][VECTOR_BYTES];
    uint64_t random = 3;
    for (int d = 0; d < DTYPE_COUNT; d++)
        for (int r = DSS_MIN; r <= DSS_MAX; r++) {
            fill_random((dss_dtype_t)d, left, MAX_COUNT, &random);
            fill_random((dss_dtype_t)d, right, MAX_COUNT, &random);
            CHECK_STATUS(dss_combine((dss_dtype_t)d, (dss_reduction_t)r, left, right, 1, results[0], MAX_COUNT), DSS_OK);
            CHECK_STATUS(dss_combine((dss_dtype_t)d, (dss_reduction_t)r, right, left, 1, results[1], MAX_COUNT), DSS_OK);
            CHECK_FOR(memcmp(results[0], results[1], sizeof results[0]) == 0, "%s %s", dss_reduction_name((dss_reduction_t)r),
                      dss_dtype_name((dss_dtype_t)d));
        }
}

static void check_accumulate(dss_dtype_t dtype, dss_reduction_t reduction, size_t count, uint64_t *random) {
    static unsigned char source[VECTOR_BYTES];
    static unsigned char sums[VECTOR_BYTES];
    static unsigned char before[VECTOR_BYTES];
    const dss_dtype_t wide = accumulator_of(dtype);
    memset(sums, 0x5a, sizeof sums);
    fill_random(dtype, source + 1, count, random);
    fill_random(wide, sums + 3, count, random);
    memcpy(before, sums, sizeof before);
    CHECK_STATUS(dss_accumulate(dtype, reduction, source + 1, sums + 3, count), DSS_OK);
    for (size_t i = 0; i < count; i++) {
        unsigned char expected[MAX_BYTES];
        unsigned char *result = sums + 3 + i * bytes_of(wide);
        const unsigned char *left = before + 3 + i * bytes_of(wide);
        reduce_one(dtype, wide, reduction, left, source + 1 + i * bytes_of(dtype), 1, expected);
        CHECK_FOR(is_same(wide, expected, result), "%s %s, element %zu of %zu", dss_reduction_name(reduction),
                  dss_dtype_name(dtype), i, count);
        memcpy(result, left, bytes_of(wide));
    }
    CHECK_FOR(memcmp(sums, before, sizeof before) == 0, "wrote beyond its %zu elements", count);
}

static void accumulating_matches_the_reference(void) {
    static const size_t counts[] = {0, 1, 5, 16, 512, 513, MAX_COUNT - 1};
    uint64_t random = 4;
    for (int d = 0; d < DTYPE_COUNT; d++)
        for (int r = 0; r < REDUCTION_COUNT; r++)
            for (size_t c = 0; is_defined((dss_dtype_t)d, r) && c < sizeof counts / sizeof counts[0]; c++)
                check_accumulate((dss_dtype_t)d, (dss_reduction_t)r, counts[c], &random);
}

static void integers_widen_and_narrow_unchanged(void) {
    uint64_t random = 5;
    for (int d = DSS_INT8; d < DTYPE_COUNT; d++) {
        const dss_dtype_t dtype = (dss_dtype_t)d;
        unsigned char values[8 * 100];
        unsigned char wide[8 * 100 + 1];
        unsigned char again[8 * 100] = {0};
        fill_random(dtype, values, 100, &random);
        CHECK_STATUS(dss_widen(dtype, values, wide + 1, 100), DSS_OK);
        CHECK_STATUS(dss_narrow_scaled(dtype, wide + 1, 1, again, 100), DSS_OK);
        CHECK_STATUS(dss_narrow_scaled(dtype, again, 1, again, 100), DSS_OK);
        CHECK(memcmp(values, again, 100 * bytes_of(dtype)) == 0);
        CHECK_STATUS(dss_narrow_scaled(dtype, wide + 1, 0.5, again, 100), DSS_ERR_INVALID_ARGUMENT);
        CHECK(memcmp(values, again, 100 * bytes_of(dtype)) == 0);
    }
}

static void names_and_sizes_are_as_declared(void) {
    static const char *const dtypes[] = {"float32", "float64", "float16", "bfloat16", "int8", "uint8", "int32", "int64", "unknown"};
    static const char *const reductions[] = {"sum", "product", "min", "max", "band", "bor", "bxor", "unknown"};
    for (int d = 0; d <= DTYPE_COUNT; d++)
        CHECK_FOR(strcmp(dss_dtype_name((dss_dtype_t)d), dtypes[d]) == 0, "dtype %d", d);
    for (int r = 0; r <= REDUCTION_COUNT; r++)
        CHECK_FOR(strcmp(dss_reduction_name((dss_reduction_t)r), reductions[r]) == 0, "reduction %d", r);
    CHECK(strcmp(dss_reduction_name((dss_reduction_t)-1), "unknown") == 0);
    for (int d = 0; d < DTYPE_COUNT; d++) {
        CHECK_EQUAL(dss_dtype_bytes((dss_dtype_t)d), bytes_of((dss_dtype_t)d));
        CHECK_EQUAL(dss_dtype_accumulator((dss_dtype_t)d), accumulator_of((dss_dtype_t)d));
    }
}

static void what_is_not_defined_is_refused(void) {
    double value = 1;
    double wide = 1;
    for (int d = -1; d <= DTYPE_COUNT; d++)
        for (int r = -1; r <= REDUCTION_COUNT; r++) {
            const dss_dtype_t dtype = (dss_dtype_t)d;
            const dss_reduction_t reduction = (dss_reduction_t)r;
            const int known = d >= 0 && d < DTYPE_COUNT && r >= 0 && r < REDUCTION_COUNT;
            const int defined = known && is_defined(dtype, r);
            const int scalable = defined && is_floating(dtype) && r == DSS_SUM;
            CHECK_EQUAL(dss_reduction_takes(reduction, dtype), defined);
            CHECK_STATUS(dss_combine(dtype, reduction, &value, &value, 1, &wide, 0), defined ? DSS_OK : DSS_ERR_INVALID_ARGUMENT);
            CHECK_STATUS(dss_combine(dtype, reduction, &value, &value, 0.5, &wide, 0),
                         scalable ? DSS_OK : DSS_ERR_INVALID_ARGUMENT);
            CHECK_STATUS(dss_combine(dtype, reduction, &value, &value, NAN, &wide, 1), DSS_ERR_INVALID_ARGUMENT);
            CHECK_STATUS(dss_accumulate(dtype, reduction, &value, &wide, 0), defined ? DSS_OK : DSS_ERR_INVALID_ARGUMENT);
        }
    CHECK_STATUS(dss_combine(DSS_INT8, DSS_SUM, NULL, &value, 1, &wide, 1), DSS_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(dss_combine(DSS_INT8, DSS_SUM, &value, NULL, 1, &wide, 1), DSS_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(dss_combine(DSS_INT8, DSS_SUM, &value, &value, 1, NULL, 1), DSS_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(dss_combine(DSS_BFLOAT16, DSS_SUM, NULL, NULL, 0.5, NULL, 0), DSS_OK);
    CHECK_STATUS(dss_accumulate(DSS_FLOAT16, DSS_MAX, NULL, &wide, 1), DSS_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(dss_accumulate(DSS_FLOAT16, DSS_MAX, &value, NULL, 1), DSS_ERR_INVALID_ARGUMENT);
    CHECK(value == 1 && wide == 1);
}

int main(void) {
    RUN(every_length_alignment_and_place_matches_the_reference);
    RUN(floating_sums_are_scaled);
    RUN(every_half_meets_a_few_others);
    RUN(min_and_max_know_no_sides);
    RUN(accumulating_matches_the_reference);
    RUN(integers_widen_and_narrow_unchanged);
    RUN(names_and_sizes_are_as_declared);
    RUN(what_is_not_defined_is_refused);
}
