/*
 * cost.h: the cost of a plan, for the search that compares many.
 *
 * dss_cost_of_plan says all there is to say about one plan; a search asks hundreds of them only for time, so what takes longer
 * than that (contraction, longest wait) is left out here. The key choice is that the search has no formulas of its own: it makes
 * each candidate and asks the model that people are shown. Everything is the caller's own; nobody locks.
 */
#ifndef DSS_COST_H
#define DSS_COST_H

#include "dssync.h"

/* All but contraction (NAN) and longest_wait_steps (0). */
dss_status_t dss_cost_of_time(const dss_plan_t *plan, const dss_topology_t *topology, uint64_t model_bytes, double compute_s,
                              dss_cost_t *cost_p, dss_error_t *error_p);

/* The smallest tau in 1 .. stripe_count - 1 (0 for one stripe) whose steps hide the background of a crossing with some slack. */
uint32_t dss_cost_smallest_delay(const dss_cost_t *cost, double compute_s, uint32_t stripe_count);
/* Time of a step, compute included, if crossings come home after `delay` steps (0: they are waited for). */
double dss_cost_step_s(const dss_cost_t *cost, double compute_s, uint32_t delay);

#endif
