#include "load.h"

#include <stdlib.h>

struct dss_load_meter {
    const dss_topology_t *topology;
    uint32_t *workers_on;   /* [host_count] of the group at hand; zero between uses; owned */
    uint32_t *hosts_in;     /* [rack_count] the same */
    uint32_t *hosts;        /* [host_count] those of the group, in the order met; owned */
    uint32_t *racks;        /* [rack_count] the same */
    dss_link_load_t *links; /* [2 * host_count + rack_count] owned */
};

static uint32_t larger(uint32_t a, uint32_t b) {
    return a > b ? a : b;
}

static double slower(double a, double b) {
    return a > b ? a : b;
}

dss_status_t dss_load_meter_create(const dss_topology_t *topology, dss_load_meter_t **meter_p) {
    const size_t host_count = dss_topology_host_count(topology);
    const size_t rack_count = dss_topology_rack_count(topology);
    dss_load_meter_t *meter = calloc(1, sizeof *meter);
    if (!meter)
        return DSS_ERR_NO_MEMORY;
    meter->topology = topology;
    meter->workers_on = calloc(host_count, sizeof *meter->workers_on);
    meter->hosts = calloc(host_count, sizeof *meter->hosts);
    meter->hosts_in = calloc(rack_count, sizeof *meter->hosts_in);
    meter->racks = calloc(rack_count, sizeof *meter->racks);
    meter->links = calloc(2 * host_count + rack_count, sizeof *meter->links);
    if (!meter->workers_on || !meter->hosts || !meter->hosts_in || !meter->racks || !meter->links) {
        dss_load_meter_destroy(meter);
        return DSS_ERR_NO_MEMORY;
    }
    *meter_p = meter;
    return DSS_OK;
}

void dss_load_meter_destroy(dss_load_meter_t *meter) {
    if (!meter)
        return;
    free(meter->workers_on);
    free(meter->hosts);
    free(meter->hosts_in);
    free(meter->racks);
    free(meter->links);
    free(meter);
}

double dss_load_seconds(const dss_topology_t *topology, dss_link_kind_t kind, uint32_t index, double bytes) {
    const dss_link_t link = kind == DSS_LINK_MEMORY ? dss_topology_memory(topology)
                            : kind == DSS_LINK_NIC  ? dss_topology_nic(topology, index)
                                                    : dss_topology_uplink(topology, index);
    return bytes > 0 ? bytes / link.bytes_per_s : 0;
}

/* The hosts and racks of the group, and how many of its members each holds. */
static void classify(dss_load_meter_t *meter, const uint32_t *members, uint32_t member_count, dss_group_load_t *load) {
    for (uint32_t i = 0; i < member_count; i++) {
        const uint32_t host = dss_topology_host_of(meter->topology, members[i]);
        if (meter->workers_on[host]++)
            continue;
        meter->hosts[load->host_count++] = host;
        const uint32_t rack = dss_topology_rack_of_host(meter->topology, host);
        if (!meter->hosts_in[rack]++)
            meter->racks[load->rack_count++] = rack;
    }
}

static void forget(dss_load_meter_t *meter, const dss_group_load_t *load) {
    for (uint32_t i = 0; i < load->host_count; i++)
        meter->workers_on[meter->hosts[i]] = 0;
    for (uint32_t i = 0; i < load->rack_count; i++)
        meter->hosts_in[meter->racks[i]] = 0;
}

/* How often bytes go through a rack, in or out, and whether they are exchanged between racks; at once and later. */
typedef struct ways {
    double foreground_inside;
    double foreground_between;
    double background_inside;
    double background_between;
} ways_t;

static ways_t ways_of(dss_crossing_t crossing) {
    switch (crossing) {
    case DSS_CROSSING_MEANS:
        return (ways_t){2, 0, 1, 1};
    case DSS_CROSSING_VALUES:
        return (ways_t){0, 0, 2, 1};
    default:
        return (ways_t){2, 1, 0, 0};
    }
}

static void add(dss_load_meter_t *meter, dss_group_load_t *load, dss_link_kind_t kind, uint32_t index, double foreground,
                double background) {
    meter->links[load->link_count++] = (dss_link_load_t){kind, index, foreground, background};
}

/* A message between hosts crosses two NICs, one between racks two uplinks besides; both ends are taken to be alike. */
static void add_latency(dss_load_meter_t *meter, dss_group_load_t *load, ways_t ways) {
    uint32_t workers = 1;
    uint32_t hosts = 1;
    double nic_alpha = 0;
    double uplink_alpha = 0;
    for (uint32_t i = 0; i < load->host_count; i++) {
        workers = larger(workers, meter->workers_on[meter->hosts[i]]);
        nic_alpha = slower(nic_alpha, 2 * dss_topology_nic(meter->topology, meter->hosts[i]).latency_s);
    }
    for (uint32_t i = 0; i < load->rack_count; i++) {
        hosts = larger(hosts, meter->hosts_in[meter->racks[i]]);
        uplink_alpha = slower(uplink_alpha, 2 * dss_topology_uplink(meter->topology, meter->racks[i]).latency_s);
    }
    const double inside = (workers - 1) * dss_topology_memory(meter->topology).latency_s + (hosts - 1) * nic_alpha; /* one way */
    const double between = 2.0 * (load->rack_count - 1) * (nic_alpha + uplink_alpha);
    load->foreground_latency_s = ways.foreground_inside * inside + ways.foreground_between * between;
    load->background_latency_s = ways.background_inside * inside + ways.background_between * between;
}

dss_group_load_t dss_load_of_group(dss_load_meter_t *meter, const uint32_t *members, uint32_t member_count, double bytes,
                                   dss_crossing_t crossing) {
    dss_group_load_t load = {meter->links, 0, 0, 0, 0, 0, 0};
    classify(meter, members, member_count, &load);
    const ways_t ways = ways_of(crossing == DSS_CROSSING_MEANS && load.rack_count == 1 ? DSS_CROSSING_NONE : crossing);
    const double between = load.rack_count > 1 ? 2.0 * (load.rack_count - 1) / load.rack_count * bytes : 0; /* of one rack */
    for (uint32_t i = 0; i < load.host_count; i++) {
        const uint32_t host = meter->hosts[i];
        const uint32_t workers = meter->workers_on[host];
        const double hosts = meter->hosts_in[dss_topology_rack_of_host(meter->topology, host)];
        const double in_memory = (workers - 1) * bytes;     /* all workers of the host, one way */
        const double in_rack = (hosts - 1) / hosts * bytes; /* the host's, one way */
        const double through = between / hosts;             /* its part of what leaves the rack */
        load.sent_bytes += (ways.foreground_inside + ways.background_inside) * (in_memory + in_rack) + through;
        if (workers > 1)
            add(meter, &load, DSS_LINK_MEMORY, host, ways.foreground_inside * in_memory, ways.background_inside * in_memory);
        if (load.host_count > 1)
            add(meter, &load, DSS_LINK_NIC, host,
                DSS_WIRE_OVERHEAD * (ways.foreground_inside * in_rack + ways.foreground_between * through),
                DSS_WIRE_OVERHEAD * (ways.background_inside * in_rack + ways.background_between * through));
    }
    for (uint32_t i = 0; load.rack_count > 1 && i < load.rack_count; i++)
        add(meter, &load, DSS_LINK_UPLINK, meter->racks[i], DSS_WIRE_OVERHEAD * ways.foreground_between * between,
            DSS_WIRE_OVERHEAD * ways.background_between * between);
    add_latency(meter, &load, ways);
    forget(meter, &load);
    return load;
}

uint32_t dss_load_stripe_count(const dss_plan_t *plan, uint64_t model_bytes) {
    return dss_stripe_count((size_t)model_bytes, dss_plan_stripe_count(plan), DSS_LOAD_MIN_STRIPE_BYTES);
}
