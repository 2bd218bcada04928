#include "dense.h"
#include "plan_internal.h"
#include "racks.h"

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
        while (count < 2 * period - 1 && dense_distance_to_mean(product, n) > 1e-9) {
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

/* One number a worker of one stripe, and what its last crossing still owes. */
typedef struct replicas {
    const dss_plan_t *plan;
    double values[64];
    double owed[64];
    uint32_t due; /* in so many steps; 0: nothing is owed */
} replicas_t;

static double mean_of(const replicas_t *replicas, const uint32_t *members, uint32_t member_count, uint32_t rack) {
    double sum = 0;
    double count = 0;
    for (uint32_t i = 0; i < member_count; i++) {
        if (rack != UINT32_MAX && dss_plan_rack_of(replicas->plan, members[i]) != rack)
            continue;
        sum += replicas->values[members[i]];
        count++;
    }
    return sum / count;
}

/* A crossing by its definition: what every worker of a rack is to add, and, unless values are kept, the rack's mean at once. */
static void replicas_cross(replicas_t *replicas, uint32_t round) {
    const dss_plan_t *plan = replicas->plan;
    double rack_means[64];
    CHECK_EQUAL(replicas->due, 0);
    for (uint32_t rank = 0; rank < dss_plan_world_size(plan); rank++) {
        const uint32_t *members;
        uint32_t member_count;
        CHECK_STATUS(dss_plan_group_of_rank(plan, round, rank, &members, &member_count), DSS_OK);
        rack_means[rank] = mean_of(replicas, members, member_count, dss_plan_rack_of(plan, rank));
        replicas->owed[rank] = mean_of(replicas, members, member_count, UINT32_MAX) - rack_means[rank];
    }
    for (uint32_t rank = 0; rank < dss_plan_world_size(plan) && !dss_plan_keeps_values(plan, round); rank++)
        replicas->values[rank] = rack_means[rank];
    replicas->due = dss_plan_delay(plan) + 1;
}

static void replicas_step(replicas_t *replicas, uint32_t round) {
    const dss_plan_t *plan = replicas->plan;
    if (dss_plan_is_crossing(plan, round))
        replicas_cross(replicas, round);
    for (uint32_t group = 0; !dss_plan_is_crossing(plan, round) && group < dss_plan_group_count(plan, round); group++) {
        const uint32_t *members;
        uint32_t member_count;
        CHECK_STATUS(dss_plan_group(plan, round, group, &members, &member_count), DSS_OK);
        const double mean = mean_of(replicas, members, member_count, UINT32_MAX);
        for (uint32_t i = 0; i < member_count; i++)
            replicas->values[members[i]] = mean;
    }
    if (replicas->due == 0 || --replicas->due > 0)
        return;
    for (uint32_t rank = 0; rank < dss_plan_world_size(plan); rank++)
        replicas->values[rank] += replicas->owed[rank];
}

/* Steps from round `first` on until all hold the mean of what they began with. */
static uint32_t replicas_wait(const dss_plan_t *plan, uint32_t first, uint64_t *random) {
    replicas_t replicas = {.plan = plan};
    const uint32_t world_size = dss_plan_world_size(plan);
    double mean = 0;
    for (uint32_t rank = 0; rank < world_size; rank++) {
        replicas.values[rank] = check_random_below(random, 1000000) * 1e-6;
        mean += replicas.values[rank] / world_size;
    }
    for (uint32_t elapsed = 1; elapsed <= dss_plan_period(plan) + dss_plan_delay(plan); elapsed++) {
        double furthest = 0;
        replicas_step(&replicas, (first + elapsed - 1) % dss_plan_period(plan));
        for (uint32_t rank = 0; rank < world_size; rank++)
            furthest = fmax(furthest, fabs(replicas.values[rank] - mean));
        if (furthest < 1e-12)
            return elapsed;
    }
    CHECK_FAIL("from round %u on never", first);
}

/* Step by step, with corrections that come later: local rounds may end after the last correction, or before. */
static void waits_with_delays_are_those_of_replicas(void) {
    uint64_t random = 8;
    uint32_t kept_count = 0;
    uint32_t early_count = 0; /* begun at some round the correction is not the last thing to wait for */
    for (uint32_t trial = 0; trial < 400; trial++) {
        uint32_t sizes[6];
        double values[64];
        double scratch[2 * 6];
        const uint32_t rack_count = 2 + check_random_below(&random, 5);
        for (uint32_t rack = 0; rack < rack_count; rack++)
            sizes[rack] = rack && trial % 2 ? sizes[0] : 1 + check_random_below(&random, 8);
        dss_topology_t *topology = make_racks(rack_count, sizes, 1, 500e6, 100e6);
        dss_plan_params_t params = racks_params(trial % 4 ? DSS_PLAN_STRIPED : DSS_PLAN_HYBRID, topology);
        params.max_period = 1 + check_random_below(&random, 12);
        params.delay = check_random_below(&random, params.max_period);
        dss_plan_t *plan = make_from(&params);
        uint32_t longest = 0;
        for (uint32_t first = 0; first < dss_plan_period(plan); first++) {
            const uint32_t wait = replicas_wait(plan, first, &random);
            CHECK_EQUAL(dss_plan_wait_from(plan, first, dss_plan_period(plan), values, scratch), wait);
            longest = wait > longest ? wait : longest;
            early_count += dss_plan_is_crossing(plan, first) && wait > 1 + dss_plan_delay(plan);
        }
        CHECK_EQUAL(dss_plan_longest_wait(plan), longest);
        kept_count += (uint32_t)dss_plan_keeps_values(plan, dss_plan_stripe_count(plan) - 1);
        dss_plan_destroy(plan);
        dss_topology_destroy(topology);
    }
    CHECK_FOR(kept_count > 50 && kept_count < 350 && early_count > 20, "kept by %u plans, %u early", kept_count, early_count);
}

int main(void) {
    RUN(waits_with_delays_are_those_of_replicas);
    RUN(waits_are_those_of_the_matrices);
    RUN(grids_wait_a_period_and_random_plans_for_ever);
}
