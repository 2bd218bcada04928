/*
 * Two vectors into one. Every reduction of a full-size dtype is one loop over elements that need no alignment, in a table by
 * accumulator and reduction. Half types are staged through float32, a block on the stack at a time, but for the one case that must
 * run at memory speed, the scaled sum of a pair's average, which half.h does in one pass.
 */
#include <string.h>

#include "dssync.h"
#include "half.h"

typedef void (*kernel_t)(const unsigned char *left, const unsigned char *right, double scale, unsigned char *target, size_t count);

/* `result` is an expression of l and r, and factor, the scale. */
#define KERNEL(name, type, result)                                                                                                 \
    static void name(const unsigned char *left, const unsigned char *right, double scale, unsigned char *target, size_t count) {   \
        const type factor = (type)scale;                                                                                           \
        (void)factor;                                                                                                              \
        DSS_ELEMENTWISE                                                                                                            \
        for (size_t i = 0; i < count; i++) {                                                                                       \
            type l;                                                                                                                \
            type r;                                                                                                                \
            memcpy(&l, left + i * sizeof l, sizeof l);                                                                             \
            memcpy(&r, right + i * sizeof r, sizeof r);                                                                            \
            const type value = (type)(result);                                                                                     \
            memcpy(target + i * sizeof value, &value, sizeof value);                                                               \
        }                                                                                                                          \
    }

/* Neither operand's side decides. Numbers that do not differ, zeros of either sign and NaN are joined by their bits: the union has
 * the sign of -0, and is a NaN where either is. */
#define SMALLER(name, type, bits_type)                                                                                             \
    static inline type smaller_##name(type l, type r) {                                                                            \
        bits_type l_bits;                                                                                                          \
        bits_type r_bits;                                                                                                          \
        type joined;                                                                                                               \
        memcpy(&l_bits, &l, sizeof l_bits);                                                                                        \
        memcpy(&r_bits, &r, sizeof r_bits);                                                                                        \
        l_bits |= r_bits;                                                                                                          \
        memcpy(&joined, &l_bits, sizeof joined);                                                                                   \
        return l < r ? l : r < l ? r : joined;                                                                                     \
    }

#define FLOAT_KERNELS(name, type, bits_type)                                                                                       \
    SMALLER(name, type, bits_type)                                                                                                 \
    KERNEL(sum_##name, type, (l + r) * factor)                                                                                     \
    KERNEL(product_##name, type, (l * r))                                                                                          \
    KERNEL(min_##name, type, smaller_##name(l, r))                                                                                 \
    KERNEL(max_##name, type, -smaller_##name(-l, -r))

/* Integers wrap around in the unsigned type, where C defines it. */
#define INTEGER_KERNELS(name, type, unsigned_type)                                                                                 \
    KERNEL(sum_##name, unsigned_type, l + r)                                                                                       \
    KERNEL(product_##name, unsigned_type, (l * r))                                                                                 \
    KERNEL(min_##name, type, l < r ? l : r)                                                                                        \
    KERNEL(max_##name, type, l > r ? l : r)                                                                                        \
    KERNEL(band_##name, unsigned_type, (l & r))                                                                                    \
    KERNEL(bor_##name, unsigned_type, l | r)                                                                                       \
    KERNEL(bxor_##name, unsigned_type, l ^ r)

FLOAT_KERNELS(f32, float, uint32_t)
FLOAT_KERNELS(f64, double, uint64_t)
INTEGER_KERNELS(i8, int8_t, uint8_t)
INTEGER_KERNELS(u8, uint8_t, uint8_t)
INTEGER_KERNELS(i32, int32_t, uint32_t)
INTEGER_KERNELS(i64, int64_t, uint64_t)

static const char *const reduction_names[] = {
    [DSS_SUM] = "sum",   [DSS_PRODUCT] = "product", [DSS_MIN] = "min",   [DSS_MAX] = "max",
    [DSS_BAND] = "band", [DSS_BOR] = "bor",         [DSS_BXOR] = "bxor",
};

#define REDUCTION_COUNT (sizeof reduction_names / sizeof reduction_names[0])
#define FLOATS(name) sum_##name, product_##name, min_##name, max_##name
#define INTEGERS(name) FLOATS(name), band_##name, bor_##name, bxor_##name

static const kernel_t kernels[][REDUCTION_COUNT] = {
    [DSS_FLOAT32] = {FLOATS(f32)}, [DSS_FLOAT64] = {FLOATS(f64)}, [DSS_INT8] = {INTEGERS(i8)},
    [DSS_UINT8] = {INTEGERS(u8)},  [DSS_INT32] = {INTEGERS(i32)}, [DSS_INT64] = {INTEGERS(i64)},
};

/* Of the accumulator of `dtype`; NULL where the reduction is not defined. */
static kernel_t find_kernel(dss_dtype_t dtype, dss_reduction_t reduction) {
    if (!dss_dtype_bytes(dtype) || (size_t)reduction >= REDUCTION_COUNT)
        return NULL;
    return kernels[dss_dtype_accumulator(dtype)][reduction];
}

const char *dss_reduction_name(dss_reduction_t reduction) {
    return (size_t)reduction < REDUCTION_COUNT ? reduction_names[reduction] : "unknown";
}

int dss_reduction_takes(dss_reduction_t reduction, dss_dtype_t dtype) {
    return find_kernel(dtype, reduction) != NULL;
}

static size_t block_length(size_t count, size_t begin) {
    return count - begin < DSS_BLOCK ? count - begin : DSS_BLOCK;
}

/* Into the cache, if the compiler knows how. */
static void prefetch(const unsigned char *bytes, size_t length_bytes) {
#if defined(__GNUC__)
    for (size_t i = 0; i < length_bytes; i += 64)
        __builtin_prefetch(bytes + i);
#else
    (void)bytes;
    (void)length_bytes;
#endif
}

/* Halves take so much arithmetic a byte that the CPU's window does not reach far enough ahead to keep the memory busy: that costs a
 * third of the speed on vectors in memory, prefetching a tenth on those in the cache. */
static void sum_halves(const dss_half_t *half, const unsigned char *left, const unsigned char *right, float scale,
                       unsigned char *target, size_t count) {
    const size_t chunk = 256;
    const size_t chunk_bytes = 2 * chunk;
    const size_t ahead_bytes = 2 * chunk_bytes;
    for (; count > chunk; count -= chunk) {
        if (count >= 3 * chunk) {
            prefetch(left + ahead_bytes, chunk_bytes);
            prefetch(right + ahead_bytes, chunk_bytes);
        }
        half->sum(left, right, scale, target, chunk);
        left += chunk_bytes;
        right += chunk_bytes;
        target += chunk_bytes;
    }
    half->sum(left, right, scale, target, count);
}

static void combine_halves(const dss_half_t *half, kernel_t kernel, const unsigned char *left, const unsigned char *right,
                           unsigned char *target, size_t count) {
    for (size_t begin = 0; begin < count; begin += DSS_BLOCK) {
        unsigned char l[DSS_BLOCK * sizeof(float)];
        unsigned char r[DSS_BLOCK * sizeof(float)];
        const size_t length = block_length(count, begin);
        half->widen(left + 2 * begin, l, length);
        half->widen(right + 2 * begin, r, length);
        kernel(l, r, 1, l, length);
        half->narrow(l, target + 2 * begin, length);
    }
}

dss_status_t dss_combine(dss_dtype_t dtype, dss_reduction_t reduction, const void *left, const void *right, double scale,
                         void *target, size_t element_count) {
    const kernel_t kernel = find_kernel(dtype, reduction);
    const int is_integer = dss_reduction_takes(DSS_BAND, dtype);
    const int takes_scale = reduction == DSS_SUM && !is_integer && scale == scale;
    if (!kernel || (scale != 1 && !takes_scale) || ((!left || !right || !target) && element_count))
        return DSS_ERR_INVALID_ARGUMENT;
    const dss_half_t *half = dss_half_fastest(dtype);
    if (!half)
        kernel(left, right, scale, target, element_count);
    else if (reduction == DSS_SUM)
        sum_halves(half, left, right, (float)scale, target, element_count);
    else
        combine_halves(half, kernel, left, right, target, element_count);
    return DSS_OK;
}

static void accumulate_halves(const dss_half_t *half, kernel_t kernel, const unsigned char *source, unsigned char *accumulator,
                              size_t count) {
    for (size_t begin = 0; begin < count; begin += DSS_BLOCK) {
        unsigned char wide[DSS_BLOCK * sizeof(float)];
        unsigned char *sums = accumulator + begin * sizeof(float);
        const size_t length = block_length(count, begin);
        half->widen(source + 2 * begin, wide, length);
        kernel(sums, wide, 1, sums, length);
    }
}

dss_status_t dss_accumulate(dss_dtype_t dtype, dss_reduction_t reduction, const void *source, void *accumulator,
                            size_t element_count) {
    const kernel_t kernel = find_kernel(dtype, reduction);
    if (!kernel || ((!source || !accumulator) && element_count))
        return DSS_ERR_INVALID_ARGUMENT;
    const dss_half_t *half = dss_half_fastest(dtype);
    if (half)
        accumulate_halves(half, kernel, source, accumulator, element_count);
    else
        kernel(accumulator, source, 1, accumulator, element_count);
    return DSS_OK;
}
