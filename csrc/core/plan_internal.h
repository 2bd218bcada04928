/*
 * plan_internal.h: what a plan is made of, for the files that make one.
 *
 * A plan is asked for the group of one rank in every bucket of every step and changes never, so it is stored unrolled: for each
 * round the group of each rank, and the ranks sorted by group. That costs 8 bytes a rank and round (6 MB for 100,000 ranks and 8
 * rounds) and makes every question an index. Groups are numbered by their smallest member, so that equal partitions are equal
 * bytes, whoever made them, and have equal hashes. Makers fill `group_of` (and where they know racks `rack_of`, `crossing` and what
 * goes with them) and call dss_plan_finish, which does everything else and is the one gate that every plan passes. Immutable after
 * that: any number of threads may read, nobody locks.
 */
#ifndef DSS_PLAN_INTERNAL_H
#define DSS_PLAN_INTERNAL_H

#include "dssync.h"

/* What happens to a worker's values in a round that crosses racks with a delay; without one they become the mean of all. */
typedef enum dss_crossing {
    DSS_CROSSING_NONE = 0,   /* the round does not cross */
    DSS_CROSSING_MEANS = 1,  /* at once the rack's mean, later the correction */
    DSS_CROSSING_VALUES = 2, /* kept, later the correction of the rack's mean at the launch */
} dss_crossing_t;

struct dss_plan {
    dss_plan_kind_t kind;    /* never AUTO */
    uint32_t world_size;     /* N */
    uint32_t period;         /* P */
    uint32_t max_group_size; /* over all rounds */
    uint32_t stripe_count;   /* divides P; of so many rounds in a row a striped plan crosses in one */
    uint32_t delay;          /* tau, in steps; 0 without crossing rounds */
    uint32_t rack_count;     /* 1: no racks are known */
    uint32_t *rack_of;       /* [N] or NULL, for one rack; owned */
    uint8_t *crossing;       /* [P] dss_crossing_t; owned */
    uint64_t seed;           /* also orders the calls outside a step */
    uint64_t hash;           /* of the serialised content */
    uint32_t *group_of;      /* [P][N] number of the rank's group; owned */
    uint32_t *members;       /* [P][N] ranks, group after group, ascending in each; owned */
    size_t *round_begin;     /* [P + 1] where the round's entries begin in group_begin; owned */
    uint32_t *group_begin;   /* for each round group_count + 1 offsets into its N members; owned */
};

#define DSS_PLAN_DEFAULT_PERIOD 8u
#define DSS_PLAN_DEFAULT_MODEL_BYTES ((uint64_t)32 << 20)
#define DSS_CONTRACTION_MAX_WORLD_SIZE 4096u /* above it the contraction costs more than the plan */
#define DSS_GRID_MAX_FACTORS 24u             /* 2^24 is the largest world */

/* The makers take params already checked by dss_plan_create, with max_period and model_bytes filled in. */
dss_status_t dss_plan_create_grid(const dss_plan_params_t *params, dss_plan_t **plan_p, dss_error_t *error_p);
dss_status_t dss_plan_create_random(const dss_plan_params_t *params, dss_plan_t **plan_p, dss_error_t *error_p);
dss_status_t dss_plan_create_exact(const dss_plan_params_t *params, dss_plan_t **plan_p, dss_error_t *error_p);
dss_status_t dss_plan_create_leaders(const dss_plan_params_t *params, dss_plan_t **plan_p, dss_error_t *error_p);
dss_status_t dss_plan_create_striped(const dss_plan_params_t *params, dss_plan_t **plan_p, dss_error_t *error_p); /* and hybrid */

/* The cheapest kind for the topology, made. */
dss_status_t dss_plan_create_cheapest(const dss_plan_params_t *params, dss_plan_t **plan_p, dss_error_t *error_p);
/* Without a look at the topology: a grid is exact, so it is taken unless its largest group costs more than twice what was aimed at
 * (or asked for, once); else random. */
dss_plan_kind_t dss_plan_flat_kind(const dss_plan_params_t *params);
/* By kind, which is not AUTO. */
dss_status_t dss_plan_create_kind(const dss_plan_params_t *params, dss_plan_kind_t kind, dss_plan_t **plan_p, dss_error_t *error_p);

/* The factors of the grid that params ask for, largest first. Returns how many; 0: there is no such grid. */
uint32_t dss_grid_factors(const dss_plan_params_t *params, uint32_t factors[DSS_GRID_MAX_FACTORS]);

/* The group size aimed at: params->group_size, or what 0 stands for. */
uint32_t dss_plan_target_group_size(const dss_plan_params_t *params);

/* An unfinished plan of one rack, no crossing and P stripes: group_of is allocated and to be filled with any numbers below
 * world_size. Freed by dss_plan_destroy. */
dss_status_t dss_plan_allocate(dss_plan_kind_t kind, uint32_t world_size, uint32_t period, uint64_t seed, dss_plan_t **plan_p,
                               dss_error_t *error_p);

/* Room for rack_of, to be filled with numbers below rack_count; none for one rack. */
dss_status_t dss_plan_allocate_racks(dss_plan_t *plan, uint32_t rack_count, dss_error_t *error_p);
/* The racks of a topology. */
dss_status_t dss_plan_take_racks(dss_plan_t *plan, const dss_topology_t *topology, dss_error_t *error_p);

/* Renumbers the groups, sorts the members, passes the gates and takes the hash. */
dss_status_t dss_plan_finish(dss_plan_t *plan, dss_error_t *error_p);

/* finish, and *plan_p if that went well; else the plan is destroyed. */
dss_status_t dss_plan_hand_over(dss_plan_t *plan, dss_plan_t **plan_p, dss_error_t *error_p);

/* Stripes, racks, crossings and delay agree with each other and with the groups (rules 7 and 8). Needs the members. */
dss_status_t dss_plan_check_crossings(const dss_plan_t *plan, dss_error_t *error_p);

/* The gate (rule: rho < 1 iff the union of one period's groups connects all ranks). Needs the members, and crossings that passed.
 */
dss_status_t dss_plan_check_connected(const dss_plan_t *plan, dss_error_t *error_p);

/* Hash of what dss_plan_serialize would write before its hash. */
uint64_t dss_plan_content_hash(const dss_plan_t *plan);

/* One round's averages of one value a rank, a crossing's correction included. `scratch`: 2 * rack_count numbers. */
void dss_round_average(const dss_plan_t *plan, uint32_t round, double *values, double *scratch);

/* Steps from round `first` on until all ranks agree, corrections included, if `limit` rounds do that; else 0. `values` is
 * scratch, a number a rank; the other is that of dss_round_average. */
uint32_t dss_plan_wait_from(const dss_plan_t *plan, uint32_t first, uint32_t limit, double *values, double *scratch);
/* dss_plan_longest_wait, for callers to whom no memory is not the same as never. */
dss_status_t dss_plan_find_longest_wait(const dss_plan_t *plan, uint32_t *wait_p);

/* How a round crosses in the background; NONE where it is waited for. */
static inline dss_crossing_t dss_plan_delayed_crossing(const dss_plan_t *plan, uint32_t round) {
    return plan->delay ? (dss_crossing_t)plan->crossing[round] : DSS_CROSSING_NONE;
}

/* Members of a group, and by *member_count_p how many, with no checks. */
static inline const uint32_t *dss_plan_members(const dss_plan_t *plan, uint32_t round, uint32_t group, uint32_t *member_count_p) {
    const uint32_t *begin = plan->group_begin + plan->round_begin[round] + group;
    *member_count_p = begin[1] - begin[0];
    return plan->members + (size_t)round * plan->world_size + begin[0];
}

#endif
