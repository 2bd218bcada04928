/*
 * half.h: float16 and bfloat16 in bulk.
 *
 * C11 has no 16-bit floats and -Wpedantic refuses _Float16, so halves are plain bit patterns here. Each format has a portable
 * version, written so that compilers turn its loops into vector code (GCC from -O3 on), and where the CPU allows, asked at run time
 * since wheels are built for any x86-64, a faster one: F16C instructions for float16, wider vectors for bfloat16. All versions give
 * the same bits for all inputs, NaN payloads included, so ranks on different machines agree; only which of two NaN survives their
 * sum is not promised. Pure functions; nobody locks.
 */
#ifndef DSS_HALF_H
#define DSS_HALF_H

#include "dssync.h"

#define DSS_BLOCK 512u /* elements that callers stage on the stack at a time: a few blocks fit into the first-level cache */

/* Before a loop whose target is one of its sources or apart from them: no iteration reads what another one writes. */
#if defined(__clang__)
#pragma clang diagnostic ignored "-Wpass-failed" /* it warns where sanitizers or -O1 leave the loop as it is */
#define DSS_ELEMENTWISE _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define DSS_ELEMENTWISE _Pragma("GCC ivdep")
#else
#define DSS_ELEMENTWISE
#endif

/* No pointer needs alignment. Rounding is to nearest even; NaN comes out quiet. */
typedef struct dss_half {
    const char *name;
    void (*widen)(const unsigned char *halves, unsigned char *floats, size_t count);
    void (*narrow)(const unsigned char *floats, unsigned char *halves, size_t count);
    /* target = (left + right) * scale in float32, rounded once; target may be left or right. */
    void (*sum)(const unsigned char *left, const unsigned char *right, float scale, unsigned char *target, size_t count);
} dss_half_t;

/* The versions of a half dtype that run on this CPU, the fastest first, the portable one last, then NULL. */
const dss_half_t *dss_half_version(dss_dtype_t dtype, unsigned number);
static inline const dss_half_t *dss_half_fastest(dss_dtype_t dtype) { /* NULL where the dtype is no half */
    return dss_half_version(dtype, 0);
}

extern const dss_half_t dss_float16_portable;
#if defined(__x86_64__) && defined(__GNUC__)
#define DSS_HAVE_X86 1
int dss_cpu_has_f16c(void);
extern const dss_half_t dss_float16_f16c;
#endif

#endif
