#include "half.h"

#include <string.h>

static float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static uint16_t load_u16(const unsigned char *bytes) {
    uint16_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

/* All of 1.0f's kin below are exponents moved between the biases 15 and 127: 112 << 23. */
static float widen_float16(uint32_t half) {
    const uint32_t magnitude = half & 0x7fff;
    const uint32_t normal = (magnitude << 13) + (112u << 23);
    const uint32_t special = (magnitude << 13) | 0x7f800000 | (magnitude > 0x7c00 ? 0x00400000 : 0);
    const uint32_t subnormal = bits_of_float((float)(int32_t)magnitude * 0x1p-24f);
    const uint32_t bits = magnitude < 0x0400 ? subnormal : magnitude >= 0x7c00 ? special : normal;
    return float_of_bits(bits | (half & 0x8000) << 16);
}

static uint16_t narrow_float16(float value) {
    const uint32_t bits = bits_of_float(value);
    const uint32_t magnitude = bits & 0x7fffffff;
    const uint32_t sign = bits >> 16 & 0x8000;
    const uint32_t nan = 0x7e00 | (magnitude >> 13 & 0x03ff);
    const uint32_t normal = (magnitude - (112u << 23) + 0x0fff + (magnitude >> 13 & 1)) >> 13;
    /* Beside 0.5 a float's last place is 2^-24, that of float16's subnormals: the addition rounds as it should. */
    const uint32_t subnormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000;
    const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
    const uint32_t large = magnitude > 0x7f800000 ? nan : 0x7c00;
    return (uint16_t)(sign | (magnitude >= 0x477ff000 ? large : finite)); /* from 65520 on: infinity */
}

static uint16_t narrow_bfloat16(float value) {
    const uint32_t bits = bits_of_float(value);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x0040 : rounded);
}

void dss_float16_widen_portable(const unsigned char *restrict source, float *restrict target) {
    for (size_t i = 0; i < DSS_BLOCK; i++)
        target[i] = widen_float16(load_u16(source + 2 * i));
}

void dss_float16_narrow_portable(const float *restrict source, unsigned char *restrict target) {
    for (size_t i = 0; i < DSS_BLOCK; i++) {
        const uint16_t half = narrow_float16(source[i]);
        memcpy(target + 2 * i, &half, sizeof half);
    }
}

void dss_bfloat16_widen(const unsigned char *restrict source, float *restrict target) {
    for (size_t i = 0; i < DSS_BLOCK; i++)
        target[i] = float_of_bits((uint32_t)load_u16(source + 2 * i) << 16);
}

void dss_bfloat16_narrow(const float *restrict source, unsigned char *restrict target) {
    for (size_t i = 0; i < DSS_BLOCK; i++) {
        const uint16_t half = narrow_bfloat16(source[i]);
        memcpy(target + 2 * i, &half, sizeof half);
    }
}
