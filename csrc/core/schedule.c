#include "schedule.h"

#include <stdlib.h>

#include "load.h"
#include "status.h"

/* What is needed while a schedule is made. */
typedef struct dss_maker {
    dss_schedule_t *schedule;
    const dss_plan_t *plan;
    const dss_topology_t *topology;
    double stripe_bytes;
    dss_load_meter_t *meter;  /* owned */
    uint32_t *rack_begin;     /* [rack_count + 1] scratch; owned */
    dss_round_begin_t end;    /* how much of each array is filled */
    double *round_foreground; /* [link_count] of the round at hand; owned */
    double *round_background; /* [link_count] owned */
} dss_maker_t;

static uint32_t link_row(const dss_schedule_t *schedule, dss_link_kind_t kind, uint32_t index) {
    return (uint32_t)kind * schedule->host_count + index;
}

static void add_members(dss_maker_t *maker, const uint32_t *members, uint32_t member_count) {
    for (uint32_t i = 0; i < member_count; i++)
        maker->schedule->members[maker->end.member + i] = members[i];
}

/* One part; its members stand in the schedule already. */
static void add_part(dss_maker_t *maker, uint32_t member_count) {
    dss_schedule_t *schedule = maker->schedule;
    const dss_group_load_t load = dss_load_of_group(maker->meter, schedule->members + maker->end.member, member_count,
                                                    maker->stripe_bytes, DSS_CROSSING_NONE);
    for (uint32_t i = 0; i < load.link_count; i++) {
        const dss_link_load_t *link = &load.links[i];
        const uint32_t row = link_row(schedule, link->kind, link->index);
        schedule->links[maker->end.link++] = row;
        maker->round_foreground[row] += dss_load_seconds(maker->topology, link->kind, link->index, link->foreground_bytes);
    }
    schedule->parts[maker->end.part++] = (dss_part_t){member_count, load.link_count, 0, load.foreground_latency_s};
    maker->end.member += member_count;
}

/* Copies the group's members, rack after rack; rack r's end up at rack_begin[r] .. rack_begin[r + 1]. */
static void sort_by_rack(dss_maker_t *maker, const uint32_t *members, uint32_t member_count) {
    const uint32_t rack_count = dss_topology_rack_count(maker->topology);
    uint32_t *begin = maker->rack_begin;
    for (uint32_t rack = 0; rack <= rack_count; rack++)
        begin[rack] = 0;
    for (uint32_t i = 0; i < member_count; i++)
        begin[dss_topology_rack_of(maker->topology, members[i])]++;
    for (uint32_t rack = 0; rack < rack_count; rack++)
        begin[rack + 1] += begin[rack];
    for (uint32_t i = member_count; i-- > 0;)
        maker->schedule->members[maker->end.member + --begin[dss_topology_rack_of(maker->topology, members[i])]] = members[i];
}

/* What a crossing waits for before its exchange begins. */
static void add_crossing_parts(dss_maker_t *maker, const uint32_t *members, uint32_t member_count, dss_crossing_t crossing) {
    if (crossing == DSS_CROSSING_VALUES) {
        add_members(maker, members, member_count);
        maker->schedule->parts[maker->end.part++] = (dss_part_t){member_count, 0, 1, 0};
        maker->end.member += member_count;
        return;
    }
    sort_by_rack(maker, members, member_count);
    for (uint32_t rack = 0; rack < dss_topology_rack_count(maker->topology); rack++) {
        if (maker->rack_begin[rack + 1] > maker->rack_begin[rack])
            add_part(maker, maker->rack_begin[rack + 1] - maker->rack_begin[rack]);
    }
}

static void add_crossing(dss_maker_t *maker, const uint32_t *members, uint32_t member_count, dss_crossing_t crossing) {
    dss_schedule_t *schedule = maker->schedule;
    dss_exchange_t exchange = {0, maker->end.part, maker->end.member, member_count, 0, 0};
    add_crossing_parts(maker, members, member_count, crossing);
    exchange.part_count = (uint32_t)(maker->end.part - exchange.first_part);
    const dss_group_load_t load = dss_load_of_group(maker->meter, members, member_count, maker->stripe_bytes, crossing);
    for (uint32_t i = 0; i < load.link_count; i++) {
        const dss_link_load_t *link = &load.links[i];
        const double seconds = dss_load_seconds(maker->topology, link->kind, link->index, link->background_bytes);
        maker->round_background[link_row(schedule, link->kind, link->index)] += seconds;
        if (seconds > exchange.done_s)
            exchange.done_s = seconds; /* its levels are pipelined */
        if (link->kind == DSS_LINK_UPLINK) {
            schedule->uplinks[maker->end.uplink++] = (dss_occupied_t){link->index, seconds};
            exchange.uplink_count++;
        }
    }
    exchange.done_s += load.background_latency_s;
    schedule->exchanges[maker->end.exchange++] = exchange;
}

static void add_group(dss_maker_t *maker, uint32_t round, uint32_t group) {
    const uint32_t *members;
    uint32_t member_count;
    dss_plan_group(maker->plan, round, group, &members, &member_count);
    const dss_crossing_t crossing = dss_plan_delayed_crossing(maker->plan, round);
    if (crossing != DSS_CROSSING_NONE) {
        add_crossing(maker, members, member_count, crossing);
        return;
    }
    add_members(maker, members, member_count);
    add_part(maker, member_count);
}

/* The round's loads count in every phase that takes it. */
static void add_loads(dss_maker_t *maker, uint32_t round) {
    dss_schedule_t *schedule = maker->schedule;
    for (uint32_t phase = 0; phase < schedule->phase_count; phase++) {
        const uint32_t stripe = (round + schedule->period - phase) % schedule->period;
        const size_t row = (size_t)phase * schedule->link_count;
        for (uint32_t link = 0; stripe < schedule->stripe_count && link < schedule->link_count; link++) {
            schedule->foreground_s[row + link] += maker->round_foreground[link];
            schedule->background_s[row + link] += maker->round_background[link];
        }
    }
    for (uint32_t link = 0; link < schedule->link_count; link++)
        maker->round_foreground[link] = maker->round_background[link] = 0;
}

static dss_status_t allocate(dss_maker_t *maker) {
    dss_schedule_t *schedule = maker->schedule;
    const size_t worker_rounds = (size_t)schedule->period * dss_plan_world_size(maker->plan);
    const size_t rack_rounds = (size_t)schedule->period * dss_topology_rack_count(maker->topology);
    schedule->rounds = calloc((size_t)schedule->period + 1, sizeof *schedule->rounds);
    schedule->parts = calloc(worker_rounds, sizeof *schedule->parts);
    schedule->members = calloc(worker_rounds, sizeof *schedule->members);
    schedule->links =
        calloc(worker_rounds, 3 * sizeof *schedule->links); /* a member adds a host's two links and an uplink at most */
    schedule->exchanges = calloc(rack_rounds, sizeof *schedule->exchanges);
    schedule->uplinks = calloc(rack_rounds, sizeof *schedule->uplinks);
    schedule->foreground_s = calloc((size_t)schedule->phase_count * schedule->link_count, sizeof *schedule->foreground_s);
    schedule->background_s = calloc((size_t)schedule->phase_count * schedule->link_count, sizeof *schedule->background_s);
    maker->rack_begin = calloc((size_t)dss_topology_rack_count(maker->topology) + 1, sizeof *maker->rack_begin);
    maker->round_foreground = calloc(schedule->link_count, sizeof *maker->round_foreground);
    maker->round_background = calloc(schedule->link_count, sizeof *maker->round_background);
    if (!schedule->rounds || !schedule->parts || !schedule->members || !schedule->links || !schedule->exchanges ||
        !schedule->uplinks || !schedule->foreground_s || !schedule->background_s || !maker->rack_begin ||
        !maker->round_foreground || !maker->round_background)
        return DSS_ERR_NO_MEMORY;
    return dss_load_meter_create(maker->topology, &maker->meter);
}

dss_status_t dss_schedule_create(const dss_plan_t *plan, const dss_topology_t *topology, uint64_t model_bytes,
                                 dss_schedule_t **schedule_p, dss_error_t *error_p) {
    dss_maker_t maker = {.plan = plan, .topology = topology};
    dss_status_t status = DSS_ERR_NO_MEMORY;
    dss_schedule_t *schedule = maker.schedule = calloc(1, sizeof *schedule);
    if (!schedule)
        goto done;
    schedule->period = dss_plan_period(plan);
    schedule->stripe_count = dss_load_stripe_count(plan, model_bytes);
    schedule->delay = dss_plan_delay(plan);
    schedule->host_count = dss_topology_host_count(topology);
    schedule->link_count = 2 * schedule->host_count + dss_topology_rack_count(topology);
    schedule->phase_count = schedule->stripe_count == schedule->period ? 1 : schedule->period;
    maker.stripe_bytes = (double)model_bytes / schedule->stripe_count;
    status = allocate(&maker);
    if (status != DSS_OK)
        goto done;
    for (uint32_t round = 0; round < schedule->period; round++) {
        for (uint32_t group = 0; group < dss_plan_group_count(plan, round); group++)
            add_group(&maker, round, group);
        schedule->rounds[round + 1] = maker.end;
        add_loads(&maker, round);
    }
    *schedule_p = schedule;
    schedule = NULL;
done:
    dss_schedule_destroy(schedule);
    dss_load_meter_destroy(maker.meter);
    free(maker.rack_begin);
    free(maker.round_foreground);
    free(maker.round_background);
    if (status != DSS_OK)
        return dss_fail(error_p, status, "out of memory to lay out %u rounds of %u ranks", dss_plan_period(plan),
                        dss_plan_world_size(plan));
    return DSS_OK;
}

void dss_schedule_destroy(dss_schedule_t *schedule) {
    if (!schedule)
        return;
    free(schedule->rounds);
    free(schedule->parts);
    free(schedule->members);
    free(schedule->links);
    free(schedule->exchanges);
    free(schedule->uplinks);
    free(schedule->foreground_s);
    free(schedule->background_s);
    free(schedule);
}
