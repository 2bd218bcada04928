/* float16 by the F16C instructions: eight values each. See half.h. */
#include "half.h"

#ifdef DSS_HAVE_F16C
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

static inline WITH_F16C __m256 load_eight(const unsigned char *source) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)source));
}

WITH_F16C void dss_float16_widen_f16c(const unsigned char *source, float *target) {
    for (size_t i = 0; i < DSS_BLOCK; i += 8)
        _mm256_storeu_ps(target + i, load_eight(source + 2 * i));
}

WITH_F16C void dss_float16_add_f16c(const unsigned char *source, float *sum) {
    for (size_t i = 0; i < DSS_BLOCK; i += 8)
        _mm256_storeu_ps(sum + i, _mm256_add_ps(_mm256_loadu_ps(sum + i), load_eight(source + 2 * i)));
}

WITH_F16C void dss_float16_narrow_f16c(const float *source, unsigned char *target) {
    for (size_t i = 0; i < DSS_BLOCK; i += 8)
        _mm_storeu_si128((__m128i *)(void *)(target + 2 * i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#endif
