/* float16 by the F16C instructions: eight values each. See half.h. */
#include "half.h"

#ifdef DSS_HAVE_F16C
#include <immintrin.h>

int dss_cpu_has_f16c(void) {
    return __builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c");
}

__attribute__((target("avx,f16c"))) void dss_float16_widen_f16c(const unsigned char *source, float *target) {
    for (unsigned i = 0; i < DSS_BLOCK; i += 8)
        _mm256_storeu_ps(target + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(source + 2 * i))));
}

__attribute__((target("avx,f16c"))) void dss_float16_narrow_f16c(const float *source, unsigned char *target) {
    for (unsigned i = 0; i < DSS_BLOCK; i += 8)
        _mm_storeu_si128((__m128i *)(void *)(target + 2 * i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#endif
