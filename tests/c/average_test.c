#include "check.h"

#include "half_reference.h"

#define MAX_SOURCES 5u
#define MAX_ELEMENTS 1600u

static const dss_dtype_t dtypes[] = {DSS_FLOAT32, DSS_FLOAT64, DSS_FLOAT16, DSS_BFLOAT16};

/* One element of any dtype, read and written without the library. */
static double get(dss_dtype_t dtype, const unsigned char *vector, size_t i) {
    float f32;
    double f64;
    uint16_t half;
    switch (dtype) {
    case DSS_FLOAT32:
        memcpy(&f32, vector + 4 * i, 4);
        return f32;
    case DSS_FLOAT64:
        memcpy(&f64, vector + 8 * i, 8);
        return f64;
    default:
        memcpy(&half, vector + 2 * i, 2);
        return reference_widen(dtype == DSS_FLOAT16 ? float16_format : bfloat16_format, half);
    }
}

static void put(dss_dtype_t dtype, unsigned char *vector, size_t i, double value) {
    const float f32 = (float)value;
    const uint16_t half = reference_narrow(dtype == DSS_FLOAT16 ? float16_format : bfloat16_format, value);
    if (dtype == DSS_FLOAT32)
        memcpy(vector + 4 * i, &f32, 4);
    else if (dtype == DSS_FLOAT64)
        memcpy(vector + 8 * i, &value, 8);
    else
        memcpy(vector + 2 * i, &half, 2);
}

/* Half a unit in the last place of the dtype, at 1. */
static double half_unit(dss_dtype_t dtype) {
    return dtype == DSS_FLOAT32 ? 0x1p-24 : dtype == DSS_FLOAT64 ? 0x1p-53 : dtype == DSS_FLOAT16 ? 0x1p-11 : 0x1p-8;
}

static size_t bytes_of(dss_dtype_t dtype) {
    return dtype == DSS_FLOAT64 ? 8 : dtype == DSS_FLOAT32 ? 4 : 2;
}

static double accumulator_unit(dss_dtype_t dtype) {
    return dtype == DSS_FLOAT64 ? 0x1p-53 : 0x1p-24;
}

typedef struct bench {
    unsigned char *memory[MAX_SOURCES]; /* owned; each vector sits at an offset of its own, between guards */
    unsigned char *vectors[MAX_SOURCES];
    double *values[MAX_SOURCES]; /* owned; what the vectors held at first, in double */
    size_t span_bytes;
} bench_t;

static bench_t bench_new(dss_dtype_t dtype, size_t element_count, size_t offset, uint64_t *random) {
    bench_t bench;
    bench.span_bytes = 64 + element_count * bytes_of(dtype) + 64;
    for (uint32_t s = 0; s < MAX_SOURCES; s++) {
        bench.memory[s] = malloc(bench.span_bytes);
        bench.values[s] = calloc(element_count + 1, sizeof(double));
        memset(bench.memory[s], 0x5a, bench.span_bytes);
        bench.vectors[s] = bench.memory[s] + 16 + (offset * (s + 1)) % 8;
        for (size_t i = 0; i < element_count; i++) {
            const double value = ldexp((double)(check_random(random) >> 11) * 0x1p-53 - 0.5, (int)(check_random(random) % 12));
            put(dtype, bench.vectors[s], i, value);
            bench.values[s][i] = get(dtype, bench.vectors[s], i);
        }
    }
    return bench;
}

static void bench_free(bench_t *bench) {
    for (uint32_t s = 0; s < MAX_SOURCES; s++) {
        free(bench->memory[s]);
        free(bench->values[s]);
    }
}

/* Nothing outside the vector was written. */
static void check_guards(const bench_t *bench, uint32_t s, size_t vector_bytes) {
    for (const unsigned char *at = bench->memory[s]; at < bench->vectors[s]; at++)
        CHECK_EQUAL(*at, 0x5a);
    for (const unsigned char *at = bench->vectors[s] + vector_bytes; at < bench->memory[s] + bench->span_bytes; at++)
        CHECK_EQUAL(*at, 0x5a);
}

/* The mean in double differs by what the documented roundings allow: one for each addition and the division, at the size of the
 * partial sums, in the accumulator's dtype, and one into the dtype. */
static void check_mean(dss_dtype_t dtype, const bench_t *bench, uint32_t source_count, const unsigned char *target,
                       size_t element_count) {
    for (size_t i = 0; i < element_count; i++) {
        double sum = 0;
        double size = 0;
        for (uint32_t s = 0; s < source_count; s++) {
            sum += bench->values[s][i];
            size += fabs(bench->values[s][i]);
        }
        const double mean = sum / source_count;
        const double allowed = size * accumulator_unit(dtype) * 1.01 + fabs(mean) * half_unit(dtype) * 1.01 + 0x1p-25;
        const double tolerance = dtype == DSS_FLOAT64 ? size * 0x1p-52 : dtype == DSS_FLOAT32 ? size * 0x1p-23 : allowed;
        CHECK_NEAR(get(dtype, target, i), mean, tolerance);
    }
}

static void check_average(dss_dtype_t dtype, size_t element_count, size_t offset, uint32_t source_count, uint32_t target,
                          uint64_t *random) {
    bench_t bench = bench_new(dtype, element_count, offset, random);
    const void *sources[MAX_SOURCES];
    for (uint32_t s = 0; s < source_count; s++)
        sources[s] = bench.vectors[s];
    CHECK_STATUS(dss_average(dtype, sources, source_count, bench.vectors[target], element_count), DSS_OK);
    check_mean(dtype, &bench, source_count, bench.vectors[target], element_count);
    for (uint32_t s = 0; s < MAX_SOURCES; s++) {
        check_guards(&bench, s, element_count * bytes_of(dtype));
        for (size_t i = 0; s != target && i < element_count; i++)
            CHECK_FOR(get(dtype, bench.vectors[s], i) == bench.values[s][i], "a source was written");
    }
    bench_free(&bench);
}

/* Lengths around the block of 512; the target is the last vector, which is a source or not. */
static void averages_match_the_double_reference(void) {
    static const size_t counts[] = {0, 1, 2, 3, 7, 63, 64, 511, 512, 513, 1023, 1025, MAX_ELEMENTS - 1};
    uint64_t random = 1;
    for (int d = 0; d < 4; d++)
        for (size_t c = 0; c < sizeof counts / sizeof counts[0]; c++)
            for (size_t offset = 0; offset < 4; offset++)
                for (uint32_t source_count = 1; source_count <= MAX_SOURCES; source_count++) {
                    check_average(dtypes[d], counts[c], offset, source_count, MAX_SOURCES - 1, &random);
                    check_average(dtypes[d], counts[c], offset, source_count, 0, &random);
                    check_average(dtypes[d], counts[c], offset, source_count, source_count / 2, &random);
                }
}

/* Half types: sums in float32 in the order of the sources, one division, one rounding, to the bit. */
static void half_types_round_once(void) {
    uint64_t random = 2;
    for (int d = 2; d < 4; d++) {
        const half_format_t format = dtypes[d] == DSS_FLOAT16 ? float16_format : bfloat16_format;
        bench_t bench = bench_new(dtypes[d], MAX_ELEMENTS, 0, &random);
        unsigned char target[2 * MAX_ELEMENTS];
        const void *sources[MAX_SOURCES];
        for (uint32_t s = 0; s < MAX_SOURCES; s++)
            sources[s] = bench.vectors[s];
        CHECK_STATUS(dss_average(dtypes[d], sources, MAX_SOURCES, target, MAX_ELEMENTS), DSS_OK);
        for (size_t i = 0; i < MAX_ELEMENTS; i++) {
            volatile float sum = (float)bench.values[0][i];
            uint16_t half;
            for (uint32_t s = 1; s < MAX_SOURCES; s++)
                sum = sum + (float)bench.values[s][i];
            sum = sum / (float)MAX_SOURCES;
            memcpy(&half, target + 2 * i, 2);
            CHECK_EQUAL(half, reference_narrow(format, sum));
        }
        bench_free(&bench);
    }
}

/* Ranks that agree stay where they are: the mean of 2 or 4 equal values is that value to the bit, for half types, whose accumulator
 * has bits to spare, that of 3 as well. (A float32 may move by one unit: 3 x is rounded before it is divided.) */
static void equal_values_stay(void) {
    uint64_t random = 3;
    for (int d = 0; d < 4; d++) {
        bench_t bench = bench_new(dtypes[d], MAX_ELEMENTS, 0, &random);
        unsigned char target[8 * MAX_ELEMENTS];
        const void *sources[] = {bench.vectors[0], bench.vectors[0], bench.vectors[0], bench.vectors[0]};
        for (size_t source_count = 1; source_count <= 4; source_count++) {
            if (source_count == 3 && d < 2)
                continue;
            CHECK_STATUS(dss_average(dtypes[d], sources, source_count, target, MAX_ELEMENTS), DSS_OK);
            CHECK_FOR(memcmp(target, bench.vectors[0], MAX_ELEMENTS * bytes_of(dtypes[d])) == 0, "dtype %d, %zu sources", d,
                      source_count);
        }
        bench_free(&bench);
    }
}

/* A float16 sum would overflow at 65504; the accumulator does not. */
static void half_sums_do_not_overflow(void) {
    const uint16_t large = 0x7bff;
    uint16_t target = 0;
    const void *sources[] = {&large, &large, &large, &large};
    CHECK_STATUS(dss_average(DSS_FLOAT16, sources, 4, &target, 1), DSS_OK);
    CHECK_EQUAL(target, large);
}

static void infinity_and_nan_pass_through(void) {
    for (int d = 0; d < 4; d++) {
        unsigned char a[24] = {0};
        unsigned char b[24] = {0};
        unsigned char target[24];
        const void *sources[] = {a, b};
        put(dtypes[d], a, 0, INFINITY);
        put(dtypes[d], b, 0, 1);
        put(dtypes[d], a, 1, INFINITY);
        put(dtypes[d], b, 1, -INFINITY);
        put(dtypes[d], a, 2, -INFINITY);
        CHECK_STATUS(dss_average(dtypes[d], sources, 2, target, 3), DSS_OK);
        CHECK_FOR(get(dtypes[d], target, 0) == INFINITY, "dtype %d", d);
        CHECK_FOR(isnan(get(dtypes[d], target, 1)), "dtype %d", d);
        CHECK_FOR(get(dtypes[d], target, 2) == -INFINITY, "dtype %d", d);
    }
}

/* Widen, sum elsewhere (Gloo does), scale, narrow: to the bit what dss_average gives for these counts, where 1/n is exact or the
 * product with it in double rounds like the division. */
static void widen_and_narrow_match_the_average(void) {
    uint64_t random = 4;
    for (int d = 0; d < 4; d++) {
        for (uint32_t source_count = 1; source_count <= MAX_SOURCES; source_count++) {
            bench_t bench = bench_new(dtypes[d], MAX_ELEMENTS - 3, 1, &random);
            const size_t wide_bytes = dtypes[d] == DSS_FLOAT64 ? 8 : 4;
            unsigned char *wide = calloc(2 * MAX_ELEMENTS, 8); /* the sum, then the next source */
            unsigned char expected[8 * MAX_ELEMENTS + 1];
            unsigned char target[8 * MAX_ELEMENTS + 1];
            const dss_dtype_t accumulator = dss_dtype_accumulator(dtypes[d]);
            const void *sources[MAX_SOURCES];
            for (uint32_t s = 0; s < source_count; s++)
                sources[s] = bench.vectors[s];
            CHECK_STATUS(dss_average(dtypes[d], sources, source_count, expected + 1, MAX_ELEMENTS - 3), DSS_OK);
            for (uint32_t s = 0; s < source_count; s++) {
                unsigned char *next = wide + (s ? MAX_ELEMENTS * wide_bytes + 1 : 0);
                CHECK_STATUS(dss_widen(dtypes[d], sources[s], next, MAX_ELEMENTS - 3), DSS_OK);
                for (size_t i = 0; i < MAX_ELEMENTS - 3; i++) {
                    CHECK_FOR(get(accumulator, next, i) == bench.values[s][i], "widened wrongly");
                    if (s) /* exact in double or rounded once by put, as the kernel does */
                        put(accumulator, wide, i, get(accumulator, wide, i) + get(accumulator, next, i));
                }
            }
            CHECK_STATUS(dss_narrow_scaled(dtypes[d], wide, 1.0 / source_count, target + 1, MAX_ELEMENTS - 3), DSS_OK);
            for (size_t i = 0; i < MAX_ELEMENTS - 3; i++) {
                const double difference = fabs(get(dtypes[d], target + 1, i) - get(dtypes[d], expected + 1, i));
                CHECK_FOR(difference <= (dtypes[d] == DSS_FLOAT64 ? 2 * 0x1p-53 * fabs(get(dtypes[d], expected + 1, i)) : 0),
                          "dtype %d, %u sources, element %zu: differ by %g", d, source_count, i, difference);
            }
            free(wide);
            bench_free(&bench);
        }
    }
}

static void narrowing_in_place_is_allowed(void) {
    float values[700];
    float expected[700];
    for (int i = 0; i < 700; i++) {
        values[i] = (float)i / 7;
        expected[i] = (float)(values[i] * 0.3);
    }
    CHECK_STATUS(dss_narrow_scaled(DSS_FLOAT32, values, 0.3, values, 700), DSS_OK);
    CHECK(memcmp(values, expected, sizeof values) == 0);
}

static void dtypes_are_as_named(void) {
    for (int d = 0; d < 4; d++) {
        CHECK_EQUAL(dss_dtype_bytes(dtypes[d]), bytes_of(dtypes[d]));
        CHECK_EQUAL(dss_dtype_accumulator(dtypes[d]), dtypes[d] == DSS_FLOAT64 ? DSS_FLOAT64 : DSS_FLOAT32);
    }
    CHECK_EQUAL(dss_dtype_bytes((dss_dtype_t)8), 0);
    CHECK_EQUAL(dss_dtype_bytes((dss_dtype_t)-1), 0);
}

static void bad_arguments_are_refused(void) {
    float value = 1;
    const void *sources[] = {&value, NULL};
    for (int d = DSS_INT8; d <= DSS_INT64 + 1; d++) /* integers have no mean of their own; then the unknown */
        CHECK_STATUS(dss_average((dss_dtype_t)d, sources, 1, &value, 1), DSS_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(dss_average(DSS_FLOAT32, sources, 0, &value, 1), DSS_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(dss_average(DSS_FLOAT32, sources, 2, &value, 1), DSS_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(dss_average(DSS_FLOAT32, NULL, 1, &value, 1), DSS_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(dss_average(DSS_FLOAT32, sources, 1, NULL, 1), DSS_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(dss_average(DSS_FLOAT32, sources, 2, NULL, 0), DSS_OK);
    CHECK_STATUS(dss_widen((dss_dtype_t)8, &value, &value, 1), DSS_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(dss_widen(DSS_FLOAT32, NULL, &value, 1), DSS_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(dss_widen(DSS_FLOAT32, &value, NULL, 1), DSS_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(dss_narrow_scaled((dss_dtype_t)8, &value, 1, &value, 1), DSS_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(dss_narrow_scaled(DSS_FLOAT32, NULL, 1, &value, 1), DSS_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(dss_narrow_scaled(DSS_FLOAT32, &value, 1, NULL, 1), DSS_ERR_INVALID_ARGUMENT);
    CHECK(value == 1);
}

int main(void) {
    RUN(averages_match_the_double_reference);
    RUN(half_types_round_once);
    RUN(equal_values_stay);
    RUN(half_sums_do_not_overflow);
    RUN(infinity_and_nan_pass_through);
    RUN(widen_and_narrow_match_the_average);
    RUN(narrowing_in_place_is_allowed);
    RUN(dtypes_are_as_named);
    RUN(bad_arguments_are_refused);
}
