/*
 * AUTO with a topology: every kind that exists for it is made and timed by the cost model. Exact averaging wins if it is nearly as
 * quick as the best, since it is the most accurate; so a flat fast network stays with it. Of the others that are nearly the best
 * the one that brings the ranks together most in a period is taken, then the one with the shorter wait for a global average.
 * Where every rack is one worker, leaders are exact averaging, and between the crossings of a striped plan nobody would average at
 * all: quick, but only for those who ask for it.
 */
#include <math.h>

#include "cost.h"
#include "plan_internal.h"
#include "status.h"

#define NEARLY_BEST 1.05 /* times of a step that count as equal */

typedef struct candidate {
    dss_plan_t *plan;    /* NULL: there is none of this kind; owned */
    double step_s;       /* compute included */
    double contraction;  /* of those that are nearly the best */
    uint32_t wait_steps; /* UINT32_MAX: never exact */
} candidate_t;

static dss_status_t make_candidate(const dss_plan_params_t *params, dss_plan_kind_t kind, candidate_t *candidate,
                                   dss_error_t *error_p) {
    dss_cost_t cost;
    dss_status_t status = dss_plan_create_kind(params, kind, &candidate->plan, error_p);
    if (status == DSS_ERR_IMPOSSIBLE || status == DSS_ERR_DISCONNECTED)
        return DSS_OK;
    if (status == DSS_OK)
        status = dss_cost_of_time(candidate->plan, params->topology, params->model_bytes, params->compute_s, &cost, error_p);
    if (status == DSS_OK)
        candidate->step_s = params->compute_s + cost.sync_s;
    return status;
}

static dss_status_t look_closer(candidate_t *candidate, dss_error_t *error_p) {
    const uint32_t wait_steps = dss_plan_longest_wait(candidate->plan);
    candidate->wait_steps = wait_steps ? wait_steps : UINT32_MAX;
    candidate->contraction = wait_steps ? 0 : 1;
    if (wait_steps || dss_plan_world_size(candidate->plan) > DSS_CONTRACTION_MAX_WORLD_SIZE)
        return DSS_OK;
    return dss_plan_contraction(candidate->plan, &candidate->contraction) == DSS_OK
               ? DSS_OK
               : dss_fail(error_p, DSS_ERR_NO_MEMORY, "out of memory for the contraction of a plan");
}

static int better(const candidate_t *a, const candidate_t *b) {
    if (a->contraction != b->contraction)
        return a->contraction < b->contraction;
    if (a->wait_steps != b->wait_steps)
        return a->wait_steps < b->wait_steps;
    return a->step_s < b->step_s;
}

dss_status_t dss_plan_create_cheapest(const dss_plan_params_t *params, dss_plan_t **plan_p, dss_error_t *error_p) {
    const uint32_t rack_count = dss_topology_rack_count(params->topology);
    const dss_plan_kind_t kinds[] = {DSS_PLAN_EXACT, dss_plan_flat_kind(params), DSS_PLAN_LEADERS, DSS_PLAN_STRIPED};
    const size_t kind_count = rack_count == 1 || rack_count == params->world_size ? 2 : 4;
    candidate_t candidates[4] = {{0}};
    candidate_t *chosen = NULL;
    double best_s = INFINITY;
    dss_status_t status = DSS_OK;
    for (size_t i = 0; status == DSS_OK && i < kind_count; i++) {
        status = make_candidate(params, kinds[i], &candidates[i], error_p);
        if (status == DSS_OK && candidates[i].plan)
            best_s = fmin(best_s, candidates[i].step_s);
    }
    if (status == DSS_OK && candidates[0].step_s <= NEARLY_BEST * best_s)
        chosen = &candidates[0];
    for (size_t i = 1; status == DSS_OK && chosen != &candidates[0] && i < kind_count; i++) {
        if (!candidates[i].plan || candidates[i].step_s > NEARLY_BEST * best_s)
            continue;
        status = look_closer(&candidates[i], error_p);
        if (!chosen || better(&candidates[i], chosen))
            chosen = &candidates[i];
    }
    if (status == DSS_OK) {
        *plan_p = chosen->plan;
        chosen->plan = NULL;
    }
    for (size_t i = 0; i < kind_count; i++)
        dss_plan_destroy(candidates[i].plan);
    return status;
}
