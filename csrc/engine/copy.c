#include "copy.h"

#include <string.h>

#if defined(__x86_64__)
#include <emmintrin.h>

#define LEAST_BYTES ((size_t)4096)

void dss_copy_streaming(uint8_t *target, const uint8_t *source, size_t bytes_count) {
    size_t at = 0;
    if (bytes_count >= LEAST_BYTES && (uintptr_t)target % 16 == 0) {
        for (; at + 64 <= bytes_count; at += 64) {
            const __m128i line[4] = {_mm_loadu_si128((const __m128i *)(const void *)(source + at)),
                                     _mm_loadu_si128((const __m128i *)(const void *)(source + at + 16)),
                                     _mm_loadu_si128((const __m128i *)(const void *)(source + at + 32)),
                                     _mm_loadu_si128((const __m128i *)(const void *)(source + at + 48))};
            for (size_t i = 0; i < 4; i++)
                _mm_stream_si128((__m128i *)(void *)(target + at + 16 * i), line[i]);
        }
        _mm_sfence(); /* such stores are not ordered by what publishes them */
    }
    memcpy(target + at, source + at, bytes_count - at);
}
#else
void dss_copy_streaming(uint8_t *target, const uint8_t *source, size_t bytes_count) {
    memcpy(target, source, bytes_count);
}
#endif
