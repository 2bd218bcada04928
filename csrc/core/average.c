/*
 * The arithmetic of an average. A pair is one pass. Larger groups go a block of the result at a time: sum all sources into an
 * accumulator on the stack, divide, round into the target; so the target may be one of the sources, nothing is allocated, and each
 * byte is read from memory once.
 */
#include "dssync.h"
#include "half.h"

typedef union block {
    float f32[DSS_BLOCK];
    double f64[DSS_BLOCK];
} block_t;

/* In the accumulator's dtype. */
static void divide(dss_dtype_t accumulator, block_t *sum, size_t divisor, size_t length) {
    if (accumulator == DSS_FLOAT64) {
        for (size_t i = 0; i < length; i++)
            sum->f64[i] /= (double)divisor;
    } else {
        for (size_t i = 0; i < length; i++)
            sum->f32[i] /= (float)divisor;
    }
}

static void average_block(dss_dtype_t dtype, const void *const *sources, size_t source_count, size_t begin, size_t length,
                          unsigned char *target) {
    const size_t offset = begin * dss_dtype_bytes(dtype);
    /* Then the product with the reciprocal is the quotient to the bit, several times faster; fours are common. */
    const int is_power_of_two = (source_count & (source_count - 1)) == 0;
    block_t sum;
    dss_widen(dtype, (const unsigned char *)sources[0] + offset, &sum, length);
    for (size_t s = 1; s < source_count; s++)
        dss_accumulate(dtype, DSS_SUM, (const unsigned char *)sources[s] + offset, &sum, length);
    if (!is_power_of_two)
        divide(dss_dtype_accumulator(dtype), &sum, source_count, length);
    dss_narrow_scaled(dtype, &sum, is_power_of_two ? 1.0 / (double)source_count : 1, target + offset, length);
}

dss_status_t dss_average(dss_dtype_t dtype, const void *const *sources, size_t source_count, void *target, size_t element_count) {
    const int is_floating = dss_dtype_bytes(dtype) && !dss_reduction_takes(DSS_BAND, dtype);
    if (!is_floating || !sources || !source_count || (!target && element_count))
        return DSS_ERR_INVALID_ARGUMENT;
    for (size_t s = 0; s < source_count; s++) {
        if (!sources[s] && element_count)
            return DSS_ERR_INVALID_ARGUMENT;
    }
    if (source_count == 2)
        return dss_combine(dtype, DSS_SUM, sources[0], sources[1], 0.5, target, element_count);
    for (size_t begin = 0; begin < element_count; begin += DSS_BLOCK)
        average_block(dtype, sources, source_count, begin, element_count - begin < DSS_BLOCK ? element_count - begin : DSS_BLOCK,
                      target);
    return DSS_OK;
}
