#include "plans.h"

static void refuse(dss_plan_params_t params, dss_status_t expected, const char *part) {
    dss_plan_t *const untouched = (dss_plan_t *)&params;
    dss_plan_t *plan = untouched;
    dss_error_t error = {DSS_OK, ""};
    CHECK_STATUS(dss_plan_create(&params, &plan, &error), expected);
    CHECK_STATUS(error.status, expected);
    CHECK_CONTAINS(error.text, part);
    CHECK_FOR(plan == untouched, "a failing call wrote its output");
    CHECK_STATUS(dss_plan_create(&params, &plan, NULL), expected);
}

static dss_plan_params_t params_of(size_t size, dss_plan_kind_t kind, uint32_t world_size, uint32_t group_size,
                                   uint32_t max_period) {
    return (dss_plan_params_t){
        .params_bytes = size, .kind = kind, .world_size = world_size, .group_size = group_size, .max_period = max_period};
}

static void impossible_params_are_refused_by_name(void) {
    const size_t size = sizeof(dss_plan_params_t);
    refuse(params_of(size - 8, DSS_PLAN_AUTO, 8, 0, 0), DSS_ERR_INVALID_ARGUMENT, "params_bytes is");
    refuse(params_of(size, DSS_PLAN_EXPLICIT, 8, 0, 0), DSS_ERR_INVALID_ARGUMENT, "plan kind is 3");
    refuse(params_of(size, (dss_plan_kind_t)77, 8, 0, 0), DSS_ERR_INVALID_ARGUMENT, "plan kind is 77");
    refuse(params_of(size, DSS_PLAN_AUTO, 0, 0, 0), DSS_ERR_INVALID_ARGUMENT, "world_size is 0");
    refuse(params_of(size, DSS_PLAN_AUTO, (1u << 24) + 1, 0, 0), DSS_ERR_INVALID_ARGUMENT, "world_size is 16777217");
    refuse(params_of(size, DSS_PLAN_AUTO, 8, 9, 0), DSS_ERR_INVALID_ARGUMENT, "group_size is 9 but world_size is 8");
    refuse(params_of(size, DSS_PLAN_AUTO, 8, 1, 0), DSS_ERR_DISCONNECTED, "group_size is 1");
    refuse(params_of(size, DSS_PLAN_AUTO, 8, 0, 1025), DSS_ERR_INVALID_ARGUMENT, "max_period is 1025");
    dss_plan_t *plan = NULL;
    CHECK_STATUS(dss_plan_create(NULL, &plan, NULL), DSS_ERR_INVALID_ARGUMENT);
    const dss_plan_params_t good = params_of(size, DSS_PLAN_AUTO, 8, 0, 0);
    CHECK_STATUS(dss_plan_create(&good, NULL, NULL), DSS_ERR_INVALID_ARGUMENT);
    dss_plan_destroy(NULL);
}

/* Pairs while three rounds suffice, else the smallest size that needs at most three; a grid unless it needs far larger groups. */
static void auto_chooses_as_documented(void) {
    static const struct {
        uint32_t world_size, group_size;
        dss_plan_kind_t kind;
        uint32_t period, max_group_size;
    } rows[] = {
        {1, 0, DSS_PLAN_GRID, 1, 1},    {2, 0, DSS_PLAN_GRID, 1, 2},    {3, 0, DSS_PLAN_GRID, 1, 3},
        {4, 0, DSS_PLAN_GRID, 2, 2},    {5, 0, DSS_PLAN_RANDOM, 6, 3},  {6, 0, DSS_PLAN_GRID, 2, 3},
        {7, 0, DSS_PLAN_RANDOM, 6, 3},  {8, 0, DSS_PLAN_GRID, 3, 2},    {9, 0, DSS_PLAN_GRID, 2, 3},
        {12, 0, DSS_PLAN_GRID, 3, 3},   {13, 0, DSS_PLAN_RANDOM, 6, 4}, {14, 0, DSS_PLAN_RANDOM, 6, 4},
        {16, 0, DSS_PLAN_GRID, 2, 4},   {32, 0, DSS_PLAN_GRID, 3, 4},   {64, 0, DSS_PLAN_GRID, 3, 4},
        {32, 8, DSS_PLAN_GRID, 2, 8},   {32, 2, DSS_PLAN_GRID, 5, 2},   {10, 2, DSS_PLAN_RANDOM, 8, 2},
        {10, 10, DSS_PLAN_GRID, 1, 10}, {7, 7, DSS_PLAN_GRID, 1, 7},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        dss_plan_t *plan = make_plan(DSS_PLAN_AUTO, rows[i].world_size, rows[i].group_size, 0, 0);
        CHECK_FOR(dss_plan_kind(plan) == rows[i].kind && dss_plan_period(plan) == rows[i].period &&
                      dss_plan_max_group_size(plan) == rows[i].max_group_size,
                  "N %u, g %u: kind %d, period %u, largest group %u", rows[i].world_size, rows[i].group_size,
                  (int)dss_plan_kind(plan), dss_plan_period(plan), dss_plan_max_group_size(plan));
        dss_plan_destroy(plan);
    }
}

static void partitions_are_valid_for_all_sizes(void) {
    static const dss_plan_kind_t kinds[] = {DSS_PLAN_AUTO, DSS_PLAN_GRID, DSS_PLAN_RANDOM};
    uint32_t impossible_count = 0;
    for (uint32_t world_size = 1; world_size <= 256; world_size++) {
        for (uint32_t group_size = 0; group_size <= world_size; group_size++) {
            if (group_size == 1 && world_size > 1)
                continue;
            for (int k = 0; k < 3; k++) {
                dss_plan_t *plan = NULL;
                dss_error_t error;
                const dss_status_t status = try_plan(kinds[k], world_size, group_size, 0, world_size, &plan, &error);
                if (status == DSS_ERR_IMPOSSIBLE && kinds[k] == DSS_PLAN_GRID && group_size) {
                    impossible_count++;
                    continue;
                }
                CHECK_FOR(status == DSS_OK, "kind %d, N %u, g %u: %s", (int)kinds[k], world_size, group_size, error.text);
                CHECK_EQUAL(dss_plan_world_size(plan), world_size);
                CHECK(dss_plan_period(plan) >= 1 && dss_plan_period(plan) <= 8);
                check_partitions(plan);
                dss_plan_destroy(plan);
            }
        }
    }
    CHECK_FOR(impossible_count > 0 && impossible_count < 256 * 128, "%u", impossible_count);
}

static void accessors_refuse_what_is_out_of_range(void) {
    dss_plan_t *plan = make_plan(DSS_PLAN_GRID, 4, 2, 0, 0);
    const uint32_t *members = NULL;
    uint32_t member_count = 77;
    CHECK_STATUS(dss_plan_group(plan, 2, 0, &members, &member_count), DSS_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(dss_plan_group(plan, 0, 2, &members, &member_count), DSS_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(dss_plan_group(NULL, 0, 0, &members, &member_count), DSS_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(dss_plan_group(plan, 0, 0, NULL, &member_count), DSS_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(dss_plan_group(plan, 0, 0, &members, NULL), DSS_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(dss_plan_group_of_rank(plan, 2, 0, &members, &member_count), DSS_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(dss_plan_group_of_rank(plan, 0, 4, &members, &member_count), DSS_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(dss_plan_group_of_rank(NULL, 0, 0, &members, &member_count), DSS_ERR_INVALID_ARGUMENT);
    CHECK_FOR(members == NULL && member_count == 77, "a failing call wrote its outputs");
    CHECK_EQUAL(dss_plan_group_count(plan, 2), 0);
    dss_plan_destroy(plan);
}

/* Two installations must make the same plan from the same options; these hashes pin that down for good. */
static void plans_are_reproducible(void) {
    static const struct {
        dss_plan_kind_t kind;
        uint32_t world_size;
        uint64_t seed, hash;
    } rows[] = {
        {DSS_PLAN_GRID, 8, 0, 0x50592a241dd42d70u},
        {DSS_PLAN_RANDOM, 7, 0, 0x9996393efa2dbe7fu},
        {DSS_PLAN_RANDOM, 1000, 12345, 0xfb07c436fcfe308fu},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        dss_plan_t *plan = make_plan(rows[i].kind, rows[i].world_size, 0, 0, rows[i].seed);
        CHECK_EQUAL(dss_plan_hash(plan), rows[i].hash);
        CHECK_EQUAL(dss_plan_seed(plan), rows[i].seed);
        dss_plan_destroy(plan);
    }
}

static void seeds_change_random_plans_and_every_hash(void) {
    dss_plan_t *one = make_plan(DSS_PLAN_RANDOM, 16, 4, 0, 1);
    dss_plan_t *two = make_plan(DSS_PLAN_RANDOM, 16, 4, 0, 2);
    uint32_t different_count = 0;
    for (uint32_t round = 0; round < dss_plan_period(one); round++) {
        for (uint32_t rank = 0; rank < 16; rank++) {
            const uint32_t *a;
            const uint32_t *b;
            uint32_t a_count;
            uint32_t b_count;
            CHECK_STATUS(dss_plan_group_of_rank(one, round, rank, &a, &a_count), DSS_OK);
            CHECK_STATUS(dss_plan_group_of_rank(two, round, rank, &b, &b_count), DSS_OK);
            different_count += a_count != b_count || memcmp(a, b, a_count * sizeof *a) != 0;
        }
    }
    CHECK_FOR(different_count > 48, "%u of 96 groups differ", different_count);
    CHECK(dss_plan_hash(one) != dss_plan_hash(two));
    dss_plan_destroy(one);
    dss_plan_destroy(two);
    one = make_plan(DSS_PLAN_GRID, 16, 4, 0, 1);
    two = make_plan(DSS_PLAN_GRID, 16, 4, 0, 2); /* the order of its calls differs */
    CHECK(dss_plan_hash(one) != dss_plan_hash(two));
    dss_plan_destroy(one);
    dss_plan_destroy(two);
}

/* Any P stripes in a row take P different rounds, as do P steps, also where the 64-bit step is about to wrap. */
static void stripes_and_steps_walk_the_rounds(void) {
    dss_plan_t *plan = make_plan(DSS_PLAN_GRID, 12, 3, 0, 0);
    const uint32_t period = dss_plan_period(plan);
    static const uint64_t steps[] = {0, 1, 17, 1000003, UINT64_MAX - 3};
    CHECK_EQUAL(period, 3);
    for (size_t i = 0; i < sizeof steps / sizeof steps[0]; i++) {
        for (uint32_t stripe = 0; stripe < 7; stripe++) {
            const uint32_t round = dss_plan_round_at(plan, steps[i], stripe);
            CHECK_EQUAL(round, (steps[i] % period + stripe) % period);
            CHECK_EQUAL(dss_plan_round_at(plan, steps[i] + 1, stripe), (round + 1) % period);
        }
        CHECK_EQUAL(dss_plan_round_at(plan, steps[i], UINT32_MAX), (steps[i] % period + UINT32_MAX % period) % period);
    }
    dss_plan_destroy(plan);
}

static void every_block_of_calls_is_a_permutation(void) {
    static const uint32_t periods[] = {1, 2, 3, 5, 8, 31};
    for (size_t i = 0; i < sizeof periods / sizeof periods[0]; i++) {
        const uint32_t period = periods[i];
        uint32_t *group_of = calloc((size_t)period * 2, sizeof *group_of);
        dss_plan_t *plan = NULL;
        uint32_t first_seen = 0; /* rounds seen at the first place of a block */
        CHECK_STATUS(dss_plan_create_explicit(2, period, group_of, 5, &plan, NULL), DSS_OK);
        for (uint64_t block = 0; block < 400; block++) {
            uint32_t seen = 0;
            const uint64_t call = (block < 200 ? block : UINT64_MAX / period - block) * period;
            for (uint32_t j = 0; j < period; j++)
                seen |= 1u << dss_plan_round_of_call(plan, call + j);
            CHECK_EQUAL(seen, period == 32 ? UINT32_MAX : (1u << period) - 1);
            first_seen |= 1u << dss_plan_round_of_call(plan, call);
        }
        CHECK_EQUAL(first_seen, (1u << period) - 1);
        dss_plan_destroy(plan);
        free(group_of);
    }
}

/* A tensor that is every stride-th call must still meet all rounds: with 40 P of its calls, one missing is out of the question. */
static void every_stride_of_calls_meets_every_round(void) {
    dss_plan_t *plan = make_plan(DSS_PLAN_RANDOM, 11, 2, 8, 3);
    const uint32_t period = dss_plan_period(plan);
    CHECK_EQUAL(period, 8);
    for (uint32_t stride = 1; stride <= 4 * period; stride++) {
        for (uint32_t offset = 0; offset < stride; offset++) {
            uint32_t seen = 0;
            for (uint32_t i = 0; i < 40 * period; i++)
                seen |= 1u << dss_plan_round_of_call(plan, (uint64_t)offset + (uint64_t)i * stride);
            CHECK_FOR(seen == (1u << period) - 1, "stride %u, offset %u: rounds %#x", stride, offset, seen);
        }
    }
    dss_plan_destroy(plan);
}

/* The bar is a second; the assertion leaves room for sanitizers and busy machines. */
static void a_hundred_thousand_ranks_are_quick(void) {
    static const dss_plan_kind_t kinds[] = {DSS_PLAN_AUTO, DSS_PLAN_GRID, DSS_PLAN_RANDOM};
    for (int k = 0; k < 3; k++) {
        const double begin = check_cpu_seconds();
        dss_plan_t *plan = make_plan(kinds[k], 100000, 0, 0, 1);
        const double took = check_cpu_seconds() - begin;
        printf("   plan kind %d for 100000 ranks: %.3f s\n", (int)kinds[k], took);
        CHECK_FOR(took < 5, "kind %d took %.3f s", (int)kinds[k], took);
        check_partitions(plan);
        dss_plan_destroy(plan);
    }
}

int main(void) {
    RUN(impossible_params_are_refused_by_name);
    RUN(auto_chooses_as_documented);
    RUN(partitions_are_valid_for_all_sizes);
    RUN(accessors_refuse_what_is_out_of_range);
    RUN(plans_are_reproducible);
    RUN(seeds_change_random_plans_and_every_hash);
    RUN(stripes_and_steps_walk_the_rounds);
    RUN(every_block_of_calls_is_a_permutation);
    RUN(every_stride_of_calls_meets_every_round);
    RUN(a_hundred_thousand_ranks_are_quick);
}
