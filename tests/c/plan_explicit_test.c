#include "plans.h"

static void rounds_come_back_as_given(void) {
    static const uint32_t rounds[2][5] = {{4, 4, 0, 0, 0}, {1, 0, 1, 0, 3}};
    dss_plan_t *plan = NULL;
    CHECK_STATUS(dss_plan_create_explicit(5, 2, rounds[0], 99, &plan, NULL), DSS_OK);
    CHECK_EQUAL(dss_plan_kind(plan), DSS_PLAN_EXPLICIT);
    CHECK_EQUAL(dss_plan_period(plan), 2);
    CHECK_EQUAL(dss_plan_seed(plan), 99);
    CHECK_EQUAL(dss_plan_max_group_size(plan), 3);
    check_partitions(plan);
    for (uint32_t round = 0; round < 2; round++) {
        for (uint32_t rank = 0; rank < 5; rank++) {
            const uint32_t *members;
            uint32_t member_count;
            uint32_t expected_count = 0;
            CHECK_STATUS(dss_plan_group_of_rank(plan, round, rank, &members, &member_count), DSS_OK);
            for (uint32_t other = 0; other < 5; other++) {
                if (rounds[round][other] == rounds[round][rank])
                    CHECK_EQUAL(members[expected_count++], other);
            }
            CHECK_EQUAL(member_count, expected_count);
        }
    }
    dss_plan_destroy(plan);
}

/* The partition is the plan, whatever its groups are called. */
static void names_of_groups_do_not_matter(void) {
    static const uint32_t one[4] = {0, 0, 0, 0};
    static const uint32_t two[4] = {3, 3, 3, 3};
    dss_plan_t *a = NULL;
    dss_plan_t *b = NULL;
    CHECK_STATUS(dss_plan_create_explicit(4, 1, one, 0, &a, NULL), DSS_OK);
    CHECK_STATUS(dss_plan_create_explicit(4, 1, two, 0, &b, NULL), DSS_OK);
    CHECK_EQUAL(dss_plan_hash(a), dss_plan_hash(b));
    dss_plan_destroy(a);
    dss_plan_destroy(b);
}

static void bad_rounds_are_refused_by_name(void) {
    uint32_t group_of[8] = {0, 0, 0, 0, 0, 4, 0, 0};
    dss_plan_t *plan = NULL;
    dss_error_t error;
    CHECK_STATUS(dss_plan_create_explicit(4, 2, group_of, 0, &plan, &error), DSS_ERR_INVALID_ARGUMENT);
    CHECK_CONTAINS(error.text, "round 1 puts rank 1 in group 4");
    CHECK_STATUS(dss_plan_create_explicit(0, 1, group_of, 0, &plan, &error), DSS_ERR_INVALID_ARGUMENT);
    CHECK_CONTAINS(error.text, "world_size is 0");
    CHECK_STATUS(dss_plan_create_explicit(4, 0, group_of, 0, &plan, &error), DSS_ERR_INVALID_ARGUMENT);
    CHECK_CONTAINS(error.text, "0 rounds");
    CHECK_STATUS(dss_plan_create_explicit(4, DSS_PLAN_MAX_PERIOD + 1, group_of, 0, &plan, &error), DSS_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(dss_plan_create_explicit(4, 1, NULL, 0, &plan, &error), DSS_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(dss_plan_create_explicit(4, 1, group_of, 0, NULL, &error), DSS_ERR_INVALID_ARGUMENT);
    CHECK(plan == NULL);
}

static void lists_of_groups_become_numbers(void) {
    static const uint32_t group_counts[] = {2, 3};
    static const uint32_t member_counts[] = {3, 1, 1, 1, 2};
    static const uint32_t members[] = {3, 0, 2, 1, /* round 1 */ 2, 0, 3, 1};
    static const uint32_t expected[] = {0, 1, 0, 0, 1, 2, 0, 2};
    uint32_t group_of[8];
    CHECK_STATUS(dss_rounds_from_groups(4, 2, group_counts, member_counts, members, group_of, NULL), DSS_OK);
    for (int i = 0; i < 8; i++)
        CHECK_EQUAL(group_of[i], expected[i]);
}

static void lists_that_are_no_partition_are_refused_by_rank(void) {
    static const struct {
        uint32_t group_count, member_counts[3], members[5];
        const char *text;
    } rows[] = {
        {2, {2, 1, 0}, {0, 1, 3}, "rank 2 stands in no group of round 0"},
        {2, {2, 3, 0}, {0, 1, 2, 1, 3}, "rank 1 stands in groups 0 and 1 of round 0"},
        {2, {3, 2, 0}, {0, 1, 0, 2, 3}, "rank 0 stands twice in group 0 of round 0"},
        {2, {2, 2, 0}, {0, 1, 2, 4}, "group 1 of round 0 names rank 4, but the ranks are 0 to 3"},
        {3, {2, 0, 2}, {0, 1, 2, 3}, "group 1 of round 0 is empty"},
        {0, {0}, {0}, "rank 0 stands in no group of round 0"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        uint32_t group_of[4];
        dss_error_t error;
        CHECK_STATUS(dss_rounds_from_groups(4, 1, &rows[i].group_count, rows[i].member_counts, rows[i].members, group_of, &error),
                     DSS_ERR_NOT_A_PARTITION);
        CHECK_CONTAINS(error.text, rows[i].text);
    }
    uint32_t group_of[4];
    CHECK_STATUS(dss_rounds_from_groups(4, 1, NULL, NULL, NULL, group_of, NULL), DSS_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(dss_rounds_from_groups(0, 1, group_of, group_of, group_of, group_of, NULL), DSS_ERR_INVALID_ARGUMENT);
}

int main(void) {
    RUN(rounds_come_back_as_given);
    RUN(names_of_groups_do_not_matter);
    RUN(bad_rounds_are_refused_by_name);
    RUN(lists_of_groups_become_numbers);
    RUN(lists_that_are_no_partition_are_refused_by_rank);
}
