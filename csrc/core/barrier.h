/*
 * barrier.h: the exact exchanges that divide-and-shuffle is compared with, as closed forms.
 *
 * Each makes every worker wait for the slowest, so a step of it is the last worker's compute and one time that never changes: the
 * sum over its phases (a phase begins when the one before is over, as when they are composed from collectives) of the latency and
 * the largest of bytes / rate over all links, which all flows of the phase share. Reentrant; nobody locks.
 */
#ifndef DSS_BARRIER_H
#define DSS_BARRIER_H

#include "dssync.h"

/* *seconds_p: of one exchange of `bytes`; busy_s[2 * hosts + racks]: for how long each link sends in it (memory, NICs, uplinks). */
dss_status_t dss_barrier_time(dss_method_t method, const dss_topology_t *topology, double bytes, double *seconds_p, double *busy_s);

#endif
