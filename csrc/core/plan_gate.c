/*
 * The connectivity gate: union-find over all groups of one period. Block averages are orthogonal projections, so a plan mixes all
 * ranks (rho < 1) exactly when this graph is connected; a plausible pattern that is not fails silently in training. A crossing in
 * which workers keep their values makes the means of its racks equal and leaves what differs inside a rack as it is: it joins one
 * rank of each, and the local rounds have to join the others. Roots are always the smallest rank of their part, so that the ranks
 * named in the error do not depend on the order of the rounds.
 */
#include <stdlib.h>

#include "plan_internal.h"
#include "status.h"

static uint32_t find_root(uint32_t *parent, uint32_t rank) {
    while (parent[rank] != rank) {
        parent[rank] = parent[parent[rank]];
        rank = parent[rank];
    }
    return rank;
}

static void unite(uint32_t *parent, uint32_t a, uint32_t b) {
    a = find_root(parent, a);
    b = find_root(parent, b);
    if (a < b)
        parent[b] = a;
    else
        parent[a] = b;
}

static dss_status_t check_one_part(const uint32_t *parent, uint32_t world_size, uint32_t period, dss_error_t *error_p) {
    uint32_t part_count = 0;
    uint32_t outsider = 0; /* smallest rank of the second part */
    for (uint32_t rank = 0; rank < world_size; rank++) {
        if (parent[rank] == rank && ++part_count == 2)
            outsider = rank;
    }
    if (part_count == 1)
        return DSS_OK;
    return dss_fail(error_p, DSS_ERR_DISCONNECTED,
                    "ranks 0 and %u are never connected: the union of the %u round%s falls into %u parts, so the %u ranks would "
                    "never agree; add a round with a group that joins the parts",
                    outsider, period, period == 1 ? "" : "s", part_count, world_size);
}

static void find_smallest_of_racks(const dss_plan_t *plan, uint32_t *smallest) {
    for (uint32_t rank = plan->world_size; rank-- > 0;)
        smallest[plan->rack_of ? plan->rack_of[rank] : 0] = rank;
}

dss_status_t dss_plan_check_connected(const dss_plan_t *plan, dss_error_t *error_p) {
    uint32_t *parent = malloc(((size_t)plan->world_size + plan->rack_count) * sizeof *parent);
    if (!parent)
        return DSS_ERR_NO_MEMORY;
    uint32_t *smallest = parent + plan->world_size;
    find_smallest_of_racks(plan, smallest);
    for (uint32_t rank = 0; rank < plan->world_size; rank++)
        parent[rank] = rank;
    for (uint32_t round = 0; round < plan->period; round++) {
        for (uint32_t group = 0; group < dss_plan_group_count(plan, round); group++) {
            uint32_t member_count;
            const uint32_t *members = dss_plan_members(plan, round, group, &member_count);
            for (uint32_t i = 1; i < member_count; i++) {
                if (plan->crossing[round] != DSS_CROSSING_VALUES || smallest[plan->rack_of[members[i]]] == members[i])
                    unite(parent, members[0], members[i]);
            }
        }
    }
    const dss_status_t status = check_one_part(parent, plan->world_size, plan->period, error_p);
    free(parent);
    return status;
}
