#include "barrier.h"

#include <stdlib.h>

#include "load.h"

typedef struct dss_barrier {
    const dss_topology_t *topology;
    double bytes; /* averaged by each worker */
    uint32_t world_size;
    uint32_t host_count;
    uint32_t rack_count;
    uint32_t *workers_on; /* [host_count] owned */
    uint32_t *hosts_in;   /* [rack_count] owned */
    double *phase_bytes;  /* [2 * hosts + racks] of the phase at hand, headers not counted; owned */
    double *busy_s;       /* [2 * hosts + racks] of all phases; the caller's */
    double seconds;       /* of all phases */
} dss_barrier_t;

static double *memory_of(dss_barrier_t *barrier, uint32_t host) {
    return &barrier->phase_bytes[host];
}

static double *nic_of(dss_barrier_t *barrier, uint32_t host) {
    return &barrier->phase_bytes[barrier->host_count + host];
}

static double *uplink_of(dss_barrier_t *barrier, uint32_t rack) {
    return &barrier->phase_bytes[2 * barrier->host_count + rack];
}

/* The phase is over when its busiest link has sent its bytes; `hops` messages follow one another. */
static void end_phase(dss_barrier_t *barrier, double hops, dss_link_kind_t outermost) {
    double slowest = 0;
    double alpha = dss_topology_memory(barrier->topology).latency_s;
    double uplink_alpha = 0;
    for (uint32_t row = 0; row < 2 * barrier->host_count + barrier->rack_count; row++) {
        const dss_link_kind_t kind = (dss_link_kind_t)(row / barrier->host_count < 2 ? row / barrier->host_count : 2);
        const uint32_t index = row - (uint32_t)kind * barrier->host_count;
        const double wire = kind == DSS_LINK_MEMORY ? 1 : DSS_WIRE_OVERHEAD;
        const double seconds = dss_load_seconds(barrier->topology, kind, index, wire * barrier->phase_bytes[row]);
        if (kind == DSS_LINK_NIC && outermost != DSS_LINK_MEMORY &&
            2 * dss_topology_nic(barrier->topology, index).latency_s > alpha)
            alpha = 2 * dss_topology_nic(barrier->topology, index).latency_s;
        if (kind == DSS_LINK_UPLINK && 2 * dss_topology_uplink(barrier->topology, index).latency_s > uplink_alpha)
            uplink_alpha = 2 * dss_topology_uplink(barrier->topology, index).latency_s;
        slowest = seconds > slowest ? seconds : slowest;
        barrier->busy_s[row] += seconds;
        barrier->phase_bytes[row] = 0;
    }
    barrier->seconds += slowest + hops * (alpha + (outermost == DSS_LINK_UPLINK ? uplink_alpha : 0));
}

static uint32_t most(const uint32_t *counts, uint32_t count) {
    uint32_t most = 0;
    for (uint32_t i = 0; i < count; i++)
        most = counts[i] > most ? counts[i] : most;
    return most;
}

/* The outermost link that the exchange of all ranks crosses. */
static dss_link_kind_t outermost(const dss_barrier_t *barrier) {
    return barrier->rack_count > 1 ? DSS_LINK_UPLINK : barrier->host_count > 1 ? DSS_LINK_NIC : DSS_LINK_MEMORY;
}

static void ring(dss_barrier_t *barrier) {
    const dss_topology_t *topology = barrier->topology;
    const double share = 2.0 * (barrier->world_size - 1) / barrier->world_size * barrier->bytes;
    for (uint32_t rank = 0; barrier->world_size > 1 && rank < barrier->world_size; rank++) {
        const uint32_t next = (rank + 1) % barrier->world_size;
        const uint32_t host = dss_topology_host_of(topology, rank);
        const uint32_t rack = dss_topology_rack_of(topology, rank);
        *(dss_topology_host_of(topology, next) == host ? memory_of(barrier, host) : nic_of(barrier, host)) += share;
        if (dss_topology_rack_of(topology, next) != rack)
            *uplink_of(barrier, rack) += share;
    }
    end_phase(barrier, 2.0 * (barrier->world_size - 1), outermost(barrier));
}

/*
 * One way inside racks. Scattered: each host ends up with its part of the rack's bytes, or begins with it. Else one worker ends up
 * with all, or begins with all: for many bytes a reduce is a reduce-scatter and a gather, a broadcast a scatter and an all-gather,
 * and each has two such traversals.
 */
static void phase_in_racks(dss_barrier_t *barrier, int scattered) {
    const uint32_t hosts = most(barrier->hosts_in, barrier->rack_count);
    const double traversals = scattered ? 1 : 2;
    for (uint32_t host = 0; host < barrier->host_count; host++) {
        const double mates = barrier->hosts_in[dss_topology_rack_of_host(barrier->topology, host)];
        *memory_of(barrier, host) = (barrier->workers_on[host] - 1) * barrier->bytes;
        *nic_of(barrier, host) = traversals * (mates - 1) / mates * barrier->bytes;
    }
    end_phase(barrier, traversals * (hosts - 1), hosts > 1 ? DSS_LINK_NIC : DSS_LINK_MEMORY);
}

/* Between racks; `through_all`: each host sends its part of the rack's bytes, else the rack's first worker's sends all. */
static void phase_between_racks(dss_barrier_t *barrier, int through_all) {
    const double share = 2.0 * (barrier->rack_count - 1) / barrier->rack_count * barrier->bytes;
    for (uint32_t host = 0; through_all && host < barrier->host_count; host++)
        *nic_of(barrier, host) = share / barrier->hosts_in[dss_topology_rack_of_host(barrier->topology, host)];
    for (uint32_t rack = 0; rack < barrier->rack_count; rack++) {
        const uint32_t *members;
        uint32_t member_count;
        dss_topology_rack(barrier->topology, rack, &members, &member_count);
        if (!through_all)
            *nic_of(barrier, dss_topology_host_of(barrier->topology, members[0])) = share;
        *uplink_of(barrier, rack) = share;
    }
    end_phase(barrier, 2.0 * (barrier->rack_count - 1), outermost(barrier));
}

/* All send to the server, then it sends to all: the same bytes in both directions. The server's own host needs no NIC. */
static void phase_of_server(dss_barrier_t *barrier) {
    const uint32_t server = dss_topology_host_of(barrier->topology, 0);
    const uint32_t server_rack = dss_topology_rack_of(barrier->topology, 0);
    for (uint32_t rank = 0; rank < barrier->world_size; rank++) {
        const uint32_t host = dss_topology_host_of(barrier->topology, rank);
        const uint32_t rack = dss_topology_rack_of(barrier->topology, rank);
        *memory_of(barrier, server) += host == server ? barrier->bytes : 0;
        *nic_of(barrier, server) += host == server ? 0 : barrier->bytes;
        *nic_of(barrier, host) += host == server ? 0 : barrier->bytes;
        *uplink_of(barrier, server_rack) += rack == server_rack ? 0 : barrier->bytes;
        *uplink_of(barrier, rack) += rack == server_rack ? 0 : barrier->bytes;
    }
    end_phase(barrier, 1, outermost(barrier));
}

static void count_members(dss_barrier_t *barrier) {
    for (uint32_t rank = 0; rank < barrier->world_size; rank++)
        barrier->workers_on[dss_topology_host_of(barrier->topology, rank)]++;
    for (uint32_t host = 0; host < barrier->host_count; host++)
        barrier->hosts_in[dss_topology_rack_of_host(barrier->topology, host)]++;
}

static void add_phases(dss_barrier_t *barrier, dss_method_t method) {
    const int scattered = method == DSS_METHOD_TWO_DIMENSIONAL;
    switch (method) {
    case DSS_METHOD_RING:
        ring(barrier);
        break;
    case DSS_METHOD_PARAMETER_SERVER:
        phase_of_server(barrier);
        phase_of_server(barrier);
        break;
    default:
        phase_in_racks(barrier, scattered);
        if (barrier->rack_count > 1)
            phase_between_racks(barrier, scattered);
        phase_in_racks(barrier, scattered);
    }
}

dss_status_t dss_barrier_time(dss_method_t method, const dss_topology_t *topology, double bytes, double *seconds_p,
                              double *busy_s) {
    dss_barrier_t barrier = {.topology = topology, .bytes = bytes, .busy_s = busy_s};
    barrier.world_size = dss_topology_world_size(topology);
    barrier.host_count = dss_topology_host_count(topology);
    barrier.rack_count = dss_topology_rack_count(topology);
    const size_t link_count = 2 * (size_t)barrier.host_count + barrier.rack_count;
    dss_status_t status = DSS_ERR_NO_MEMORY;
    barrier.workers_on = calloc(barrier.host_count, sizeof *barrier.workers_on);
    barrier.hosts_in = calloc(barrier.rack_count, sizeof *barrier.hosts_in);
    barrier.phase_bytes = calloc(link_count, sizeof *barrier.phase_bytes);
    if (!barrier.workers_on || !barrier.hosts_in || !barrier.phase_bytes)
        goto done;
    for (size_t link = 0; link < link_count; link++)
        busy_s[link] = 0;
    count_members(&barrier);
    add_phases(&barrier, method);
    *seconds_p = barrier.seconds;
    status = DSS_OK;
done:
    free(barrier.workers_on);
    free(barrier.hosts_in);
    free(barrier.phase_bytes);
    return status;
}
