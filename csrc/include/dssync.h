/*
 * dssync.h: the C interface of the dssync core.
 *
 * Divide-and-shuffle synchronization (Wang et al., arXiv 2007.03298) averages the parameters of N workers inside small,
 * non-overlapping groups that change from step to step. This core decides who averages with whom (plans), which part of the
 * parameters takes which round (stripes), and does the arithmetic of an average (kernels). It knows no thread, no socket, no
 * Python and no torch; every function is reentrant, and a handle may be read by many threads at once.
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

/* ---- plans -------------------------------------------------------------------------------------------------------------- */

typedef enum dss_plan_kind {
    DSS_PLAN_AUTO = 0,     /* grid where its groups stay small, else random */
    DSS_PLAN_GRID = 1,     /* mixed radix: exact consensus after every period */
    DSS_PLAN_RANDOM = 2,   /* seeded permutations cut into groups, unequal where the size does not divide N */
    DSS_PLAN_EXPLICIT = 3, /* rounds given by hand */
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
} dss_plan_params_t;

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
