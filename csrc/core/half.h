/*
 * half.h: float16 and bfloat16, a block at a time.
 *
 * C11 has no 16-bit floats and -Wpedantic refuses _Float16, so halves are plain uint16_t bit patterns here. A block is always whole
 * (DSS_BLOCK elements, the tail is staged by the caller), so that compilers turn each loop into vector code at -O2. float16 has two
 * versions that give the same bits for all inputs, NaN payloads included: F16C instructions where the CPU has them, asked at run
 * time since wheels are built for any x86-64, and integer arithmetic elsewhere. Pure functions; nobody locks.
 */
#ifndef DSS_HALF_H
#define DSS_HALF_H

#include <stddef.h>
#include <stdint.h>

#define DSS_BLOCK 512u /* elements: one double block is 4 KiB, so that a few fit into the first-level cache */

/* `source` and `target` hold DSS_BLOCK 16-bit values and need no alignment. Rounding is to nearest even; NaN comes out quiet. */
void dss_float16_widen_portable(const unsigned char *source, float *target);
void dss_float16_narrow_portable(const float *source, unsigned char *target);
void dss_bfloat16_widen(const unsigned char *source, float *target);
void dss_bfloat16_narrow(const float *source, unsigned char *target);

#if defined(__x86_64__) && defined(__GNUC__)
#define DSS_HAVE_F16C 1 /* compiled in; call the others only where dss_cpu_has_f16c() */
int dss_cpu_has_f16c(void);
void dss_float16_widen_f16c(const unsigned char *source, float *target);
void dss_float16_add_f16c(const unsigned char *source, float *sum); /* sum += source, without a block in between */
void dss_float16_narrow_f16c(const float *source, unsigned char *target);
#endif

#endif
