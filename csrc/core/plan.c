#include "plan_internal.h"

#include <math.h>
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
    plan->crossing = calloc(period, sizeof *plan->crossing);
    plan->stripe_count = period;
    plan->rack_count = 1;
    if (!plan->group_of || !plan->members || !plan->round_begin || !plan->crossing) {
        dss_plan_destroy(plan);
        return fail_memory(error_p, world_size, period);
    }
    *plan_p = plan;
    return DSS_OK;
}

dss_status_t dss_plan_allocate_racks(dss_plan_t *plan, uint32_t rack_count, dss_error_t *error_p) {
    plan->rack_count = rack_count;
    if (rack_count == 1)
        return DSS_OK;
    plan->rack_of = new_words(plan->world_size, 1);
    return plan->rack_of ? DSS_OK : fail_memory(error_p, plan->world_size, plan->period);
}

dss_status_t dss_plan_take_racks(dss_plan_t *plan, const dss_topology_t *topology, dss_error_t *error_p) {
    const dss_status_t status = dss_plan_allocate_racks(plan, dss_topology_rack_count(topology), error_p);
    for (uint32_t rank = 0; plan->rack_of && rank < plan->world_size; rank++)
        plan->rack_of[rank] = dss_topology_rack_of(topology, rank);
    return status;
}

void dss_plan_destroy(dss_plan_t *plan) {
    if (!plan)
        return;
    free(plan->rack_of);
    free(plan->crossing);
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
    status = dss_plan_check_crossings(plan, error_p);
    if (status == DSS_OK)
        status = dss_plan_check_connected(plan, error_p);
done:
    free(scratch);
    return status == DSS_ERR_NO_MEMORY ? fail_memory(error_p, world_size, plan->period) : status;
}

dss_status_t dss_plan_hand_over(dss_plan_t *plan, dss_plan_t **plan_p, dss_error_t *error_p) {
    const dss_status_t status = dss_plan_finish(plan, error_p);
    if (status == DSS_OK)
        *plan_p = plan;
    else
        dss_plan_destroy(plan);
    return status;
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

static dss_status_t check_topology(const dss_plan_params_t *params, dss_error_t *error_p) {
    const char *kind = params->kind == DSS_PLAN_LEADERS ? "leaders" : params->kind == DSS_PLAN_STRIPED ? "striped" : "hybrid";
    if (!(params->compute_s >= 0 && isfinite(params->compute_s)))
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "compute_s is %g, expected a finite time of at least 0",
                        params->compute_s);
    if (params->kind >= DSS_PLAN_LEADERS && !params->topology)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "a %s plan is made around racks and needs a topology", kind);
    if (params->topology && dss_topology_world_size(params->topology) != params->world_size)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "the topology holds %u workers, but world_size is %u",
                        dss_topology_world_size(params->topology), params->world_size);
    if (params->kind >= DSS_PLAN_LEADERS && dss_topology_rack_count(params->topology) == 1)
        return dss_fail(error_p, DSS_ERR_IMPOSSIBLE,
                        "a %s plan needs at least 2 racks, and the topology has one; use plan=grid or random", kind);
    return DSS_OK;
}

static dss_status_t check_params(const dss_plan_params_t *params, dss_error_t *error_p) {
    if (!params)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "plan params are NULL");
    if (params->params_bytes != sizeof *params)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT,
                        "params_bytes is %zu, expected %zu: set it to sizeof(dss_plan_params_t) and build against this dssync.h",
                        params->params_bytes, sizeof *params);
    if ((int)params->kind < DSS_PLAN_AUTO || params->kind > DSS_PLAN_HYBRID || params->kind == DSS_PLAN_EXPLICIT)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT,
                        "plan kind is %d, expected %d (auto) to %d (hybrid), but not %d (by hand)", (int)params->kind,
                        DSS_PLAN_AUTO, DSS_PLAN_HYBRID, DSS_PLAN_EXPLICIT);
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
    return check_topology(params, error_p);
}

dss_plan_kind_t dss_plan_flat_kind(const dss_plan_params_t *params) {
    uint32_t factors[DSS_GRID_MAX_FACTORS];
    const uint32_t limit = params->group_size ? params->group_size : 2 * dss_plan_target_group_size(params);
    if (dss_grid_factors(params, factors) > 0 && factors[0] <= limit)
        return DSS_PLAN_GRID;
    return DSS_PLAN_RANDOM;
}

/* Where no link can be a bottleneck there is nothing to plan around. */
static int knows_limits(const dss_topology_t *topology) {
    int finite = isfinite(dss_topology_memory(topology).bytes_per_s);
    for (uint32_t host = 0; !finite && host < dss_topology_host_count(topology); host++)
        finite = isfinite(dss_topology_nic(topology, host).bytes_per_s);
    for (uint32_t rack = 0; !finite && rack < dss_topology_rack_count(topology); rack++)
        finite = isfinite(dss_topology_uplink(topology, rack).bytes_per_s);
    return finite;
}

dss_status_t dss_plan_create_kind(const dss_plan_params_t *params, dss_plan_kind_t kind, dss_plan_t **plan_p,
                                  dss_error_t *error_p) {
    dss_plan_params_t wanted = *params;
    wanted.kind = kind;
    if (kind == DSS_PLAN_GRID)
        return dss_plan_create_grid(&wanted, plan_p, error_p);
    if (kind == DSS_PLAN_RANDOM)
        return dss_plan_create_random(&wanted, plan_p, error_p);
    if (kind == DSS_PLAN_EXACT)
        return dss_plan_create_exact(&wanted, plan_p, error_p);
    if (kind == DSS_PLAN_LEADERS)
        return dss_plan_create_leaders(&wanted, plan_p, error_p);
    return dss_plan_create_striped(&wanted, plan_p, error_p);
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
    if (!wanted.model_bytes)
        wanted.model_bytes = DSS_PLAN_DEFAULT_MODEL_BYTES;
    if (wanted.kind != DSS_PLAN_AUTO)
        return dss_plan_create_kind(&wanted, wanted.kind, plan_p, error_p);
    if (wanted.topology && wanted.world_size > 1 && knows_limits(wanted.topology))
        return dss_plan_create_cheapest(&wanted, plan_p, error_p);
    return dss_plan_create_kind(&wanted, dss_plan_flat_kind(&wanted), plan_p, error_p);
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

uint32_t dss_plan_stripe_count(const dss_plan_t *plan) {
    return plan->stripe_count;
}

int dss_plan_is_crossing(const dss_plan_t *plan, uint32_t round) {
    return round < plan->period && plan->crossing[round] != DSS_CROSSING_NONE;
}

int dss_plan_keeps_values(const dss_plan_t *plan, uint32_t round) {
    return round < plan->period && plan->crossing[round] == DSS_CROSSING_VALUES;
}

uint32_t dss_plan_delay(const dss_plan_t *plan) {
    return plan->delay;
}

uint32_t dss_plan_rack_of(const dss_plan_t *plan, uint32_t rank) {
    return plan->rack_of && rank < plan->world_size ? plan->rack_of[rank] : 0;
}

uint32_t dss_plan_rack_count(const dss_plan_t *plan) {
    return plan->rack_count;
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
