#include "dense.h"
#include "racks.h"

static void check_led_rounds(const dss_plan_t *plan, const dss_topology_t *topology, uint32_t led_count) {
    const uint32_t rack_count = dss_topology_rack_count(topology);
    for (uint32_t round = 0; round < led_count; round++) {
        for (uint32_t rank = 0; rank < dss_plan_world_size(plan); rank++) {
            const uint32_t *rack;
            const uint32_t *group;
            uint32_t rack_size;
            uint32_t group_size;
            CHECK_STATUS(dss_topology_rack(topology, dss_topology_rack_of(topology, rank), &rack, &rack_size), DSS_OK);
            CHECK_STATUS(dss_plan_group_of_rank(plan, round, rank, &group, &group_size), DSS_OK);
            CHECK_EQUAL(dss_plan_rack_of(plan, rank), dss_topology_rack_of(topology, rank));
            if (rack[round % rack_size] == rank)
                CHECK_EQUAL(group_size, rack_count);
            else
                CHECK_EQUAL(group_size, rack_size - 1);
            for (uint32_t i = 0; i < group_size && rack[round % rack_size] != rank; i++)
                CHECK_EQUAL(dss_topology_rack_of(topology, group[i]), dss_topology_rack_of(topology, rank));
        }
    }
}

static void leaders_rotate_through_racks_of_any_size(void) {
    static const struct {
        uint32_t rack_count, sizes[5], period, led_count;
    } rows[] = {{2, {4, 4}, 4, 4},    {3, {1, 3, 2}, 3, 3}, {2, {2, 2}, 3, 2},  {4, {2, 2, 2, 2}, 3, 2},
                {3, {1, 1, 1}, 1, 1}, {2, {1, 2}, 3, 2},    {2, {5, 12}, 8, 8}, {5, {3, 9, 1, 2, 4}, 8, 8}};
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        dss_topology_t *topology = make_racks(rows[i].rack_count, rows[i].sizes, 1, 1e9, 1e9);
        dss_plan_t *plan = make_for(DSS_PLAN_LEADERS, topology);
        CHECK_EQUAL(dss_plan_kind(plan), DSS_PLAN_LEADERS);
        CHECK_EQUAL(dss_plan_period(plan), rows[i].period);
        CHECK_EQUAL(dss_plan_stripe_count(plan), rows[i].period);
        CHECK_EQUAL(dss_plan_delay(plan), 0);
        CHECK_EQUAL(dss_plan_rack_count(plan), rows[i].rack_count);
        for (uint32_t round = 0; round < rows[i].period; round++)
            CHECK(!dss_plan_is_crossing(plan, round));
        check_partitions(plan);
        check_led_rounds(plan, topology, rows[i].led_count);
        double *product = dense_period(plan, 0);
        double rho;
        CHECK_STATUS(dss_plan_contraction(plan, &rho), DSS_OK);
        CHECK_NEAR(rho, dense_distance_to_mean(product, dss_plan_world_size(plan)), 1e-6);
        CHECK(rho < 1 - 1e-3);
        free(product);
        dss_plan_destroy(plan);
        dss_topology_destroy(topology);
    }
}

/* Leaders of racks of two would stay among themselves, and a single round leads nobody else. */
static void periods_too_short_to_rotate_are_refused(void) {
    dss_topology_t *twos = make_equal_racks(2, 2, 1e9, 1e9);
    dss_topology_t *fours = make_bed();
    dss_plan_params_t params = racks_params(DSS_PLAN_LEADERS, twos);
    params.max_period = 2;
    refuse_params(&params, DSS_ERR_IMPOSSIBLE, "use max_period=3");
    params = racks_params(DSS_PLAN_LEADERS, fours);
    params.max_period = 1;
    refuse_params(&params, DSS_ERR_IMPOSSIBLE, "use max_period=2");
    params.max_period = 2;
    dss_plan_t *plan = make_from(&params);
    CHECK_EQUAL(dss_plan_period(plan), 2);
    dss_plan_destroy(plan);
    dss_topology_destroy(twos);
    dss_topology_destroy(fours);
}

static void exact_is_one_group_of_all(void) {
    for (uint32_t world_size = 1; world_size < 20; world_size++) {
        dss_plan_t *plan = make_plan(DSS_PLAN_EXACT, world_size, 0, 0, 0);
        CHECK_EQUAL(dss_plan_period(plan), 1);
        CHECK_EQUAL(dss_plan_max_group_size(plan), world_size);
        CHECK_EQUAL(dss_plan_longest_wait(plan), 1);
        CHECK_EQUAL(dss_plan_stripe_count(plan), 1);
        dss_plan_destroy(plan);
    }
}

int main(void) {
    RUN(leaders_rotate_through_racks_of_any_size);
    RUN(periods_too_short_to_rotate_are_refused);
    RUN(exact_is_one_group_of_all);
}
