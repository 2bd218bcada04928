/* racks.h: topologies and plans around racks, for tests. */
#ifndef DSS_TEST_RACKS_H
#define DSS_TEST_RACKS_H

#include "plans.h"

#define MBIT (1e6 / 8)
#define RACKS_MAX_WORKERS 16384u
#define MODEL_BYTES ((uint64_t)32 << 20)

/* Racks of rack_sizes[] hosts, workers_each workers on each, ranks in a row; rates in bit/s. */
static inline dss_topology_t *make_racks(uint32_t rack_count, const uint32_t *rack_sizes, uint32_t workers_each, double nic,
                                         double uplink) {
    static uint32_t host_of[RACKS_MAX_WORKERS];
    static uint32_t rack_of[RACKS_MAX_WORKERS];
    static dss_link_t nics[RACKS_MAX_WORKERS];
    static dss_link_t uplinks[RACKS_MAX_WORKERS];
    uint32_t host_count = 0;
    dss_topology_t *topology = NULL;
    dss_error_t error;
    for (uint32_t rack = 0; rack < rack_count; rack++) {
        uplinks[rack] = (dss_link_t){uplink / 8, 0};
        for (uint32_t i = 0; i < rack_sizes[rack]; i++) {
            nics[host_count] = (dss_link_t){nic / 8, 0};
            rack_of[host_count++] = rack;
        }
    }
    CHECK(host_count * workers_each <= RACKS_MAX_WORKERS);
    for (uint32_t rank = 0; rank < host_count * workers_each; rank++)
        host_of[rank] = rank / workers_each;
    const dss_topology_params_t params = {
        sizeof params, host_count * workers_each, host_count, rack_count, host_of, rack_of, nics, uplinks, {INFINITY, 0}};
    if (dss_topology_create(&params, &topology, &error) != DSS_OK)
        CHECK_FAIL("%s", error.text);
    return topology;
}

static inline dss_topology_t *make_equal_racks(uint32_t rack_count, uint32_t hosts_each, double nic, double uplink) {
    static uint32_t sizes[RACKS_MAX_WORKERS];
    for (uint32_t rack = 0; rack < rack_count; rack++)
        sizes[rack] = hosts_each;
    return make_racks(rack_count, sizes, 1, nic, uplink);
}

/* The emulated cluster of the benchmarks: two racks of four, NICs of 500 Mbit/s, uplinks of 100. */
static inline dss_topology_t *make_bed(void) {
    return make_equal_racks(2, 4, 500e6, 100e6);
}

static inline dss_plan_params_t racks_params(dss_plan_kind_t kind, const dss_topology_t *topology) {
    return (dss_plan_params_t){.params_bytes = sizeof(dss_plan_params_t),
                               .kind = kind,
                               .world_size = dss_topology_world_size(topology),
                               .topology = topology,
                               .model_bytes = MODEL_BYTES,
                               .delay = DSS_DELAY_AUTO};
}

static inline dss_plan_t *make_from(const dss_plan_params_t *params) {
    dss_plan_t *plan = NULL;
    dss_error_t error;
    if (dss_plan_create(params, &plan, &error) != DSS_OK)
        CHECK_FAIL("kind %d, N %u: %s", (int)params->kind, params->world_size, error.text);
    return plan;
}

static inline dss_plan_t *make_for(dss_plan_kind_t kind, const dss_topology_t *topology) {
    const dss_plan_params_t params = racks_params(kind, topology);
    return make_from(&params);
}

static inline dss_cost_t cost_for(const dss_plan_t *plan, const dss_topology_t *topology, double compute_s) {
    dss_cost_t cost;
    dss_error_t error;
    if (dss_cost_of_plan(plan, topology, MODEL_BYTES, compute_s, &cost, &error) != DSS_OK)
        CHECK_FAIL("%s", error.text);
    return cost;
}

static inline void refuse_params(const dss_plan_params_t *params, dss_status_t expected, const char *part) {
    dss_plan_t *none = NULL;
    dss_error_t error = {DSS_OK, ""};
    CHECK_STATUS(dss_plan_create(params, &none, &error), expected);
    CHECK_CONTAINS(error.text, part);
    CHECK(none == NULL);
}

#endif
