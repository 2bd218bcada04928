#include "plans.h"

#include "dense.h"

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

int main(void) {
    RUN(refused_exactly_when_rho_is_one);
    RUN(the_plausible_pattern_is_refused);
}
