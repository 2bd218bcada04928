/* plans.h: plans for tests, and what must hold for any of them. */
#ifndef DSS_TEST_PLANS_H
#define DSS_TEST_PLANS_H

#include "check.h"

static inline dss_status_t try_plan(dss_plan_kind_t kind, uint32_t world_size, uint32_t group_size, uint32_t max_period,
                                    uint64_t seed, dss_plan_t **plan_p, dss_error_t *error_p) {
    const dss_plan_params_t params = {.params_bytes = sizeof params,
                                      .kind = kind,
                                      .world_size = world_size,
                                      .group_size = group_size,
                                      .max_period = max_period,
                                      .seed = seed};
    return dss_plan_create(&params, plan_p, error_p);
}

static inline dss_plan_t *make_plan(dss_plan_kind_t kind, uint32_t world_size, uint32_t group_size, uint32_t max_period,
                                    uint64_t seed) {
    dss_plan_t *plan = NULL;
    dss_error_t error;
    if (try_plan(kind, world_size, group_size, max_period, seed, &plan, &error) != DSS_OK)
        CHECK_FAIL("kind %d, N %u, g %u: %s", (int)kind, world_size, group_size, error.text);
    return plan;
}

/* Random rounds in groups of any sizes, many of them single: connected about as often as not. */
static inline void draw_rounds(uint64_t *random, uint32_t world_size, uint32_t round_count, uint32_t *group_of) {
    for (uint32_t round = 0; round < round_count; round++) {
        const uint32_t group_count = 1 + check_random_below(random, world_size);
        for (uint32_t rank = 0; rank < world_size; rank++)
            group_of[round * world_size + rank] = check_random_below(random, group_count);
    }
}

/*
 * Each round is a partition: every rank stands in exactly one group, and is told that group. That makes the round's matrix doubly
 * stochastic, in whole numbers: the rows of the s members of a group hold 1/s at these s members and nowhere else, so each row and
 * each column sums to s times 1/s.
 */
static inline void check_partitions(const dss_plan_t *plan) {
    const uint32_t world_size = dss_plan_world_size(plan);
    uint32_t *seen_in = calloc(world_size, sizeof *seen_in); /* the last round, counted from 1, that placed the rank */
    uint32_t largest = 0;
    for (uint32_t round = 0; round < dss_plan_period(plan); round++) {
        uint32_t placed_count = 0;
        for (uint32_t group = 0; group < dss_plan_group_count(plan, round); group++) {
            const uint32_t *members;
            uint32_t member_count;
            CHECK_STATUS(dss_plan_group(plan, round, group, &members, &member_count), DSS_OK);
            CHECK_FOR(member_count > 0, "round %u group %u", round, group);
            largest = member_count > largest ? member_count : largest;
            for (uint32_t i = 0; i < member_count; i++, placed_count++) {
                const uint32_t *told;
                uint32_t told_count;
                CHECK_FOR(members[i] < world_size && (i == 0 || members[i - 1] < members[i]), "round %u group %u", round, group);
                CHECK_FOR(seen_in[members[i]] == round, "rank %u in two groups of round %u", members[i], round);
                seen_in[members[i]] = round + 1;
                CHECK_STATUS(dss_plan_group_of_rank(plan, round, members[i], &told, &told_count), DSS_OK);
                CHECK_FOR(told == members && told_count == member_count, "round %u rank %u", round, members[i]);
            }
        }
        CHECK_EQUAL(placed_count, world_size);
    }
    CHECK_EQUAL(dss_plan_max_group_size(plan), largest);
    free(seen_in);
}

#endif
