#include "plans.h"

#include "dense.h"

static double contraction(const dss_plan_t *plan) {
    double rho = -1;
    CHECK_STATUS(dss_plan_contraction(plan, &rho), DSS_OK);
    return rho;
}

static void check_against_dense(const dss_plan_t *plan) {
    double *period = dense_period(plan, 0);
    CHECK_NEAR(contraction(plan), dense_distance_to_mean(period, dss_plan_world_size(plan)), 1e-7);
    free(period);
}

/* The two rounds project onto lines 60 degrees apart in the plane of mean zero. */
static void a_case_done_by_hand(void) {
    static const uint32_t rounds[2][3] = {{0, 0, 1}, {0, 1, 1}};
    dss_plan_t *plan = NULL;
    CHECK_STATUS(dss_plan_create_explicit(3, 2, rounds[0], 0, &plan, NULL), DSS_OK);
    CHECK_NEAR(contraction(plan), 0.5, 1e-12);
    dss_plan_destroy(plan);
}

static void agrees_with_brute_force_on_random_rounds(void) {
    uint64_t random = 4;
    uint32_t compared_count = 0;
    for (uint32_t trial = 0; trial < 3000; trial++) {
        uint32_t group_of[6 * 20];
        const uint32_t n = 1 + check_random_below(&random, 20);
        const uint32_t round_count = 1 + check_random_below(&random, 6);
        dss_plan_t *plan = NULL;
        draw_rounds(&random, n, round_count, group_of);
        if (dss_plan_create_explicit(n, round_count, group_of, trial, &plan, NULL) != DSS_OK)
            continue;
        check_against_dense(plan);
        compared_count++;
        dss_plan_destroy(plan);
    }
    CHECK_FOR(compared_count > 1000, "only %u", compared_count);
}

static void agrees_with_brute_force_on_random_plans(void) {
    for (uint32_t n = 2; n <= 48; n++) {
        for (uint32_t group_size = 2; group_size <= 6 && group_size <= n; group_size++) {
            dss_plan_t *plan = make_plan(DSS_PLAN_RANDOM, n, group_size, 0, n);
            check_against_dense(plan);
            dss_plan_destroy(plan);
        }
    }
}

/* Pairs (0 1)(2 3).. then (1 2)(3 4)..: two projections whose smallest angle is pi / n. The top singular values crowd together,
 * which stalls a plain power iteration. */
static void slow_chains_match_their_formula(void) {
    static const uint32_t sizes[] = {3, 8, 31, 64, 500, 2000};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        const uint32_t n = sizes[i];
        uint32_t group_of[2 * 2000];
        dss_plan_t *plan = NULL;
        for (uint32_t rank = 0; rank < n; rank++) {
            group_of[rank] = rank / 2;
            group_of[n + rank] = (rank + 1) / 2;
        }
        CHECK_STATUS(dss_plan_create_explicit(n, 2, group_of, 0, &plan, NULL), DSS_OK);
        CHECK_NEAR(contraction(plan), cos(acos(-1) / n), 1e-10);
        if (n <= 64)
            check_against_dense(plan);
        dss_plan_destroy(plan);
    }
}

static void consensus_is_exactly_zero(void) {
    static const uint32_t sizes[] = {1, 2, 3, 8, 12, 30, 97, 128, 1000, 46656};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        dss_plan_t *plan = make_plan(DSS_PLAN_GRID, sizes[i], 0, 0, i);
        CHECK_FOR(contraction(plan) == 0, "N %u: %g", sizes[i], contraction(plan));
        dss_plan_destroy(plan);
    }
}

/* Every rank prints rho and must print the same. */
static void the_same_plan_gives_the_same_bits(void) {
    dss_plan_t *plan = make_plan(DSS_PLAN_RANDOM, 501, 0, 0, 6);
    const double rho = contraction(plan);
    CHECK_FOR(rho > 0 && rho < 1, "%g", rho);
    CHECK(contraction(plan) == rho);
    dss_plan_destroy(plan);
}

static void null_arguments_are_refused(void) {
    dss_plan_t *plan = make_plan(DSS_PLAN_GRID, 4, 0, 0, 0);
    double rho = 77;
    CHECK_STATUS(dss_plan_contraction(NULL, &rho), DSS_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(dss_plan_contraction(plan, NULL), DSS_ERR_INVALID_ARGUMENT);
    CHECK(rho == 77);
    dss_plan_destroy(plan);
}

static void a_hundred_thousand_ranks_are_quick(void) {
    dss_plan_t *plan = make_plan(DSS_PLAN_RANDOM, 100000, 0, 0, 1);
    const double begin = check_cpu_seconds();
    const double rho = contraction(plan);
    const double took = check_cpu_seconds() - begin;
    printf("   rho of 100000 ranks: %.6f in %.3f s\n", rho, took);
    CHECK_FOR(rho > 0 && rho < 0.01, "%g", rho);
    CHECK_FOR(took < 30, "%.3f s", took);
    dss_plan_destroy(plan);
}

int main(void) {
    RUN(a_case_done_by_hand);
    RUN(agrees_with_brute_force_on_random_rounds);
    RUN(agrees_with_brute_force_on_random_plans);
    RUN(slow_chains_match_their_formula);
    RUN(consensus_is_exactly_zero);
    RUN(the_same_plan_gives_the_same_bits);
    RUN(null_arguments_are_refused);
    RUN(a_hundred_thousand_ranks_are_quick);
}
