/*
 * Random plans: each round is a seeded permutation of the ranks cut into groups whose sizes differ by at most one. They exist for
 * every N, where a grid needs small factors, and mix fast, but never exactly. Twice the rounds that a grid of such groups would
 * take connects all ranks almost surely; a draw that does not is replaced by the next one of the same seed.
 */
#include <stdlib.h>

#include "plan_internal.h"
#include "random.h"
#include "status.h"

#define MAX_ATTEMPTS 64u

/* Of N/g groups and one more, the count whose sizes stay nearer to g: 9 ranks in fives are 4 + 5 and not one group of 9, while 7
 * in pairs are 2 + 2 + 3, since 2 + 2 + 2 + 1 would leave one rank alone. */
static uint32_t choose_group_count(uint32_t world_size, uint32_t group_size) {
    const uint32_t fewer = world_size / group_size;
    const uint32_t too_large = (world_size + fewer - 1) / fewer - group_size;
    const uint32_t too_small = group_size - world_size / (fewer + 1);
    return too_large <= too_small ? fewer : fewer + 1;
}

static uint32_t choose_period(const dss_plan_params_t *params, uint32_t group_size, uint32_t group_count) {
    uint32_t period = 0;
    if (group_count == 1)
        return 1;
    for (uint64_t reached = 1; reached < params->world_size; reached *= group_size)
        period += 2;
    return period < params->max_period ? period : params->max_period;
}

static void draw_round(dss_random_t *random, uint32_t world_size, uint32_t group_count, uint32_t *order, uint32_t *group_of) {
    for (uint32_t rank = 0; rank < world_size; rank++)
        order[rank] = rank;
    dss_random_shuffle(random, order, world_size);
    for (uint32_t i = 0; i < world_size; i++)
        group_of[order[i]] = (uint32_t)((uint64_t)i * group_count / world_size);
}

static dss_status_t fail_disconnected(const dss_plan_params_t *params, uint32_t group_size, uint32_t period, dss_error_t *error_p) {
    if (period == 1)
        return dss_fail(error_p, DSS_ERR_DISCONNECTED,
                        "max_period is 1: one round in groups of about %u cannot connect %u ranks; use max_period=2 or more, or "
                        "group_size=%u",
                        group_size, params->world_size, params->world_size);
    return dss_fail(
        error_p, DSS_ERR_DISCONNECTED,
        "%u ranks in random groups of about %u stay apart in %u rounds (max_period is %u; %u draws of seed %llu tried); "
        "raise max_period or group_size",
        params->world_size, group_size, period, params->max_period, MAX_ATTEMPTS, (unsigned long long)params->seed);
}

static dss_status_t draw_plan(const dss_plan_params_t *params, uint32_t group_count, uint32_t period, uint32_t attempt,
                              dss_plan_t **plan_p, dss_error_t *error_p) {
    dss_plan_t *plan = NULL;
    dss_status_t status = dss_plan_allocate(DSS_PLAN_RANDOM, params->world_size, period, params->seed, &plan, error_p);
    if (status != DSS_OK)
        return status;
    dss_random_t random = dss_random_stream(params->seed, DSS_RANDOM_PLAN, attempt);
    for (uint32_t round = 0; round < period; round++) {
        const size_t row = (size_t)round * params->world_size;
        draw_round(&random, params->world_size, group_count, plan->members + row, plan->group_of + row);
    }
    return dss_plan_hand_over(plan, plan_p, error_p);
}

dss_status_t dss_plan_create_random(const dss_plan_params_t *params, dss_plan_t **plan_p, dss_error_t *error_p) {
    const uint32_t group_size = params->world_size == 1 ? 1 : dss_plan_target_group_size(params);
    const uint32_t group_count = choose_group_count(params->world_size, group_size);
    const uint32_t period = choose_period(params, group_size, group_count);
    if (period == 1 && group_count > 1)
        return fail_disconnected(params, group_size, period, error_p);
    for (uint32_t attempt = 0; attempt < MAX_ATTEMPTS; attempt++) {
        const dss_status_t status = draw_plan(params, group_count, period, attempt, plan_p, error_p);
        if (status != DSS_ERR_DISCONNECTED)
            return status;
    }
    return fail_disconnected(params, group_size, period, error_p);
}
