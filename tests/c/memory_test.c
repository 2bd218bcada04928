/* Every allocation of the core fails once: the call says so, leaves its outputs alone and (the address sanitizer watches) leaks
 * nothing. Linked with --wrap, which sends the library's calls here; see core.mk. */
#include "plans.h"

/* NOLINTBEGIN(*reserved-identifier,cert-dcl*): the linker chose these names */
void *__real_malloc(size_t bytes);
void *__real_calloc(size_t count, size_t bytes);
void *__wrap_malloc(size_t bytes);
void *__wrap_calloc(size_t count, size_t bytes);
/* NOLINTEND(*reserved-identifier,cert-dcl*) */

static uint32_t allocation_count;
static uint32_t failing_allocation; /* counted from 1; 0: none */

static int fails(void) {
    return ++allocation_count == failing_allocation;
}

void *__wrap_malloc(size_t bytes) {
    return fails() ? NULL : __real_malloc(bytes);
}

void *__wrap_calloc(size_t count, size_t bytes) {
    return fails() ? NULL : __real_calloc(count, bytes);
}

typedef struct call {
    const char *name;
    dss_status_t (*make)(dss_plan_t **plan_p, dss_error_t *error_p);
} call_t;

static unsigned char wire[256];
static size_t wire_bytes;

static dss_status_t make_grid(dss_plan_t **plan_p, dss_error_t *error_p) {
    return try_plan(DSS_PLAN_GRID, 12, 0, 0, 0, plan_p, error_p);
}

static dss_status_t make_random(dss_plan_t **plan_p, dss_error_t *error_p) {
    return try_plan(DSS_PLAN_RANDOM, 12, 0, 0, 0, plan_p, error_p);
}

static dss_status_t make_explicit(dss_plan_t **plan_p, dss_error_t *error_p) {
    static const uint32_t group_of[12];
    return dss_plan_create_explicit(12, 1, group_of, 0, plan_p, error_p);
}

static dss_topology_t *make_racks(void) {
    static const uint32_t host_of[4] = {0, 1, 2, 3};
    static const uint32_t rack_of[4] = {0, 0, 1, 1};
    static const dss_link_t links[4] = {{1e8, 0}, {1e8, 0}, {1e8, 0}, {1e8, 0}};
    const dss_topology_params_t cluster = {sizeof cluster, 4, 4, 2, host_of, rack_of, links, links, {1e10, 0}};
    dss_topology_t *topology = NULL;
    CHECK_STATUS(dss_topology_create(&cluster, &topology, NULL), DSS_OK);
    return topology;
}

static const dss_topology_t *racks; /* of make_striped */

static dss_status_t make_striped(dss_plan_t **plan_p, dss_error_t *error_p) {
    const dss_plan_params_t params = {
        .params_bytes = sizeof params, .kind = DSS_PLAN_STRIPED, .world_size = 4, .max_period = 3, .topology = racks, .delay = 1};
    return dss_plan_create(&params, plan_p, error_p);
}

static dss_status_t make_from_bytes(dss_plan_t **plan_p, dss_error_t *error_p) {
    return dss_plan_deserialize(wire, wire_bytes, plan_p, error_p);
}

static void makers_report_every_failed_allocation(void) {
    static const call_t calls[] = {{"grid", make_grid},
                                   {"random", make_random},
                                   {"explicit", make_explicit},
                                   {"striped", make_striped},
                                   {"deserialize", make_from_bytes}};
    dss_topology_t *topology = make_racks();
    dss_plan_t *plan = make_plan(DSS_PLAN_GRID, 12, 0, 0, 0);
    racks = topology;
    wire_bytes = sizeof wire;
    CHECK_STATUS(dss_plan_serialize(plan, wire, sizeof wire, &wire_bytes), DSS_OK);
    dss_plan_destroy(plan);
    for (size_t i = 0; i < sizeof calls / sizeof calls[0]; i++) {
        dss_status_t status = DSS_ERR_NO_MEMORY;
        plan = NULL;
        for (failing_allocation = 1; status != DSS_OK; failing_allocation++) {
            dss_error_t error = {DSS_OK, ""};
            allocation_count = 0;
            status = calls[i].make(&plan, &error);
            if (status == DSS_OK)
                break;
            CHECK_STATUS(status, DSS_ERR_NO_MEMORY);
            CHECK_CONTAINS(error.text, "out of memory for ");
            CHECK_FOR(plan == NULL, "%s", calls[i].name);
        }
        CHECK_FOR(failing_allocation > 5, "%s: only %u allocations seen", calls[i].name, failing_allocation - 1);
        failing_allocation = 0;
        dss_plan_destroy(plan);
    }
    dss_topology_destroy(topology);
}

static void contraction_reports_a_failed_allocation(void) {
    dss_plan_t *plan = make_plan(DSS_PLAN_RANDOM, 12, 0, 0, 0);
    double rho = 77;
    allocation_count = 0;
    failing_allocation = 1;
    CHECK_STATUS(dss_plan_contraction(plan, &rho), DSS_ERR_NO_MEMORY);
    failing_allocation = 0;
    CHECK(rho == 77);
    dss_plan_destroy(plan);
}

static void check_simulation_fails(const dss_simulation_params_t *params) {
    dss_simulation_t simulation = {.total_s = -1};
    dss_status_t status = DSS_ERR_NO_MEMORY;
    for (failing_allocation = 1; status != DSS_OK; failing_allocation++) {
        dss_error_t error = {DSS_OK, ""};
        allocation_count = 0;
        status = dss_simulate(params, &simulation, NULL, &error);
        if (status == DSS_OK)
            break;
        CHECK_STATUS(status, DSS_ERR_NO_MEMORY);
        CHECK_CONTAINS(error.text, "out of memory to");
        CHECK(simulation.total_s == -1);
    }
    CHECK_FOR(failing_allocation > 10, "only %u allocations seen", failing_allocation - 1);
    failing_allocation = 0;
}

static void simulations_report_every_failed_allocation(void) {
    dss_topology_t *topology = make_racks();
    dss_plan_t *plan = NULL;
    racks = topology;
    CHECK_STATUS(make_striped(&plan, NULL), DSS_OK);
    dss_simulation_params_t params = {
        .params_bytes = sizeof params, .plan = plan, .topology = topology, .model_bytes = 1 << 24, .step_count = 3};
    check_simulation_fails(&params);
    params.method = DSS_METHOD_RING;
    check_simulation_fails(&params);
    dss_plan_destroy(plan);
    dss_topology_destroy(topology);
}

/* A step must not depend on the heap. */
static void the_calls_of_a_step_allocate_nothing(void) {
    static const float values[2000];
    static float target[2000];
    const void *const sources[] = {values, values};
    const uint32_t *members;
    uint32_t member_count;
    dss_plan_t *plan = make_plan(DSS_PLAN_RANDOM, 12, 0, 0, 0);
    allocation_count = 0;
    (void)dss_plan_round_of_call(plan, 5);
    CHECK_STATUS(dss_plan_group_of_rank(plan, 0, 3, &members, &member_count), DSS_OK);
    CHECK_STATUS(dss_average(DSS_FLOAT32, sources, 2, target, 2000), DSS_OK);
    CHECK_STATUS(dss_average(DSS_FLOAT16, sources, 2, target, 2000), DSS_OK);
    CHECK_EQUAL(allocation_count, 0);
    dss_plan_destroy(plan);
}

int main(void) {
    RUN(makers_report_every_failed_allocation);
    RUN(contraction_reports_a_failed_allocation);
    RUN(simulations_report_every_failed_allocation);
    RUN(the_calls_of_a_step_allocate_nothing);
}
