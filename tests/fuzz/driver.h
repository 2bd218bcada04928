/*
 * driver.h: fuzz targets, with and without libFuzzer.
 *
 * A target is one file: LLVMFuzzerTestOneInput, whose checks (check.h) are what must hold for any bytes at all, and fuzz_seed,
 * inputs to begin from. libFuzzer (make fuzz-long, clang) follows the branches that an input takes; driver.c (make fuzz, and part
 * of core-test, any compiler) mutates the seeds blindly, the same way for the same seed number, in a few seconds.
 */
#ifndef DSS_FUZZ_DRIVER_H
#define DSS_FUZZ_DRIVER_H

#include "check.h"

#define FUZZ_INPUT_BYTES 512u

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t bytes_count); /* the name and the result, 0, are libFuzzer's */

/* Writes input number `number`, one worth beginning from; its size, 0 if there is none of this number. */
size_t fuzz_seed(unsigned number, uint8_t bytes[FUZZ_INPUT_BYTES]);

/* How many inputs the driver tries where it is not told: seconds under the sanitizers. */
extern const unsigned long fuzz_input_count;

/* How many inputs got through to the end. The driver wants some: a target that refuses all at the door tests nothing. */
extern unsigned long fuzz_through_count;

#endif
