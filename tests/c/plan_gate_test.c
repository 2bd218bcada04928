#include "plans.h"

#include "dense.h"
#include "plan_internal.h"

/* rho of raw rounds, with no help from the library. */
static double brute_force_rho(const uint32_t *group_of, uint32_t n, uint32_t round_count) {
    double product[12 * 12];
    double round[12 * 12];
    double next[12 * 12];
    dense_round_of_numbers(group_of, n, product);
    for (uint32_t r = 1; r < round_count; r++) {
        dense_round_of_numbers(group_of + (size_t)r * n, n, round);
        dense_multiply(round, product, n, next);
        memcpy(product, next, sizeof product);
    }
    return dense_distance_to_mean(product, n);
}

/* Spreads labels until nothing changes: slow, obvious, and not union-find. Returns how many labels are left. */
static uint32_t label_parts(const uint32_t *group_of, uint32_t n, uint32_t round_count, uint32_t *label) {
    uint32_t part_count = 0;
    for (uint32_t i = 0; i < n; i++)
        label[i] = i;
    for (int changed = 1; changed;) {
        changed = 0;
        for (uint32_t r = 0; r < round_count; r++)
            for (uint32_t i = 0; i < n; i++)
                for (uint32_t j = 0; j < n; j++)
                    if (group_of[r * n + i] == group_of[r * n + j] && label[j] < label[i]) {
                        label[i] = label[j];
                        changed = 1;
                    }
    }
    for (uint32_t i = 0; i < n; i++)
        part_count += label[i] == i;
    return part_count;
}

static void check_refusal(const uint32_t *group_of, uint32_t n, uint32_t round_count, const dss_error_t *error) {
    uint32_t label[12];
    unsigned a;
    unsigned b;
    unsigned rounds;
    unsigned parts;
    const uint32_t part_count = label_parts(group_of, n, round_count, label);
    CHECK_CONTAINS(error->text, "are never connected");
    CHECK_FOR(sscanf(error->text, "ranks %u and %u are never connected: the union of the %u round", &a, &b, &rounds) == 3 &&
                  sscanf(strstr(error->text, "falls into"), "falls into %u parts", &parts) == 1,
              "%s", error->text);
    CHECK_FOR(a < n && b < n && label[a] != label[b], "%s", error->text);
    CHECK_EQUAL(parts, part_count);
    CHECK_EQUAL(rounds, round_count);
}

static void refused_exactly_when_rho_is_one(void) {
    uint64_t random = 20240701;
    uint32_t refused_count = 0;
    uint32_t accepted_count = 0;
    for (uint32_t trial = 0; trial < 6000; trial++) {
        uint32_t group_of[4 * 12];
        const uint32_t n = 1 + check_random_below(&random, 12);
        const uint32_t round_count = 1 + check_random_below(&random, 4);
        dss_plan_t *plan = NULL;
        dss_error_t error;
        draw_rounds(&random, n, round_count, group_of);
        const double rho = brute_force_rho(group_of, n, round_count);
        const dss_status_t status = dss_plan_create_explicit(n, round_count, group_of, 0, &plan, &error);
        if (rho > 1 - 1e-9) {
            CHECK_STATUS(status, DSS_ERR_DISCONNECTED);
            check_refusal(group_of, n, round_count, &error);
            refused_count++;
        } else {
            CHECK_FOR(status == DSS_OK, "rho %.9f: %s", rho, error.text);
            accepted_count++;
            dss_plan_destroy(plan);
        }
    }
    CHECK_FOR(refused_count > 1000 && accepted_count > 1000, "refused %u, accepted %u", refused_count, accepted_count);
}

/* Four racks of two; a worker of each crosses, always to the same neighbour: looks busy, never mixes. */
static void the_plausible_pattern_is_refused(void) {
    static const uint32_t rounds[2][8] = {{0, 0, 1, 1, 2, 2, 3, 3}, {0, 1, 0, 2, 3, 4, 3, 5}};
    dss_plan_t *plan = NULL;
    dss_error_t error;
    CHECK_STATUS(dss_plan_create_explicit(8, 2, rounds[0], 0, &plan, &error), DSS_ERR_DISCONNECTED);
    CHECK_CONTAINS(error.text, "ranks 0 and 4 are never connected: the union of the 2 rounds falls into 2 parts");
}

/* The group of an earlier rank of the rack, or one of its own. */
static uint32_t draw_local_group(uint64_t *random, const uint32_t *rack_of, const uint32_t *group_of, uint32_t rank) {
    for (;;) {
        const uint32_t other = check_random_below(random, rank + 1);
        if (rack_of[other] == rack_of[rank])
            return other == rank ? rank : group_of[other];
    }
}

/* Racks in any order of ranks, one to three blocks of local rounds, each closed by a crossing of any kind. */
static dss_plan_t *draw_crossing_plan(uint64_t *random) {
    const uint32_t rack_count = 2 + check_random_below(random, 3);
    const uint32_t world_size = rack_count + check_random_below(random, 7);
    const uint32_t block = 2 + check_random_below(random, 3);
    const uint32_t period = block * (1 + check_random_below(random, 3));
    dss_plan_t *plan = NULL;
    CHECK_STATUS(dss_plan_allocate(DSS_PLAN_STRIPED, world_size, period, 1, &plan, NULL), DSS_OK);
    CHECK_STATUS(dss_plan_allocate_racks(plan, rack_count, NULL), DSS_OK);
    for (uint32_t rank = 0; rank < world_size; rank++)
        plan->rack_of[rank] = rank < rack_count ? rank : check_random_below(random, rack_count);
    plan->stripe_count = block;
    plan->delay = 1;
    for (uint32_t round = 0; round < period; round++) {
        uint32_t *group_of = plan->group_of + round * world_size;
        const int crosses = round % block == block - 1;
        plan->crossing[round] = crosses ? (uint8_t)(check_random_below(random, 4) ? 2 : 1) : 0;
        for (uint32_t rank = 0; rank < world_size; rank++) {
            if (crosses)
                group_of[rank] = round / block % 2 ? plan->rack_of[rank] / 2 : plan->rack_of[rank] % 2;
            else
                group_of[rank] = draw_local_group(random, plan->rack_of, group_of, rank);
        }
    }
    return plan;
}

/* Values that workers keep reach others of their rack by local rounds only: those of a rack have to connect it. */
static void kept_values_are_refused_exactly_when_rho_is_one(void) {
    uint64_t random = 12;
    uint32_t refused_count = 0;
    uint32_t accepted_count = 0;
    uint32_t exact_count = 0;
    for (uint32_t trial = 0; trial < 4000; trial++) {
        double product[12 * 12];
        double round[12 * 12];
        double next[12 * 12];
        dss_plan_t *plan = draw_crossing_plan(&random);
        const uint32_t n = plan->world_size;
        dss_error_t error = {DSS_OK, ""};
        for (uint32_t r = 0; r < plan->period; r++) {
            if (plan->crossing[r] == 2)
                dense_correction_of_numbers(plan->group_of + r * n, plan->rack_of, n, round);
            else
                dense_round_of_numbers(plan->group_of + r * n, n, round);
            if (r > 0)
                dense_multiply(round, product, n, next);
            memcpy(product, r > 0 ? next : round, sizeof product);
        }
        const double rho = dense_distance_to_mean(product, n);
        const dss_status_t status = dss_plan_finish(plan, &error);
        if (rho > 1 - 1e-9) {
            CHECK_STATUS(status, DSS_ERR_DISCONNECTED);
            CHECK_CONTAINS(error.text, "are never connected");
            refused_count++;
        } else {
            double found = -1;
            CHECK_FOR(status == DSS_OK, "rho %.9f: %s", rho, error.text);
            CHECK_STATUS(dss_plan_contraction(plan, &found), DSS_OK);
            CHECK_NEAR(found, rho, 1e-7);
            CHECK_FOR((found == 0) == (rho < 1e-7), "%g is not exactly 0", found);
            exact_count += found == 0;
            accepted_count++;
        }
        dss_plan_destroy(plan);
    }
    CHECK_FOR(refused_count > 300 && accepted_count > 300 && exact_count > 100 && exact_count + 100 < accepted_count,
              "refused %u, accepted %u, exact %u", refused_count, accepted_count, exact_count);
}

int main(void) {
    RUN(refused_exactly_when_rho_is_one);
    RUN(kept_values_are_refused_exactly_when_rho_is_one);
    RUN(the_plausible_pattern_is_refused);
}
