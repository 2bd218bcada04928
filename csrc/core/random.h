/*
 * random.h: the only source of chance in the core, a splitmix64 stream.
 *
 * Plans must come out the same on every machine and in every release that calls itself compatible, so no libc generator. A stream
 * is named by (seed, purpose, index): draws for one purpose never shift those for another, and the order of the calls of block b
 * is found without walking through the blocks before it. Good enough to shuffle; not for secrets. Streams are values on the
 * caller's stack; nobody locks.
 */
#ifndef DSS_RANDOM_H
#define DSS_RANDOM_H

#include <stdint.h>

typedef struct dss_random {
    uint64_t state; /* advances by an odd constant each draw: period 2^64 */
} dss_random_t;

typedef enum dss_random_purpose {
    DSS_RANDOM_PLAN = 1,        /* index: the attempt */
    DSS_RANDOM_CALLS = 2,       /* index: the block of calls */
    DSS_RANDOM_CONTRACTION = 3, /* index: 0 */
    DSS_RANDOM_COMPUTE = 4,     /* index: the step */
    DSS_RANDOM_STRAGGLERS = 5,  /* index: the step */
} dss_random_purpose_t;

dss_random_t dss_random_stream(uint64_t seed, dss_random_purpose_t purpose, uint64_t index);
uint64_t dss_random_next(dss_random_t *random);
/* Uniform in 0 .. bound-1, without bias; bound at least 1. */
uint32_t dss_random_below(dss_random_t *random, uint32_t bound);
/* Puts the count values into an order drawn uniformly. */
void dss_random_shuffle(dss_random_t *random, uint32_t *values, uint32_t count);
/* Uniform in (0, 1]: its logarithm is finite. */
double dss_random_uniform(dss_random_t *random);
/* Standard normal. By libm, whose last digits differ between machines: for simulations, not for plans. */
double dss_random_normal(dss_random_t *random);

#endif
