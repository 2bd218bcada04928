#include "plans.h"

#include "dense.h"

/* The naive answer: every way to write `number` as ordered factors, each at most `cap`; the fewest, then the smallest largest. */
typedef struct best {
    uint32_t count;
    uint32_t largest;
} best_t;

static int better(best_t a, best_t b, int smallest_first) {
    if (b.count == 0)
        return 1;
    if (smallest_first)
        return a.largest < b.largest || (a.largest == b.largest && a.count < b.count);
    return a.count < b.count || (a.count == b.count && a.largest < b.largest);
}

static void search(uint32_t number, uint32_t cap, uint32_t max_count, best_t so_far, int smallest_first, best_t *best) {
    if (number == 1) {
        if (so_far.count && better(so_far, *best, smallest_first))
            *best = so_far;
        return;
    }
    for (uint32_t factor = 2; factor <= cap && factor <= number && so_far.count < max_count; factor++) {
        if (number % factor)
            continue;
        const best_t next = {so_far.count + 1, factor > so_far.largest ? factor : so_far.largest};
        search(number / factor, cap, max_count, next, smallest_first, best);
    }
}

static void grids_have_the_best_factors(void) {
    static const uint32_t max_periods[] = {1, 2, 3, 8};
    for (uint32_t world_size = 2; world_size <= 256; world_size++) {
        for (size_t p = 0; p < sizeof max_periods / sizeof max_periods[0]; p++) {
            for (uint32_t group_size = 0; group_size <= world_size; group_size += group_size ? 1 : 2) {
                const uint32_t most = group_size || max_periods[p] < 3 ? max_periods[p] : 3;
                best_t best = {0, 0};
                search(world_size, group_size ? group_size : world_size, most, (best_t){0, 0}, !group_size, &best);
                dss_plan_t *plan = NULL;
                dss_error_t error;
                const dss_status_t status = try_plan(DSS_PLAN_GRID, world_size, group_size, max_periods[p], 0, &plan, &error);
                if (best.count == 0) {
                    CHECK_STATUS(status, DSS_ERR_IMPOSSIBLE);
                    continue;
                }
                CHECK_FOR(status == DSS_OK, "N %u, g %u: %s", world_size, group_size, error.text);
                CHECK_EQUAL(dss_plan_period(plan), best.count);
                CHECK_EQUAL(dss_plan_max_group_size(plan), best.largest);
                dss_plan_destroy(plan);
            }
        }
    }
}

static void check_consensus(const dss_plan_t *plan) {
    const uint32_t n = dss_plan_world_size(plan);
    for (uint32_t first = 0; first < dss_plan_period(plan); first++) {
        double *product = dense_period(plan, first);
        for (size_t i = 0; i < (size_t)n * n; i++)
            CHECK_NEAR(product[i], 1.0 / n, 1e-14);
        free(product);
    }
}

/* Base-(k+1)'s test, for every N, every group size that gives another grid, and a period begun at any of its rounds. */
static void the_product_of_the_rounds_is_the_mean(void) {
    uint32_t grid_count = 0;
    for (uint32_t world_size = 1; world_size <= 128; world_size++) {
        uint64_t last_hash = 0;
        for (uint32_t group_size = 0; group_size <= world_size; group_size++) {
            dss_plan_t *plan = NULL;
            if ((group_size == 1 && world_size > 1) || try_plan(DSS_PLAN_GRID, world_size, group_size, 0, 0, &plan, NULL) != DSS_OK)
                continue;
            if (dss_plan_hash(plan) != last_hash) {
                check_consensus(plan);
                grid_count++;
            }
            last_hash = dss_plan_hash(plan);
            dss_plan_destroy(plan);
        }
    }
    CHECK_FOR(grid_count > 2 * 128, "%u different grids", grid_count);
}

static void the_refusal_names_what_is_in_the_way_and_a_way_out(void) {
    static const struct {
        uint32_t world_size, group_size, max_period;
        const char *names;
    } rows[] = {
        {14, 3, 0, "prime factor 7"},
        {7, 2, 0, "prime factor 7"},
        {97, 96, 0, "prime factor 97"},
        {32, 2, 3, "needs 5 rounds, but max_period is 3"},
        {8, 4, 1, "needs 2 rounds, but max_period is 1"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        dss_plan_t *plan = NULL;
        dss_error_t error;
        CHECK_STATUS(try_plan(DSS_PLAN_GRID, rows[i].world_size, rows[i].group_size, rows[i].max_period, 0, &plan, &error),
                     DSS_ERR_IMPOSSIBLE);
        CHECK_CONTAINS(error.text, rows[i].names);
        unsigned group_size = 0; /* the last number of the text */
        CHECK_FOR(sscanf(strstr(error.text, "or group_size="), "or group_size=%u", &group_size) == 1, "%s", error.text);
        dss_plan_destroy(make_plan(DSS_PLAN_GRID, rows[i].world_size, group_size, rows[i].max_period, 0));
        unsigned max_period = 0;
        const char *advice = strstr(error.text, "max_period=");
        if (advice && sscanf(advice, "max_period=%u", &max_period) == 1)
            dss_plan_destroy(make_plan(DSS_PLAN_GRID, rows[i].world_size, rows[i].group_size, max_period, 0));
    }
}

static void rounds_come_in_ascending_stride(void) {
    static const uint32_t expected[3][4] = {{0, 1, 2, 3}, {0, 4, 8, 12}, {0, 16, 0, 0}};
    dss_plan_t *plan = make_plan(DSS_PLAN_GRID, 32, 0, 0, 0);
    CHECK_EQUAL(dss_plan_period(plan), 3);
    for (uint32_t round = 0; round < 3; round++) {
        const uint32_t *members;
        uint32_t member_count;
        CHECK_STATUS(dss_plan_group(plan, round, 0, &members, &member_count), DSS_OK);
        CHECK_EQUAL(member_count, round < 2 ? 4 : 2);
        for (uint32_t i = 0; i < member_count; i++)
            CHECK_EQUAL(members[i], expected[round][i]);
    }
    dss_plan_destroy(plan);
}

/* Numbers with the most divisors, powers and primes near the upper end: the search must not take noticeable time. */
static void the_largest_worlds_factorise(void) {
    static const uint32_t sizes[] = {14414400, 1u << 24, 16777213, 9699690, 4782969};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        dss_plan_t *plan = NULL;
        dss_error_t error;
        const double begin = check_cpu_seconds();
        CHECK_STATUS(try_plan(DSS_PLAN_GRID, sizes[i], 2, 1, 0, &plan, &error), DSS_ERR_IMPOSSIBLE);
        CHECK_FOR(check_cpu_seconds() - begin < 2, "N %u", sizes[i]);
    }
}

int main(void) {
    RUN(grids_have_the_best_factors);
    RUN(the_product_of_the_rounds_is_the_mean);
    RUN(the_refusal_names_what_is_in_the_way_and_a_way_out);
    RUN(rounds_come_in_ascending_stride);
    RUN(the_largest_worlds_factorise);
}
