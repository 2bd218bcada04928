/*
 * schedule.h: a plan laid out over a topology, as the simulator walks it.
 *
 * Each round becomes parts: workers that start together when the last of them is ready and are done together, with the links that
 * their traffic is on. A group is one part; a group that crosses with a delay is one part a rack, and one exchange that begins when
 * all these parts are done and whose correction is due some steps later. Where workers keep their values the group is one part that
 * makes nobody wait: it is done when the last is ready. Everything that does not change from step to step is
 * computed here, in flat arrays in the order in which the simulator reads them, so that a step costs two visits a worker and round.
 * Immutable once made; nobody locks.
 */
#ifndef DSS_SCHEDULE_H
#define DSS_SCHEDULE_H

#include "dssync.h"

/* Workers that wait for each other, unless they keep their values. Links are numbered in one row: the memory of each host, the NIC
 * of each host, the uplinks. */
typedef struct dss_part {
    uint32_t member_count;
    uint32_t link_count;
    int keeps_values;
    double latency_s;
} dss_part_t;

/* The time for which an exchange occupies an uplink. */
typedef struct dss_occupied {
    uint32_t rack;
    double busy_s;
} dss_occupied_t;

typedef struct dss_exchange {
    uint32_t part_count; /* consecutive ones of the round, from first_part on */
    size_t first_part;   /* in `parts` */
    size_t first_member; /* in `members` */
    uint32_t member_count;
    uint32_t uplink_count;
    double done_s; /* from its start until the correction is everywhere */
} dss_exchange_t;

/* Where a round's entries begin in the arrays of the schedule. */
typedef struct dss_round_begin {
    size_t part;
    size_t member;
    size_t link;
    size_t exchange;
    size_t uplink;
} dss_round_begin_t;

typedef struct dss_schedule {
    uint32_t period;
    uint32_t stripe_count;
    uint32_t delay;
    uint32_t host_count;
    uint32_t link_count;       /* of the topology: 2 * hosts + racks */
    uint32_t phase_count;      /* steps after which loads repeat: 1 where every step takes all rounds */
    dss_round_begin_t *rounds; /* [period + 1] */
    dss_part_t *parts;         /* round after round; owned, as are all arrays here */
    uint32_t *members;         /* of each part */
    uint32_t *links;           /* of each part */
    dss_exchange_t *exchanges; /* round after round */
    dss_occupied_t *uplinks;   /* of each exchange */
    double *foreground_s;      /* [phase_count][link_count] each link's time for all foreground traffic of such a step */
    double *background_s;      /* [phase_count][link_count] of the traffic of exchanges */
} dss_schedule_t;

dss_status_t dss_schedule_create(const dss_plan_t *plan, const dss_topology_t *topology, uint64_t model_bytes,
                                 dss_schedule_t **schedule_p, dss_error_t *error_p);
void dss_schedule_destroy(dss_schedule_t *schedule); /* NULL is allowed */

#endif
