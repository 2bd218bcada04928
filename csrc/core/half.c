#include "half.h"

#include <string.h>

#if defined(__GNUC__)
#define INLINED static inline __attribute__((always_inline))
#else
#define INLINED static inline
#endif

/* Of one half, in the low 16 bits. */
typedef float (*widen_t)(uint32_t half);
typedef uint32_t (*narrow_t)(float value);

INLINED float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINED uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* Both are always computed: a branch, which compilers like to make of a conditional with arithmetic in it, ends vectorisation. */
INLINED uint32_t choose(int condition, uint32_t yes, uint32_t no) {
    const uint32_t mask = 0u - (uint32_t)condition;
    return (yes & mask) | (no & ~mask);
}

/* All of 1.0f's kin below are exponents moved between the biases 15 and 127: 112 << 23. */
INLINED float widen_float16(uint32_t half) {
    const uint32_t magnitude = half & 0x7fff;
    const uint32_t normal = (magnitude << 13) + (112u << 23);
    const uint32_t special = (magnitude << 13) | 0x7f800000 | choose(magnitude > 0x7c00, 0x00400000, 0);
    const uint32_t subnormal = bits_of_float((float)(int32_t)magnitude * 0x1p-24f);
    const uint32_t bits = choose(magnitude < 0x0400, subnormal, choose(magnitude >= 0x7c00, special, normal));
    return float_of_bits(bits | (half & 0x8000) << 16);
}

INLINED uint32_t narrow_float16(float value) {
    const uint32_t bits = bits_of_float(value);
    const uint32_t magnitude = bits & 0x7fffffff;
    const uint32_t sign = bits >> 16 & 0x8000;
    const uint32_t nan = 0x7e00 | (magnitude >> 13 & 0x03ff);
    const uint32_t normal = (magnitude - (112u << 23) + 0x0fff + (magnitude >> 13 & 1)) >> 13;
    /* Beside 0.5 a float's last place is 2^-24, that of float16's subnormals: the addition rounds as it should. */
    const uint32_t subnormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000;
    const uint32_t finite = choose(magnitude < 0x38800000, subnormal, normal);
    const uint32_t large = choose(magnitude > 0x7f800000, nan, 0x7c00);
    return sign | choose(magnitude >= 0x477ff000, large, finite); /* from 65520 on: infinity */
}

INLINED float widen_bfloat16(uint32_t half) {
    return float_of_bits(half << 16);
}

/* A NaN is made quiet instead of rounded, which could carry it into the sign. */
INLINED uint32_t narrow_bfloat16(float value) {
    const uint32_t bits = bits_of_float(value);
    const uint32_t rounding = 0x7fff + (bits >> 16 & 1);
    return choose(value == value, bits + rounding, bits | 0x00400000) >> 16;
}

/* Of a scaled sum of two bfloat16: arithmetic makes NaN quiet and takes its payload from an operand, so that its low 16 bits are
 * zero and rounding carries nothing out of them. */
INLINED uint32_t narrow_bfloat16_sum(float value) {
    const uint32_t bits = bits_of_float(value);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

INLINED void widen_all(widen_t widen, const unsigned char *restrict halves, unsigned char *restrict floats, size_t count) {
    for (size_t i = 0; i < count; i++) {
        uint16_t half;
        memcpy(&half, halves + i * sizeof half, sizeof half);
        const float value = widen(half);
        memcpy(floats + i * sizeof value, &value, sizeof value);
    }
}

INLINED void narrow_all(narrow_t narrow, const unsigned char *restrict floats, unsigned char *restrict halves, size_t count) {
    for (size_t i = 0; i < count; i++) {
        float value;
        memcpy(&value, floats + i * sizeof value, sizeof value);
        const uint16_t half = (uint16_t)narrow(value);
        memcpy(halves + i * sizeof half, &half, sizeof half);
    }
}

INLINED uint32_t sum_one(widen_t widen, narrow_t narrow, uint32_t left, uint32_t right, float scale) {
    return narrow((widen(left) + widen(right)) * scale);
}

/* Two halves a 32-bit word, of which it does not matter which comes first: floats and halves stay in their lane of a vector, and
 * all the shuffling of 16-bit values into floats and back falls away. */
INLINED void sum_all(widen_t widen, narrow_t narrow, const unsigned char *left, const unsigned char *right, float scale,
                     unsigned char *target, size_t count) {
    DSS_ELEMENTWISE
    for (size_t i = 0; i < count / 2; i++) {
        uint32_t l;
        uint32_t r;
        memcpy(&l, left + i * sizeof l, sizeof l);
        memcpy(&r, right + i * sizeof r, sizeof r);
        const uint32_t sums =
            sum_one(widen, narrow, l & 0xffff, r & 0xffff, scale) | sum_one(widen, narrow, l >> 16, r >> 16, scale) << 16;
        memcpy(target + i * sizeof sums, &sums, sizeof sums);
    }
    if (count % 2) {
        uint16_t l;
        uint16_t r;
        memcpy(&l, left + 2 * (count - 1), sizeof l);
        memcpy(&r, right + 2 * (count - 1), sizeof r);
        const uint16_t sum = (uint16_t)sum_one(widen, narrow, l, r, scale);
        memcpy(target + 2 * (count - 1), &sum, sizeof sum);
    }
}

/* A version of a format: the loops above compiled with `attributes`. */
/* NOLINTBEGIN(bugprone-macro-parentheses) */
#define VERSION(version, format, sum_format, attributes)                                                                           \
    attributes static void version##_widen(const unsigned char *halves, unsigned char *floats, size_t count) {                     \
        widen_all(widen_##format, halves, floats, count);                                                                          \
    }                                                                                                                              \
    attributes static void version##_narrow(const unsigned char *floats, unsigned char *halves, size_t count) {                    \
        narrow_all(narrow_##format, floats, halves, count);                                                                        \
    }                                                                                                                              \
    attributes static void version##_sum(const unsigned char *left, const unsigned char *right, float scale,                       \
                                         unsigned char *target, size_t count) {                                                    \
        sum_all(widen_##format, narrow_##sum_format, left, right, scale, target, count);                                           \
    }
/* NOLINTEND(bugprone-macro-parentheses) */

VERSION(float16_portable, float16, float16, )
VERSION(bfloat16_portable, bfloat16, bfloat16_sum, )

const dss_half_t dss_float16_portable = {"float16 by integers", float16_portable_widen, float16_portable_narrow,
                                         float16_portable_sum};
static const dss_half_t bfloat16_portable = {"bfloat16", bfloat16_portable_widen, bfloat16_portable_narrow, bfloat16_portable_sum};

#ifdef DSS_HAVE_X86
VERSION(bfloat16_avx2, bfloat16, bfloat16_sum, __attribute__((target("avx2"))))
static const dss_half_t bfloat16_avx2 = {"bfloat16 by AVX2", bfloat16_avx2_widen, bfloat16_avx2_narrow, bfloat16_avx2_sum};

/* NULL where this CPU has nothing better than the portable version. */
static const dss_half_t *faster_version(dss_dtype_t dtype) {
    if (dtype == DSS_FLOAT16)
        return dss_cpu_has_f16c() ? &dss_float16_f16c : NULL;
    return __builtin_cpu_supports("avx2") ? &bfloat16_avx2 : NULL;
}
#else
static const dss_half_t *faster_version(dss_dtype_t dtype) {
    (void)dtype;
    return NULL;
}
#endif

const dss_half_t *dss_half_version(dss_dtype_t dtype, unsigned number) {
    if (dtype != DSS_FLOAT16 && dtype != DSS_BFLOAT16)
        return NULL;
    const dss_half_t *faster = faster_version(dtype);
    if (faster && number == 0)
        return faster;
    if (number == (faster ? 1u : 0u))
        return dtype == DSS_FLOAT16 ? &dss_float16_portable : &bfloat16_portable;
    return NULL;
}
