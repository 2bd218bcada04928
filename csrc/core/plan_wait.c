/*
 * After how many rounds in a row, begun at any of them, everybody holds the mean of all. The product of rounds is J exactly if it
 * takes a vector drawn at random to its mean: the vectors that another product takes there are a subspace, which a draw misses
 * with probability 1. So the question costs as many averages as rounds, not matrices.
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

/* Rounds from `first` on until all agree, at most a period; 0: they do not. */
static uint32_t rounds_to_consensus(const dss_plan_t *plan, uint32_t first, double *values) {
    dss_random_t random = dss_random_stream(plan->seed, DSS_RANDOM_CONTRACTION, 1);
    for (uint32_t rank = 0; rank < plan->world_size; rank++)
        values[rank] = (double)(dss_random_next(&random) >> 11) * 0x1p-53 - 0.5;
    for (uint32_t i = 0; i < plan->period; i++) {
        dss_round_average(plan, (first + i) % plan->period, values);
        if (spread(values, plan->world_size) < ROUNDING)
            return i + 1;
    }
    return 0;
}

uint32_t dss_plan_longest_wait(const dss_plan_t *plan) {
    double *values = calloc(plan->world_size, sizeof *values);
    uint32_t longest = 0;
    for (uint32_t first = 0; values && first < plan->period; first++) {
        const uint32_t count = rounds_to_consensus(plan, first, values);
        if (count == 0) {
            longest = 0;
            break;
        }
        const uint32_t wait = count + (plan->crossing[(first + count - 1) % plan->period] ? plan->delay : 0);
        longest = wait > longest ? wait : longest;
    }
    free(values);
    return longest;
}
