/*
 * After how many rounds in a row, begun at any of them, everybody holds the mean of all. The product of rounds is J exactly if it
 * takes a vector drawn at random to its mean: the vectors that another product takes there are a subspace, which a draw misses
 * with probability 1. So the question costs as many averages as rounds, not matrices.
 *
 * A delayed correction adds one number to all values of a rack, which the local rounds after the crossing leave as it is, and it is
 * there before the stripe crosses again. So the values are those of a crossing at once, less one correction while that is under
 * way: all agree as soon as they would at once and the last crossing's correction is there.
 */
#include <math.h>
#include <stdlib.h>

#include "plan_internal.h"
#include "random.h"

#define ROUNDING 1e-12 /* of values up to 1/2, after averages in any order */

static double spread(const double *values, uint32_t count) {
    double least = values[0];
    double most = values[0];
    for (uint32_t i = 1; i < count; i++) {
        least = fmin(least, values[i]);
        most = fmax(most, values[i]);
    }
    return most - least;
}

uint32_t dss_plan_wait_from(const dss_plan_t *plan, uint32_t first, uint32_t limit, double *values, double *scratch) {
    dss_random_t random = dss_random_stream(plan->seed, DSS_RANDOM_CONTRACTION, 1);
    uint32_t corrected = 0; /* when the correction of the last crossing is there */
    for (uint32_t rank = 0; rank < plan->world_size; rank++)
        values[rank] = (double)(dss_random_next(&random) >> 11) * 0x1p-53 - 0.5;
    for (uint32_t i = 0; i < limit; i++) {
        const uint32_t round = (first + i) % plan->period;
        dss_round_average(plan, round, values, scratch);
        if (plan->crossing[round])
            corrected = i + 1 + plan->delay;
        if (spread(values, plan->world_size) < ROUNDING)
            return corrected > i + 1 ? corrected : i + 1;
    }
    return 0;
}

dss_status_t dss_plan_find_longest_wait(const dss_plan_t *plan, uint32_t *wait_p) {
    const size_t world_size = plan->world_size;
    double *values = calloc(world_size + 2 * (size_t)plan->rack_count, sizeof *values);
    const uint32_t limit = 2 * plan->period - 1; /* a period that is exact from some round on lies within */
    uint32_t longest = 0;
    uint32_t wait = 1;
    if (!values)
        return DSS_ERR_NO_MEMORY;
    for (uint32_t first = 0; wait && first < plan->period; first++) {
        wait = dss_plan_wait_from(plan, first, limit, values, values + world_size);
        longest = wait > longest ? wait : longest;
    }
    free(values);
    *wait_p = wait ? longest : 0;
    return DSS_OK;
}

uint32_t dss_plan_longest_wait(const dss_plan_t *plan) {
    uint32_t wait = 0;
    (void)dss_plan_find_longest_wait(plan, &wait);
    return wait;
}
