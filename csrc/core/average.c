/*
 * The arithmetic of an average. A block of the result at a time: sum all sources into an accumulator on the stack, divide, round
 * into the target; so the target may be one of the sources, nothing is allocated, and each byte is read from memory once. The tail
 * that fills no block is staged through one, which keeps every loop's length a constant that compilers vectorise.
 */
#include <string.h>

#include "dssync.h"
#include "half.h"

typedef union block {
    float f32[DSS_BLOCK];
    double f64[DSS_BLOCK];
    unsigned char bytes[DSS_BLOCK * sizeof(double)];
} block_t;

/* How a dtype gets into and out of the accumulator; all four work on whole blocks. */
typedef struct kernel {
    size_t element_bytes;
    size_t accumulator_bytes;                                  /* of one element */
    void (*widen)(const unsigned char *source, block_t *sum);  /* sum = source */
    void (*add)(const unsigned char *source, block_t *sum);    /* sum += source */
    void (*scale)(block_t *sum, double factor);                /* sum *= factor, in double */
    void (*divide)(block_t *sum, size_t divisor);              /* sum /= divisor, in the accumulator's dtype */
    void (*narrow)(const block_t *sum, unsigned char *target); /* target = sum, rounded */
} kernel_t;

/* Then the product with the reciprocal is the quotient to the bit, several times faster; pairs and fours are the common groups. */
static int is_power_of_two(size_t number) {
    return (number & (number - 1)) == 0;
}

static void widen_f32(const unsigned char *source, block_t *sum) {
    memcpy(sum->f32, source, sizeof sum->f32);
}

static void add_f32(const unsigned char *restrict source, block_t *restrict sum) {
    for (size_t i = 0; i < DSS_BLOCK; i++) {
        float value;
        memcpy(&value, source + i * sizeof value, sizeof value);
        sum->f32[i] += value;
    }
}

static void scale_f32(block_t *sum, double factor) {
    for (size_t i = 0; i < DSS_BLOCK; i++)
        sum->f32[i] = (float)(sum->f32[i] * factor);
}

static void divide_f32(block_t *sum, size_t divisor) {
    const float count = (float)divisor;
    const float reciprocal = 1 / count;
    if (is_power_of_two(divisor)) {
        for (size_t i = 0; i < DSS_BLOCK; i++)
            sum->f32[i] *= reciprocal;
    } else {
        for (size_t i = 0; i < DSS_BLOCK; i++)
            sum->f32[i] /= count;
    }
}

static void narrow_f32(const block_t *sum, unsigned char *target) {
    memcpy(target, sum->f32, sizeof sum->f32);
}

static void widen_f64(const unsigned char *source, block_t *sum) {
    memcpy(sum->f64, source, sizeof sum->f64);
}

static void add_f64(const unsigned char *restrict source, block_t *restrict sum) {
    for (size_t i = 0; i < DSS_BLOCK; i++) {
        double value;
        memcpy(&value, source + i * sizeof value, sizeof value);
        sum->f64[i] += value;
    }
}

static void scale_f64(block_t *sum, double factor) {
    for (size_t i = 0; i < DSS_BLOCK; i++)
        sum->f64[i] *= factor;
}

static void divide_f64(block_t *sum, size_t divisor) {
    const double count = (double)divisor;
    const double reciprocal = 1 / count;
    if (is_power_of_two(divisor)) {
        for (size_t i = 0; i < DSS_BLOCK; i++)
            sum->f64[i] *= reciprocal;
    } else {
        for (size_t i = 0; i < DSS_BLOCK; i++)
            sum->f64[i] /= count;
    }
}

static void narrow_f64(const block_t *sum, unsigned char *target) {
    memcpy(target, sum->f64, sizeof sum->f64);
}

static void add_block_f32(const block_t *restrict values, block_t *restrict sum) {
    for (size_t i = 0; i < DSS_BLOCK; i++)
        sum->f32[i] += values->f32[i];
}

static void widen_f16(const unsigned char *source, block_t *sum) {
#ifdef DSS_HAVE_F16C
    if (dss_cpu_has_f16c()) {
        dss_float16_widen_f16c(source, sum->f32);
        return;
    }
#endif
    dss_float16_widen_portable(source, sum->f32);
}

static void add_f16(const unsigned char *source, block_t *sum) {
#ifdef DSS_HAVE_F16C
    if (dss_cpu_has_f16c()) {
        dss_float16_add_f16c(source, sum->f32);
        return;
    }
#endif
    block_t values;
    dss_float16_widen_portable(source, values.f32);
    add_block_f32(&values, sum);
}

static void narrow_f16(const block_t *sum, unsigned char *target) {
#ifdef DSS_HAVE_F16C
    if (dss_cpu_has_f16c()) {
        dss_float16_narrow_f16c(sum->f32, target);
        return;
    }
#endif
    dss_float16_narrow_portable(sum->f32, target);
}

static void widen_bf16(const unsigned char *source, block_t *sum) {
    dss_bfloat16_widen(source, sum->f32);
}

static void add_bf16(const unsigned char *source, block_t *sum) {
    block_t values;
    dss_bfloat16_widen(source, values.f32);
    add_block_f32(&values, sum);
}

static void narrow_bf16(const block_t *sum, unsigned char *target) {
    dss_bfloat16_narrow(sum->f32, target);
}

static const kernel_t kernels[] = {
    [DSS_FLOAT32] = {4, 4, widen_f32, add_f32, scale_f32, divide_f32, narrow_f32},
    [DSS_FLOAT64] = {8, 8, widen_f64, add_f64, scale_f64, divide_f64, narrow_f64},
    [DSS_FLOAT16] = {2, 4, widen_f16, add_f16, scale_f32, divide_f32, narrow_f16},
    [DSS_BFLOAT16] = {2, 4, widen_bf16, add_bf16, scale_f32, divide_f32, narrow_bf16},
};

/* NULL for an unknown dtype. */
static const kernel_t *find_kernel(dss_dtype_t dtype) {
    return (size_t)dtype < sizeof kernels / sizeof kernels[0] ? &kernels[dtype] : NULL;
}

size_t dss_dtype_bytes(dss_dtype_t dtype) {
    const kernel_t *kernel = find_kernel(dtype);
    return kernel ? kernel->element_bytes : 0;
}

dss_dtype_t dss_dtype_accumulator(dss_dtype_t dtype) {
    return dtype == DSS_FLOAT64 ? DSS_FLOAT64 : DSS_FLOAT32;
}

static size_t block_length(size_t element_count, size_t begin) {
    return element_count - begin < DSS_BLOCK ? element_count - begin : DSS_BLOCK;
}

/* The block's bytes: in place where it is whole, else copied to `staged`, whose rest is zero. */
static const unsigned char *whole_block(const void *source, size_t element_bytes, size_t begin, size_t length, block_t *staged) {
    const unsigned char *bytes = (const unsigned char *)source + begin * element_bytes;
    if (length == DSS_BLOCK)
        return bytes;
    memcpy(staged, bytes, length * element_bytes);
    memset(staged->bytes + length * element_bytes, 0, (DSS_BLOCK - length) * element_bytes);
    return staged->bytes;
}

static void store_block(const kernel_t *kernel, const block_t *sum, void *target, size_t begin, size_t length) {
    unsigned char *bytes = (unsigned char *)target + begin * kernel->element_bytes;
    if (length == DSS_BLOCK) {
        kernel->narrow(sum, bytes);
        return;
    }
    block_t staged;
    kernel->narrow(sum, staged.bytes);
    memcpy(bytes, staged.bytes, length * kernel->element_bytes);
}

dss_status_t dss_average(dss_dtype_t dtype, const void *const *sources, size_t source_count, void *target, size_t element_count) {
    const kernel_t *kernel = find_kernel(dtype);
    if (!kernel || !sources || !source_count || (!target && element_count))
        return DSS_ERR_INVALID_ARGUMENT;
    for (size_t s = 0; s < source_count; s++) {
        if (!sources[s] && element_count)
            return DSS_ERR_INVALID_ARGUMENT;
    }
    for (size_t begin = 0; begin < element_count; begin += DSS_BLOCK) {
        const size_t length = block_length(element_count, begin);
        block_t sum;
        block_t staged;
        kernel->widen(whole_block(sources[0], kernel->element_bytes, begin, length, &staged), &sum);
        for (size_t s = 1; s < source_count; s++)
            kernel->add(whole_block(sources[s], kernel->element_bytes, begin, length, &staged), &sum);
        kernel->divide(&sum, source_count);
        store_block(kernel, &sum, target, begin, length);
    }
    return DSS_OK;
}

dss_status_t dss_widen(dss_dtype_t dtype, const void *source, void *accumulator, size_t element_count) {
    const kernel_t *kernel = find_kernel(dtype);
    if (!kernel || ((!source || !accumulator) && element_count))
        return DSS_ERR_INVALID_ARGUMENT;
    for (size_t begin = 0; begin < element_count; begin += DSS_BLOCK) {
        const size_t length = block_length(element_count, begin);
        block_t wide;
        block_t staged;
        kernel->widen(whole_block(source, kernel->element_bytes, begin, length, &staged), &wide);
        memcpy((unsigned char *)accumulator + begin * kernel->accumulator_bytes, &wide, length * kernel->accumulator_bytes);
    }
    return DSS_OK;
}

dss_status_t dss_narrow_scaled(dss_dtype_t dtype, const void *accumulator, double scale, void *target, size_t element_count) {
    const kernel_t *kernel = find_kernel(dtype);
    if (!kernel || ((!accumulator || !target) && element_count))
        return DSS_ERR_INVALID_ARGUMENT;
    for (size_t begin = 0; begin < element_count; begin += DSS_BLOCK) {
        const size_t length = block_length(element_count, begin);
        block_t wide;
        memset(&wide, 0, length < DSS_BLOCK ? sizeof wide : 0);
        memcpy(&wide, (const unsigned char *)accumulator + begin * kernel->accumulator_bytes, length * kernel->accumulator_bytes);
        kernel->scale(&wide, scale);
        store_block(kernel, &wide, target, begin, length);
    }
    return DSS_OK;
}
