#include "dense.h"
#include "plans.h"

/* The slow way: the rounds as matrices, multiplied until they are J. */
static uint32_t dense_wait(const dss_plan_t *plan) {
    const uint32_t n = dss_plan_world_size(plan);
    const uint32_t period = dss_plan_period(plan);
    double *product = malloc((size_t)n * n * sizeof *product);
    double *round = malloc((size_t)n * n * sizeof *round);
    double *next = malloc((size_t)n * n * sizeof *next);
    uint32_t longest = 0;
    for (uint32_t first = 0; first < period && longest != UINT32_MAX; first++) {
        uint32_t count = 1;
        dense_round(plan, first, product);
        while (count < period && dense_distance_to_mean(product, n) > 1e-9) {
            dense_round(plan, (first + count++) % period, round);
            dense_multiply(round, product, n, next);
            memcpy(product, next, (size_t)n * n * sizeof *product);
        }
        longest = dense_distance_to_mean(product, n) > 1e-9 ? UINT32_MAX : count > longest ? count : longest;
    }
    free(product);
    free(round);
    free(next);
    return longest == UINT32_MAX ? 0 : longest;
}

static void waits_are_those_of_the_matrices(void) {
    uint64_t random = 11;
    uint32_t exact_count = 0;
    for (uint32_t trial = 0; trial < 400; trial++) {
        uint32_t group_of[4 * 6];
        const uint32_t world_size = 1 + check_random_below(&random, 6);
        const uint32_t round_count = 1 + check_random_below(&random, 4);
        dss_plan_t *plan = NULL;
        draw_rounds(&random, world_size, round_count, group_of);
        if (dss_plan_create_explicit(world_size, round_count, group_of, trial, &plan, NULL) != DSS_OK)
            continue;
        CHECK_EQUAL(dss_plan_longest_wait(plan), dense_wait(plan));
        exact_count += dss_plan_longest_wait(plan) > 0;
        dss_plan_destroy(plan);
    }
    CHECK_FOR(exact_count > 20 && exact_count < 380, "%u", exact_count);
}

static void grids_wait_a_period_and_random_plans_for_ever(void) {
    static const uint32_t sizes[] = {4, 6, 8, 12, 27, 32};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        dss_plan_t *grid = make_plan(DSS_PLAN_GRID, sizes[i], 0, 0, 0);
        dss_plan_t *shuffled = make_plan(DSS_PLAN_RANDOM, sizes[i] + 3, 2, 0, 0);
        CHECK_EQUAL(dss_plan_longest_wait(grid), dss_plan_period(grid));
        CHECK_EQUAL(dss_plan_longest_wait(shuffled), 0);
        dss_plan_destroy(grid);
        dss_plan_destroy(shuffled);
    }
}

int main(void) {
    RUN(waits_are_those_of_the_matrices);
    RUN(grids_wait_a_period_and_random_plans_for_ever);
}
