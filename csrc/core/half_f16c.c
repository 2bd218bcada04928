/* float16 by the F16C instructions: eight values each, what is left over by integers. See half.h. */
#include "half.h"

#ifdef DSS_HAVE_X86
#include <immintrin.h>

#if defined(__clang__) || __GNUC__ < 11
#define F16C_FEATURE "avx2" /* these do not know f16c by name; no CPU has AVX2 without it */
#else
#define F16C_FEATURE "f16c"
#endif

int dss_cpu_has_f16c(void) {
    return __builtin_cpu_supports("avx") && __builtin_cpu_supports(F16C_FEATURE);
}

#define WITH_F16C __attribute__((target("avx,f16c")))

static inline WITH_F16C __m256 load_eight(const unsigned char *halves) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)halves));
}

static inline WITH_F16C void store_eight(unsigned char *halves, __m256 values) {
    _mm_storeu_si128((__m128i *)(void *)halves, _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

static WITH_F16C void widen(const unsigned char *halves, unsigned char *floats, size_t count) {
    const size_t whole = count - count % 8;
    for (size_t i = 0; i < whole; i += 8)
        _mm256_storeu_ps((float *)(void *)(floats + 4 * i), load_eight(halves + 2 * i));
    dss_float16_portable.widen(halves + 2 * whole, floats + 4 * whole, count - whole);
}

static WITH_F16C void narrow(const unsigned char *floats, unsigned char *halves, size_t count) {
    const size_t whole = count - count % 8;
    for (size_t i = 0; i < whole; i += 8)
        store_eight(halves + 2 * i, _mm256_loadu_ps((const float *)(const void *)(floats + 4 * i)));
    dss_float16_portable.narrow(floats + 4 * whole, halves + 2 * whole, count - whole);
}

static WITH_F16C void sum(const unsigned char *left, const unsigned char *right, float scale, unsigned char *target, size_t count) {
    const size_t whole = count - count % 8;
    const __m256 factor = _mm256_set1_ps(scale);
    for (size_t i = 0; i < whole; i += 8) {
        const __m256 both = _mm256_add_ps(load_eight(left + 2 * i), load_eight(right + 2 * i));
        store_eight(target + 2 * i, _mm256_mul_ps(both, factor));
    }
    dss_float16_portable.sum(left + 2 * whole, right + 2 * whole, scale, target + 2 * whole, count - whole);
}

const dss_half_t dss_float16_f16c = {"float16 by F16C", widen, narrow, sum};
#endif
