/*
 * stream_shared.h: a stream through memory shared by two processes of one host, a ring of bytes each way.
 *
 * One sealed memfd holds both rings; it has no name, so nothing is left behind whoever dies. Each ring is mapped twice in a row:
 * any window of it is one piece of memory, and values can be reduced where they lie. The key choice is how to sleep: a Unix socket
 * is the doorbell, one byte a ring, sent only to a peer that has said in shared memory that it sleeps; its end of file also tells
 * that the peer is gone. The peer may write anything into the shared memory at any time: positions are checked whenever they are
 * read, and nothing outside the rings is ever touched. No locks: each side's calls are made under its engine's lock, and the two
 * sides meet in sequentially consistent atomics.
 */
#ifndef DSS_STREAM_SHARED_H
#define DSS_STREAM_SHARED_H

#include <stdalign.h>
#include <stdatomic.h>

#include "status.h"
#include "stream.h"

#define DSS_SHARED_VERSION 1u
#define DSS_SHARED_MIN_RING_BYTES ((size_t)2 * DSS_STREAM_MAX_WANTED) /* see dss_stream_shared_create() */
#define DSS_SHARED_MAX_RING_BYTES ((size_t)1 << 30)
#define DSS_SHARED_LINE_BYTES 128 /* what processors fetch at once, neighbouring line included */

/* The first page of the memfd; the rings follow, the creator's first. Positions count bytes from the begin and never wrap. */
typedef struct dss_shared_control {
    uint8_t magic[8];
    uint32_t version;
    uint32_t zero;
    uint64_t ring_bytes; /* a power of two, whole pages */
    struct {
        alignas(DSS_SHARED_LINE_BYTES) _Atomic uint64_t tail; /* the end of what was written; the writer's */
        alignas(DSS_SHARED_LINE_BYTES) _Atomic uint64_t head; /* the end of what was consumed; the reader's */
    } rings[2];                                               /* [0] from the creator to the opener, [1] back */
    struct {
        alignas(DSS_SHARED_LINE_BYTES) _Atomic uint32_t wants; /* dss_shared_wants_t; set by the sleeper, cleared by its peer */
    } sides[2];                                                /* [0] the creator */
} dss_shared_control_t;

typedef enum dss_shared_wants {
    DSS_SHARED_WANTS_DATA = 1,
    DSS_SHARED_WANTS_ROOM = 2,
} dss_shared_wants_t;

typedef struct dss_shared dss_shared_t; /* one process's mapping */

/* New shared memory with rings of at least `ring_bytes`, rounded up. The descriptor is for sending it to the peer, the caller's to
 * close; the mapping does not need it. DSS_ERR_SYSTEM if the system has no sealed memfd for us. */
dss_status_t dss_shared_create(size_t ring_bytes, int *memfd_p, dss_shared_t **shared_p, dss_error_t *error_p);
/* Maps what a peer sent; `memfd` stays the caller's. DSS_ERR_CORRUPT if it is not what dss_shared_create() makes: nothing of it is
 * mapped before its seals, size and header are known to be right. */
dss_status_t dss_shared_open(int memfd, dss_shared_t **shared_p, dss_error_t *error_p);
void dss_shared_destroy(dss_shared_t *shared); /* NULL is allowed */

/* One side's end. `doorbell` is a socket stream to the peer with nothing of the handshake left in it. Owns both from then on; NULL
 * if there is no memory, and they are still the caller's. A writer that waits for room is rung when half of the ring is free: less
 * often than for each piece, and never so late that a peek of DSS_STREAM_MAX_WANTED bytes could wait for a writer that sleeps. */
dss_stream_t *dss_stream_shared_create(dss_shared_t *shared, bool creator, dss_stream_t *doorbell, dss_error_t *error_p);

/* An eventfd that wakes the peer is rung from now on; the stream's from then on. Preferred to the socket: a write to a socket tells
 * the scheduler that the writer is about to sleep, and it moves the woken peer to the writer's processor, where the two then take
 * turns. */
void dss_stream_shared_set_bell(dss_stream_t *stream, int bell);

/* Sends a descriptor of ours beside the rings; false where the stream is no ring, or the doorbell has no room. */
bool dss_stream_shared_show(dss_stream_t *stream, int fd);
/* The peer's, now the caller's, once woken() has taken the ring that came with it; -1: none. */
int dss_stream_shared_take_shown(dss_stream_t *stream);

/* Whether writes go past the caches, see copy.h. */
void dss_stream_shared_set_streaming(dss_stream_t *stream, bool streaming);

#endif
