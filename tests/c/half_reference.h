/*
 * half_reference.h: 16-bit floats by the book, from the definition of the formats and the C library's rounding to nearest even,
 * for comparison with the bit tricks. mantissa_bits and exponent_bits: float16 10 and 5, bfloat16 7 and 8.
 */
#ifndef DSS_TEST_HALF_REFERENCE_H
#define DSS_TEST_HALF_REFERENCE_H

#include "check.h"

typedef struct half_format {
    int mantissa_bits;
    int exponent_bits;
} half_format_t;

static const half_format_t float16_format = {10, 5};
static const half_format_t bfloat16_format = {7, 8};

static inline double reference_widen(half_format_t format, uint16_t half) {
    const int bias = (1 << (format.exponent_bits - 1)) - 1;
    const int exponent = half >> format.mantissa_bits & ((1 << format.exponent_bits) - 1);
    const int mantissa = half & ((1 << format.mantissa_bits) - 1);
    const double sign = half & 0x8000 ? -1 : 1;
    if (exponent == (1 << format.exponent_bits) - 1)
        return mantissa ? (double)NAN : sign * (double)INFINITY;
    if (exponent == 0)
        return sign * ldexp(mantissa, 1 - bias - format.mantissa_bits);
    return sign * ldexp(mantissa + (1 << format.mantissa_bits), exponent - bias - format.mantissa_bits);
}

/* Of numbers; a NaN has many forms. */
static inline uint16_t reference_narrow(half_format_t format, double value) {
    const int bias = (1 << (format.exponent_bits - 1)) - 1;
    const uint16_t infinity = (uint16_t)(((1 << format.exponent_bits) - 1) << format.mantissa_bits);
    const uint16_t sign = signbit(value) ? 0x8000 : 0;
    const double magnitude = fabs(value);
    if (isinf(magnitude))
        return sign | infinity;
    int exponent = magnitude > 0 ? ilogb(magnitude) : 1 - bias;
    if (exponent < 1 - bias)
        exponent = 1 - bias;
    /* In units of the last place; a carry out of the mantissa goes on into the exponent, and on into infinity. */
    const double units = nearbyint(ldexp(magnitude, format.mantissa_bits - exponent));
    const double code = ldexp(exponent + bias - 1, format.mantissa_bits) + units;
    return sign | (code >= infinity ? infinity : (uint16_t)code);
}

#endif
