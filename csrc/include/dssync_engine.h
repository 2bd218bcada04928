/*
 * dssync_engine.h: the C interface of the native engine.
 *
 * An engine is one rank's end of a process group: it moves bytes between ranks and reduces them on the way, over shared memory
 * inside a host and TCP between hosts, each connection made when it is first needed. Who takes part in an operation is told with
 * the operation, so a group of ranks that never met before costs nothing to form. Operations match by key, (channel, sequence,
 * part), whatever the order in which ranks post them, and many may be under way at once.
 *
 * Every function may be called from any thread, but destroy, which must be the last. Progress is made by whoever waits and, while
 * nobody does, by one thread of the engine. Values of an operation must stay where they are, and untouched, until it is done.
 */
#ifndef DSSYNC_ENGINE_H
#define DSSYNC_ENGINE_H

#include "dssync.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct dss_engine dss_engine_t;
typedef struct dss_operation dss_operation_t;

/* ---- engines ------------------------------------------------------------------------------------------------------------ */

typedef enum dss_transport {
    DSS_TRANSPORT_AUTO = 0, /* shared memory where two ranks can pass it to each other, else TCP */
    DSS_TRANSPORT_SHM = 1,  /* shared memory or an error */
    DSS_TRANSPORT_TCP = 2,
} dss_transport_t;

/* Bootstrap: how ranks that have no connection yet learn of each other. Called by dss_engine_create only. */
typedef struct dss_oob {
    /* Collective: `all` gets bytes_each bytes of every rank, in the order of ranks. Blocks. */
    dss_status_t (*allgather)(void *argument, const void *mine, size_t bytes_each, void *all, dss_error_t *error_p);
    void *argument;
} dss_oob_t;

typedef struct dss_engine_params {
    size_t params_bytes; /* sizeof(dss_engine_params_t) */
    uint32_t rank;
    uint32_t world_size;
    dss_transport_t transport;
    const char *interfaces; /* to listen on, divided by commas; NULL: the one from which `reach` is reached */
    const char *reach;      /* host name or number; NULL: this host only */
    dss_oob_t oob;
    void (*log)(void *argument, const char *text); /* a connection was refused or dropped; from any thread; may be NULL */
    void *log_argument;
} dss_engine_params_t;

/* Collective. DSS_ERR_SYSTEM if sockets are not to be had, DSS_ERR_INVALID_ARGUMENT for addresses that others cannot reach. */
DSS_API dss_status_t dss_engine_create(const dss_engine_params_t *params, dss_engine_t **engine_p, dss_error_t *error_p);
/* Fails what is under way, says goodbye, ends the thread, closes all connections; bounded by about a second. NULL is allowed. */
DSS_API void dss_engine_destroy(dss_engine_t *engine);
/* Fails what is under way, and all that is posted later, with this reason; returns at once. */
DSS_API void dss_engine_abort(dss_engine_t *engine, const char *reason);

/* This rank will post nothing more on the channel: what is under way on it fails, and a rank that posts on it is told the reason.
 */
DSS_API void dss_engine_close_channel(dss_engine_t *engine, uint64_t channel, const char *reason);

DSS_API uint32_t dss_engine_rank(const dss_engine_t *engine);
DSS_API uint32_t dss_engine_world_size(const dss_engine_t *engine);
/* The lowest rank on the host of `rank`. */
DSS_API uint32_t dss_engine_host_of(const dss_engine_t *engine, uint32_t rank);
/* The rack of each rank, the same on all ranks, before anything is posted. Larger operations go by hosts and racks then: values are
 * reduced and scattered inside, exchanged between, and gathered inside again, so that an uplink carries them once. */
DSS_API dss_status_t dss_engine_set_racks(dss_engine_t *engine, const uint32_t *rack_of, dss_error_t *error_p);

typedef struct dss_engine_stats {
    uint64_t bytes_sent; /* frames included */
    uint64_t bytes_received;
    uint64_t operations_done;
    uint32_t shared_memory_peers; /* connected so */
    uint32_t tcp_peers;
    uint32_t unix_peers; /* of this host, where shared memory was refused */
    uint32_t lost_peers;
    uint32_t board_readers; /* of the shared memory peers: can read results where this rank has written them once for all */
    uint64_t board_bytes;   /* of bytes_sent: so told of, not copied for each */
} dss_engine_stats_t;

DSS_API void dss_engine_stats(dss_engine_t *engine, dss_engine_stats_t *stats_p);

/* What the link to each peer has given since the start: by rank, payload received and the time in which it came, that is, in which
 * both sides had posted an operation and it was not over. Waiting for a peer to post is not in it. */
DSS_API void dss_engine_transfers(dss_engine_t *engine, uint64_t *bytes, uint64_t *nanoseconds);

/* ---- operations --------------------------------------------------------------------------------------------------------- */

typedef enum dss_operation_kind {
    DSS_OPERATION_AVERAGE = 1, /* the mean over the members; floating dtypes; the reduction is SUM */
    DSS_OPERATION_ALL_REDUCE = 2,
    DSS_OPERATION_BARRIER = 3,           /* no elements */
    DSS_OPERATION_CROSSING_OF_MEANS = 4, /* averages between racks, for later: see dss_operation_correct() */
    DSS_OPERATION_CROSSING_OF_VALUES = 5,
} dss_operation_kind_t;

/* Operations with the same key meet. A channel holds what must stay in step: after an error on it, all of it fails, on every rank.
 */
typedef struct dss_key {
    uint64_t channel;
    uint64_t sequence; /* the step, or the order of posting */
    uint32_t part;     /* bucket and stripe */
    uint32_t stage;    /* 0; the engine counts the stages of one operation with it */
} dss_key_t;

typedef struct dss_segment {
    void *values; /* needs no alignment */
    size_t element_count;
} dss_segment_t;

typedef struct dss_operation_params {
    size_t params_bytes; /* sizeof(dss_operation_params_t) */
    dss_operation_kind_t kind;
    dss_dtype_t dtype;
    dss_reduction_t reduction;
    dss_key_t key;
    const uint32_t *members; /* ranks, ascending, this one among them */
    uint32_t member_count;
    const dss_segment_t *segments; /* together one flat vector, reduced in place; the list is copied */
    size_t segment_count;
    uint64_t layout; /* hash of what the elements are; differing ones are a mismatch */
    uint64_t timeout_ns;
    int will_wait;    /* the caller waits at once: the engine's thread need not be woken */
    const char *what; /* for errors: "step 17 of the averages of sync 0"; copied */
    /* Once, when it is done; `text` says why where status is not DSS_OK. On any thread, the poster's included, outside all locks.
     */
    void (*done)(void *argument, dss_status_t status, const char *text);
    void *argument;
} dss_operation_params_t;

/* Returns at once. An operation that cannot begin (a failed channel, a lost peer) is posted all the same and is done with an error;
 * DSS_ERR_INVALID_ARGUMENT and DSS_ERR_NO_MEMORY are returned here, and nothing is posted. *operation_p may be NULL; else it is to
 * be released. The result is the same to the last bit on all members. */
DSS_API dss_status_t dss_engine_post(dss_engine_t *engine, const dss_operation_params_t *params, dss_operation_t **operation_p,
                                     dss_error_t *error_p);
/* Works on everything that is under way until the operation is done and its callback has returned; 0 if timeout_ns went by first.
 */
DSS_API int dss_operation_wait(dss_operation_t *operation, uint64_t timeout_ns);
/* After it: the operation's status and text (fills *error_p if it is not DSS_OK). */
DSS_API dss_status_t dss_operation_result(const dss_operation_t *operation, dss_error_t *error_p);
/* Of a crossing that is done: adds its correction to the segments, of as many elements in all.
 *
 * A crossing's values are read at once and may change afterwards. When it is done, the correction is there: the mean over all
 * members less the rack's mean of what was posted, the same to the last bit on all members of the rack. Corrections sum to zero
 * over the members. One of means is posted with values that are equal on all members of a rack, its mean; one of values with any.
 */
DSS_API dss_status_t dss_operation_correct(const dss_operation_t *operation, const dss_segment_t *segments, size_t segment_count,
                                           dss_error_t *error_p);
/* The caller needs the handle no more; the operation goes on. NULL is allowed. */
DSS_API void dss_operation_release(dss_operation_t *operation);

#ifdef __cplusplus
}
#endif
#endif
