#include "dssync.h"

#define STRIPE_UNIT 64u /* elements: whole cache lines for every dtype */

uint32_t dss_stripe_count(size_t total_bytes, uint32_t period, size_t min_stripe_bytes) {
    const size_t fitting = min_stripe_bytes ? total_bytes / min_stripe_bytes : total_bytes;
    if (fitting <= 1 || period <= 1)
        return 1;
    return fitting < period ? (uint32_t)fitting : period;
}

/* floor(units * stripe / stripe_count) without the overflow */
static size_t proportion(size_t units, uint32_t stripe_count, uint32_t stripe) {
    return units / stripe_count * stripe + (size_t)((uint64_t)(units % stripe_count) * stripe / stripe_count);
}

size_t dss_stripe_begin(size_t element_count, uint32_t stripe_count, uint32_t stripe) {
    const size_t unit_count = element_count / STRIPE_UNIT;
    if (stripe >= stripe_count)
        return element_count;
    if (unit_count >= stripe_count)
        return proportion(unit_count, stripe_count, stripe) * STRIPE_UNIT;
    return proportion(element_count, stripe_count, stripe);
}
