#include "check.h"
#include "random.h"

#define MEGABIT (1e6 / 8)
#define MODEL_BYTES ((uint64_t)32 << 20)

/* ---- clusters and plans ------------------------------------------------------------------------------------------------- */

/* As many racks as rack_sizes has entries, with so many hosts each, each of workers_each workers; ranks go host by host. */
static dss_topology_t *make_cluster(uint32_t rack_count, const uint32_t *rack_sizes, uint32_t workers_each, double nic_mbit,
                                    double uplink_mbit, double latency_s) {
    uint32_t host_of[64];
    uint32_t rack_of[64];
    dss_link_t nics[64];
    dss_link_t uplinks[64];
    uint32_t host_count = 0;
    dss_topology_t *topology = NULL;
    dss_error_t error;
    for (uint32_t rack = 0; rack < rack_count; rack++) {
        uplinks[rack] = (dss_link_t){uplink_mbit * MEGABIT, 2 * latency_s};
        for (uint32_t i = 0; i < rack_sizes[rack]; i++) {
            nics[host_count] = (dss_link_t){nic_mbit * MEGABIT * (1 + 0.25 * (host_count % 3)), latency_s};
            rack_of[host_count++] = rack;
        }
    }
    for (uint32_t rank = 0; rank < host_count * workers_each; rank++)
        host_of[rank] = rank / workers_each;
    const dss_topology_params_t params = {
        sizeof params, host_count * workers_each, host_count, rack_count, host_of, rack_of, nics, uplinks, {4e9, 1e-6}};
    if (dss_topology_create(&params, &topology, &error) != DSS_OK)
        CHECK_FAIL("%s", error.text);
    return topology;
}

/* The emulated cluster of the benchmarks: two racks of four workers, NICs of 500 Mbit/s, uplinks of 100. */
static dss_topology_t *make_bed(void) {
    uint32_t host_of[8];
    uint32_t rack_of[8];
    dss_link_t nics[8];
    const dss_link_t uplinks[2] = {{100 * MEGABIT, 0}, {100 * MEGABIT, 0}};
    dss_topology_t *topology = NULL;
    for (uint32_t i = 0; i < 8; i++) {
        host_of[i] = i;
        rack_of[i] = i / 4;
        nics[i] = (dss_link_t){500 * MEGABIT, 0};
    }
    const dss_topology_params_t params = {sizeof params, 8, 8, 2, host_of, rack_of, nics, uplinks, {INFINITY, 0}};
    CHECK_STATUS(dss_topology_create(&params, &topology, NULL), DSS_OK);
    return topology;
}

static dss_plan_t *make_plan(dss_plan_kind_t kind, const dss_topology_t *topology, uint32_t max_period, uint32_t delay) {
    const dss_plan_params_t params = {.params_bytes = sizeof params,
                                      .kind = kind,
                                      .world_size = dss_topology_world_size(topology),
                                      .max_period = max_period,
                                      .topology = kind == DSS_PLAN_GRID || kind == DSS_PLAN_RANDOM ? NULL : topology,
                                      .model_bytes = MODEL_BYTES,
                                      .delay = delay};
    dss_plan_t *plan = NULL;
    dss_error_t error;
    if (dss_plan_create(&params, &plan, &error) != DSS_OK)
        CHECK_FAIL("%s", error.text);
    return plan;
}

static dss_simulation_params_t quiet(dss_method_t method, const dss_plan_t *plan, const dss_topology_t *topology,
                                     uint32_t step_count) {
    return (dss_simulation_params_t){.params_bytes = sizeof(dss_simulation_params_t),
                                     .method = method,
                                     .plan = plan,
                                     .topology = topology,
                                     .model_bytes = MODEL_BYTES,
                                     .step_count = step_count};
}

static dss_simulation_t simulate(const dss_simulation_params_t *params, double *step_s) {
    dss_simulation_t simulation;
    dss_error_t error;
    if (dss_simulate(params, &simulation, step_s, &error) != DSS_OK)
        CHECK_FAIL("%s", error.text);
    return simulation;
}

/* ---- an independent reference ------------------------------------------------------------------------------------------- */

/* Written a worker and a group at a time, with no thought of speed; what it has in common with the core is the source of chance. */
#define MOST_WORKERS 64
#define MOST_STEPS 64
#define MOST_ROUNDS 32

typedef struct reference {
    const dss_simulation_params_t *params;
    uint32_t world_size;
    uint32_t stripe_count;
    double stripe_bytes;
    double finish[MOST_STEPS + 1][MOST_WORKERS]; /* [0]: before the first step */
    double ready[MOST_WORKERS];
    double done[MOST_STEPS][MOST_WORKERS]; /* when the correction of the exchange that the worker takes part in is there */
    double free_at[MOST_WORKERS];          /* of each rack's uplink */
    double backlog[MOST_WORKERS];          /* of each host's NIC */
    double memory_backlog[MOST_WORKERS];
    double sync;
    double wait;
} reference_t;

static int same_host(const reference_t *reference, uint32_t a, uint32_t b) {
    return dss_topology_host_of(reference->params->topology, a) == dss_topology_host_of(reference->params->topology, b);
}

static int same_rack(const reference_t *reference, uint32_t a, uint32_t b) {
    return dss_topology_rack_of(reference->params->topology, a) == dss_topology_rack_of(reference->params->topology, b);
}

/* Is members[i] the first of its host (or rack) in the list? */
static int is_first(const reference_t *reference, const uint32_t *members, uint32_t i, int of_rack) {
    for (uint32_t j = 0; j < i; j++)
        if (of_rack ? same_rack(reference, members[i], members[j]) : same_host(reference, members[i], members[j]))
            return 0;
    return 1;
}

/* How the list lies around `rank`: workers on its host, hosts in its rack, hosts and racks in all. */
typedef struct layout {
    double workers_here, hosts_here, hosts, racks;
} layout_t;

static layout_t lay_out(const reference_t *reference, const uint32_t *members, uint32_t count, uint32_t rank) {
    layout_t layout = {0, 0, 0, 0};
    for (uint32_t i = 0; i < count; i++) {
        const int first = is_first(reference, members, i, 0);
        layout.workers_here += same_host(reference, members[i], rank);
        layout.hosts_here += first && same_rack(reference, members[i], rank);
        layout.hosts += first;
        layout.racks += is_first(reference, members, i, 1);
    }
    return layout;
}

typedef struct bytes {
    double memory, nic, uplink, nic_later, memory_later, uplink_later;
} bytes_t;

typedef enum crossing { AT_ONCE, MEANS_FIRST, VALUES_KEPT } crossing_t;

static crossing_t crossing_of(const dss_plan_t *plan, uint32_t round) {
    if (!dss_plan_is_crossing(plan, round) || dss_plan_delay(plan) == 0)
        return AT_ONCE;
    return dss_plan_keeps_values(plan, round) ? VALUES_KEPT : MEANS_FIRST;
}

/* What a group puts on the links of the host and the rack of `rank`. */
static bytes_t bytes_at(const reference_t *reference, const uint32_t *members, uint32_t count, uint32_t rank, crossing_t crossing) {
    const layout_t at = lay_out(reference, members, count, rank);
    const double all = reference->stripe_bytes;
    bytes_t bytes = {0, 0, 0, 0, 0, 0};
    if (at.workers_here == 0 && at.hosts_here == 0)
        return bytes;
    bytes.uplink = 2 * (at.racks - 1) / at.racks * all * DSS_WIRE_OVERHEAD;
    if (at.workers_here > 0) {
        bytes.memory = 2 * (at.workers_here - 1) * all;
        bytes.nic = 2 * (at.hosts_here - 1) / at.hosts_here * all * DSS_WIRE_OVERHEAD + bytes.uplink / at.hosts_here;
    }
    if (crossing == VALUES_KEPT)
        return (bytes_t){0, 0, 0, bytes.nic, bytes.memory, bytes.uplink};
    if (crossing == MEANS_FIRST) {
        bytes.nic -= at.workers_here > 0 ? bytes.uplink / at.hosts_here : 0;
        bytes.nic_later = bytes.nic / 2 + (at.workers_here > 0 ? bytes.uplink / at.hosts_here : 0);
        bytes.memory_later = bytes.memory / 2;
        bytes.uplink_later = bytes.uplink;
        bytes.uplink = 0;
    }
    return bytes;
}

/* All that a step's groups put on the links of the host and the rack of `rank`. */
static bytes_t total_at(const reference_t *reference, uint32_t step, uint32_t rank) {
    const dss_plan_t *plan = reference->params->plan;
    bytes_t total = {0, 0, 0, 0, 0, 0};
    for (uint32_t stripe = 0; stripe < reference->stripe_count; stripe++) {
        const uint32_t round = (step + stripe) % dss_plan_period(plan);
        for (uint32_t group = 0; group < dss_plan_group_count(plan, round); group++) {
            const uint32_t *members;
            uint32_t count;
            CHECK_STATUS(dss_plan_group(plan, round, group, &members, &count), DSS_OK);
            const bytes_t bytes = bytes_at(reference, members, count, rank, crossing_of(plan, round));
            total.memory += bytes.memory;
            total.nic += bytes.nic;
            total.uplink += bytes.uplink;
            total.memory_later += bytes.memory_later;
            total.nic_later += bytes.nic_later;
            total.uplink_later += bytes.uplink_later;
        }
    }
    return total;
}

static double largest(double a, double b) {
    return a > b ? a : b;
}

/* How long the background had the NIC of the rank's host to itself before this step's averages. */
static double idle_before(const reference_t *reference, uint32_t step, uint32_t rank) {
    double last_end = 0;
    double last_ready = 0;
    for (uint32_t i = 0; i < reference->world_size; i++) {
        if (same_host(reference, i, rank)) {
            last_end = largest(last_end, reference->finish[step][i]);
            last_ready = largest(last_ready, reference->ready[i]);
        }
    }
    return largest(0, last_ready - last_end);
}

/* Of what the step before left to be sent by the rank's host, behind its idle time. */
static double left_of(const reference_t *reference, double backlog, uint32_t step, uint32_t rank) {
    return largest(0, backlog - idle_before(reference, step, rank));
}

/* Time of a list of workers that average together: its latency and its slowest link. */
static double time_of(const reference_t *reference, uint32_t step, const uint32_t *members, uint32_t count) {
    const dss_topology_t *topology = reference->params->topology;
    const double memory_alpha = dss_topology_memory(topology).latency_s;
    double slowest = 0;
    double workers = 0;
    double hosts = 0;
    double nic_alpha = 0;
    double uplink_alpha = 0;
    const layout_t all = lay_out(reference, members, count, members[0]);
    for (uint32_t i = 0; i < count; i++) {
        const layout_t at = lay_out(reference, members, count, members[i]);
        const bytes_t total = total_at(reference, step, members[i]);
        const uint32_t host = dss_topology_host_of(topology, members[i]);
        const uint32_t rack = dss_topology_rack_of(topology, members[i]);
        workers = largest(workers, at.workers_here);
        hosts = largest(hosts, at.hosts_here);
        nic_alpha = largest(nic_alpha, 2 * dss_topology_nic(topology, host).latency_s);
        uplink_alpha = largest(uplink_alpha, 2 * dss_topology_uplink(topology, rack).latency_s);
        if (at.workers_here > 1)
            slowest = largest(slowest, total.memory / dss_topology_memory(topology).bytes_per_s +
                                           left_of(reference, reference->memory_backlog[host], step, members[i]));
        if (at.hosts > 1)
            slowest = largest(slowest, total.nic / dss_topology_nic(topology, host).bytes_per_s +
                                           left_of(reference, reference->backlog[host], step, members[i]));
        if (at.racks > 1)
            slowest = largest(slowest, total.uplink / dss_topology_uplink(topology, rack).bytes_per_s);
    }
    return slowest + 2 * (workers - 1) * memory_alpha + 2 * (hosts - 1) * nic_alpha +
           2 * (all.racks - 1) * (nic_alpha + uplink_alpha);
}

/* Of the group in which the rank takes the round: its members in the same rack if only they are waited for, or the rank alone. */
static uint32_t waited_for(const reference_t *reference, uint32_t round, uint32_t rank, uint32_t *list) {
    const dss_plan_t *plan = reference->params->plan;
    const crossing_t crossing = crossing_of(plan, round);
    const uint32_t *members;
    uint32_t count;
    uint32_t kept = 0;
    CHECK_STATUS(dss_plan_group_of_rank(plan, round, rank, &members, &count), DSS_OK);
    for (uint32_t i = 0; i < count; i++)
        if (crossing == AT_ONCE || members[i] == rank || (crossing == MEANS_FIRST && same_rack(reference, members[i], rank)))
            list[kept++] = members[i];
    return kept;
}

/* The end of what the rank waits for in a round; *last_ready_p grows to the last of those who make it wait. */
static double end_of(const reference_t *reference, uint32_t step, uint32_t round, uint32_t rank, double *last_ready_p) {
    uint32_t list[MOST_WORKERS];
    const uint32_t count = waited_for(reference, round, rank, list);
    double ready = 0;
    for (uint32_t i = 0; i < count; i++)
        ready = largest(ready, reference->ready[list[i]]);
    *last_ready_p = largest(*last_ready_p, ready);
    return ready + time_of(reference, step, list, count);
}

static void exchange(reference_t *reference, uint32_t step, uint32_t round, uint32_t group) {
    const dss_topology_t *topology = reference->params->topology;
    const uint32_t *members;
    uint32_t count;
    double start = 0;
    double slowest = 0;
    double workers = 0;
    double hosts = 0;
    double nic_alpha = 0;
    double uplink_alpha = 0;
    double unused = 0;
    const crossing_t crossing = crossing_of(reference->params->plan, round);
    const double ways = crossing == VALUES_KEPT ? 2 : 1; /* into the racks and out of them, or only out */
    CHECK_STATUS(dss_plan_group(reference->params->plan, round, group, &members, &count), DSS_OK);
    const layout_t all = lay_out(reference, members, count, members[0]);
    for (uint32_t i = 0; i < count; i++) {
        start = largest(start, end_of(reference, step, round, members[i], &unused));
        start = largest(start, reference->free_at[dss_topology_rack_of(topology, members[i])]);
    }
    for (uint32_t i = 0; i < count; i++) {
        const uint32_t host = dss_topology_host_of(topology, members[i]);
        const uint32_t rack = dss_topology_rack_of(topology, members[i]);
        const bytes_t bytes = bytes_at(reference, members, count, members[i], crossing);
        const layout_t at = lay_out(reference, members, count, members[i]);
        const double uplink_s = bytes.uplink_later / dss_topology_uplink(topology, rack).bytes_per_s;
        workers = largest(workers, at.workers_here);
        hosts = largest(hosts, at.hosts_here);
        nic_alpha = largest(nic_alpha, 2 * dss_topology_nic(topology, host).latency_s);
        uplink_alpha = largest(uplink_alpha, 2 * dss_topology_uplink(topology, rack).latency_s);
        slowest = largest(slowest, uplink_s);
        slowest = largest(slowest, bytes.nic_later / dss_topology_nic(topology, host).bytes_per_s);
        slowest = largest(slowest, bytes.memory_later / dss_topology_memory(topology).bytes_per_s);
        reference->free_at[rack] = start + uplink_s;
    }
    for (uint32_t i = 0; i < count; i++)
        reference->done[step][members[i]] = start + slowest + ways * (workers - 1) * dss_topology_memory(topology).latency_s +
                                            ways * (hosts - 1) * nic_alpha + 2 * (all.racks - 1) * (nic_alpha + uplink_alpha);
}

static void reference_compute(reference_t *reference, uint32_t step) {
    const dss_simulation_params_t *params = reference->params;
    dss_random_t noise = dss_random_stream(params->seed, DSS_RANDOM_COMPUTE, step);
    dss_random_t luck = dss_random_stream(params->seed, DSS_RANDOM_STRAGGLERS, step);
    for (uint32_t rank = 0; rank < reference->world_size; rank++) {
        double compute = params->compute_s * exp(params->compute_sigma * dss_random_normal(&noise));
        compute *= dss_random_uniform(&luck) <= params->straggler_probability ? params->straggler_factor : 1;
        reference->ready[rank] = reference->finish[step][rank] + compute;
    }
}

static void reference_step(reference_t *reference, uint32_t step) {
    const dss_plan_t *plan = reference->params->plan;
    const uint32_t delay = dss_plan_delay(plan);
    reference_compute(reference, step);
    for (uint32_t rank = 0; rank < reference->world_size; rank++) {
        double end = reference->ready[rank];
        double last_ready = reference->ready[rank];
        for (uint32_t stripe = 0; stripe < reference->stripe_count; stripe++)
            end = largest(end, end_of(reference, step, (step + stripe) % dss_plan_period(plan), rank, &last_ready));
        if (delay > 0 && step >= delay)
            end = largest(end, reference->done[step - delay][rank]);
        const dss_topology_t *topology = reference->params->topology;
        const uint32_t host = dss_topology_host_of(topology, rank);
        const bytes_t total = total_at(reference, step, rank);
        const double memory_left = left_of(reference, reference->memory_backlog[host], step, rank);
        const double nic_left = left_of(reference, reference->backlog[host], step, rank);
        if (memory_left > 0)
            end = largest(end, reference->ready[rank] + memory_left + total.memory / dss_topology_memory(topology).bytes_per_s);
        if (nic_left > 0)
            end = largest(end, reference->ready[rank] + nic_left + total.nic / dss_topology_nic(topology, host).bytes_per_s);
        reference->finish[step + 1][rank] = end;
        reference->sync += end - reference->ready[rank];
        reference->wait += last_ready - reference->ready[rank];
    }
    for (uint32_t stripe = 0; delay > 0 && stripe < reference->stripe_count; stripe++) {
        const uint32_t round = (step + stripe) % dss_plan_period(plan);
        for (uint32_t group = 0; dss_plan_is_crossing(plan, round) && group < dss_plan_group_count(plan, round); group++)
            exchange(reference, step, round, group);
    }
    for (uint32_t rank = 0; delay > 0 && rank < reference->world_size; rank++) {
        const uint32_t host = dss_topology_host_of(reference->params->topology, rank);
        const bytes_t total = total_at(reference, step, rank);
        reference->backlog[host] = total.nic_later / dss_topology_nic(reference->params->topology, host).bytes_per_s;
        reference->memory_backlog[host] = total.memory_later / dss_topology_memory(reference->params->topology).bytes_per_s;
    }
}

static void check_against_reference(const dss_simulation_params_t *params) {
    reference_t *reference = calloc(1, sizeof *reference);
    double step_s[MOST_STEPS];
    double before = 0;
    reference->params = params;
    reference->world_size = dss_topology_world_size(params->topology);
    reference->stripe_count = dss_plan_stripe_count(params->plan);
    reference->stripe_bytes = (double)params->model_bytes / reference->stripe_count;
    const dss_simulation_t simulation = simulate(params, step_s);
    for (uint32_t step = 0; step < params->step_count; step++) {
        reference_step(reference, step);
        double end = 0;
        for (uint32_t rank = 0; rank < reference->world_size; rank++)
            end = largest(end, reference->finish[step + 1][rank]);
        CHECK_FOR(fabs(step_s[step] - (end - before)) < 1e-9 * (1 + end), "step %u of plan %d: %.12g, reference %.12g", step,
                  (int)dss_plan_kind(params->plan), step_s[step], end - before);
        before = end;
    }
    CHECK_NEAR(simulation.total_s, before, 1e-9 * before);
    CHECK_NEAR(simulation.mean_step_s, before / params->step_count, 1e-9 * before);
    CHECK_NEAR(simulation.mean_sync_s, reference->sync / reference->world_size / params->step_count, 1e-9 * before);
    CHECK_NEAR(simulation.mean_wait_s, reference->wait / reference->world_size / params->step_count, 1e-9 * before);
    CHECK_FOR(simulation.busiest_use > 0 && simulation.busiest_use < 1 + 1e-9, "%g of kind %d", simulation.busiest_use,
              (int)simulation.busiest);
    free(reference);
}

static void noise_and_stragglers_follow_the_recurrence(void) {
    static const struct {
        uint32_t rack_count;
        uint32_t rack_sizes[4];
        uint32_t workers_each;
        double uplink_mbit;
        double latency_s;
    } clusters[] = {{2, {4, 4}, 1, 100, 0},       {2, {2, 3}, 1, 100, 1e-3}, {4, {2, 2, 2, 2}, 1, 100, 1e-4},
                    {3, {1, 2, 2}, 2, 100, 1e-4}, {1, {6}, 1, 100, 0},       {4, {1, 1, 1, 1}, 1, 5000, 1e-4},
                    {2, {1, 1}, 4, 5000, 0}}; /* the last two: crossings on NICs that nothing else uses */
    static const struct {
        dss_plan_kind_t kind;
        uint32_t max_period;
        uint32_t delay;
    } plans[] = {{DSS_PLAN_GRID, 8, 0},    {DSS_PLAN_RANDOM, 3, 0},  {DSS_PLAN_EXACT, 0, 0},   {DSS_PLAN_LEADERS, 0, 0},
                 {DSS_PLAN_STRIPED, 5, 0}, {DSS_PLAN_STRIPED, 5, 2}, {DSS_PLAN_STRIPED, 8, 1}, {DSS_PLAN_STRIPED, 8, 4},
                 {DSS_PLAN_STRIPED, 2, 1}, {DSS_PLAN_HYBRID, 5, 2}};
    uint32_t counts[3] = {0, 0, 0}; /* of plans by what their last round is */
    for (size_t i = 0; i < sizeof clusters / sizeof clusters[0]; i++) {
        dss_topology_t *topology = make_cluster(clusters[i].rack_count, clusters[i].rack_sizes, clusters[i].workers_each, 500,
                                                clusters[i].uplink_mbit, clusters[i].latency_s);
        for (size_t j = 0; j < sizeof plans / sizeof plans[0]; j++) {
            if (clusters[i].rack_count == 1 && plans[j].kind >= DSS_PLAN_LEADERS)
                continue;
            dss_plan_t *plan = make_plan(plans[j].kind, topology, plans[j].max_period, plans[j].delay);
            dss_simulation_params_t params = quiet(DSS_METHOD_PLAN, plan, topology, 12);
            params.seed = 17 * i + j;
            params.compute_s = j % 2 ? 0.5 : 0.05;
            params.compute_sigma = 0.3;
            params.straggler_probability = 0.1;
            params.straggler_factor = 3;
            check_against_reference(&params);
            counts[crossing_of(plan, dss_plan_period(plan) - 1)]++;
            dss_plan_destroy(plan);
        }
        dss_topology_destroy(topology);
    }
    CHECK_FOR(counts[MEANS_FIRST] > 4 && counts[VALUES_KEPT] > 4, "%u, %u", counts[MEANS_FIRST], counts[VALUES_KEPT]);
}

/* ---- closed forms ------------------------------------------------------------------------------------------------------- */

static const double nic_s = 33554432.0 * DSS_WIRE_OVERHEAD / (500 * MEGABIT);    /* all bytes once through a NIC */
static const double uplink_s = 33554432.0 * DSS_WIRE_OVERHEAD / (100 * MEGABIT); /* and through an uplink */

static double step_of_method(dss_method_t method, const dss_topology_t *topology) {
    const dss_simulation_params_t params = quiet(method, NULL, topology, 3);
    return simulate(&params, NULL).mean_step_s;
}

static void exact_exchanges_take_what_their_formulas_say(void) {
    dss_topology_t *bed = make_bed();
    CHECK_NEAR(step_of_method(DSS_METHOD_RING, bed), 2 * 7.0 / 8 * uplink_s, 1e-9);
    CHECK_NEAR(step_of_method(DSS_METHOD_LEADERS, bed), 1.5 * nic_s + uplink_s + 1.5 * nic_s, 1e-9);
    CHECK_NEAR(step_of_method(DSS_METHOD_TWO_DIMENSIONAL, bed), 0.75 * nic_s + uplink_s + 0.75 * nic_s, 1e-9);
    CHECK_NEAR(step_of_method(DSS_METHOD_PARAMETER_SERVER, bed), 2 * 4 * uplink_s, 1e-9);
    dss_topology_destroy(bed);
}

static void latency_counts_for_every_hop(void) {
    const uint32_t rack_sizes[] = {3, 3};
    dss_topology_t *near = make_cluster(2, rack_sizes, 1, 500, 100, 0);
    dss_topology_t *far = make_cluster(2, rack_sizes, 1, 500, 100, 1e-3);
    const double between_racks = 2 * 1e-3 + 2 * 2e-3;
    CHECK_NEAR(step_of_method(DSS_METHOD_RING, far) - step_of_method(DSS_METHOD_RING, near), 10 * between_racks, 1e-9 + 10e-6);
    CHECK_NEAR(step_of_method(DSS_METHOD_TWO_DIMENSIONAL, far) - step_of_method(DSS_METHOD_TWO_DIMENSIONAL, near),
               2 * 2 * 2e-3 + 2 * between_racks, 1e-9 + 10e-6);
    CHECK_NEAR(step_of_method(DSS_METHOD_PARAMETER_SERVER, far) - step_of_method(DSS_METHOD_PARAMETER_SERVER, near),
               2 * between_racks, 1e-9 + 10e-6);
    dss_topology_destroy(near);
    dss_topology_destroy(far);
}

/* Rounds by hand: pairs in racks, and in one round all pairs cross. */
static void pairs_share_the_links_that_they_cross(void) {
    static const uint32_t all_cross[] = {0, 0, 1, 1, 2, 2, 3, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 1, 0, 2, 3, 3, 2};
    dss_topology_t *bed = make_bed();
    dss_plan_t *plan = NULL;
    double step_s[6];
    CHECK_STATUS(dss_plan_create_explicit(8, 3, all_cross, 0, &plan, NULL), DSS_OK);
    dss_simulation_params_t params = quiet(DSS_METHOD_PLAN, plan, bed, 6);
    simulate(&params, step_s);
    for (uint32_t step = 0; step < 6; step++) /* 3 stripes: a third of the bytes in each round, four pairs on the uplink in one */
        CHECK_NEAR(step_s[step], 4 * uplink_s / 3, 1e-9);
    params.model_bytes = 1 << 20; /* one stripe: the rounds take turns */
    simulate(&params, step_s);
    for (uint32_t step = 0; step < 6; step++)
        CHECK_NEAR(step_s[step], (step % 3 == 1 ? 4 * uplink_s : nic_s) / 32, 1e-9);
    dss_plan_destroy(plan);
    dss_topology_destroy(bed);
}

/* Two racks of four, five rounds, with compute that hides the background and without. Where racks take their means first, those are
 * waited for; where values are kept, nothing of the crossing is. */
static void check_hidden(const dss_topology_t *bed, dss_plan_kind_t kind, crossing_t expected) {
    dss_plan_t *plan = make_plan(kind, bed, 5, 4);
    double step_s[40];
    double foreground_s = 0; /* of a NIC in a step */
    dss_simulation_params_t params = quiet(DSS_METHOD_PLAN, plan, bed, 40);
    const uint32_t period = dss_plan_period(plan);
    CHECK_EQUAL(crossing_of(plan, period - 1), expected);
    for (uint32_t round = 0; round + 1 < period; round++) {
        const uint32_t *members;
        uint32_t member_count;
        CHECK_STATUS(dss_plan_group_of_rank(plan, round, 0, &members, &member_count), DSS_OK);
        foreground_s += 2 * (member_count - 1.0) / member_count * nic_s / period;
    }
    foreground_s += (expected == VALUES_KEPT ? 0 : 1.5) * nic_s / period;
    params.compute_s = 3; /* hides all of the background */
    simulate(&params, step_s);
    for (uint32_t step = 1; step < 40; step++)
        CHECK_NEAR(step_s[step], 3 + foreground_s, 1e-9);
    params.compute_s = 0; /* on the NICs the background's bytes are on top; the uplink may be the slowest even so */
    simulate(&params, step_s);
    const double nic_bound_s = foreground_s + (expected == VALUES_KEPT ? 1.75 : 1) * nic_s / period;
    for (uint32_t step = 20; step < 40; step++)
        CHECK_NEAR(step_s[step], fmax(nic_bound_s, uplink_s / period), 1e-9);
    params.step_count = 1; /* the background is still to be sent, and did not use the NICs yet */
    const dss_simulation_t first = simulate(&params, NULL);
    CHECK_NEAR(first.total_s, foreground_s, 1e-9);
    CHECK_NEAR(first.busiest_use, 1, 1e-9);
    dss_plan_destroy(plan);
}

static void a_delayed_crossing_costs_only_what_is_not_hidden(void) {
    dss_topology_t *bed = make_bed();
    check_hidden(bed, DSS_PLAN_STRIPED, VALUES_KEPT);
    check_hidden(bed, DSS_PLAN_HYBRID, MEANS_FIRST);
    dss_topology_destroy(bed);
}

/* Where all NICs and racks are alike and everyone takes the same time, the recurrence has nothing to add to the cost model. */
static void with_no_noise_it_agrees_with_the_cost_model(void) {
    static const struct {
        dss_plan_kind_t kind;
        uint32_t max_period;
        double compute_s;
    } rows[] = {{DSS_PLAN_GRID, 8, 0},    {DSS_PLAN_EXACT, 8, 1},     {DSS_PLAN_LEADERS, 8, 0.3}, {DSS_PLAN_STRIPED, 5, 0},
                {DSS_PLAN_STRIPED, 8, 0}, {DSS_PLAN_STRIPED, 5, 0.2}, {DSS_PLAN_STRIPED, 8, 2},   {DSS_PLAN_HYBRID, 8, 1}};
    dss_topology_t *bed = make_bed();
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        dss_plan_t *plan = make_plan(rows[i].kind, bed, rows[i].max_period, DSS_DELAY_AUTO);
        dss_simulation_params_t params = quiet(DSS_METHOD_PLAN, plan, bed, 400);
        double step_s[400];
        double later_s = 0;
        dss_cost_t cost;
        CHECK_STATUS(dss_cost_of_plan(plan, bed, MODEL_BYTES, rows[i].compute_s, &cost, NULL), DSS_OK);
        params.compute_s = rows[i].compute_s;
        simulate(&params, step_s);
        for (uint32_t step = 40; step < 400; step++) /* the first ones have no correction to wait for */
            later_s += step_s[step] / 360;
        CHECK_FOR(fabs(later_s - rows[i].compute_s - cost.sync_s) < 1e-3 * later_s, "row %zu: simulated %g s, cost %g + %g s", i,
                  later_s, rows[i].compute_s, cost.sync_s);
        dss_plan_destroy(plan);
    }
    dss_topology_destroy(bed);
}

/* ---- what a simulation is good for -------------------------------------------------------------------------------------- */

/* The seed under which `rank` alone straggles in the first step of eight workers. */
static uint64_t seed_of_straggler(uint32_t rank, double probability) {
    for (uint64_t seed = 0;; seed++) {
        dss_random_t luck = dss_random_stream(seed, DSS_RANDOM_STRAGGLERS, 0);
        uint32_t slow = 0;
        for (uint32_t i = 0; i < 8; i++)
            slow |= (uint32_t)(dss_random_uniform(&luck) <= probability) << i;
        if (slow == 1u << rank)
            return seed;
    }
}

static double mean_wait_s(const dss_simulation_params_t *params, const dss_plan_t *plan) {
    dss_simulation_params_t of_plan = *params;
    of_plan.plan = plan;
    return simulate(&of_plan, NULL).mean_wait_s;
}

/* Pairs along both digits of a rack of four: two partners. */
static void a_straggler_holds_up_its_partners_or_its_rack_and_with_a_barrier_all(void) {
    dss_topology_t *bed = make_bed();
    dss_plan_t *keeping = make_plan(DSS_PLAN_STRIPED, bed, 5, 4);
    dss_plan_t *means_first = make_plan(DSS_PLAN_HYBRID, bed, 5, 4);
    dss_plan_t *waiting = make_plan(DSS_PLAN_STRIPED, bed, 5, 0);
    dss_simulation_params_t params = quiet(DSS_METHOD_PLAN, NULL, bed, 1);
    params.seed = seed_of_straggler(2, 0.1);
    params.compute_s = 1;
    params.straggler_probability = 0.1;
    params.straggler_factor = 2;
    CHECK_NEAR(mean_wait_s(&params, keeping), 2.0 / 8, 1e-9);
    CHECK_NEAR(mean_wait_s(&params, means_first), 3.0 / 8, 1e-9);
    CHECK_NEAR(mean_wait_s(&params, waiting), 7.0 / 8, 1e-9);
    params.method = DSS_METHOD_RING;
    CHECK_NEAR(simulate(&params, NULL).mean_wait_s, 7.0 / 8, 1e-9);
    dss_plan_destroy(keeping);
    dss_plan_destroy(means_first);
    dss_plan_destroy(waiting);
    dss_topology_destroy(bed);
}

/* Two racks of two behind slow uplinks, a pair and a crossing. The exchange begins when all are ready, not after an average, and is
 * waited for a step later; the next one has to wait for the uplink. */
static void kept_values_leave_when_all_are_ready(void) {
    static const uint32_t rack_sizes[] = {2, 2};
    dss_topology_t *slow = make_cluster(2, rack_sizes, 1, 500, 10, 0);
    dss_plan_t *plan = make_plan(DSS_PLAN_STRIPED, slow, 2, 1);
    dss_simulation_params_t params = quiet(DSS_METHOD_PLAN, plan, slow, 3);
    const double exchange_s = 10 * uplink_s / 2;
    double step_s[3];
    params.compute_s = 1;
    const dss_simulation_t simulation = simulate(&params, step_s);
    CHECK(dss_plan_keeps_values(plan, 1));
    CHECK_NEAR(step_s[0], 1 + nic_s / 2, 1e-9);
    CHECK_NEAR(step_s[0] + step_s[1], 1 + exchange_s, 1e-9);
    CHECK_NEAR(step_s[0] + step_s[1] + step_s[2], 1 + 2 * exchange_s, 1e-9);
    CHECK_NEAR(simulation.mean_wait_s, 0, 1e-9);
    CHECK_EQUAL(simulation.busiest, DSS_LINK_UPLINK);
    CHECK_NEAR(simulation.busiest_use, 2 * exchange_s / (1 + 2 * exchange_s), 1e-9); /* the third is still to be sent */
    dss_plan_destroy(plan);
    dss_topology_destroy(slow);
}

static void methods_meet_the_same_compute_times(void) {
    dss_topology_t *bed = make_bed();
    double ring_s[20];
    double server_s[20];
    double again_s[20];
    dss_simulation_params_t params = quiet(DSS_METHOD_RING, NULL, bed, 20);
    params.compute_s = 1;
    params.compute_sigma = 0.3;
    params.seed = 5;
    simulate(&params, ring_s);
    simulate(&params, again_s);
    CHECK(memcmp(ring_s, again_s, sizeof ring_s) == 0);
    params.method = DSS_METHOD_PARAMETER_SERVER;
    simulate(&params, server_s);
    for (uint32_t step = 0; step < 20; step++)
        CHECK_NEAR(server_s[step] - ring_s[step], server_s[0] - ring_s[0], 1e-9);
    params.seed = 6;
    simulate(&params, again_s);
    CHECK(fabs(server_s[0] - again_s[0]) > 1e-6);
    dss_topology_destroy(bed);
}

static void compute_times_have_the_asked_distribution(void) {
    dss_random_t random = dss_random_stream(1, DSS_RANDOM_COMPUTE, 0);
    double sum = 0;
    double squares = 0;
    double inside = 0;
    for (uint32_t i = 0; i < 100000; i++) {
        const double value = dss_random_normal(&random);
        sum += value;
        squares += value * value;
        inside += fabs(value) < 1;
    }
    CHECK_NEAR(sum / 100000, 0, 0.015);
    CHECK_NEAR(squares / 100000, 1, 0.02);
    CHECK_NEAR(inside / 100000, 0.6827, 0.007);
}

typedef struct watched {
    uint32_t calls;
    uint32_t last;
} watched_t;

static void watch(void *argument, uint32_t steps_done) {
    watched_t *watched = argument;
    CHECK(steps_done > watched->last);
    watched->calls++;
    watched->last = steps_done;
}

static void progress_is_told_about_a_hundred_times(void) {
    static const uint32_t step_counts[] = {1, 3, 99, 100, 101, 777, 1000};
    dss_topology_t *bed = make_bed();
    for (size_t i = 0; i < sizeof step_counts / sizeof step_counts[0]; i++) {
        watched_t watched = {0, 0};
        dss_simulation_params_t params = quiet(DSS_METHOD_RING, NULL, bed, step_counts[i]);
        params.progress = watch;
        params.progress_argument = &watched;
        simulate(&params, NULL);
        CHECK_EQUAL(watched.last, step_counts[i]);
        CHECK(watched.calls <= 200 && (watched.calls >= 100 || watched.calls == step_counts[i]));
    }
    dss_topology_destroy(bed);
}

static void check_refused(const dss_simulation_params_t *params, const char *part) {
    dss_simulation_t simulation = {.total_s = -1};
    dss_error_t error;
    CHECK_STATUS(dss_simulate(params, &simulation, NULL, &error), DSS_ERR_INVALID_ARGUMENT);
    CHECK_CONTAINS(error.text, part);
    CHECK_NEAR(simulation.total_s, -1, 0);
}

#define CHECK_REFUSED(field, value, part)                                                                                          \
    do {                                                                                                                           \
        dss_simulation_params_t refused = good;                                                                                    \
        refused.field = (value);                                                                                                   \
        check_refused(&refused, part);                                                                                             \
    } while (0)

static void wrong_params_are_named(void) {
    const uint32_t rack_sizes[] = {2, 1};
    dss_topology_t *bed = make_bed();
    dss_topology_t *small = make_cluster(2, rack_sizes, 1, 500, 100, 0);
    dss_plan_t *plan = make_plan(DSS_PLAN_GRID, bed, 8, 0);
    dss_simulation_params_t good = quiet(DSS_METHOD_PLAN, plan, bed, 3);
    good.straggler_probability = 0.5;
    good.straggler_factor = 2;
    simulate(&good, NULL);
    check_refused(NULL, "NULL");
    CHECK_REFUSED(params_bytes, 1, "params_bytes is 1");
    CHECK_REFUSED(method, (dss_method_t)9, "method is 9");
    CHECK_REFUSED(topology, NULL, "topology");
    CHECK_REFUSED(topology, small, "for 8 workers, the topology has 3");
    CHECK_REFUSED(plan, NULL, "plan");
    CHECK_REFUSED(step_count, 0, "step_count is 0");
    CHECK_REFUSED(model_bytes, 0, "model_bytes is 0");
    CHECK_REFUSED(compute_s, -1, "compute_s is -1");
    CHECK_REFUSED(compute_s, (double)INFINITY, "compute_s is inf");
    CHECK_REFUSED(compute_sigma, (double)NAN, "compute_sigma is");
    CHECK_REFUSED(straggler_probability, 1.5, "straggler_probability is 1.5");
    CHECK_REFUSED(straggler_factor, 0, "straggler_factor is 0");
    const uint32_t other_sizes[] = {3, 5};
    dss_topology_t *other = make_cluster(2, other_sizes, 1, 500, 100, 0);
    dss_plan_t *striped = make_plan(DSS_PLAN_STRIPED, bed, 5, 1);
    good.plan = striped;
    CHECK_REFUSED(topology, other, "rank 3 in rack 0, the topology in rack 1");
    dss_plan_destroy(striped);
    dss_plan_destroy(plan);
    dss_topology_destroy(bed);
    dss_topology_destroy(small);
    dss_topology_destroy(other);
}

static void one_worker_waits_for_nobody(void) {
    const uint32_t rack_sizes[] = {1};
    dss_topology_t *alone = make_cluster(1, rack_sizes, 1, 500, 100, 1e-3);
    for (int method = DSS_METHOD_RING; method <= DSS_METHOD_PARAMETER_SERVER; method++) {
        dss_simulation_params_t params = quiet((dss_method_t)method, NULL, alone, 3);
        params.compute_s = 1;
        CHECK_NEAR(simulate(&params, NULL).mean_step_s, 1, 0.02);
    }
    dss_topology_destroy(alone);
}

int main(void) {
    RUN(exact_exchanges_take_what_their_formulas_say);
    RUN(latency_counts_for_every_hop);
    RUN(pairs_share_the_links_that_they_cross);
    RUN(a_delayed_crossing_costs_only_what_is_not_hidden);
    RUN(with_no_noise_it_agrees_with_the_cost_model);
    RUN(noise_and_stragglers_follow_the_recurrence);
    RUN(a_straggler_holds_up_its_partners_or_its_rack_and_with_a_barrier_all);
    RUN(kept_values_leave_when_all_are_ready);
    RUN(methods_meet_the_same_compute_times);
    RUN(compute_times_have_the_asked_distribution);
    RUN(progress_is_told_about_a_hundred_times);
    RUN(wrong_params_are_named);
    RUN(one_worker_waits_for_nobody);
}
