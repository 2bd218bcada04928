/*
 * Rounds given by hand. dss_rounds_from_groups turns lists of groups, as people write them, into the number of each rank's group,
 * as plans hold them; it is where a rank that stands nowhere, or twice, is found out.
 */
#include <string.h>

#include "plan_internal.h"
#include "status.h"

#define NO_GROUP UINT32_MAX

static dss_status_t check_shape(uint32_t world_size, uint32_t round_count, dss_error_t *error_p) {
    if (world_size < 1 || world_size > DSS_PLAN_MAX_WORLD_SIZE)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "world_size is %u, expected 1 to %u", world_size,
                        DSS_PLAN_MAX_WORLD_SIZE);
    if (round_count < 1 || round_count > DSS_PLAN_MAX_PERIOD)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "the plan has %u rounds, expected 1 to %u", round_count,
                        DSS_PLAN_MAX_PERIOD);
    return DSS_OK;
}

dss_status_t dss_plan_create_explicit(uint32_t world_size, uint32_t round_count, const uint32_t *group_of, uint64_t seed,
                                      dss_plan_t **plan_p, dss_error_t *error_p) {
    dss_plan_t *plan = NULL;
    dss_status_t status = check_shape(world_size, round_count, error_p);
    if (status != DSS_OK)
        return status;
    if (!group_of || !plan_p)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "%s is NULL", group_of ? "plan_p" : "group_of");
    const size_t entry_count = (size_t)round_count * world_size;
    for (size_t i = 0; i < entry_count; i++) {
        if (group_of[i] >= world_size)
            return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT,
                            "round %u puts rank %u in group %u, expected a number below world_size %u", (uint32_t)(i / world_size),
                            (uint32_t)(i % world_size), group_of[i], world_size);
    }
    status = dss_plan_allocate(DSS_PLAN_EXPLICIT, world_size, round_count, seed, &plan, error_p);
    if (status != DSS_OK)
        return status;
    memcpy(plan->group_of, group_of, entry_count * sizeof *group_of);
    return dss_plan_hand_over(plan, plan_p, error_p);
}

static dss_status_t place_member(uint32_t world_size, uint32_t round, uint32_t group, uint32_t rank, uint32_t *group_of,
                                 dss_error_t *error_p) {
    if (rank >= world_size)
        return dss_fail(error_p, DSS_ERR_NOT_A_PARTITION, "group %u of round %u names rank %u, but the ranks are 0 to %u", group,
                        round, rank, world_size - 1);
    if (group_of[rank] == group)
        return dss_fail(error_p, DSS_ERR_NOT_A_PARTITION, "rank %u stands twice in group %u of round %u", rank, group, round);
    if (group_of[rank] != NO_GROUP)
        return dss_fail(error_p, DSS_ERR_NOT_A_PARTITION, "rank %u stands in groups %u and %u of round %u, expected one", rank,
                        group_of[rank], group, round);
    group_of[rank] = group;
    return DSS_OK;
}

/* Places one round's groups; *member_counts_p and *members_p advance past what they used. */
static dss_status_t place_round(uint32_t world_size, uint32_t round, uint32_t group_count, const uint32_t **member_counts_p,
                                const uint32_t **members_p, uint32_t *group_of, dss_error_t *error_p) {
    for (uint32_t rank = 0; rank < world_size; rank++)
        group_of[rank] = NO_GROUP;
    for (uint32_t group = 0; group < group_count; group++) {
        const uint32_t member_count = *(*member_counts_p)++;
        if (member_count == 0)
            return dss_fail(error_p, DSS_ERR_NOT_A_PARTITION, "group %u of round %u is empty; leave it out", group, round);
        for (uint32_t i = 0; i < member_count; i++) {
            const dss_status_t status = place_member(world_size, round, group, *(*members_p)++, group_of, error_p);
            if (status != DSS_OK)
                return status;
        }
    }
    for (uint32_t rank = 0; rank < world_size; rank++) {
        if (group_of[rank] == NO_GROUP)
            return dss_fail(error_p, DSS_ERR_NOT_A_PARTITION,
                            "rank %u stands in no group of round %u; a rank that averages with no one is a group of its own", rank,
                            round);
    }
    return DSS_OK;
}

dss_status_t dss_rounds_from_groups(uint32_t world_size, uint32_t round_count, const uint32_t *group_counts,
                                    const uint32_t *member_counts, const uint32_t *members, uint32_t *group_of,
                                    dss_error_t *error_p) {
    dss_status_t status = check_shape(world_size, round_count, error_p);
    if (status != DSS_OK)
        return status;
    if (!group_counts || !member_counts || !members || !group_of)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "an array of the groups is NULL");
    for (uint32_t round = 0; status == DSS_OK && round < round_count; round++)
        status = place_round(world_size, round, group_counts[round], &member_counts, &members,
                             group_of + (size_t)round * world_size, error_p);
    return status;
}
