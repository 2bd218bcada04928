#include "random.h"

#include <math.h>

#define DSS_TWO_PI 6.283185307179586

uint64_t dss_random_next(dss_random_t *random) {
    random->state += 0x9e3779b97f4a7c15u;
    uint64_t mixed = random->state;
    mixed = (mixed ^ (mixed >> 30)) * 0xbf58476d1ce4e5b9u;
    mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111ebu;
    return mixed ^ (mixed >> 31);
}

dss_random_t dss_random_stream(uint64_t seed, dss_random_purpose_t purpose, uint64_t index) {
    dss_random_t random = {seed};
    random.state = dss_random_next(&random) + (uint64_t)purpose;
    random.state = dss_random_next(&random) + index;
    random.state = dss_random_next(&random);
    return random;
}

uint32_t dss_random_below(dss_random_t *random, uint32_t bound) {
    const uint32_t biased_count = (uint32_t)(-bound) % bound; /* 2^32 mod bound low words would be drawn once too often */
    uint64_t product;
    do
        product = (dss_random_next(random) >> 32) * bound;
    while ((uint32_t)product < biased_count);
    return (uint32_t)(product >> 32);
}

void dss_random_shuffle(dss_random_t *random, uint32_t *values, uint32_t count) {
    for (uint32_t i = count; i > 1; i--) {
        const uint32_t j = dss_random_below(random, i);
        const uint32_t swapped = values[i - 1];
        values[i - 1] = values[j];
        values[j] = swapped;
    }
}

double dss_random_uniform(dss_random_t *random) {
    return (double)((dss_random_next(random) >> 11) + 1) * 0x1p-53;
}

double dss_random_normal(dss_random_t *random) {
    const double radius = sqrt(-2 * log(dss_random_uniform(random)));
    return radius * cos(DSS_TWO_PI * dss_random_uniform(random));
}
