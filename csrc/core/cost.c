/*
 * What a step costs under a plan, by counting bytes (design rule 9; the terms are those of the cost model of Wang et al., arXiv
 * 2007.03298, section 3, with links that are shared and with the hierarchy that the engine really runs).
 *
 * One group of s workers that averages M bytes over one link takes 2(s-1) alpha + 2(s-1)/s M / beta. Hierarchically (load.c):
 *   in a host, n workers:  2(n-1) M through its memory
 *   in a rack, H hosts:    2(H-1)/H M out of each NIC
 *   over R racks:          2(R-1)/R M out of each uplink, a share of 1/H of that out of each NIC, besides what the racks do
 * NICs and uplinks also carry headers (DSS_WIRE_OVERHEAD); they are full duplex, and the busier direction counts. A delayed
 * crossing waits for the rack's own mean only (foreground); the exchange and the spread of the correction, half of what a rack does
 * once more, are its background. Where workers keep their values nothing is waited for: all is background, each byte once.
 *
 * At step t stripe s of the n stripes takes round (t + s) mod P with 1/n of the bytes. With F(t) the largest over links of the
 * foreground's bytes / rate plus the latency of the slowest group, C the compute time and B the time of a step's background alone:
 *   foreground_s  mean over t of F(t)
 *   background_s  the largest over t of B(t)
 *   bound_s       the largest over links of all bytes of a mean step / rate
 *   T = max(C + foreground_s, bound_s, background_s / tau), the last with a delay tau only; sync_s = T - C
 * since a link can send during compute but not more than a step's bytes a step, and a crossing has tau steps to come home.
 */
#include "cost.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "load.h"
#include "plan_internal.h"
#include "status.h"

#define DELAY_SLACK 1.1 /* of the background's time: no two steps take equally long */

/* Links in one row: memory and NIC of each host, then the uplinks. */
typedef struct ledger {
    const dss_plan_t *plan;
    const dss_topology_t *topology;
    dss_load_meter_t *meter; /* owned, as is what follows */
    double *foreground;      /* [link_count] bytes of the window of rounds at hand */
    double *background;      /* [link_count] the same */
    double *total;           /* [link_count] bytes of a mean step */
    double *latencies;       /* [2][P] foreground and background latency of each round */
    size_t link_count;       /* 2 * host_count + rack_count */
    double sent_bytes;       /* of all workers in a mean step */
} ledger_t;

static void ledger_close(ledger_t *ledger) {
    dss_load_meter_destroy(ledger->meter);
    free(ledger->foreground);
    free(ledger->background);
    free(ledger->total);
    free(ledger->latencies);
}

static dss_status_t ledger_open(ledger_t *ledger, const dss_plan_t *plan, const dss_topology_t *topology, dss_error_t *error_p) {
    memset(ledger, 0, sizeof *ledger);
    ledger->plan = plan;
    ledger->topology = topology;
    ledger->link_count = 2 * (size_t)dss_topology_host_count(topology) + dss_topology_rack_count(topology);
    ledger->foreground = calloc(ledger->link_count, sizeof(double));
    ledger->background = calloc(ledger->link_count, sizeof(double));
    ledger->total = calloc(ledger->link_count, sizeof(double));
    ledger->latencies = calloc(2 * (size_t)plan->period, sizeof(double));
    if (ledger->foreground && ledger->background && ledger->total && ledger->latencies &&
        dss_load_meter_create(topology, &ledger->meter) == DSS_OK)
        return DSS_OK;
    ledger_close(ledger);
    return dss_fail(error_p, DSS_ERR_NO_MEMORY, "out of memory for the loads of %zu links", ledger->link_count);
}

static size_t row_of(const ledger_t *ledger, dss_link_kind_t kind, uint32_t index) {
    const size_t host_count = dss_topology_host_count(ledger->topology);
    return kind == DSS_LINK_MEMORY ? index : kind == DSS_LINK_NIC ? host_count + index : 2 * host_count + index;
}

static dss_link_kind_t kind_of(const ledger_t *ledger, size_t row, uint32_t *index_p) {
    const size_t host_count = dss_topology_host_count(ledger->topology);
    const dss_link_kind_t kind = row < host_count ? DSS_LINK_MEMORY : row < 2 * host_count ? DSS_LINK_NIC : DSS_LINK_UPLINK;
    *index_p = (uint32_t)(row - row_of(ledger, kind, 0));
    return kind;
}

static double seconds(const ledger_t *ledger, size_t row, double bytes) {
    uint32_t index;
    const dss_link_kind_t kind = kind_of(ledger, row, &index);
    return dss_load_seconds(ledger->topology, kind, index, bytes);
}

/* Adds what `bytes` bytes through one round put on the links, or takes it off again for a negative number of them. */
static void add_round(ledger_t *ledger, uint32_t round, double bytes) {
    const dss_plan_t *plan = ledger->plan;
    double *latency = ledger->latencies + 2 * (size_t)round;
    const dss_crossing_t crossing = dss_plan_delayed_crossing(plan, round);
    for (uint32_t group = 0; group < dss_plan_group_count(plan, round); group++) {
        uint32_t member_count;
        const uint32_t *members = dss_plan_members(plan, round, group, &member_count);
        if (member_count == 1)
            continue;
        const dss_group_load_t load = dss_load_of_group(ledger->meter, members, member_count, bytes, crossing);
        for (uint32_t i = 0; i < load.link_count; i++) {
            const size_t row = row_of(ledger, load.links[i].kind, load.links[i].index);
            ledger->foreground[row] += load.links[i].foreground_bytes;
            ledger->background[row] += load.links[i].background_bytes;
        }
        ledger->sent_bytes += load.sent_bytes;
        latency[0] = fmax(latency[0], load.foreground_latency_s);
        latency[1] = fmax(latency[1], load.background_latency_s);
    }
}

static void clear(ledger_t *ledger) {
    memset(ledger->foreground, 0, ledger->link_count * sizeof(double));
    memset(ledger->background, 0, ledger->link_count * sizeof(double));
    ledger->sent_bytes = 0;
}

/* Each round as often as any other: a mean step's bytes. Also finds the latencies. */
static void add_mean_step(ledger_t *ledger, double model_bytes) {
    for (uint32_t round = 0; round < ledger->plan->period; round++)
        add_round(ledger, round, model_bytes / ledger->plan->period);
    for (size_t row = 0; row < ledger->link_count; row++)
        ledger->total[row] = ledger->foreground[row] + ledger->background[row];
}

/* Seconds of the step whose stripes take the rounds from `first` on. */
static void time_step(const ledger_t *ledger, uint32_t first, uint32_t stripe_count, double *foreground_p, double *background_p) {
    double latency[2] = {0, 0};
    *foreground_p = 0;
    *background_p = 0;
    for (size_t row = 0; row < ledger->link_count; row++) {
        *foreground_p = fmax(*foreground_p, seconds(ledger, row, ledger->foreground[row]));
        *background_p = fmax(*background_p, seconds(ledger, row, ledger->background[row]));
    }
    for (uint32_t stripe = 0; stripe < stripe_count; stripe++) {
        const double *of_round = ledger->latencies + 2 * (size_t)((first + stripe) % ledger->plan->period);
        latency[0] = fmax(latency[0], of_round[0]);
        latency[1] = fmax(latency[1], of_round[1]);
    }
    *foreground_p += latency[0];
    *background_p += latency[1];
}

/* Every step of a period; from one to the next one round leaves the window and one enters. */
static void time_period(ledger_t *ledger, double model_bytes, dss_cost_t *cost) {
    const uint32_t period = ledger->plan->period;
    const uint32_t stripe_count = dss_load_stripe_count(ledger->plan, (uint64_t)model_bytes);
    const uint32_t step_count = stripe_count < period ? period : 1;
    const double bytes = model_bytes / stripe_count;
    clear(ledger);
    for (uint32_t stripe = 0; stripe < stripe_count; stripe++)
        add_round(ledger, stripe, bytes);
    for (uint32_t step = 0; step < step_count; step++) {
        double foreground_s;
        double background_s;
        if (step > 0) {
            add_round(ledger, step - 1, -bytes);
            add_round(ledger, (step - 1 + stripe_count) % period, bytes);
        }
        time_step(ledger, step, stripe_count, &foreground_s, &background_s);
        cost->foreground_s += foreground_s / step_count;
        cost->background_s = fmax(cost->background_s, background_s);
    }
}

static void find_busiest(const ledger_t *ledger, dss_cost_t *cost) {
    size_t busiest = 0;
    for (size_t row = 1; row < ledger->link_count; row++) {
        if (seconds(ledger, row, ledger->total[row]) > seconds(ledger, busiest, ledger->total[busiest]))
            busiest = row;
    }
    cost->busiest = kind_of(ledger, busiest, &cost->busiest_index);
    cost->busiest_bytes = ledger->total[busiest];
    cost->bound_s = seconds(ledger, busiest, ledger->total[busiest]);
}

/* The racks of a crossing are those of the plan, the links those of the topology: they have to be the same racks. */
static dss_status_t check_fit(const dss_plan_t *plan, const dss_topology_t *topology, dss_error_t *error_p) {
    if (!plan || !topology)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "%s is NULL", plan ? "topology" : "plan");
    if (plan->world_size != dss_topology_world_size(topology))
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "the plan is for %u workers, but the topology holds %u",
                        plan->world_size, dss_topology_world_size(topology));
    for (uint32_t rank = 0; plan->rack_of && rank < plan->world_size; rank++) {
        if (plan->rack_of[rank] != dss_topology_rack_of(topology, rank))
            return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT,
                            "the plan was made for other racks: it has rank %u in rack %u, the topology in rack %u", rank,
                            plan->rack_of[rank], dss_topology_rack_of(topology, rank));
    }
    return DSS_OK;
}

double dss_cost_step_s(const dss_cost_t *cost, double compute_s, uint32_t delay) {
    const double step_s = fmax(compute_s + cost->foreground_s, cost->bound_s);
    return delay ? fmax(step_s, cost->background_s / delay) : step_s;
}

uint32_t dss_cost_smallest_delay(const dss_cost_t *cost, double compute_s, uint32_t stripe_count) {
    const double step_s = dss_cost_step_s(cost, compute_s, 0);
    const uint32_t most = stripe_count - 1;
    uint32_t delay = 1;
    while (delay < most && delay * step_s < DELAY_SLACK * cost->background_s)
        delay++;
    return delay < most ? delay : most;
}

dss_status_t dss_cost_of_time(const dss_plan_t *plan, const dss_topology_t *topology, uint64_t model_bytes, double compute_s,
                              dss_cost_t *cost_p, dss_error_t *error_p) {
    ledger_t ledger;
    dss_cost_t cost = {0};
    dss_status_t status = check_fit(plan, topology, error_p);
    if (status == DSS_OK && !(compute_s >= 0 && isfinite(compute_s)))
        status = dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "compute_s is %g, expected a finite time of at least 0", compute_s);
    if (status == DSS_OK)
        status = ledger_open(&ledger, plan, topology, error_p);
    if (status != DSS_OK)
        return status;
    add_mean_step(&ledger, (double)model_bytes);
    cost.sent_bytes = ledger.sent_bytes / plan->world_size;
    find_busiest(&ledger, &cost);
    time_period(&ledger, (double)model_bytes, &cost);
    cost.sync_s = dss_cost_step_s(&cost, compute_s, plan->delay) - compute_s;
    cost.contraction = NAN;
    *cost_p = cost;
    ledger_close(&ledger);
    return DSS_OK;
}

dss_status_t dss_cost_of_plan(const dss_plan_t *plan, const dss_topology_t *topology, uint64_t model_bytes, double compute_s,
                              dss_cost_t *cost_p, dss_error_t *error_p) {
    dss_cost_t cost;
    if (!cost_p)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "cost_p is NULL");
    dss_status_t status = dss_cost_of_time(plan, topology, model_bytes, compute_s, &cost, error_p);
    if (status == DSS_OK && plan->world_size <= DSS_CONTRACTION_MAX_WORLD_SIZE)
        status = dss_plan_contraction(plan, &cost.contraction);
    if (status != DSS_OK)
        return status;
    cost.longest_wait_steps = dss_plan_longest_wait(plan);
    *cost_p = cost;
    return DSS_OK;
}

dss_status_t dss_cost_link_bytes(const dss_plan_t *plan, const dss_topology_t *topology, uint64_t model_bytes, uint32_t round,
                                 double *nic_bytes, double *uplink_bytes, dss_error_t *error_p) {
    ledger_t ledger;
    dss_status_t status = check_fit(plan, topology, error_p);
    if (status == DSS_OK && round != UINT32_MAX && round >= plan->period)
        status = dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "round is %u, but the plan has %u", round, plan->period);
    if (status == DSS_OK)
        status = ledger_open(&ledger, plan, topology, error_p);
    if (status != DSS_OK)
        return status;
    if (round == UINT32_MAX)
        add_mean_step(&ledger, (double)model_bytes);
    else
        add_round(&ledger, round, (double)model_bytes);
    for (uint32_t host = 0; nic_bytes && host < dss_topology_host_count(topology); host++) {
        const size_t row = row_of(&ledger, DSS_LINK_NIC, host);
        nic_bytes[host] = ledger.foreground[row] + ledger.background[row];
    }
    for (uint32_t rack = 0; uplink_bytes && rack < dss_topology_rack_count(topology); rack++) {
        const size_t row = row_of(&ledger, DSS_LINK_UPLINK, rack);
        uplink_bytes[rack] = ledger.foreground[row] + ledger.background[row];
    }
    ledger_close(&ledger);
    return DSS_OK;
}
