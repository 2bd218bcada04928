/* The cost model against formulas written out by hand. M: the model's bytes with headers; rates of the bed: NIC 500, uplink 100. */
#include "racks.h"

#define M ((double)MODEL_BYTES * DSS_WIRE_OVERHEAD)
#define NIC (500 * MBIT)
#define UPLINK (100 * MBIT)

/* Times of one round as the busiest link has them. */
static void check_round(const dss_plan_t *plan, const dss_topology_t *topology, uint32_t round, double nic_s, double uplink_s) {
    double nic_bytes[16];
    double uplink_bytes[4];
    double nic_most = 0;
    double uplink_most = 0;
    CHECK_STATUS(dss_cost_link_bytes(plan, topology, MODEL_BYTES, round, nic_bytes, uplink_bytes, NULL), DSS_OK);
    for (uint32_t host = 0; host < dss_topology_host_count(topology); host++)
        nic_most = fmax(nic_most, nic_bytes[host] / NIC);
    for (uint32_t rack = 0; rack < dss_topology_rack_count(topology); rack++)
        uplink_most = fmax(uplink_most, uplink_bytes[rack] / UPLINK);
    CHECK_NEAR(nic_most, nic_s, 1e-9);
    CHECK_NEAR(uplink_most, uplink_s, 1e-9);
}

static void rounds_cost_what_the_bed_measures(void) {
    static const uint32_t rounds[] = {
        0, 0, 1, 1, 2, 2, 3, 3, /* pairs inside racks */
        0, 1, 2, 3, 0, 4, 5, 6, /* one crossing pair */
        0, 1, 2, 3, 0, 1, 2, 3, /* all pairs crossing */
        0, 0, 0, 0, 0, 0, 0, 0, /* all */
        0, 0, 0, 0, 1, 1, 1, 1, /* racks */
    };
    dss_topology_t *bed = make_bed();
    dss_plan_t *plan = NULL;
    CHECK_STATUS(dss_plan_create_explicit(8, 5, rounds, 0, &plan, NULL), DSS_OK);
    check_round(plan, bed, 0, M / NIC, 0);
    check_round(plan, bed, 1, M / NIC, M / UPLINK);
    check_round(plan, bed, 2, M / NIC, 4 * M / UPLINK);
    check_round(plan, bed, 3, (2 * 0.75 + 0.25) * M / NIC, M / UPLINK);
    check_round(plan, bed, 4, 2 * 0.75 * M / NIC, 0);
    CHECK_NEAR(M / NIC, 0.56, 0.005);
    CHECK_NEAR(M / UPLINK, 2.81, 0.005);
    /* A step sends a fifth of the model through each round, all at the same time. */
    const dss_cost_t cost = cost_for(plan, bed, 0);
    CHECK_NEAR(cost.sync_s, 6 * M / 5 / UPLINK, 1e-9);
    CHECK_NEAR(cost.bound_s, cost.sync_s, 1e-9);
    CHECK_EQUAL(cost.busiest, DSS_LINK_UPLINK);
    CHECK_NEAR(cost.busiest_bytes, 6 * M / 5, 1);
    dss_plan_destroy(plan);
    dss_topology_destroy(bed);
}

/* One local round does not bring four to agreement: a pair, then the rack's mean (2 * 3/4) at once and the exchange (1/4) and
 * spread (3/4) of the other racks' in the back. */
static void a_delayed_crossing_costs_its_rack_mean_at_once_and_the_rest_later(void) {
    dss_topology_t *fast = make_equal_racks(2, 4, 500e6, 1000e6);
    dss_plan_params_t params = racks_params(DSS_PLAN_STRIPED, fast);
    params.max_period = 2;
    params.delay = 1;
    dss_plan_t *plan = make_from(&params);
    CHECK_EQUAL(dss_plan_stripe_count(plan), 2);
    CHECK(dss_plan_is_crossing(plan, 1) && !dss_plan_keeps_values(plan, 1));
    dss_cost_t cost = cost_for(plan, fast, 0);
    CHECK_NEAR(cost.foreground_s, (1 + 1.5) / 2 * M / NIC, 1e-9);
    CHECK_NEAR(cost.background_s, 1.0 / 2 * M / NIC, 1e-9); /* on the uplink half of that */
    CHECK_NEAR(cost.bound_s, (1 + 1.5 + 1) / 2 * M / NIC, 1e-9);
    CHECK_NEAR(cost.sync_s, cost.bound_s, 1e-9);
    CHECK_NEAR(cost.sent_bytes, (1 + 1.5 + 1) / 2 * (double)MODEL_BYTES, 1);
    CHECK_EQUAL(cost.busiest, DSS_LINK_NIC);
    cost = cost_for(plan, fast, 1); /* compute hides the background */
    CHECK_NEAR(cost.sync_s, cost.foreground_s, 1e-9);
    dss_plan_destroy(plan);
    dss_topology_destroy(fast);
}

/* P - 1 pairs; of the crossing, the way in (3/4), the exchange (1/4) and the way out (3/4), nothing is waited for. */
static void a_crossing_of_kept_values_costs_nothing_at_once(void) {
    dss_topology_t *bed = make_bed();
    dss_plan_params_t params = racks_params(DSS_PLAN_STRIPED, bed);
    params.delay = 7; /* so that P is 8 */
    dss_plan_t *plan = make_from(&params);
    CHECK_EQUAL(dss_plan_stripe_count(plan), 8);
    dss_cost_t cost = cost_for(plan, bed, 0);
    CHECK(dss_plan_keeps_values(plan, 7));
    CHECK_NEAR(cost.foreground_s, 7.0 / 8 * M / NIC, 1e-9);
    CHECK_NEAR(cost.background_s, M / 8 / UPLINK, 1e-9);
    CHECK_NEAR(cost.bound_s, (7 + 1.75) / 8 * M / NIC, 1e-9);
    CHECK_NEAR(cost.sync_s, cost.bound_s, 1e-9);
    CHECK_NEAR(cost.sync_s, 0.61, 0.01);
    CHECK_NEAR(cost.sent_bytes, (7 + 1.75) / 8 * (double)MODEL_BYTES, 1);
    CHECK_EQUAL(cost.busiest, DSS_LINK_NIC);
    CHECK_EQUAL(cost.longest_wait_steps, 8 + 7);
    cost = cost_for(plan, bed, 1); /* compute hides the background */
    CHECK_NEAR(cost.sync_s, cost.foreground_s, 1e-9);
    dss_plan_destroy(plan);
    params.delay = 0;
    plan = make_from(&params);
    CHECK(!dss_plan_keeps_values(plan, dss_plan_period(plan) - 1));
    const double stripes = dss_plan_stripe_count(plan);
    cost = cost_for(plan, bed, 1); /* nothing is hidden */
    CHECK_NEAR(cost.sync_s, fmax((stripes - 1 + 1.75) / stripes * M / NIC, M / stripes / UPLINK), 1e-9);
    CHECK_NEAR(cost.background_s, 0, 0);
    dss_plan_destroy(plan);
    dss_topology_destroy(bed);
}

/* Two racks of two hosts of two workers. Latency counts each message on its way: in a host, in a rack, and there and back between
 * the racks; bytes through the memory of a host are those of both ways. */
static void latencies_and_memory_of_a_crossing(void) {
    static const uint32_t host_of[] = {0, 0, 1, 1, 2, 2, 3, 3};
    static const uint32_t rack_of[] = {0, 0, 1, 1};
    static const dss_link_t nics[] = {{1e12, 1e-3}, {1e12, 1e-3}, {1e12, 1e-3}, {1e12, 1e-3}};
    static const dss_link_t uplinks[] = {{1e12, 5e-3}, {1e12, 5e-3}};
    const dss_topology_params_t cluster = {sizeof cluster, 8, 4, 2, host_of, rack_of, nics, uplinks, {1e9, 1e-4}};
    const double memory_s = (double)MODEL_BYTES / 1e9; /* one worker's bytes, once */
    const double inside_s = 1e-4 + 2e-3;
    const double between_s = 2 * (2e-3 + 1e-2);
    dss_topology_t *topology = NULL;
    CHECK_STATUS(dss_topology_create(&cluster, &topology, NULL), DSS_OK);
    for (uint32_t period = 2; period <= 3; period++) {
        dss_plan_params_t params = racks_params(DSS_PLAN_STRIPED, topology);
        params.max_period = period;
        params.delay = period - 1; /* so that P is that */
        dss_plan_t *plan = make_from(&params);
        const dss_cost_t cost = cost_for(plan, topology, 0);
        const int kept = period == 3; /* a round in hosts and one across */
        const double at_once_s = (kept ? 2 : 4) * memory_s / period;
        const double later_s = (kept ? 2 : 1) * memory_s / period;
        CHECK_EQUAL(dss_plan_keeps_values(plan, period - 1), kept);
        CHECK_NEAR(cost.foreground_s, at_once_s + 2 * (kept ? 2e-3 : inside_s), 1e-9);
        CHECK_NEAR(cost.background_s, later_s + (kept ? 2 : 1) * inside_s + between_s, 1e-9);
        CHECK_NEAR(cost.bound_s, at_once_s + later_s, 1e-9);
        dss_plan_destroy(plan);
    }
    dss_topology_destroy(topology);
}

/* Uplinks so slow that a crossing takes longer than its delay's steps: then the steps wait for it, or for the uplink. */
static void what_a_delay_cannot_hide_is_waited_for(void) {
    dss_topology_t *slow = make_equal_racks(2, 4, 500e6, 10e6);
    dss_plan_params_t params = racks_params(DSS_PLAN_STRIPED, slow);
    params.delay = 1;
    params.max_period = 2;
    dss_plan_t *plan = make_from(&params);
    const dss_cost_t cost = cost_for(plan, slow, 3);
    CHECK_EQUAL(dss_plan_stripe_count(plan), 2);
    CHECK_NEAR(cost.background_s, M / 2 / (10 * MBIT), 1e-9);
    CHECK_NEAR(cost.sync_s, cost.background_s - 3, 1e-9);
    dss_plan_destroy(plan);
    dss_topology_destroy(slow);
}

/* A small model is one stripe, which takes one round a step: steps differ, and the mean counts. */
static void a_model_of_one_stripe_takes_one_round_a_step(void) {
    dss_topology_t *bed = make_bed();
    dss_plan_params_t params = racks_params(DSS_PLAN_STRIPED, bed);
    params.delay = 7;
    dss_plan_t *plan = make_from(&params);
    dss_cost_t cost;
    const double bytes = 1000 * DSS_WIRE_OVERHEAD;
    CHECK_STATUS(dss_cost_of_plan(plan, bed, 1000, 0, &cost, NULL), DSS_OK);
    CHECK_NEAR(cost.foreground_s, 7.0 / 8 * bytes / NIC, 1e-12);
    CHECK_NEAR(cost.background_s, bytes / UPLINK, 1e-12);
    CHECK_NEAR(cost.bound_s, (7 + 1.75) / 8 * bytes / NIC, 1e-12);
    dss_plan_destroy(plan);
    dss_topology_destroy(bed);
}

static void hosts_average_in_memory_first(void) {
    static const uint32_t host_of[] = {0, 0, 0, 1, 1, 1};
    static const uint32_t rack_of[] = {0, 0};
    static const dss_link_t nics[] = {{1e9, 3e-3}, {5e8, 1e-3}};
    static const dss_link_t uplink = {1e6, 1};
    const dss_topology_params_t params = {sizeof params, 6, 2, 1, host_of, rack_of, nics, &uplink, {2e8, 1e-4}};
    dss_topology_t *topology = NULL;
    CHECK_STATUS(dss_topology_create(&params, &topology, NULL), DSS_OK);
    dss_plan_t *plan = make_plan(DSS_PLAN_EXACT, 6, 0, 0, 0);
    const dss_cost_t cost = cost_for(plan, topology, 0);
    const double memory_bytes = 2 * (3 - 1) * (double)MODEL_BYTES; /* of all workers of a host */
    CHECK_EQUAL(cost.busiest, DSS_LINK_MEMORY);
    CHECK_NEAR(cost.busiest_bytes, memory_bytes, 1);
    CHECK_NEAR(cost.bound_s, memory_bytes / 2e8, 1e-9);
    CHECK_NEAR(cost.sync_s, memory_bytes / 2e8 + 2 * 2 * 1e-4 + 2 * (3e-3 + 3e-3), 1e-9);
    CHECK_NEAR(cost.sent_bytes, (2 * memory_bytes + 2 * (double)MODEL_BYTES) / 6, 1);
    double nic_bytes[2];
    CHECK_STATUS(dss_cost_link_bytes(plan, topology, MODEL_BYTES, UINT32_MAX, nic_bytes, NULL, NULL), DSS_OK);
    CHECK_NEAR(nic_bytes[0], M, 1);
    dss_plan_destroy(plan);
    dss_topology_destroy(topology);
}

/* Each rack's uplink carries 2(R-1)/R of the model however many hosts it has, and they share that. */
static void unequal_racks_share_their_uplinks(void) {
    static const uint32_t sizes[] = {1, 2, 5};
    dss_topology_t *topology = make_racks(3, sizes, 1, 500e6, 100e6);
    dss_plan_t *plan = make_plan(DSS_PLAN_EXACT, 8, 0, 0, 0);
    double nic_bytes[8];
    double uplink_bytes[3];
    CHECK_STATUS(dss_cost_link_bytes(plan, topology, MODEL_BYTES, UINT32_MAX, nic_bytes, uplink_bytes, NULL), DSS_OK);
    for (uint32_t rack = 0; rack < 3; rack++)
        CHECK_NEAR(uplink_bytes[rack], 4.0 / 3 * M, 1);
    CHECK_NEAR(nic_bytes[0], 4.0 / 3 * M, 1);
    CHECK_NEAR(nic_bytes[2], (1 + 2.0 / 3) * M, 1);
    CHECK_NEAR(nic_bytes[7], (8.0 / 5 + 4.0 / 15) * M, 1);
    dss_plan_destroy(plan);
    dss_topology_destroy(topology);
}

/* The bytes of a mean step are the mean of the rounds' bytes, and those of the busiest link those of the cost. */
static void link_bytes_agree_with_the_cost(void) {
    dss_topology_t *topology = make_equal_racks(4, 3, 500e6, 100e6);
    static const dss_plan_kind_t kinds[] = {DSS_PLAN_GRID, DSS_PLAN_LEADERS, DSS_PLAN_STRIPED, DSS_PLAN_HYBRID};
    for (int k = 0; k < 4; k++) {
        dss_plan_t *plan = make_for(kinds[k], topology);
        const dss_cost_t cost = cost_for(plan, topology, 0);
        double mean[12];
        double sum[12] = {0};
        double of_round[12];
        double uplinks[4];
        for (uint32_t round = 0; round < dss_plan_period(plan); round++) {
            CHECK_STATUS(dss_cost_link_bytes(plan, topology, MODEL_BYTES, round, of_round, NULL, NULL), DSS_OK);
            for (uint32_t host = 0; host < 12; host++)
                sum[host] += of_round[host] / dss_plan_period(plan);
        }
        CHECK_STATUS(dss_cost_link_bytes(plan, topology, MODEL_BYTES, UINT32_MAX, mean, uplinks, NULL), DSS_OK);
        for (uint32_t host = 0; host < 12; host++)
            CHECK_NEAR(mean[host], sum[host], 1);
        CHECK_NEAR(cost.busiest == DSS_LINK_NIC ? mean[cost.busiest_index] : uplinks[cost.busiest_index], cost.busiest_bytes, 1);
        dss_plan_destroy(plan);
    }
    dss_topology_destroy(topology);
}

static void unknown_rates_cost_nothing(void) {
    dss_topology_t *topology = make_equal_racks(2, 4, INFINITY, INFINITY);
    dss_plan_t *plan = make_plan(DSS_PLAN_EXACT, 8, 0, 0, 0);
    const dss_cost_t cost = cost_for(plan, topology, 1);
    CHECK_NEAR(cost.sync_s, 0, 0);
    CHECK_NEAR(cost.bound_s, 0, 0);
    CHECK(cost.busiest_bytes >= 0);
    dss_plan_destroy(plan);
    dss_topology_destroy(topology);
}

static void refuse(const dss_plan_t *plan, const dss_topology_t *topology, double compute_s, const char *part) {
    dss_cost_t cost = {.sync_s = 77};
    dss_error_t error;
    CHECK_STATUS(dss_cost_of_plan(plan, topology, MODEL_BYTES, compute_s, &cost, &error), DSS_ERR_INVALID_ARGUMENT);
    CHECK_CONTAINS(error.text, part);
    CHECK_NEAR(cost.sync_s, 77, 0);
}

static void what_does_not_fit_together_is_refused(void) {
    static const uint32_t sizes[] = {3, 5};
    dss_topology_t *bed = make_bed();
    dss_topology_t *other = make_racks(2, sizes, 1, 1e9, 1e9);
    dss_topology_t *larger = make_equal_racks(3, 4, 1e9, 1e9);
    dss_plan_t *plan = make_for(DSS_PLAN_STRIPED, bed);
    dss_error_t error;
    refuse(plan, other, 0, "rank 3 in rack 0, the topology in rack 1");
    refuse(plan, larger, 0, "for 8 workers, but the topology holds 12");
    refuse(plan, bed, -1, "compute_s is -1");
    refuse(plan, bed, NAN, "compute_s is");
    refuse(plan, NULL, 0, "topology is NULL");
    refuse(NULL, bed, 0, "plan is NULL");
    CHECK_STATUS(dss_cost_of_plan(plan, bed, 1, 0, NULL, NULL), DSS_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(dss_cost_link_bytes(plan, bed, 1, dss_plan_period(plan), NULL, NULL, &error), DSS_ERR_INVALID_ARGUMENT);
    CHECK_CONTAINS(error.text, "but the plan has");
    dss_plan_destroy(plan);
    dss_topology_destroy(bed);
    dss_topology_destroy(other);
    dss_topology_destroy(larger);
}

int main(void) {
    RUN(rounds_cost_what_the_bed_measures);
    RUN(a_delayed_crossing_costs_its_rack_mean_at_once_and_the_rest_later);
    RUN(a_crossing_of_kept_values_costs_nothing_at_once);
    RUN(latencies_and_memory_of_a_crossing);
    RUN(what_a_delay_cannot_hide_is_waited_for);
    RUN(a_model_of_one_stripe_takes_one_round_a_step);
    RUN(hosts_average_in_memory_first);
    RUN(unequal_racks_share_their_uplinks);
    RUN(link_bytes_agree_with_the_cost);
    RUN(unknown_rates_cost_nothing);
    RUN(what_does_not_fit_together_is_refused);
}
