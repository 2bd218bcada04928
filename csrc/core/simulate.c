/*
 * The finish-time recurrence: finish_i(t) = max over the groups of worker i of (the last member's ready time + the group's time),
 * where ready = finish_i(t - 1) + compute. Waiting spreads from group to group as it does in training, which a sum of the slowest
 * workers' times would overstate. Links are shared: nobody who uses a link is done before all bytes of the step have passed it.
 *
 * The background of a delayed crossing occupies uplinks in the order of its launches (free_at) and holds up the step in which its
 * correction is due. Where workers keep their values a crossing holds nobody up before. On a NIC, and in a
 * host's memory, it has what the foreground leaves: it is sent while the host computes, and what is left then is added to the
 * foreground's time (backlog), so that none ever carries more than its rate.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "barrier.h"
#include "dssync.h"
#include "random.h"
#include "schedule.h"
#include "status.h"

typedef struct dss_simulator {
    const dss_simulation_params_t *params;
    dss_schedule_t *schedule; /* NULL for methods that are global barriers; owned, as are all arrays here */
    uint32_t world_size;
    uint32_t host_count;
    uint32_t rack_count;
    uint32_t link_count;
    double barrier_s;  /* of such a method, each step */
    double *finish_s;  /* [world_size] of the step before */
    double *ready_s;   /* [world_size] of this step: compute is over */
    double *next_s;    /* [world_size] finish of this step */
    double *heard_s;   /* [world_size] when the last of the workers waited for was ready */
    double *link_s;    /* [link_count] time for what is on the link in this step */
    double *backlog_s; /* [link_count] of the background's traffic that was not sent yet */
    double *idle_s;    /* [host_count] for how long the NIC was idle before this step's traffic */
    double *free_at_s; /* [rack_count] when the uplink has sent what was launched */
    double *done_at_s; /* [delay][exchanges of the period] when the correction is there, by the step of its launch */
    double *busy_s;    /* [link_count] of the whole simulation */
    double sync_s;     /* sum over workers and steps */
    double wait_s;     /* sum over workers and steps */
} dss_simulator_t;

static double later(double a, double b) {
    return a > b ? a : b;
}

/* ---- compute ------------------------------------------------------------------------------------------------------------ */

/* Streams by step and purpose: the same compute times for every method and plan, so that these can be compared. */
static void draw_compute(dss_simulator_t *simulator, uint32_t step) {
    const dss_simulation_params_t *params = simulator->params;
    dss_random_t noise = dss_random_stream(params->seed, DSS_RANDOM_COMPUTE, step);
    dss_random_t luck = dss_random_stream(params->seed, DSS_RANDOM_STRAGGLERS, step);
    for (uint32_t rank = 0; rank < simulator->world_size; rank++) {
        double compute_s = params->compute_s;
        if (params->compute_sigma > 0)
            compute_s *= exp(params->compute_sigma * dss_random_normal(&noise));
        if (params->straggler_probability > 0 && dss_random_uniform(&luck) <= params->straggler_probability)
            compute_s *= params->straggler_factor;
        simulator->ready_s[rank] = simulator->finish_s[rank] + compute_s;
        simulator->next_s[rank] = simulator->heard_s[rank] = simulator->ready_s[rank];
    }
}

/* ---- links -------------------------------------------------------------------------------------------------------------- */

/* For how long each NIC had nothing in its foreground: from the last of its workers' ends until the last is ready again. */
static void find_idle(dss_simulator_t *simulator) {
    const dss_topology_t *topology = simulator->params->topology;
    double *ended_s = simulator->link_s; /* scratch until share_links */
    for (uint32_t host = 0; host < simulator->host_count; host++)
        simulator->idle_s[host] = ended_s[host] = 0;
    for (uint32_t rank = 0; rank < simulator->world_size; rank++) {
        const uint32_t host = dss_topology_host_of(topology, rank);
        simulator->idle_s[host] = later(simulator->idle_s[host], simulator->ready_s[rank]);
        ended_s[host] = later(ended_s[host], simulator->finish_s[rank]);
    }
    for (uint32_t host = 0; host < simulator->host_count; host++)
        simulator->idle_s[host] = later(simulator->idle_s[host] - ended_s[host], 0);
}

static void share_links(dss_simulator_t *simulator, uint32_t step) {
    const dss_schedule_t *schedule = simulator->schedule;
    const size_t row = (size_t)(step % schedule->phase_count) * simulator->link_count;
    const double *foreground = schedule->foreground_s + row;
    const double *background = schedule->background_s + row;
    if (schedule->delay > 0)
        find_idle(simulator);
    for (uint32_t link = 0; link < simulator->link_count; link++) {
        simulator->busy_s[link] += foreground[link] + background[link];
        simulator->link_s[link] = foreground[link];
    }
    for (uint32_t link = 0; schedule->delay > 0 && link < 2 * simulator->host_count; link++) { /* memories, NICs */
        simulator->backlog_s[link] = later(simulator->backlog_s[link] - simulator->idle_s[link % simulator->host_count], 0);
        simulator->link_s[link] += simulator->backlog_s[link];
    }
}

/* What the step before left is over when this one is, also where no foreground goes the same way. */
static void send_backlog(dss_simulator_t *simulator, uint32_t step) {
    const dss_schedule_t *schedule = simulator->schedule;
    const double *background = schedule->background_s + (size_t)(step % schedule->phase_count) * simulator->link_count;
    for (uint32_t rank = 0; schedule->delay > 0 && rank < simulator->world_size; rank++) {
        const uint32_t memory = dss_topology_host_of(simulator->params->topology, rank);
        const uint32_t links[] = {memory, simulator->host_count + memory};
        for (int i = 0; i < 2; i++) {
            if (simulator->backlog_s[links[i]] > 0)
                simulator->next_s[rank] = later(simulator->next_s[rank], simulator->ready_s[rank] + simulator->link_s[links[i]]);
        }
    }
    for (uint32_t link = 0; schedule->delay > 0 && link < 2 * simulator->host_count; link++)
        simulator->backlog_s[link] = background[link];
}

/* ---- a step ------------------------------------------------------------------------------------------------------------- */

/* Returns when the part is over, or where nobody waits for it, when the last of its workers is ready. */
static double run_part(dss_simulator_t *simulator, const dss_part_t *part, const uint32_t *members, const uint32_t *links) {
    double ready_s = 0;
    double transfer_s = 0;
    for (uint32_t i = 0; i < part->member_count; i++)
        ready_s = later(ready_s, simulator->ready_s[members[i]]);
    for (uint32_t i = 0; i < part->link_count; i++)
        transfer_s = later(transfer_s, simulator->link_s[links[i]]);
    if (part->keeps_values)
        return ready_s;
    const double end_s = ready_s + part->latency_s + transfer_s;
    for (uint32_t i = 0; i < part->member_count; i++) {
        simulator->next_s[members[i]] = later(simulator->next_s[members[i]], end_s);
        simulator->heard_s[members[i]] = later(simulator->heard_s[members[i]], ready_s);
    }
    return end_s;
}

/* The step cannot finish before the correction that is due in it. */
static void apply_correction(dss_simulator_t *simulator, const dss_exchange_t *exchange, double done_at_s) {
    const uint32_t *members = simulator->schedule->members + exchange->first_member;
    for (uint32_t i = 0; i < exchange->member_count; i++)
        simulator->next_s[members[i]] = later(simulator->next_s[members[i]], done_at_s);
}

/* Starts when its parts are over and the exchange launched before has left the uplinks. */
static double launch_exchange(dss_simulator_t *simulator, const dss_exchange_t *exchange, const dss_occupied_t *uplinks,
                              double ready_s) {
    for (uint32_t i = 0; i < exchange->uplink_count; i++)
        ready_s = later(ready_s, simulator->free_at_s[uplinks[i].rack]);
    for (uint32_t i = 0; i < exchange->uplink_count; i++)
        simulator->free_at_s[uplinks[i].rack] = ready_s + uplinks[i].busy_s;
    return ready_s + exchange->done_s;
}

static void run_round(dss_simulator_t *simulator, uint32_t step, uint32_t round) {
    const dss_schedule_t *schedule = simulator->schedule;
    dss_round_begin_t at = schedule->rounds[round];
    const dss_round_begin_t end = schedule->rounds[round + 1];
    double *done_at_s = NULL; /* of the launches of step % delay */
    if (schedule->delay > 0)
        done_at_s = simulator->done_at_s + (size_t)(step % schedule->delay) * schedule->rounds[schedule->period].exchange;
    double parts_s = 0; /* when the parts of the exchange at hand are over */
    while (at.part < end.part) {
        const dss_part_t *part = &schedule->parts[at.part];
        parts_s = later(parts_s, run_part(simulator, part, schedule->members + at.member, schedule->links + at.link));
        at.part++;
        at.member += part->member_count;
        at.link += part->link_count;
        if (at.exchange == end.exchange)
            continue;
        const dss_exchange_t *exchange = &schedule->exchanges[at.exchange];
        if (at.part < exchange->first_part + exchange->part_count)
            continue;
        done_at_s[at.exchange++] = launch_exchange(simulator, exchange, schedule->uplinks + at.uplink, parts_s);
        at.uplink += exchange->uplink_count;
        parts_s = 0;
    }
}

/* Those launched `delay` steps ago; before this step's launches take their places. */
static void apply_corrections(dss_simulator_t *simulator, uint32_t step) {
    const dss_schedule_t *schedule = simulator->schedule;
    if (schedule->delay == 0 || step < schedule->delay)
        return;
    const uint32_t launched = step - schedule->delay;
    const double *done_at_s = simulator->done_at_s + (size_t)(step % schedule->delay) * schedule->rounds[schedule->period].exchange;
    for (uint32_t stripe = 0; stripe < schedule->stripe_count; stripe++) {
        const uint32_t round = dss_plan_round_at(simulator->params->plan, launched, stripe);
        for (size_t i = schedule->rounds[round].exchange; i < schedule->rounds[round + 1].exchange; i++)
            apply_correction(simulator, &schedule->exchanges[i], done_at_s[i]);
    }
}

static void run_plan_step(dss_simulator_t *simulator, uint32_t step) {
    share_links(simulator, step);
    apply_corrections(simulator, step);
    for (uint32_t stripe = 0; stripe < simulator->schedule->stripe_count; stripe++)
        run_round(simulator, step, dss_plan_round_at(simulator->params->plan, step, stripe));
    send_backlog(simulator, step);
}

static void run_barrier_step(dss_simulator_t *simulator) {
    double ready_s = 0;
    for (uint32_t rank = 0; rank < simulator->world_size; rank++)
        ready_s = later(ready_s, simulator->ready_s[rank]);
    for (uint32_t rank = 0; rank < simulator->world_size; rank++) {
        simulator->heard_s[rank] = ready_s;
        simulator->next_s[rank] = ready_s + simulator->barrier_s;
    }
}

/* Returns when the last worker has finished the step. */
static double end_step(dss_simulator_t *simulator) {
    double end_s = 0;
    for (uint32_t rank = 0; rank < simulator->world_size; rank++) {
        simulator->sync_s += simulator->next_s[rank] - simulator->ready_s[rank];
        simulator->wait_s += simulator->heard_s[rank] - simulator->ready_s[rank];
        end_s = later(end_s, simulator->next_s[rank]);
    }
    double *finished = simulator->next_s;
    simulator->next_s = simulator->finish_s;
    simulator->finish_s = finished;
    return end_s;
}

static double run_steps(dss_simulator_t *simulator, double *step_s) {
    const dss_simulation_params_t *params = simulator->params;
    const uint32_t often = params->step_count < 100 ? 1 : params->step_count / 100;
    double total_s = 0;
    for (uint32_t step = 0; step < params->step_count; step++) {
        draw_compute(simulator, step);
        if (simulator->schedule)
            run_plan_step(simulator, step);
        else
            run_barrier_step(simulator);
        const double end_s = end_step(simulator);
        if (step_s)
            step_s[step] = end_s - total_s;
        total_s = end_s;
        if (params->progress && ((step + 1) % often == 0 || step + 1 == params->step_count))
            params->progress(params->progress_argument, step + 1);
    }
    return total_s;
}

/* ---- all of it ---------------------------------------------------------------------------------------------------------- */

static dss_status_t check_compute(const dss_simulation_params_t *params, dss_error_t *error_p) {
    if (!(params->compute_s >= 0 && isfinite(params->compute_s)))
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "compute_s is %g, expected a finite time of at least 0",
                        params->compute_s);
    if (!(params->compute_sigma >= 0 && params->compute_sigma <= 10))
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "compute_sigma is %g, expected 0 to 10", params->compute_sigma);
    if (!(params->straggler_probability >= 0 && params->straggler_probability <= 1))
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "straggler_probability is %g, expected 0 to 1",
                        params->straggler_probability);
    if (params->straggler_probability > 0 && !(params->straggler_factor > 0 && isfinite(params->straggler_factor)))
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "straggler_factor is %g, expected a finite factor above 0",
                        params->straggler_factor);
    return DSS_OK;
}

/* A crossing's racks are those of the plan, its links those of the topology: they have to be the same racks. */
static dss_status_t check_plan(const dss_plan_t *plan, const dss_topology_t *topology, dss_error_t *error_p) {
    if (dss_plan_world_size(plan) != dss_topology_world_size(topology))
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "the plan is for %u workers, the topology has %u",
                        dss_plan_world_size(plan), dss_topology_world_size(topology));
    for (uint32_t rank = 0; dss_plan_rack_count(plan) > 1 && rank < dss_plan_world_size(plan); rank++) {
        if (dss_plan_rack_of(plan, rank) != dss_topology_rack_of(topology, rank))
            return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT,
                            "the plan was made for other racks: it has rank %u in rack %u, the topology in rack %u", rank,
                            dss_plan_rack_of(plan, rank), dss_topology_rack_of(topology, rank));
    }
    return DSS_OK;
}

static dss_status_t check_params(const dss_simulation_params_t *params, dss_error_t *error_p) {
    if (!params)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "simulation params are NULL");
    if (params->params_bytes != sizeof *params)
        return dss_fail(
            error_p, DSS_ERR_INVALID_ARGUMENT,
            "params_bytes is %zu, expected %zu: set it to sizeof(dss_simulation_params_t) and build against this dssync.h",
            params->params_bytes, sizeof *params);
    if ((int)params->method < DSS_METHOD_PLAN || params->method > DSS_METHOD_PARAMETER_SERVER)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "method is %d, expected %d to %d", (int)params->method, DSS_METHOD_PLAN,
                        DSS_METHOD_PARAMETER_SERVER);
    if (!params->topology)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "a simulation needs a topology, got NULL");
    if (params->method == DSS_METHOD_PLAN && !params->plan)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "a simulation of a plan needs the plan, got NULL");
    if (params->step_count < 1)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "step_count is 0, expected at least 1");
    if (params->model_bytes < 1)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "model_bytes is 0, expected at least 1");
    const dss_status_t status = check_compute(params, error_p);
    if (status != DSS_OK || params->method != DSS_METHOD_PLAN)
        return status;
    return check_plan(params->plan, params->topology, error_p);
}

static void close_simulator(dss_simulator_t *simulator) {
    dss_schedule_destroy(simulator->schedule);
    free(simulator->finish_s);
    free(simulator->ready_s);
    free(simulator->next_s);
    free(simulator->heard_s);
    free(simulator->link_s);
    free(simulator->backlog_s);
    free(simulator->idle_s);
    free(simulator->free_at_s);
    free(simulator->done_at_s);
    free(simulator->busy_s);
}

static dss_status_t allocate(dss_simulator_t *simulator) {
    const dss_schedule_t *schedule = simulator->schedule;
    const size_t pending = schedule ? schedule->delay * schedule->rounds[schedule->period].exchange : 0;
    simulator->finish_s = calloc(simulator->world_size, sizeof *simulator->finish_s);
    simulator->ready_s = calloc(simulator->world_size, sizeof *simulator->ready_s);
    simulator->next_s = calloc(simulator->world_size, sizeof *simulator->next_s);
    simulator->heard_s = calloc(simulator->world_size, sizeof *simulator->heard_s);
    simulator->link_s = calloc(simulator->link_count, sizeof *simulator->link_s);
    simulator->backlog_s = calloc(simulator->link_count, sizeof *simulator->backlog_s);
    simulator->idle_s = calloc(simulator->host_count, sizeof *simulator->idle_s);
    simulator->free_at_s = calloc(simulator->rack_count, sizeof *simulator->free_at_s);
    simulator->done_at_s = calloc(pending + 1, sizeof *simulator->done_at_s);
    simulator->busy_s = calloc(simulator->link_count, sizeof *simulator->busy_s);
    return simulator->finish_s && simulator->ready_s && simulator->next_s && simulator->heard_s && simulator->link_s &&
                   simulator->backlog_s && simulator->idle_s && simulator->free_at_s && simulator->done_at_s && simulator->busy_s
               ? DSS_OK
               : DSS_ERR_NO_MEMORY;
}

static dss_status_t open_simulator(dss_simulator_t *simulator, dss_error_t *error_p) {
    const dss_simulation_params_t *params = simulator->params;
    simulator->world_size = dss_topology_world_size(params->topology);
    simulator->host_count = dss_topology_host_count(params->topology);
    simulator->rack_count = dss_topology_rack_count(params->topology);
    simulator->link_count = 2 * simulator->host_count + simulator->rack_count;
    dss_status_t status = DSS_OK;
    if (params->method == DSS_METHOD_PLAN)
        status = dss_schedule_create(params->plan, params->topology, params->model_bytes, &simulator->schedule, error_p);
    if (status != DSS_OK)
        return status;
    status = allocate(simulator);
    if (status == DSS_OK && params->method != DSS_METHOD_PLAN)
        status = dss_barrier_time(params->method, params->topology, (double)params->model_bytes, &simulator->barrier_s,
                                  simulator->busy_s);
    for (uint32_t link = 0; status == DSS_OK && !simulator->schedule && link < simulator->link_count; link++)
        simulator->busy_s[link] *= params->step_count;
    if (status != DSS_OK)
        return dss_fail(error_p, status, "out of memory to simulate %u workers", simulator->world_size);
    return DSS_OK;
}

/* The background of the last steps that is still to be sent when they are over. */
static void take_off_unsent(dss_simulator_t *simulator, double total_s) {
    const uint32_t uplink = 2 * simulator->host_count;
    for (uint32_t link = 0; link < simulator->link_count; link++)
        simulator->busy_s[link] -= simulator->backlog_s[link];
    for (uint32_t rack = 0; rack < simulator->rack_count; rack++)
        simulator->busy_s[uplink + rack] -= later(simulator->free_at_s[rack] - total_s, 0);
}

static dss_simulation_t summarise(const dss_simulator_t *simulator, double total_s) {
    const double worker_steps = (double)simulator->world_size * simulator->params->step_count;
    dss_simulation_t simulation = {total_s,
                                   total_s / simulator->params->step_count,
                                   simulator->sync_s / worker_steps,
                                   simulator->wait_s / worker_steps,
                                   0,
                                   DSS_LINK_MEMORY,
                                   0};
    uint32_t busiest = 0;
    for (uint32_t link = 1; link < simulator->link_count; link++)
        busiest = simulator->busy_s[link] > simulator->busy_s[busiest] ? link : busiest;
    simulation.busiest_use = total_s > 0 ? simulator->busy_s[busiest] / total_s : 0;
    while (busiest >= simulator->host_count && simulation.busiest < DSS_LINK_UPLINK) {
        busiest -= simulator->host_count;
        simulation.busiest++;
    }
    simulation.busiest_index = busiest;
    return simulation;
}

dss_status_t dss_simulate(const dss_simulation_params_t *params, dss_simulation_t *simulation_p, double *step_s,
                          dss_error_t *error_p) {
    dss_status_t status = check_params(params, error_p);
    if (status != DSS_OK)
        return status;
    if (!simulation_p)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "simulation_p is NULL");
    dss_simulator_t simulator = {.params = params};
    status = open_simulator(&simulator, error_p);
    if (status == DSS_OK) {
        const double total_s = run_steps(&simulator, step_s);
        take_off_unsent(&simulator, total_s);
        *simulation_p = summarise(&simulator, total_s);
    }
    close_simulator(&simulator);
    return status;
}
