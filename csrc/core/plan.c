#include "plan_internal.h"

#include <stdlib.h>

#include "random.h"
#include "status.h"

/* calloc minds the overflow of the product; that of a row cannot, with at most 2^24 columns. */
static uint32_t *new_words(size_t rows, uint32_t columns) {
    return calloc(rows, columns * sizeof(uint32_t));
}

static dss_status_t fail_memory(dss_error_t *error_p, uint32_t world_size, uint32_t period) {
    return dss_fail(error_p, DSS_ERR_NO_MEMORY, "out of memory for a plan of %u rounds of %u ranks (about %.0f MB)", period,
                    world_size, 1.2e-5 * world_size * period);
}

dss_status_t dss_plan_allocate(dss_plan_kind_t kind, uint32_t world_size, uint32_t period, uint64_t seed, dss_plan_t **plan_p,
                               dss_error_t *error_p) {
    dss_plan_t *plan = calloc(1, sizeof *plan);
    if (!plan)
        return fail_memory(error_p, world_size, period);
    plan->kind = kind;
    plan->world_size = world_size;
    plan->period = period;
    plan->seed = seed;
    plan->group_of = new_words(period, world_size);
    plan->members = new_words(period, world_size);
    plan->round_begin = calloc((size_t)period + 1, sizeof *plan->round_begin);
    if (!plan->group_of || !plan->members || !plan->round_begin) {
        dss_plan_destroy(plan);
        return fail_memory(error_p, world_size, period);
    }
    *plan_p = plan;
    return DSS_OK;
}

void dss_plan_destroy(dss_plan_t *plan) {
    if (!plan)
        return;
    free(plan->group_of);
    free(plan->members);
    free(plan->round_begin);
    free(plan->group_begin);
    free(plan);
}

/* Renumbers one round's groups by their smallest member and returns how many there are. `number_of` is scratch, a word a rank. */
static uint32_t number_groups(uint32_t *group_of, uint32_t world_size, uint32_t *number_of) {
    uint32_t group_count = 0;
    for (uint32_t i = 0; i < world_size; i++)
        number_of[i] = UINT32_MAX;
    for (uint32_t rank = 0; rank < world_size; rank++) {
        uint32_t *number = &number_of[group_of[rank]];
        if (*number == UINT32_MAX)
            *number = group_count++;
        group_of[rank] = *number;
    }
    return group_count;
}

/* Counting sort of one round. `begin` (group_count + 1 zeros) becomes the offsets; `next` is scratch, a word a group. */
static uint32_t sort_members(const uint32_t *group_of, uint32_t world_size, uint32_t group_count, uint32_t *begin, uint32_t *next,
                             uint32_t *members) {
    uint32_t largest = 0;
    for (uint32_t rank = 0; rank < world_size; rank++)
        begin[group_of[rank] + 1]++;
    for (uint32_t group = 0; group < group_count; group++) {
        if (begin[group + 1] > largest)
            largest = begin[group + 1];
        next[group] = begin[group];
        begin[group + 1] += begin[group];
    }
    for (uint32_t rank = 0; rank < world_size; rank++)
        members[next[group_of[rank]]++] = rank;
    return largest;
}

dss_status_t dss_plan_finish(dss_plan_t *plan, dss_error_t *error_p) {
    const uint32_t world_size = plan->world_size;
    dss_status_t status = DSS_ERR_NO_MEMORY;
    uint32_t *scratch = new_words(world_size, 1);
    if (!scratch)
        goto done;
    for (uint32_t round = 0; round < plan->period; round++) {
        const uint32_t group_count = number_groups(plan->group_of + (size_t)round * world_size, world_size, scratch);
        plan->round_begin[round + 1] = plan->round_begin[round] + group_count + 1;
    }
    plan->group_begin = new_words(plan->round_begin[plan->period], 1);
    if (!plan->group_begin)
        goto done;
    for (uint32_t round = 0; round < plan->period; round++) {
        const size_t row = (size_t)round * world_size;
        const uint32_t largest = sort_members(plan->group_of + row, world_size, dss_plan_group_count(plan, round),
                                              plan->group_begin + plan->round_begin[round], scratch, plan->members + row);
        if (largest > plan->max_group_size)
            plan->max_group_size = largest;
    }
    plan->hash = dss_plan_content_hash(plan);
    status = dss_plan_check_connected(plan, error_p);
done:
    free(scratch);
    return status == DSS_ERR_NO_MEMORY ? fail_memory(error_p, world_size, plan->period) : status;
}

uint32_t dss_plan_target_group_size(const dss_plan_params_t *params) {
    const uint64_t world_size = params->world_size;
    if (params->group_size)
        return params->group_size;
    uint64_t size = 2;
    while (size * size * size < world_size)
        size++;
    return (uint32_t)size;
}

static dss_status_t check_params(const dss_plan_params_t *params, dss_error_t *error_p) {
    if (!params)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "plan params are NULL");
    if (params->params_bytes != sizeof *params)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT,
                        "params_bytes is %zu, expected %zu: set it to sizeof(dss_plan_params_t) and build against this dssync.h",
                        params->params_bytes, sizeof *params);
    if ((int)params->kind < DSS_PLAN_AUTO || params->kind > DSS_PLAN_RANDOM)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "plan kind is %d, expected auto (%d), grid (%d) or random (%d)",
                        (int)params->kind, DSS_PLAN_AUTO, DSS_PLAN_GRID, DSS_PLAN_RANDOM);
    if (params->world_size < 1 || params->world_size > DSS_PLAN_MAX_WORLD_SIZE)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "world_size is %u, expected 1 to %u", params->world_size,
                        DSS_PLAN_MAX_WORLD_SIZE);
    if (params->max_period > DSS_PLAN_MAX_PERIOD)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "max_period is %u, expected at most %u", params->max_period,
                        DSS_PLAN_MAX_PERIOD);
    if (params->group_size > params->world_size)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT,
                        "group_size is %u but world_size is %u: no group can hold more than all ranks (0 chooses a size)",
                        params->group_size, params->world_size);
    if (params->group_size == 1 && params->world_size > 1)
        return dss_fail(error_p, DSS_ERR_DISCONNECTED,
                        "group_size is 1: none of the %u ranks would ever average with another; use at least 2, or 0 to choose",
                        params->world_size);
    return DSS_OK;
}

/* A grid is exact, so AUTO takes it unless its largest group costs more than twice what was aimed at (or asked for, once). */
static dss_plan_kind_t choose_kind(const dss_plan_params_t *params) {
    uint32_t factors[DSS_GRID_MAX_FACTORS];
    const uint32_t limit = params->group_size ? params->group_size : 2 * dss_plan_target_group_size(params);
    if (dss_grid_factors(params, factors) > 0 && factors[0] <= limit)
        return DSS_PLAN_GRID;
    return DSS_PLAN_RANDOM;
}

dss_status_t dss_plan_create(const dss_plan_params_t *params, dss_plan_t **plan_p, dss_error_t *error_p) {
    const dss_status_t status = check_params(params, error_p);
    if (status != DSS_OK)
        return status;
    if (!plan_p)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "plan_p is NULL");
    dss_plan_params_t wanted = *params;
    if (!wanted.max_period)
        wanted.max_period = DSS_PLAN_DEFAULT_PERIOD;
    if (wanted.kind == DSS_PLAN_AUTO)
        wanted.kind = choose_kind(&wanted);
    return wanted.kind == DSS_PLAN_GRID ? dss_plan_create_grid(&wanted, plan_p, error_p)
                                        : dss_plan_create_random(&wanted, plan_p, error_p);
}

dss_plan_kind_t dss_plan_kind(const dss_plan_t *plan) {
    return plan->kind;
}

uint32_t dss_plan_world_size(const dss_plan_t *plan) {
    return plan->world_size;
}

uint32_t dss_plan_period(const dss_plan_t *plan) {
    return plan->period;
}

uint32_t dss_plan_max_group_size(const dss_plan_t *plan) {
    return plan->max_group_size;
}

uint64_t dss_plan_seed(const dss_plan_t *plan) {
    return plan->seed;
}

uint64_t dss_plan_hash(const dss_plan_t *plan) {
    return plan->hash;
}

uint32_t dss_plan_group_count(const dss_plan_t *plan, uint32_t round) {
    if (round >= plan->period)
        return 0;
    return (uint32_t)(plan->round_begin[round + 1] - plan->round_begin[round] - 1);
}

dss_status_t dss_plan_group(const dss_plan_t *plan, uint32_t round, uint32_t group, const uint32_t **members_p,
                            uint32_t *member_count_p) {
    if (!plan || !members_p || !member_count_p || group >= dss_plan_group_count(plan, round))
        return DSS_ERR_INVALID_ARGUMENT;
    *members_p = dss_plan_members(plan, round, group, member_count_p);
    return DSS_OK;
}

dss_status_t dss_plan_group_of_rank(const dss_plan_t *plan, uint32_t round, uint32_t rank, const uint32_t **members_p,
                                    uint32_t *member_count_p) {
    if (!plan || round >= plan->period || rank >= plan->world_size)
        return DSS_ERR_INVALID_ARGUMENT;
    return dss_plan_group(plan, round, plan->group_of[(size_t)round * plan->world_size + rank], members_p, member_count_p);
}

uint32_t dss_plan_round_at(const dss_plan_t *plan, uint64_t step, uint32_t stripe) {
    return (uint32_t)((step % plan->period + stripe % plan->period) % plan->period);
}

uint32_t dss_plan_round_of_call(const dss_plan_t *plan, uint64_t call) {
    uint32_t order[DSS_PLAN_MAX_PERIOD];
    dss_random_t random = dss_random_stream(plan->seed, DSS_RANDOM_CALLS, call / plan->period);
    for (uint32_t round = 0; round < plan->period; round++)
        order[round] = round;
    dss_random_shuffle(&random, order, plan->period);
    return order[call % plan->period];
}
