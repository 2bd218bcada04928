/*
 * The shape of the paper (Wang et al., arXiv 2007.03298): in every round one worker of each rack is its leader, the leaders average
 * among themselves and the others of a rack among themselves, and another worker leads next time. Few bytes cross an uplink at
 * once, but the racks' difference only contracts by about 1 - 1/W a crossing. And, as the limit of that shape, exact averaging: one
 * group of all.
 */
#include <string.h>

#include "plan_internal.h"
#include "status.h"

dss_status_t dss_plan_create_exact(const dss_plan_params_t *params, dss_plan_t **plan_p, dss_error_t *error_p) {
    dss_plan_t *plan = NULL;
    const dss_status_t status = dss_plan_allocate(DSS_PLAN_EXACT, params->world_size, 1, params->seed, &plan, error_p);
    return status == DSS_OK ? dss_plan_hand_over(plan, plan_p, error_p) : status; /* all are in group 0 already */
}

static uint32_t largest_rack(const dss_topology_t *topology) {
    uint32_t largest = 0;
    for (uint32_t rack = 0; rack < dss_topology_rack_count(topology); rack++) {
        const uint32_t *members;
        uint32_t member_count;
        dss_topology_rack(topology, rack, &members, &member_count);
        largest = member_count > largest ? member_count : largest;
    }
    return largest;
}

/* Group 0 holds the leaders, group 1 + k the others of rack k. */
static void fill_led_round(const dss_topology_t *topology, uint32_t round, uint32_t *group_of) {
    for (uint32_t rack = 0; rack < dss_topology_rack_count(topology); rack++) {
        const uint32_t *members;
        uint32_t member_count;
        dss_topology_rack(topology, rack, &members, &member_count);
        for (uint32_t i = 0; i < member_count; i++)
            group_of[members[i]] = i == round % member_count ? 0 : 1 + rack;
    }
}

/* In racks of two the leaders of each round would stay among themselves for ever: one round more averages whole racks. */
dss_status_t dss_plan_create_leaders(const dss_plan_params_t *params, dss_plan_t **plan_p, dss_error_t *error_p) {
    const uint32_t largest = largest_rack(params->topology);
    const uint32_t led_count = largest < params->max_period ? largest : params->max_period;
    const uint32_t period = largest == 2 ? 3 : led_count;
    dss_plan_t *plan = NULL;
    if (period > params->max_period || (led_count == 1 && largest > 1))
        return dss_fail(error_p, DSS_ERR_IMPOSSIBLE,
                        "no leaders: in racks of up to %u workers max_period %u is too short for the leaders to rotate; use "
                        "max_period=%u",
                        largest, params->max_period, largest == 2 ? 3 : 2);
    dss_status_t status = dss_plan_allocate(DSS_PLAN_LEADERS, params->world_size, period, params->seed, &plan, error_p);
    if (status != DSS_OK)
        return status;
    status = dss_plan_take_racks(plan, params->topology, error_p);
    if (status != DSS_OK) {
        dss_plan_destroy(plan);
        return status;
    }
    for (uint32_t round = 0; round < led_count; round++)
        fill_led_round(params->topology, round, plan->group_of + (size_t)round * params->world_size);
    if (period > led_count)
        memcpy(plan->group_of + (size_t)led_count * params->world_size, plan->rack_of, params->world_size * sizeof(uint32_t));
    return dss_plan_hand_over(plan, plan_p, error_p);
}
