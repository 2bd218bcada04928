/*
 * stream.h: the connection to one peer, as the engine sees it: an ordered stream of bytes each way.
 *
 * A table of functions stands between the engine and what carries the bytes: a socket (stream_socket.c), rings in shared memory
 * with a socket as doorbell (stream_shared.c), and, in tests, queues in memory that cut, delay and reset where a test says
 * (tests/c/memory_stream.h). Nothing here blocks and nothing locks: whoever drives the engine holds its one lock. Reading is by
 * peek and consume, so that values can be reduced where they lie in shared memory, without a copy in between.
 */
#ifndef DSS_STREAM_H
#define DSS_STREAM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

typedef struct dss_stream dss_stream_t;

typedef struct dss_stream_ops {
    const char *name; /* "tcp", "shm" */

    /* Takes bytes from the front of the list; how many, 0 if there is no room now, or -errno once the stream is broken. */
    ssize_t (*write)(dss_stream_t *stream, const struct iovec *list, int list_count);

    /* The bytes that have come and are not consumed, in one piece, at least `wanted` of them if so many have come (`wanted` is at
     * most DSS_STREAM_MAX_WANTED); how many, 0 if there are none now, -errno once the stream is broken and drained, -EPIPE
     * if its other end has closed it in good order. They stay where they are until consume() or the next peek(). A rest shorter
     * than `wanted` is given once; asked for again, with nothing consumed in between, it is the error: it will never be whole. */
    ssize_t (*peek)(dss_stream_t *stream, size_t wanted, const uint8_t **bytes_p);
    void (*consume)(dss_stream_t *stream, size_t bytes_count);

    /* After a batch of writes and consumes: rings the peer's doorbell if the peer sleeps and something came for it. */
    void (*flush)(dss_stream_t *stream);

    /* Before sleeping. The epoll events to wait for, EPOLLIN at least, on `fd` and EPOLLOUT on `out_fd`, after which anything that
     * comes, and room to write if want_room, makes one of them ready; 0 if something has come already, so that the caller must not
     * sleep: what the last peek told of does not count, if nothing was consumed since. */
    uint32_t (*arm)(dss_stream_t *stream, bool want_room);
    /* fd or out_fd became ready with these epoll events: takes the doorbell's rings off it. */
    void (*woken)(dss_stream_t *stream, uint32_t events);

    /* Whether the peer may be waiting for us to consume before it can go on; true where that cannot be known, and once it is gone:
     * its end then keeps fd ready until all is consumed. A peer that begins to wait wakes us, or this is always true. */
    bool (*peer_waits)(dss_stream_t *stream);

    /* Frees the stream, closes its descriptors. Bytes written before still reach the peer where the carrier can do that. */
    void (*close)(dss_stream_t *stream);
} dss_stream_ops_t;

#define DSS_STREAM_MAX_WANTED 4096u

struct dss_stream {
    const dss_stream_ops_t *ops;
    int fd;     /* what epoll watches; owned by the stream */
    int out_fd; /* where arm()'s EPOLLOUT is watched: fd, unless each way has a socket of its own; owned */
};

#endif
