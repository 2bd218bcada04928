/*
 * Which worker sits on which host, which host in which rack, and how fast their links are. Copied, checked once and never changed
 * after that, so that plans, costs and simulations may index without looking: any number of threads may read, nobody locks. The
 * members of the racks are kept sorted besides, because a rack is what everybody asks for.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "dssync.h"
#include "status.h"

struct dss_topology {
    uint32_t world_size;
    uint32_t host_count;
    uint32_t rack_count;
    uint32_t *host_of;      /* [world_size]; owned, as are all arrays here */
    uint32_t *rack_of_host; /* [host_count] */
    uint32_t *rack_of;      /* [world_size] */
    uint32_t *members;      /* [world_size] ranks, rack after rack, ascending in each */
    uint32_t *rack_begin;   /* [rack_count + 1] offsets into members */
    dss_link_t *nics;       /* [host_count] */
    dss_link_t *uplinks;    /* [rack_count] */
    dss_link_t memory;
};

static dss_status_t check_counts(const dss_topology_params_t *params, dss_error_t *error_p) {
    if (params->params_bytes != sizeof *params)
        return dss_fail(
            error_p, DSS_ERR_INVALID_ARGUMENT,
            "params_bytes is %zu, expected %zu: set it to sizeof(dss_topology_params_t) and build against this dssync.h",
            params->params_bytes, sizeof *params);
    if (params->world_size < 1 || params->world_size > DSS_PLAN_MAX_WORLD_SIZE)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "world_size is %u, expected 1 to %u", params->world_size,
                        DSS_PLAN_MAX_WORLD_SIZE);
    if (params->host_count < 1 || params->host_count > params->world_size)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT,
                        "host_count is %u, expected 1 to world_size %u: every host holds a worker", params->host_count,
                        params->world_size);
    if (params->rack_count < 1 || params->rack_count > params->host_count)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "rack_count is %u, expected 1 to host_count %u: every rack holds a host",
                        params->rack_count, params->host_count);
    if (!params->host_of || !params->rack_of || !params->nics || !params->uplinks)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "an array of the topology is NULL");
    return DSS_OK;
}

static dss_status_t check_link(const char *kind, uint32_t index, const dss_link_t *link, dss_error_t *error_p) {
    if (!(link->bytes_per_s > 0)) /* NAN too */
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT,
                        "%s %u has a rate of %g bytes/s, expected more than 0 (unknown: INFINITY)", kind, index, link->bytes_per_s);
    if (!(link->latency_s >= 0 && isfinite(link->latency_s)))
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "%s %u has a latency of %g s, expected a finite time of at least 0",
                        kind, index, link->latency_s);
    return DSS_OK;
}

static dss_status_t check_links(const dss_topology_params_t *params, dss_error_t *error_p) {
    dss_status_t status = check_link("the memory of hosts 0 to", params->host_count - 1, &params->memory, error_p);
    for (uint32_t host = 0; status == DSS_OK && host < params->host_count; host++)
        status = check_link("the NIC of host", host, &params->nics[host], error_p);
    for (uint32_t rack = 0; status == DSS_OK && rack < params->rack_count; rack++)
        status = check_link("the uplink of rack", rack, &params->uplinks[rack], error_p);
    return status;
}

/* Every child has a parent in range. `parent_of` with its names serves workers on hosts and hosts in racks. */
static dss_status_t check_parents(const char *child, const char *parent, const uint32_t *parent_of, uint32_t child_count,
                                  uint32_t parent_count, dss_error_t *error_p) {
    for (uint32_t i = 0; i < child_count; i++) {
        if (parent_of[i] >= parent_count)
            return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "%s %u is said to be in %s %u, but the %ss are 0 to %u", child, i,
                            parent, parent_of[i], parent, parent_count - 1);
    }
    return DSS_OK;
}

static dss_status_t allocate(const dss_topology_params_t *params, dss_topology_t **topology_p, dss_error_t *error_p) {
    dss_topology_t *topology = calloc(1, sizeof *topology);
    if (!topology)
        goto failed;
    topology->host_of = calloc(params->world_size, sizeof *topology->host_of);
    topology->rack_of = calloc(params->world_size, sizeof *topology->rack_of);
    topology->members = calloc(params->world_size, sizeof *topology->members);
    topology->rack_of_host = calloc(params->host_count, sizeof *topology->rack_of_host);
    topology->nics = calloc(params->host_count, sizeof *topology->nics);
    topology->uplinks = calloc(params->rack_count, sizeof *topology->uplinks);
    topology->rack_begin = calloc((size_t)params->rack_count + 1, sizeof *topology->rack_begin);
    if (!topology->host_of || !topology->rack_of || !topology->members || !topology->rack_of_host || !topology->nics ||
        !topology->uplinks || !topology->rack_begin)
        goto failed;
    *topology_p = topology;
    return DSS_OK;
failed:
    dss_topology_destroy(topology);
    return dss_fail(error_p, DSS_ERR_NO_MEMORY, "out of memory for a topology of %u ranks on %u hosts in %u racks",
                    params->world_size, params->host_count, params->rack_count);
}

static void fill(dss_topology_t *topology, const dss_topology_params_t *params) {
    topology->world_size = params->world_size;
    topology->host_count = params->host_count;
    topology->rack_count = params->rack_count;
    topology->memory = params->memory;
    memcpy(topology->host_of, params->host_of, params->world_size * sizeof *params->host_of);
    memcpy(topology->rack_of_host, params->rack_of, params->host_count * sizeof *params->rack_of);
    memcpy(topology->nics, params->nics, params->host_count * sizeof *params->nics);
    memcpy(topology->uplinks, params->uplinks, params->rack_count * sizeof *params->uplinks);
    for (uint32_t rank = 0; rank < params->world_size; rank++)
        topology->rack_of[rank] = params->rack_of[params->host_of[rank]];
}

/* Counting sort: rack_begin is first the end of each rack's members, then, filled from behind, their begin. */
static void sort_members(dss_topology_t *topology) {
    for (uint32_t rank = 0; rank < topology->world_size; rank++)
        topology->rack_begin[topology->rack_of[rank]]++;
    for (uint32_t rack = 0; rack < topology->rack_count; rack++)
        topology->rack_begin[rack + 1] += topology->rack_begin[rack];
    for (uint32_t rank = topology->world_size; rank-- > 0;)
        topology->members[--topology->rack_begin[topology->rack_of[rank]]] = rank;
}

/* The smallest host that no worker names; host_count if there is none. `seen` is scratch, a word a host, all zero before. */
static uint32_t first_empty_host(const dss_topology_t *topology, uint32_t *seen) {
    uint32_t host = 0;
    for (uint32_t rank = 0; rank < topology->world_size; rank++)
        seen[topology->host_of[rank]] = 1;
    while (host < topology->host_count && seen[host])
        host++;
    return host;
}

static dss_status_t check_none_empty(const dss_topology_t *topology, dss_error_t *error_p) {
    uint32_t *seen = calloc(topology->host_count, sizeof *seen);
    if (!seen)
        return dss_fail(error_p, DSS_ERR_NO_MEMORY, "out of memory for a topology of %u ranks on %u hosts in %u racks",
                        topology->world_size, topology->host_count, topology->rack_count);
    const uint32_t host = first_empty_host(topology, seen);
    free(seen);
    if (host < topology->host_count)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "host %u holds no worker; leave it out", host);
    for (uint32_t rack = 0; rack < topology->rack_count; rack++) {
        if (topology->rack_begin[rack] == topology->rack_begin[rack + 1])
            return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "rack %u holds no host; leave it out", rack);
    }
    return DSS_OK;
}

dss_status_t dss_topology_create(const dss_topology_params_t *params, dss_topology_t **topology_p, dss_error_t *error_p) {
    dss_topology_t *topology = NULL;
    if (!params || !topology_p)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "%s is NULL", params ? "topology_p" : "params");
    dss_status_t status = check_counts(params, error_p);
    if (status == DSS_OK)
        status = check_parents("rank", "host", params->host_of, params->world_size, params->host_count, error_p);
    if (status == DSS_OK)
        status = check_parents("host", "rack", params->rack_of, params->host_count, params->rack_count, error_p);
    if (status == DSS_OK)
        status = check_links(params, error_p);
    if (status == DSS_OK)
        status = allocate(params, &topology, error_p);
    if (status != DSS_OK)
        return status;
    fill(topology, params);
    sort_members(topology);
    status = check_none_empty(topology, error_p);
    if (status != DSS_OK) {
        dss_topology_destroy(topology);
        return status;
    }
    *topology_p = topology;
    return DSS_OK;
}

void dss_topology_destroy(dss_topology_t *topology) {
    if (!topology)
        return;
    free(topology->host_of);
    free(topology->rack_of_host);
    free(topology->rack_of);
    free(topology->members);
    free(topology->rack_begin);
    free(topology->nics);
    free(topology->uplinks);
    free(topology);
}

uint32_t dss_topology_world_size(const dss_topology_t *topology) {
    return topology->world_size;
}

uint32_t dss_topology_host_count(const dss_topology_t *topology) {
    return topology->host_count;
}

uint32_t dss_topology_rack_count(const dss_topology_t *topology) {
    return topology->rack_count;
}

uint32_t dss_topology_host_of(const dss_topology_t *topology, uint32_t rank) {
    return topology->host_of[rank];
}

uint32_t dss_topology_rack_of_host(const dss_topology_t *topology, uint32_t host) {
    return topology->rack_of_host[host];
}

uint32_t dss_topology_rack_of(const dss_topology_t *topology, uint32_t rank) {
    return topology->rack_of[rank];
}

dss_link_t dss_topology_nic(const dss_topology_t *topology, uint32_t host) {
    return topology->nics[host];
}

dss_link_t dss_topology_uplink(const dss_topology_t *topology, uint32_t rack) {
    return topology->uplinks[rack];
}

dss_link_t dss_topology_memory(const dss_topology_t *topology) {
    return topology->memory;
}

dss_status_t dss_topology_rack(const dss_topology_t *topology, uint32_t rack, const uint32_t **members_p,
                               uint32_t *member_count_p) {
    if (!topology || rack >= topology->rack_count || !members_p || !member_count_p)
        return DSS_ERR_INVALID_ARGUMENT;
    *members_p = topology->members + topology->rack_begin[rack];
    *member_count_p = topology->rack_begin[rack + 1] - topology->rack_begin[rack];
    return DSS_OK;
}
