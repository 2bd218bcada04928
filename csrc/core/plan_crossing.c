/*
 * The second gate: a plan that crosses racks in the background is right only if every group of a crossing round is made of whole
 * racks, all other rounds stay inside racks while a correction is under way, and the last correction of a stripe has arrived
 * before it crosses again. Then rack means change by crossings only and nothing is counted twice (design rule 8). This gate comes
 * first: the other trusts the racks.
 */
#include <stdlib.h>

#include "plan_internal.h"
#include "status.h"

static uint32_t rack_of(const dss_plan_t *plan, uint32_t rank) {
    return plan->rack_of ? plan->rack_of[rank] : 0;
}

static dss_status_t check_racks(const dss_plan_t *plan, uint32_t *rack_sizes, dss_error_t *error_p) {
    for (uint32_t rank = 0; rank < plan->world_size; rank++) {
        if (rack_of(plan, rank) >= plan->rack_count)
            return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "the plan puts rank %u in rack %u, but its racks are 0 to %u", rank,
                            rack_of(plan, rank), plan->rack_count - 1);
        rack_sizes[rack_of(plan, rank)]++;
    }
    for (uint32_t rack = 0; rack < plan->rack_count; rack++) {
        if (rack_sizes[rack] == 0)
            return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "rack %u of the plan is empty, expected every rack to hold a rank",
                            rack);
    }
    return DSS_OK;
}

/* Members stand in ascending order, racks anyhow: a group is made of whole racks if each rack met first here ends here. */
static dss_status_t check_whole_racks(const dss_plan_t *plan, uint32_t round, uint32_t *group_of_rack, dss_error_t *error_p) {
    const uint32_t *group_of = plan->group_of + (size_t)round * plan->world_size;
    for (uint32_t rack = 0; rack < plan->rack_count; rack++)
        group_of_rack[rack] = UINT32_MAX;
    for (uint32_t rank = 0; rank < plan->world_size; rank++) {
        uint32_t *group = &group_of_rack[rack_of(plan, rank)];
        if (*group == UINT32_MAX)
            *group = group_of[rank];
        if (*group != group_of[rank])
            return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT,
                            "round %u crosses racks, but rank %u is not in the group of the others of its rack %u: groups of a "
                            "crossing round are whole racks",
                            round, rank, rack_of(plan, rank));
    }
    return DSS_OK;
}

static dss_status_t check_inside_racks(const dss_plan_t *plan, uint32_t round, dss_error_t *error_p) {
    for (uint32_t group = 0; group < dss_plan_group_count(plan, round); group++) {
        uint32_t member_count;
        const uint32_t *members = dss_plan_members(plan, round, group, &member_count);
        for (uint32_t i = 1; i < member_count; i++) {
            if (rack_of(plan, members[i]) != rack_of(plan, members[0]))
                return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT,
                                "round %u averages ranks %u and %u of different racks at once, which would count a delayed "
                                "correction twice: with delay %u other rounds than crossings stay inside racks",
                                round, members[0], members[i], plan->delay);
        }
    }
    return DSS_OK;
}

/* A stripe takes the rounds in order, so the distance between crossing rounds is its number of steps between crossings. */
static dss_status_t check_delay(const dss_plan_t *plan, dss_error_t *error_p) {
    uint32_t first = UINT32_MAX;
    uint32_t last = 0;
    uint32_t nearest = plan->period;
    for (uint32_t round = 0; round < plan->period; round++) {
        if (!plan->crossing[round])
            continue;
        if (first == UINT32_MAX)
            first = round;
        else if (round - last < nearest)
            nearest = round - last;
        last = round;
    }
    if (plan->delay && first == UINT32_MAX)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "the delay is %u, but no round of the plan crosses racks", plan->delay);
    if (first != UINT32_MAX && first + plan->period - last < nearest)
        nearest = first + plan->period - last;
    if (plan->delay > plan->stripe_count - 1 || plan->delay > nearest - 1)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT,
                        "the delay is %u with %u stripes and crossings %u rounds apart: a correction has to arrive before the "
                        "stripe crosses again, so at most %u",
                        plan->delay, plan->stripe_count, nearest,
                        (nearest < plan->stripe_count ? nearest : plan->stripe_count) - 1);
    return DSS_OK;
}

dss_status_t dss_plan_check_crossings(const dss_plan_t *plan, dss_error_t *error_p) {
    if (plan->stripe_count < 1 || plan->stripe_count > plan->period || plan->period % plan->stripe_count)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "the plan has %u rounds and is made for %u stripes, expected a divisor",
                        plan->period, plan->stripe_count);
    uint32_t *scratch = calloc(plan->rack_count, sizeof *scratch);
    if (!scratch)
        return DSS_ERR_NO_MEMORY;
    dss_status_t status = check_racks(plan, scratch, error_p);
    for (uint32_t round = 0; status == DSS_OK && round < plan->period; round++) {
        if (plan->crossing[round] && plan->rack_count == 1)
            status = dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "round %u crosses racks, but the plan knows only one", round);
        else if (plan->crossing[round] == DSS_CROSSING_VALUES && !plan->delay)
            status = dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT,
                              "in round %u workers keep their values until a correction comes, but the delay is 0", round);
        else if (plan->crossing[round])
            status = check_whole_racks(plan, round, scratch, error_p);
        else if (plan->delay)
            status = check_inside_racks(plan, round, error_p);
    }
    if (status == DSS_OK)
        status = check_delay(plan, error_p);
    free(scratch);
    return status;
}
