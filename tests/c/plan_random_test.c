#include "plans.h"

#include "dense.h"

static uint32_t distance(uint32_t a, uint32_t b) {
    return a > b ? a - b : b - a;
}

/* How far the sizes of `group_count` groups as equal as possible stray from group_size. */
static uint32_t stray(uint32_t world_size, uint32_t group_count, uint32_t group_size) {
    const uint32_t small = distance(world_size / group_count, group_size);
    const uint32_t large = distance((world_size + group_count - 1) / group_count, group_size);
    return small > large ? small : large;
}

static void sizes_are_as_equal_and_as_near_as_possible(void) {
    for (uint32_t world_size = 2; world_size <= 100; world_size++) {
        for (uint32_t group_size = 2; group_size <= world_size; group_size++) {
            dss_plan_t *plan = make_plan(DSS_PLAN_RANDOM, world_size, group_size, 0, 1);
            const uint32_t group_count = dss_plan_group_count(plan, 0);
            CHECK(group_count > 0);
            for (uint32_t round = 0; round < dss_plan_period(plan); round++) {
                CHECK_EQUAL(dss_plan_group_count(plan, round), group_count);
                for (uint32_t group = 0; group < group_count; group++) {
                    const uint32_t *members;
                    uint32_t member_count;
                    CHECK_STATUS(dss_plan_group(plan, round, group, &members, &member_count), DSS_OK);
                    CHECK_FOR(member_count == world_size / group_count ||
                                  member_count == (world_size + group_count - 1) / group_count,
                              "N %u, g %u: a group of %u", world_size, group_size, member_count);
                    CHECK_FOR(member_count > 1, "N %u, g %u leaves a rank alone", world_size, group_size);
                }
            }
            for (uint32_t other = 1; other <= world_size; other++)
                CHECK_FOR(stray(world_size, group_count, group_size) <= stray(world_size, other, group_size),
                          "N %u, g %u: %u groups, %u are nearer", world_size, group_size, group_count, other);
            dss_plan_destroy(plan);
        }
    }
}

static void the_documented_examples(void) {
    static const struct {
        uint32_t world_size, group_size, group_count, max_group_size, period;
    } rows[] = {{7, 2, 3, 3, 6}, {5, 2, 2, 3, 6}, {9, 5, 2, 5, 4}, {16, 4, 4, 4, 4}, {8, 8, 1, 8, 1}, {1, 1, 1, 1, 1}};
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        dss_plan_t *plan = make_plan(DSS_PLAN_RANDOM, rows[i].world_size, rows[i].group_size, 0, 1);
        CHECK_EQUAL(dss_plan_group_count(plan, 0), rows[i].group_count);
        CHECK_EQUAL(dss_plan_max_group_size(plan), rows[i].max_group_size);
        CHECK_EQUAL(dss_plan_period(plan), rows[i].period);
        dss_plan_destroy(plan);
    }
}

/* Two rounds of pairs connect 24 ranks only when they form one ring, about one draw in four: the maker must go on drawing. */
static void draws_that_stay_apart_are_replaced(void) {
    for (uint64_t seed = 0; seed < 50; seed++) {
        dss_plan_t *plan = make_plan(DSS_PLAN_RANDOM, 24, 2, 2, seed);
        double *period = dense_period(plan, 0);
        CHECK_FOR(dense_distance_to_mean(period, 24) < 1 - 1e-9, "seed %" PRIu64, seed);
        free(period);
        dss_plan_destroy(plan);
    }
}

static void what_no_draw_connects_is_refused(void) {
    dss_plan_t *plan = NULL;
    dss_error_t error;
    CHECK_STATUS(try_plan(DSS_PLAN_RANDOM, 16, 4, 1, 9, &plan, &error), DSS_ERR_DISCONNECTED);
    CHECK_CONTAINS(error.text, "max_period is 1: one round in groups of about 4 cannot connect 16 ranks");
    CHECK_CONTAINS(error.text, "use max_period=2 or more, or group_size=16");
    CHECK_STATUS(try_plan(DSS_PLAN_RANDOM, 100000, 2, 2, 9, &plan, &error), DSS_ERR_DISCONNECTED);
    CHECK_CONTAINS(error.text, "100000 ranks in random groups of about 2 stay apart in 2 rounds");
    CHECK_CONTAINS(error.text, "seed 9 tried); raise max_period or group_size");
    CHECK(plan == NULL);
}

/* Over many rounds every pair of ranks must meet, about equally often. */
static void every_pair_meets_about_equally_often(void) {
    uint32_t met[9][9] = {{0}};
    for (uint64_t seed = 0; seed < 1000; seed++) {
        dss_plan_t *plan = make_plan(DSS_PLAN_RANDOM, 9, 3, 4, seed);
        for (uint32_t round = 0; round < 4; round++) {
            for (uint32_t rank = 0; rank < 9; rank++) {
                const uint32_t *members;
                uint32_t member_count;
                CHECK_STATUS(dss_plan_group_of_rank(plan, round, rank, &members, &member_count), DSS_OK);
                for (uint32_t i = 0; i < member_count; i++)
                    met[rank][members[i]]++;
            }
        }
        dss_plan_destroy(plan);
    }
    for (uint32_t a = 0; a < 9; a++)
        for (uint32_t b = 0; b < 9; b++)
            CHECK_NEAR(met[a][b], a == b ? 4000 : 1000, a == b ? 0 : 140); /* 5 standard deviations */
}

int main(void) {
    RUN(sizes_are_as_equal_and_as_near_as_possible);
    RUN(the_documented_examples);
    RUN(draws_that_stay_apart_are_replaced);
    RUN(what_no_draw_connects_is_refused);
    RUN(every_pair_meets_about_equally_often);
}
