/*
 * dssync.h: the C interface of the dssync core.
 *
 * Divide-and-shuffle synchronization (Wang et al., arXiv 2007.03298) averages the parameters of N workers inside small,
 * non-overlapping groups that change from step to step. This core decides who averages with whom (plans), which part of the
 * parameters takes which round (stripes), what that costs on a given network (topology, cost, simulation), and does the arithmetic
 * of an average (kernels). It knows no thread, no socket, no Python and no torch; every function is reentrant, and a handle may be
 * read by many threads at once.
 *
 * Conventions: functions return dss_status_t; outputs are the parameters named `..._p`; parameter structs begin with their own
 * size so that they can grow; sizes in bytes say `_bytes`, numbers of things say `_count`. A failing call leaves its outputs
 * untouched and, where the caller passes a dss_error_t, says there which value was wrong and what was expected.
 */
#ifndef DSSYNC_H
#define DSSYNC_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define DSS_API
#else
#define DSS_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- status ------------------------------------------------------------------------------------------------------------- */

typedef enum dss_status {
    DSS_OK = 0,
    DSS_ERR_INVALID_ARGUMENT = -1, /* a parameter is out of its range */
    DSS_ERR_NO_MEMORY = -2,        /* an allocation failed */
    DSS_ERR_IMPOSSIBLE = -3,       /* no plan of the asked shape exists for this world size */
    DSS_ERR_DISCONNECTED = -4,     /* the plan never mixes all ranks: contraction 1 */
    DSS_ERR_NOT_A_PARTITION = -5,  /* a rank stands in no group, or in two, of one round */
    DSS_ERR_CORRUPT = -6,          /* serialised bytes are damaged, cut short or of another version */

    /* of an operation: its channel is out of step from then on, other channels go on */
    DSS_ERR_TIMED_OUT = -10,
    DSS_ERR_MISMATCH = -11,  /* the ranks did not call the same thing */
    DSS_ERR_PEER_LOST = -12, /* a peer's process or host is gone */
    DSS_ERR_FAILED = -13,    /* the channel had failed before, here or at a peer */

    /* of a connection that is being made: it is dropped, nobody else is disturbed */
    DSS_ERR_STRANGER = -20, /* not a rank of this job */

    /* of a whole context */
    DSS_ERR_SYSTEM = -30,    /* the operating system refused something */
    DSS_ERR_SHUT_DOWN = -31, /* the context was shut down or aborted */
} dss_status_t;

/* What went wrong, for people. Filled by the function that decided that it is an error. */
typedef struct dss_error {
    dss_status_t status;
    char text[504];
} dss_error_t;

DSS_API const char *dss_status_string(dss_status_t status);

/* ---- topology ----------------------------------------------------------------------------------------------------------- */

typedef struct dss_topology dss_topology_t; /* immutable once made; owned by whoever created it */

/* One link, both directions at once. */
typedef struct dss_link {
    double bytes_per_s; /* on the wire, headers included; INFINITY: never the bottleneck */
    double latency_s;   /* added by this link to a message that crosses it */
} dss_link_t;

/* Cluster > racks > hosts > workers. A host's NIC is shared by its workers, a rack's uplink by its hosts. */
typedef struct dss_topology_params {
    size_t params_bytes; /* sizeof(dss_topology_params_t) */
    uint32_t world_size;
    uint32_t host_count;
    uint32_t rack_count;
    const uint32_t *host_of;   /* [world_size] */
    const uint32_t *rack_of;   /* [host_count] */
    const dss_link_t *nics;    /* [host_count] */
    const dss_link_t *uplinks; /* [rack_count] */
    dss_link_t memory;         /* between workers of one host, shared by them; what one worker writes is counted once */
} dss_topology_params_t;

/* Every host and rack has to hold a worker; numbers are kept as given. DSS_ERR_INVALID_ARGUMENT names what is wrong. */
DSS_API dss_status_t dss_topology_create(const dss_topology_params_t *params, dss_topology_t **topology_p, dss_error_t *error_p);
DSS_API void dss_topology_destroy(dss_topology_t *topology); /* NULL is allowed */
DSS_API uint32_t dss_topology_world_size(const dss_topology_t *topology);
DSS_API uint32_t dss_topology_host_count(const dss_topology_t *topology);
DSS_API uint32_t dss_topology_rack_count(const dss_topology_t *topology);
DSS_API uint32_t dss_topology_host_of(const dss_topology_t *topology, uint32_t rank);
DSS_API uint32_t dss_topology_rack_of_host(const dss_topology_t *topology, uint32_t host);
DSS_API uint32_t dss_topology_rack_of(const dss_topology_t *topology, uint32_t rank);
DSS_API dss_link_t dss_topology_nic(const dss_topology_t *topology, uint32_t host);
DSS_API dss_link_t dss_topology_uplink(const dss_topology_t *topology, uint32_t rack);
DSS_API dss_link_t dss_topology_memory(const dss_topology_t *topology);
/* The members, ascending, of a rack; they belong to the topology. */
DSS_API dss_status_t dss_topology_rack(const dss_topology_t *topology, uint32_t rack, const uint32_t **members_p,
                                       uint32_t *member_count_p);

/* Bytes on an Ethernet wire for each byte of payload over TCP: 1514 bytes a frame carry 1448. */
#define DSS_WIRE_OVERHEAD (1514.0 / 1448.0)

/* ---- plans -------------------------------------------------------------------------------------------------------------- */

typedef enum dss_plan_kind {
    DSS_PLAN_AUTO = 0,     /* with a topology the cheapest by the cost model, else grid where its groups stay small, else random */
    DSS_PLAN_GRID = 1,     /* mixed radix: exact consensus after every period */
    DSS_PLAN_RANDOM = 2,   /* seeded permutations cut into groups, unequal where the size does not divide N */
    DSS_PLAN_EXPLICIT = 3, /* rounds given by hand */
    DSS_PLAN_EXACT = 4,    /* all ranks in one group, each step */
    DSS_PLAN_LEADERS = 5,  /* the paper's: one worker a rack in a group of leaders, the others in their rack; leaders rotate */
    DSS_PLAN_STRIPED = 6,  /* rack-local rounds and a delayed crossing round; needs stripes */
    DSS_PLAN_HYBRID = 7,   /* gradients exact inside a rack; here the crossing rounds, no others */
} dss_plan_kind_t;

#define DSS_PLAN_MAX_WORLD_SIZE (1u << 24)
#define DSS_PLAN_MAX_PERIOD 1024u

typedef struct dss_plan dss_plan_t; /* immutable once made; owned by whoever created it */

typedef struct dss_plan_params {
    size_t params_bytes; /* sizeof(dss_plan_params_t) */
    dss_plan_kind_t kind;
    uint32_t world_size; /* N, at least 1 */
    uint32_t group_size; /* wanted workers a group; 0: pairs while 3 rounds suffice, else the smallest size that needs at most 3 */
    uint32_t max_period; /* most rounds in a period; 0: 8 */
    uint64_t seed;       /* shuffles random plans and the order of calls outside a step */

    /* what AUTO, LEADERS, STRIPED and HYBRID plan for */
    const dss_topology_t *topology; /* NULL: no links are known, and AUTO is grid or random */
    uint64_t model_bytes;           /* averaged each step; 0: 32 MiB */
    double compute_s;               /* of a step without synchronisation; 0 is the worst case */
    uint32_t delay;                 /* tau; DSS_DELAY_AUTO: the smallest that hides a crossing */
} dss_plan_params_t;

#define DSS_DELAY_AUTO UINT32_MAX

DSS_API dss_status_t dss_plan_create(const dss_plan_params_t *params, dss_plan_t **plan_p, dss_error_t *error_p);

/* Rounds given by hand: group_of[round * world_size + rank] is the number of the rank's group in that round, below world_size. */
DSS_API dss_status_t dss_plan_create_explicit(uint32_t world_size, uint32_t round_count, const uint32_t *group_of, uint64_t seed,
                                              dss_plan_t **plan_p, dss_error_t *error_p);
/* Rounds written as lists of groups, turned into the group_of of dss_plan_create_explicit (room for round_count * world_size; its
 * content is undefined after a failure). group_counts: groups of each round; member_counts: members of each group, round after
 * round; members: the ranks, group after group. A rank that is missing, repeated or unknown is DSS_ERR_NOT_A_PARTITION. */
DSS_API dss_status_t dss_rounds_from_groups(uint32_t world_size, uint32_t round_count, const uint32_t *group_counts,
                                            const uint32_t *member_counts, const uint32_t *members, uint32_t *group_of,
                                            dss_error_t *error_p);
DSS_API void dss_plan_destroy(dss_plan_t *plan); /* NULL is allowed */

DSS_API dss_plan_kind_t dss_plan_kind(const dss_plan_t *plan); /* never AUTO: what AUTO became */
DSS_API uint32_t dss_plan_world_size(const dss_plan_t *plan);
DSS_API uint32_t dss_plan_period(const dss_plan_t *plan);         /* P, the number of rounds */
DSS_API uint32_t dss_plan_max_group_size(const dss_plan_t *plan); /* of the largest group of any round */
DSS_API uint64_t dss_plan_seed(const dss_plan_t *plan);
DSS_API uint32_t dss_plan_group_count(const dss_plan_t *plan, uint32_t round);

/* How many stripes the plan is made for: striped plans say P, so that of P consecutive rounds one crosses; others their period. */
DSS_API uint32_t dss_plan_stripe_count(const dss_plan_t *plan);
/* Whether groups of this round hold workers of several racks that average hierarchically, the part between racks in the background:
 * at once all workers of a rack take the rack's mean, unless they keep their values, and dss_plan_delay() steps later add the same
 * correction: the mean of the group at the launch less the rack's. Without a delay the round is one average over the group. */
DSS_API int dss_plan_is_crossing(const dss_plan_t *plan, uint32_t round);
/* Whether in this crossing round, which has a delay then, every worker keeps its values until the correction is there: the rounds
 * between crossings bring each rack to agreement, so nothing has to be waited for at once. */
DSS_API int dss_plan_keeps_values(const dss_plan_t *plan, uint32_t round);
DSS_API uint32_t dss_plan_delay(const dss_plan_t *plan);                  /* tau, in steps; 0: a crossing is waited for */
DSS_API uint32_t dss_plan_rack_of(const dss_plan_t *plan, uint32_t rank); /* 0 for plans that know no racks */
DSS_API uint32_t dss_plan_rack_count(const dss_plan_t *plan);             /* 1 for plans that know no racks */
/* Steps until every parameter was averaged over all ranks at the latest, delays included; 0: the plan never does that exactly. */
DSS_API uint32_t dss_plan_longest_wait(const dss_plan_t *plan);

/* The members, ascending, of the group that holds `rank` in `round`; they belong to the plan. */
DSS_API dss_status_t dss_plan_group_of_rank(const dss_plan_t *plan, uint32_t round, uint32_t rank, const uint32_t **members_p,
                                            uint32_t *member_count_p);
/* The same by the group's number, 0 .. group_count-1. */
DSS_API dss_status_t dss_plan_group(const dss_plan_t *plan, uint32_t round, uint32_t group, const uint32_t **members_p,
                                    uint32_t *member_count_p);

/* The round that stripe s takes at step t: (t + s) mod P. */
DSS_API uint32_t dss_plan_round_at(const dss_plan_t *plan, uint64_t step, uint32_t stripe);

/* The round of the call-th average outside any step: a seeded permutation of the P rounds within each block of P calls, so that
 * P averages of one tensor in a row use every round once and no regular stride of calls stays in one round. */
DSS_API uint32_t dss_plan_round_of_call(const dss_plan_t *plan, uint64_t call);

/* rho = ||W_P ... W_1 - J||_2 over one period: 0 is exact consensus every period, below 1 mixes, 1 never does. */
DSS_API dss_status_t dss_plan_contraction(const dss_plan_t *plan, double *rho_p);

/* A fixed little-endian form with a hash at its end (plan_wire.c). With bytes NULL only *needed_bytes_p is set. */
DSS_API dss_status_t dss_plan_serialize(const dss_plan_t *plan, void *bytes, size_t capacity_bytes, size_t *needed_bytes_p);
/* Trusts nothing in the bytes: lengths, hash, partition and connectivity are checked before a plan is made. */
DSS_API dss_status_t dss_plan_deserialize(const void *bytes, size_t bytes_bytes, dss_plan_t **plan_p, dss_error_t *error_p);
DSS_API uint64_t dss_plan_hash(const dss_plan_t *plan);

/* 64-bit FNV-1a: tells slips apart, keeps no secret. Chain by passing the last result as `basis`, 0 to begin. */
DSS_API uint64_t dss_hash(const void *bytes, size_t bytes_bytes, uint64_t basis);

/* ---- stripes ------------------------------------------------------------------------------------------------------------ */

/* In how many stripes a flat vector is cut: at most `period`, at least one, their mean size not below min_stripe_bytes. */
DSS_API uint32_t dss_stripe_count(size_t total_bytes, uint32_t period, size_t min_stripe_bytes);
/* First element of stripe `stripe` of `stripe_count` in a vector of element_count elements, on a multiple of 64 elements where the
 * vector is long enough; stripe == stripe_count gives element_count. */
DSS_API size_t dss_stripe_begin(size_t element_count, uint32_t stripe_count, uint32_t stripe);

/* ---- cost --------------------------------------------------------------------------------------------------------------- */

typedef enum dss_link_kind { DSS_LINK_MEMORY = 0, DSS_LINK_NIC = 1, DSS_LINK_UPLINK = 2 } dss_link_kind_t;

typedef struct dss_cost {
    double sync_s;               /* mean time by which synchronisation lengthens a step, when all ranks run alike */
    double bound_s;              /* bytes on the busiest link / its rate: no schedule of this plan is faster without compute */
    double foreground_s;         /* of a step: what it waits for at once */
    double background_s;         /* of a step's crossing: from its launch until its correction is there */
    dss_link_kind_t busiest;     /* the link that bound_s is about */
    uint32_t busiest_index;      /* its host or rack */
    double busiest_bytes;        /* on it, a step, the busier direction, headers included */
    double sent_bytes;           /* by one worker a step: the mean */
    double contraction;          /* rho of a period; NAN above 4096 workers (it costs more than the plan) */
    uint32_t longest_wait_steps; /* dss_plan_longest_wait */
} dss_cost_t;

/* Time of a step under a plan: 2(s-1)*alpha + bytes / rate on the slowest link of every group, each link shared by all groups that
 * use it. */
DSS_API dss_status_t dss_cost_of_plan(const dss_plan_t *plan, const dss_topology_t *topology, uint64_t model_bytes,
                                      double compute_s, dss_cost_t *cost_p, dss_error_t *error_p);
/* Bytes on each link, a step, the busier direction, headers included: nic_bytes[host_count], uplink_bytes[rack_count]; of round
 * `round` alone with all bytes of the model, or, with UINT32_MAX, of a mean step. Either array may be NULL. */
DSS_API dss_status_t dss_cost_link_bytes(const dss_plan_t *plan, const dss_topology_t *topology, uint64_t model_bytes,
                                         uint32_t round, double *nic_bytes, double *uplink_bytes, dss_error_t *error_p);

/* ---- simulation --------------------------------------------------------------------------------------------------------- */

typedef enum dss_method {
    DSS_METHOD_PLAN = 0,             /* averages parameters by a plan */
    DSS_METHOD_RING = 1,             /* ring all-reduce of all ranks, in the order of ranks */
    DSS_METHOD_LEADERS = 2,          /* hierarchical: reduce in each rack, ring of leaders, broadcast in each rack */
    DSS_METHOD_TWO_DIMENSIONAL = 3,  /* hierarchical: reduce-scatter in racks, all-reduce of shards between racks, all-gather */
    DSS_METHOD_PARAMETER_SERVER = 4, /* one server in the first worker's rack, on its host */
} dss_method_t;

typedef struct dss_simulation_params {
    size_t params_bytes; /* sizeof(dss_simulation_params_t) */
    dss_method_t method;
    const dss_plan_t *plan; /* DSS_METHOD_PLAN only */
    const dss_topology_t *topology;
    uint64_t model_bytes;
    uint32_t step_count;
    uint64_t seed;
    double compute_s;                                      /* median compute time of a step */
    double compute_sigma;                                  /* of its logarithm, normally distributed; 0: always the same */
    double straggler_probability;                          /* that a worker's step is a straggler's */
    double straggler_factor;                               /* its compute time is so many times longer */
    void (*progress)(void *argument, uint32_t steps_done); /* about a hundred times; may be NULL */
    void *progress_argument;
} dss_simulation_params_t;

typedef struct dss_simulation {
    double total_s;     /* until the last worker has finished the last step */
    double mean_step_s; /* total_s / step_count */
    double mean_sync_s; /* mean over workers and steps of the time from the end of compute to the end of the step */
    double mean_wait_s; /* of it, waiting for others of the group to be ready */
    double busiest_use; /* share of total_s in which the busiest link was sending */
    dss_link_kind_t busiest;
    uint32_t busiest_index;
} dss_simulation_t;

/* step_s: the time of each step, from the last worker's end of one to that of the next; [step_count], or NULL. */
DSS_API dss_status_t dss_simulate(const dss_simulation_params_t *params, dss_simulation_t *simulation_p, double *step_s,
                                  dss_error_t *error_p);

/* ---- averaging kernels -------------------------------------------------------------------------------------------------- */

typedef enum dss_dtype {
    DSS_FLOAT32 = 0,
    DSS_FLOAT64 = 1,
    DSS_FLOAT16 = 2,
    DSS_BFLOAT16 = 3,
    DSS_INT8 = 4,
    DSS_UINT8 = 5,
    DSS_INT32 = 6,
    DSS_INT64 = 7,
} dss_dtype_t;

DSS_API size_t dss_dtype_bytes(dss_dtype_t dtype);            /* 0 for an unknown dtype */
DSS_API dss_dtype_t dss_dtype_accumulator(dss_dtype_t dtype); /* FLOAT32 for the half types, else the dtype itself */
DSS_API const char *dss_dtype_name(dss_dtype_t dtype);        /* "float32"; "unknown" */

/* target[i] = mean over s of sources[s][i], summed in order and divided in the accumulator's dtype, then rounded to `dtype` to
 * nearest even. `target` may be one of the sources; no other overlap; pointers need no alignment. */
DSS_API dss_status_t dss_average(dss_dtype_t dtype, const void *const *sources, size_t source_count, void *target,
                                 size_t element_count);
/* accumulator[i] = source[i] in the accumulator's dtype. */
DSS_API dss_status_t dss_widen(dss_dtype_t dtype, const void *source, void *accumulator, size_t element_count);
/* target[i] = accumulator[i] * scale (1 for integers), multiplied in float64, rounded to the accumulator's dtype and then, to
 * nearest even, to `dtype`; target may be the accumulator where the dtypes are the same. */
DSS_API dss_status_t dss_narrow_scaled(dss_dtype_t dtype, const void *accumulator, double scale, void *target,
                                       size_t element_count);

/* ---- reduction kernels -------------------------------------------------------------------------------------------------- */

typedef enum dss_reduction {
    DSS_SUM = 0, /* integers wrap around */
    DSS_PRODUCT = 1,
    DSS_MIN = 2, /* NaN if either is NaN */
    DSS_MAX = 3,
    DSS_BAND = 4, /* the bitwise ones: integers only */
    DSS_BOR = 5,
    DSS_BXOR = 6,
} dss_reduction_t;

DSS_API const char *dss_reduction_name(dss_reduction_t reduction); /* "sum"; "unknown" */
/* Whether the reduction is defined for the dtype. */
DSS_API int dss_reduction_takes(dss_reduction_t reduction, dss_dtype_t dtype);

/* target[i] = (left[i] op right[i]) * scale, in the accumulator's dtype, rounded once to `dtype`. scale is 1 but for a SUM of a
 * floating dtype. `target` may be left or right; no other overlap; pointers need no alignment. */
DSS_API dss_status_t dss_combine(dss_dtype_t dtype, dss_reduction_t reduction, const void *left, const void *right, double scale,
                                 void *target, size_t element_count);
/* accumulator[i] = accumulator[i] op source[i]; the accumulator is of dss_dtype_accumulator(dtype). */
DSS_API dss_status_t dss_accumulate(dss_dtype_t dtype, dss_reduction_t reduction, const void *source, void *accumulator,
                                    size_t element_count);

#ifdef __cplusplus
}
#endif
#endif
