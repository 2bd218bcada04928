/*
 * load.h: what the average of one group puts on which links.
 *
 * The cost model and the simulator have to count the same bytes, so the formulas are here, once. A group averages hierarchically:
 * in shared memory inside each host, then among the hosts of each rack, then among racks, each level a reduce-scatter on the way in
 * and an all-gather on the way out, so that a link carries each byte as seldom as it can. In a delayed crossing a rack takes its
 * own mean at once (the foreground), and the exchange between racks and the spread of the correction follow (the background).
 * Where workers keep their values, all of it is background: a copy goes in, the correction comes out. A load meter is the scratch
 * that classifies members in time linear in the group; it is the caller's own, nobody locks.
 */
#ifndef DSS_LOAD_H
#define DSS_LOAD_H

#include "plan_internal.h"

#define DSS_LOAD_MIN_STRIPE_BYTES ((size_t)1 << 20) /* as the training integration cuts stripes */

/* What one group puts on one link, in the busier direction, headers included. */
typedef struct dss_link_load {
    dss_link_kind_t kind;
    uint32_t index;          /* of the host (MEMORY, NIC) or the rack (UPLINK) */
    double foreground_bytes; /* waited for at once */
    double background_bytes; /* only of delayed crossings */
} dss_link_load_t;

typedef struct dss_group_load {
    const dss_link_load_t *links; /* the meter's, until its next use */
    uint32_t link_count;
    uint32_t host_count;
    uint32_t rack_count;
    double foreground_latency_s;
    double background_latency_s;
    double sent_bytes; /* by all members together, on any link; headers not counted */
} dss_group_load_t;

typedef struct dss_load_meter dss_load_meter_t;

/* The topology has to outlive the meter. */
dss_status_t dss_load_meter_create(const dss_topology_t *topology, dss_load_meter_t **meter_p);
void dss_load_meter_destroy(dss_load_meter_t *meter); /* NULL is allowed */
/* Of a group that averages `bytes` (before headers). crossing: how it does that with a delay, or NONE: all at once. */
dss_group_load_t dss_load_of_group(dss_load_meter_t *meter, const uint32_t *members, uint32_t member_count, double bytes,
                                   dss_crossing_t crossing);

/* Seconds for `bytes` on a link of the topology, latency not counted. */
double dss_load_seconds(const dss_topology_t *topology, dss_link_kind_t kind, uint32_t index, double bytes);
/* In how many stripes a model of so many bytes is averaged under the plan. */
uint32_t dss_load_stripe_count(const dss_plan_t *plan, uint64_t model_bytes);

#endif
