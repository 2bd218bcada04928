/*
 * engine.h: what the files of the engine share: the engine, its peers, its operations and their channels.
 *
 * One lock guards all of it. Who holds it: a poster while it posts, and one driver at a time (a waiter, or else the engine's own
 * thread) while it makes a pass over the connections; it is free while the driver sleeps in epoll. A pass moves a bounded number of
 * bytes for each peer, so nobody waits for the lock longer than some copies take. One lock is enough because one rank's work is
 * bounded by its memory bandwidth, and many more would have to be understood. Callbacks run outside it.
 *
 * Where things are: loop.c drives, post.c takes operations in, operation.c knows who sends what to whom and reduces what comes,
 * hierarchy.c makes one operation of many by hosts and racks, peer.c turns that into frames and back, board.c holds results that
 * several ranks of a host read, connect.c makes connections, channel.c lets operations fail.
 */
#ifndef DSS_ENGINE_INTERNAL_H
#define DSS_ENGINE_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>

#include "address.h"
#include "board.h"
#include "dssync_engine.h"
#include "frame.h"
#include "handshake.h"
#include "segments.h"
#include "stream.h"

#define DSS_RING_BYTES ((size_t)1 << 20)
#define DSS_FRAME_PAYLOAD ((size_t)128 << 10) /* of one data frame: others on the connection wait no longer than this takes */
#define DSS_PASS_BYTES ((size_t)1 << 20)      /* read and written for one peer in one pass, about */
#define DSS_EAGER_BYTES ((size_t)32 << 10)    /* sent before the peer has posted; it keeps them */
#define DSS_EAGER_TOTAL ((size_t)1 << 20)     /* the same, for all operations of one peer */
#define DSS_FLAT_BYTES ((size_t)8 << 10)      /* up to here everyone sends all to all: one latency instead of two */
#define DSS_FLAT_STAGE_BYTES                                                                                                       \
    ((size_t)256) /* the same of stages: other chunks are under way, and what counts is bytes over uplinks */
#define DSS_RING_FROM_BYTES ((size_t)64 << 10) /* from here on, members on several hosts exchange in a ring or a hierarchy */
#define DSS_STRAIGHT_MEMBERS 8u /* in one rack: from more than so many at once a host would lose packets, and they go in a ring */
#define DSS_MANY_NEIGHBOURS 5u  /* on one host: the rings of each with each outgrow the caches */
#define DSS_MAX_AHEAD 65536u    /* operations a peer may have posted that we have not */
#define DSS_AHEAD_BUCKETS 64u   /* lists that they are in: each is looked for among all */
#define DSS_MAX_FAIL_TEXT 1024u
#define DSS_HANDSHAKE_PATIENCE_NS ((uint64_t)10 * 1000000000u) /* for a caller that has not proved itself */
#define DSS_SILENCE_MS 10000u                                  /* no acknowledgement from a host for so long: it is lost */
#define DSS_ASK_NS ((uint64_t)1000000000u)     /* so long before its time is over an operation asks, and so long it may be held */
#define DSS_TICK_NS ((uint64_t)200 * 1000000u) /* time-outs and redials are looked after so often */

typedef struct dss_peer dss_peer_t;
typedef struct dss_member dss_member_t;

/* Bytes that came before they could be used. */
typedef struct dss_bytes {
    uint8_t *bytes;
    size_t begin;
    size_t end;
    size_t capacity;
} dss_bytes_t;

/* ---- operations --------------------------------------------------------------------------------------------------------- */

typedef enum dss_algorithm {
    DSS_ALONE,     /* nothing to exchange: no peers */
    DSS_PAIR,      /* two members: all values both ways, both reduce */
    DSS_FLAT,      /* small: all values to all, all reduce in the order of ranks */
    DSS_SHARDED,   /* reduce-scatter and all-gather, each member the owner of one shard */
    DSS_RING,      /* the same from neighbour to neighbour, hosts one after the other: each link is crossed by one flow */
    DSS_HIERARCHY, /* operations of its own inside hosts and racks, and between them */
} dss_algorithm_t;

typedef struct dss_hierarchy dss_hierarchy_t;

/* What makes an operation a part of another one. */
typedef struct dss_stage {
    dss_operation_t *parent;
    uint32_t number; /* dss_key_t.stage */
    bool skips[2];   /* phases, by dss_phase_t: REDUCE alone scatters, GATHER alone gathers */
    double scale;
} dss_stage_t;

/* One other member of an operation. */
struct dss_member {
    dss_operation_t *operation;
    dss_peer_t *peer;
    uint32_t index;        /* in the operation's list of members, this rank counted */
    bool opened;           /* its OPEN has come: it has posted the operation too */
    bool queued;           /* in the peer's list of senders */
    bool measured;         /* counted in the peer's `busy` */
    bool eager;            /* sends before `opened`; counted in the peer's eager_sent until then */
    uint64_t send_goal[2]; /* bytes, by dss_phase_t */
    uint64_t sent[2];      /* taken by the stream */
    uint64_t gathered;     /* bytes of phase GATHER in frames that have begun */
    bool reads;            /* our board, in this operation */
    uint64_t receive_goal[2];
    uint64_t received[2];       /* taken off the stream */
    uint64_t applied;           /* of phase REDUCE: reduced; the rest is staged */
    dss_bytes_t staged;         /* received[REDUCE] - applied bytes, in order */
    dss_member_t *next_sender;  /* of the peer */
    dss_member_t *next_of_peer; /* all unfinished operations of the peer */
    dss_member_t **previous_of_peer_p;
};

struct dss_operation {
    dss_engine_t *engine;
    int references; /* the engine's until it is done, the caller's until released */
    dss_operation_kind_t kind;
    dss_dtype_t dtype;
    dss_reduction_t reduction;
    dss_algorithm_t algorithm;
    dss_key_t key;
    uint32_t own_index; /* of this rank among the members */
    uint32_t member_count;
    dss_member_t *members;     /* member_count of them; peer NULL: the own one, and in a RING all but the neighbours */
    dss_signature_t signature; /* what peers compare; a stage has its parent's number of elements there */
    uint64_t element_count;
    dss_segments_t segments;
    dss_operation_t *parent;    /* of a stage: holds a reference on it; else NULL */
    dss_hierarchy_t *hierarchy; /* HIERARCHY only; owned */
    uint8_t *snapshot;          /* CROSSING_OF_VALUES: what was posted, until the hierarchy has taken it; owned */
    uint64_t stage_deadline_ns; /* of its stages; its own is never */
    bool skips[2];              /* phases that a stage does not have */
    uint32_t position;          /* RING: of this rank; shards are numbered by position */
    dss_member_t *next_in_ring;
    dss_member_t *previous_in_ring;
    double scale;      /* of the result */
    uint64_t shard_at; /* of the own shard: bytes from the begin of the vector */
    uint64_t shard_bytes;
    uint64_t reduced; /* bytes of the own shard that hold the result */
    uint8_t *scratch; /* half types: the shard in float32 (SHARDED) or everything (RING). FLAT: all
                         members' values. Owned. */
    uint8_t *posted;  /* by pieces of the own shard: 1 more than the board's slot that holds it, or 0; owned, may be NULL */
    bool has_readers; /* it is decided who reads the board */
    bool staged;      /* some member's bytes wait in `staged` */
    bool asked;       /* its time is nearly over: those it waits for were asked whether they are there */
    bool held;        /* its time was over, and they were */
    uint64_t deadline_ns;
    uint64_t timeout_ns;
    char what[160];
    void (*done)(void *argument, dss_status_t status, const char *text);
    void *argument;
    dss_status_t status;
    char *text;     /* of a failure; owned, may be NULL */
    bool completed; /* has a status; its callback is due or has run */
    bool called;    /* the callback has returned */
    dss_operation_t *next_in_bucket;
    dss_operation_t *next; /* all that are under way; or, completed ones whose callbacks are due */
    dss_operation_t **previous_p;
};

uint64_t dss_operation_shard_at(const dss_operation_t *operation, uint32_t index); /* bytes; index == member_count: the end */
/* Decides the algorithm and who sends how much to whom. False when memory is out. */
bool dss_operation_plan(dss_operation_t *operation);
/* Bytes that may be sent to the member now, and of which phase. */
uint64_t dss_operation_sendable(const dss_member_t *member, dss_phase_t *phase_p);
/* The values to send, [offset, offset + bytes) of the phase; at most `most` pieces; how many bytes they hold. */
size_t dss_operation_gather(const dss_member_t *member, dss_phase_t phase, uint64_t offset, size_t bytes, struct iovec *list,
                            int most, int *count_p);
/* The board's slot that holds the next bytes to send of phase GATHER, `*bytes_p` or fewer; -1: they go through the ring. */
int dss_operation_post(dss_member_t *member, size_t *bytes_p);
/* The member is not told of what is on the board. */
void dss_operation_unpost(const dss_member_t *member);
/* Takes values that came, from the front of `bytes`; how many bytes, 0 if they cannot be used yet. */
size_t dss_operation_take(dss_member_t *member, dss_phase_t phase, const uint8_t *bytes, size_t bytes_count);
/* Keeps values of phase REDUCE for later. False when memory is out. */
bool dss_operation_stage(dss_member_t *member, const uint8_t *bytes, size_t bytes_count);
/* Uses what is staged and can be used by now; whether there was any. */
bool dss_operation_unstage(dss_operation_t *operation);
/* After anything was sent or received: completes the operation if that was the last. */
void dss_operation_check(dss_operation_t *operation);
static inline bool dss_is_crossing(dss_operation_kind_t kind) {
    return kind == DSS_OPERATION_CROSSING_OF_MEANS || kind == DSS_OPERATION_CROSSING_OF_VALUES;
}
/* Whether larger operations of these members go by hosts and racks. */
bool dss_hierarchy_fits(const dss_operation_t *operation);
/* Begins: posts what can be. */
void dss_hierarchy_begin(dss_operation_t *operation);
void dss_hierarchy_destroy(dss_hierarchy_t *hierarchy);
/* "all_reduce sum of 1000 x float32 over 4 ranks"; for errors. */
void dss_signature_describe(const dss_signature_t *signature, char *text, size_t capacity);

/* ---- peers -------------------------------------------------------------------------------------------------------------- */

/* An operation that a peer has posted and this rank has not. */
typedef struct dss_ahead dss_ahead_t;
struct dss_ahead {
    dss_key_t key;
    dss_signature_t signature;
    dss_bytes_t eager;
    dss_ahead_t *next;
};

typedef enum dss_peer_state {
    DSS_PEER_UNKNOWN = 0, /* no connection, nobody asked for one */
    DSS_PEER_DIALING,     /* `dial` is on its way */
    DSS_PEER_AWAITED,     /* the peer's own call is used, and has not come through yet */
    DSS_PEER_READY,
    DSS_PEER_LOST, /* for good; `lost` says why */
} dss_peer_state_t;

typedef struct dss_call dss_call_t; /* a connection that is not ready yet, see connect.c */

/* What epoll gives back. */
typedef struct dss_watch {
    enum { DSS_WATCH_WAKE, DSS_WATCH_LISTENER, DSS_WATCH_CALL, DSS_WATCH_PEER } kind;
    int fd;
    uint32_t events; /* registered */
    void *owner;
} dss_watch_t;

struct dss_peer {
    dss_engine_t *engine;
    uint32_t rank;
    bool same_host;
    dss_peer_state_t state;
    dss_address_t address;
    bool has_unix;
    uint8_t unix_name[DSS_UNIX_NAME_BYTES];
    dss_call_t *dial;
    dss_call_t *forth;    /* welcomed, TCP: until the way back is welcomed, too */
    bool taken;           /* its call was welcomed */
    uint32_t hang_ups;    /* of our calls, in a row */
    uint64_t redial_ns;   /* AWAITED, or dialing again: when; 0: no */
    bool asked;           /* whether it is there, and nothing has come from it since */
    char *lost;           /* owned */
    dss_stream_t *stream; /* owned; READY only */
    dss_watch_t watch;
    dss_watch_t out_watch;    /* for room, if the stream has another descriptor for that */
    dss_member_t *operations; /* unfinished ones with this peer */
    dss_key_t latest;         /* of the operation, or the stage of one, that it has posted last, as far as this rank has, too */

    /* what a link gives: time in which both sides had posted something and it was not over, and what came in it */
    uint32_t busy; /* operations */
    uint64_t busy_since_ns;
    uint64_t transfer_ns;
    uint64_t transfer_bytes;

    dss_board_t *board; /* the peer's; owned, NULL until it has shown it */
    bool tried;         /* to send it ours */
    bool shown;         /* it has been sent */
    bool sees;          /* and the peer has said that it reads it */

    /* reading */
    bool in_frame;
    dss_frame_t frame;
    size_t frame_left;     /* payload bytes that are still to come */
    size_t frame_padding;  /* zeros that come after them */
    dss_member_t *reading; /* of a DATA frame; NULL: kept in `keeping`, or thrown away */
    dss_ahead_t *keeping;
    bool stalled;                          /* what is next cannot be used yet */
    dss_ahead_t *ahead[DSS_AHEAD_BUCKETS]; /* by dss_ahead_bucket() */
    size_t ahead_count;
    size_t ahead_bytes;
    dss_signature_t gave_up; /* posted by the peer, never by this rank, and failed; no members: nothing was */

    /* writing */
    dss_bytes_t control; /* whole frames; go before data */
    dss_member_t *senders;
    dss_member_t **last_sender_p;
    size_t eager_sent; /* payload sent that the peer has not asked for yet */
    uint8_t header[DSS_FRAME_BYTES];
    size_t header_left;    /* of the data frame on its way */
    size_t payload_left;   /* the same */
    size_t padding_left;   /* the same */
    size_t posted_bytes;   /* of what it tells of on the board */
    dss_member_t *writing; /* whose payload; NULL: its operation has failed meanwhile, the payload's rest is in `rest` */
    dss_bytes_t rest;
    dss_phase_t writing_phase;
    bool blocked; /* there is something to write and no room */
};

void dss_peer_ready(dss_peer_t *peer, dss_stream_t *stream);
/* For good: every unfinished operation with it fails. `format` continues "rank 3 (address) ". */
void dss_peer_lose(dss_peer_t *peer, const char *format, ...) DSS_PRINTF(2, 3);
/* Reads, reduces and writes what can be; whether anything moved. */
bool dss_peer_progress(dss_peer_t *peer);
/* Copies aside what cannot be used yet, so that the peer is never held up by it. */
bool dss_peer_unstall(dss_peer_t *peer);
/* Puts a control frame into the queue. */
void dss_peer_say(dss_peer_t *peer, const dss_frame_t *frame, const void *payload);
void dss_peer_say_goodbye(dss_peer_t *peer);
void dss_peer_show_board(dss_peer_t *peer); /* if it has not been */
void dss_peer_see_board(dss_peer_t *peer);  /* if it has shown one */
void dss_peer_ask(dss_peer_t *peer);        /* whether its process runs */
void dss_peer_queue(dss_member_t *member);  /* the member may have something to send */
void dss_peer_forget(dss_member_t *member); /* its operation is over */
/* The same for all related keys. */
uint32_t dss_ahead_bucket(const dss_key_t *key);
/* What the peer has posted under the key before us, taken off its list; NULL if it has not. */
dss_ahead_t *dss_peer_take_ahead(dss_peer_t *peer, const dss_key_t *key);
/* Sends the OPEN. Once the peer is ready, so that it never hears of what has failed before. */
void dss_member_announce(dss_member_t *member);
/* A peer has posted a related operation that is not the same. */
void dss_operation_mismatch(dss_operation_t *operation, dss_peer_t *peer, const dss_signature_t *theirs);
/* The operation's member meets the peer's OPEN. */
void dss_member_open(dss_member_t *member, const dss_signature_t *theirs);
/* The channel has failed: what the peer has sent ahead on it is of no use, and no longer counts. */
void dss_peer_drop_ahead(dss_peer_t *peer, uint64_t channel);
void dss_ahead_destroy(dss_ahead_t *ahead);
void dss_peer_release(dss_peer_t *peer); /* frees what it holds */
/* "rank 3 (10.0.0.1:4321)" */
const char *dss_peer_text(const dss_peer_t *peer, char *text, size_t capacity);

bool dss_bytes_append(dss_bytes_t *bytes, const void *more, size_t more_count);
void dss_bytes_release(dss_bytes_t *bytes);

/* ---- connections -------------------------------------------------------------------------------------------------------- */

/* How tests carry bytes themselves: calls go through `dial` (a stream, or NULL: nobody is there) instead of sockets. The other end
 * is handed to its engine with dss_connect_take(), by another thread. Set right after dss_engine_create(). */
typedef struct dss_fabric {
    dss_stream_t *(*dial)(void *argument, uint32_t from, uint32_t to);
    void *argument;
} dss_fabric_t;

struct dss_call {
    dss_engine_t *engine;
    dss_peer_t *peer; /* dialed: whom; accepted: NULL until proved */
    dss_stream_t *stream;
    bool unix_socket;
    bool connected; /* dialed TCP: connect() is through */
    enum { DSS_CALL_HANDSHAKE, DSS_CALL_OFFER, DSS_CALL_BELL, DSS_CALL_ANSWER, DSS_CALL_FORTH } stage;
    dss_handshake_t handshake;
    void *shared;  /* the rings, until the peer has them too; dss_shared_t, owned */
    char *problem; /* why there are none; owned */
    bool said_anything;
    uint64_t deadline_ns;
    dss_watch_t watch;
    dss_call_t *next;
};

dss_status_t dss_connect_listen(dss_engine_t *engine, const char *interfaces, const char *reach, dss_card_t *card_p,
                                dss_error_t *error_p);
/* Whether the process behind the card is in our network namespace; `ours`: it is our user's, too, and may share memory. */
bool dss_connect_reaches(const dss_card_t *card, bool *ours_p);
void dss_connect_dial(dss_peer_t *peer);
/* A stream on which somebody calls, as the listeners take; for fabrics. */
void dss_connect_take(dss_engine_t *engine, dss_stream_t *stream);
void dss_connect_accept(dss_engine_t *engine, int listener);
void dss_connect_progress(dss_call_t *call, uint32_t events);
void dss_connect_tick(dss_engine_t *engine, uint64_t now_ns);
void dss_connect_forget(dss_peer_t *peer);    /* ends what is on its way to it, for good */
void dss_connect_close(dss_engine_t *engine); /* listeners and calls */

/* ---- channels ----------------------------------------------------------------------------------------------------------- */

/* A channel that has failed. Others need no state. */
typedef struct dss_channel dss_channel_t;
struct dss_channel {
    uint64_t id;
    char *text;    /* of the first failure; owned */
    uint8_t *told; /* by rank: knows it from us, or told us; owned, may be NULL */
    dss_channel_t *next;
};

dss_channel_t *dss_channel_failed(dss_engine_t *engine, uint64_t id); /* NULL: it has not */
/* All its operations fail, and the other ranks are told. `text` says what happened to whom; `from`: the peer who said so, or NULL.
 */
void dss_channel_fail(dss_engine_t *engine, uint64_t id, dss_status_t status, const char *text, dss_peer_t *from);
void dss_channel_tell(dss_channel_t *channel, dss_peer_t *peer);
/* One operation fails, and with it its channel. `cause` is a sentence without the operation's name. */
void dss_operation_fail(dss_operation_t *operation, dss_status_t status, const char *phase, const char *cause);
/* Near the end of its time, and at it. Who waits only for ranks that are there and wait themselves gives those beside the one that
 * has stopped a moment to say so first: their error names it. */
void dss_operation_ask(dss_operation_t *operation);
void dss_operation_time_out(dss_operation_t *operation);
/* One operation alone fails, wherever it stands. */
void dss_operation_cancel(dss_operation_t *operation, dss_status_t status, const char *cause);
/* It is over: leaves the lists, its callback becomes due. */
void dss_operation_complete(dss_operation_t *operation, dss_status_t status, const char *text);
void dss_channel_release(dss_engine_t *engine);

/* ---- the engine --------------------------------------------------------------------------------------------------------- */

#define DSS_TABLE_SIZE 1024u /* of operations by key; a power of two */

struct dss_engine {
    dss_identity_t identity;
    dss_transport_t transport;
    unsigned generation; /* of the process that made it; its forked children may do nothing with it */
    dss_fabric_t fabric; /* of tests; dial NULL: sockets */
    bool has_many_neighbours;
    uint64_t spin_ns;  /* a driver looks for so long before it sleeps */
    uint32_t *hosts;   /* the lowest rank on each rank's host; owned */
    uint32_t *racks;   /* each rank's rack; all 0 if nobody has told; owned */
    bool has_racks;    /* somebody has */
    dss_peer_t *peers; /* by rank; the own one is unused; owned */
    void (*log)(void *argument, const char *text);
    void *log_argument;

    pthread_mutex_t lock;   /* guards all that follows */
    pthread_cond_t changed; /* an operation was called back, or the driver left */
    pthread_cond_t park;    /* for the engine's thread while somebody else drives */
    pthread_t thread;
    bool has_thread;
    atomic_int impatient; /* threads that want the lock: a driver steps aside for them */
    bool driven;          /* a waiter drives */
    bool parked;          /* the engine's thread waits for `park` */
    bool stopping;
    char *aborted; /* why; owned */

    int epoll;
    dss_watch_t wake;         /* eventfd: somebody wants the engine's thread out of epoll */
    dss_watch_t listeners[2]; /* TCP, Unix; fd -1: none */
    dss_call_t *calls;        /* accepted, not ready yet; dialed ones belong to their peers */
    size_t call_count;
    bool deaf;         /* the listeners are not watched until the next tick */
    int sleepers;      /* threads between epoll and what they do about it */
    dss_call_t *trash; /* closed in this pass: epoll may still hand them out */
    uint64_t next_tick_ns;

    dss_operation_t *table[DSS_TABLE_SIZE];
    dss_operation_t *operations; /* under way */
    dss_operation_t *completed;  /* callbacks are due */
    dss_operation_t **last_completed_p;
    dss_channel_t *channels;
    uint32_t *ready; /* ranks of READY peers; owned */
    uint32_t ready_count;
    bool any_staged;
    dss_board_t *board; /* owned; NULL until it is of use */
    bool has_no_board;  /* it cannot be made */
    dss_engine_stats_t stats;
};

uint64_t dss_now_ns(void);
void dss_engine_lock(dss_engine_t *engine);
/* Unlocks, then runs the callbacks that are due. */
void dss_engine_unlock(dss_engine_t *engine);
void dss_engine_log(dss_engine_t *engine, const char *format, ...) DSS_PRINTF(2, 3);
void dss_watch_set(dss_engine_t *engine, dss_watch_t *watch, uint32_t events); /* 0: none; adds, changes or removes */
void dss_engine_wake(dss_engine_t *engine);
/* Whoever worked on the connections leaves: the engine's thread goes on, if there is anything to do, or can sleep safely. */
void dss_engine_hand_over(dss_engine_t *engine);
uint32_t dss_key_bucket(const dss_key_t *key);
dss_operation_t *dss_engine_find(dss_engine_t *engine, const dss_key_t *key);
void dss_engine_insert(dss_engine_t *engine, dss_operation_t *operation);
/* Posts a part of params' operation with the lock held. */
dss_status_t dss_engine_post_stage(dss_engine_t *engine, const dss_operation_params_t *params, const dss_stage_t *stage,
                                   dss_error_t *error_p);
bool dss_key_equal(const dss_key_t *one, const dss_key_t *other);
/* Of the same operation: all but the stage. */
bool dss_key_related(const dss_key_t *one, const dss_key_t *other);
void dss_operation_unreference(dss_operation_t *operation);
/* One pass over all ready peers; whether anything moved. */
bool dss_engine_pass(dss_engine_t *engine);
void *dss_engine_main(void *engine);
char *dss_text_copy(const char *text); /* NULL when memory is out: callers live with that */

#endif
