#define _GNU_SOURCE /* memfd_create, POLLRDHUP */

#include "stream_shared.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "copy.h"
#include "stream_socket.h"

#define SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
#define PIECE_BYTES ((size_t)64 << 10) /* after so many the other side is told: it works on them while this one goes on */
#define PEEKS_BETWEEN_LOOKS 64u /* of a caller that only peeks: how often it pays a system call to see whether the peer lives */

_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2 && ATOMIC_INT_LOCK_FREE == 2, "atomics with locks do not work between processes");
_Static_assert(sizeof(dss_shared_control_t) <= 4096, "the control block is one page");

static const uint8_t shared_magic[8] = {'d', 's', 's', 'S', 'h', 'a', 'r', 'e'};

struct dss_shared {
    uint8_t *mapping; /* control page, ring 0 twice, ring 1 twice; owned */
    size_t mapping_bytes;
    dss_shared_control_t *control; /* in the mapping */
    size_t ring_bytes;             /* our copy: the one in the mapping is never looked at again */
    uint8_t *rings[2];             /* in the mapping */
};

typedef struct shared_stream {
    dss_stream_t base;
    dss_shared_t *shared;   /* owned */
    dss_stream_t *doorbell; /* owned */
    bool streaming;         /* large writes go past the caches */
    int bell;               /* the peer's eventfd, owned; -1: the doorbell is rung */
    size_t ring_bytes;
    size_t window_bytes; /* most that a peek gives: its room goes back to the writer before the rest is reduced */
    const uint8_t *incoming;
    uint8_t *outgoing;
    _Atomic uint64_t *incoming_tail; /* the peer's */
    _Atomic uint64_t *incoming_head;
    _Atomic uint64_t *outgoing_tail;
    _Atomic uint64_t *outgoing_head; /* the peer's */
    _Atomic uint32_t *own_wants;
    _Atomic uint32_t *peer_wants;
    uint64_t head;        /* what we consumed; *incoming_head says so to the peer */
    uint64_t tail;        /* what we wrote, published or not */
    size_t room;          /* of the outgoing ring, as far as known */
    size_t told_bytes;    /* so many were there at the last peek */
    bool told;            /* nothing was consumed since the last peek */
    bool wrote;           /* something was published since the last flush */
    bool consumed;        /* likewise */
    unsigned empty_peeks; /* in a row */
    bool complained;      /* the peer knows that we wait for room */
    int broken;           /* -errno: the peer's positions make no sense */
    int lost;             /* -errno: the peer is gone, what it wrote can still be read */
} shared_stream_t;

/* ---- the memory --------------------------------------------------------------------------------------------------------- */

static size_t page_bytes(void) {
    return (size_t)sysconf(_SC_PAGESIZE);
}

static size_t memory_bytes(size_t ring_bytes) {
    return page_bytes() + 2 * ring_bytes;
}

static bool map_at(uint8_t *where, size_t bytes, int memfd, size_t offset) {
    return mmap(where, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, memfd, (off_t)offset) != MAP_FAILED;
}

/* One reservation is filled piece by piece, so that nothing else of the process can come to lie in between. */
static dss_status_t shared_map(int memfd, size_t ring_bytes, dss_shared_t **shared_p, dss_error_t *error_p) {
    const size_t page = page_bytes();
    dss_shared_t *shared = calloc(1, sizeof *shared);
    if (!shared)
        return dss_fail(error_p, DSS_ERR_NO_MEMORY, "no memory for a mapping");
    shared->ring_bytes = ring_bytes;
    shared->mapping_bytes = page + 4 * ring_bytes;
    shared->mapping = mmap(NULL, shared->mapping_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (shared->mapping == MAP_FAILED) {
        free(shared);
        return dss_fail(error_p, DSS_ERR_SYSTEM, "no address space for shared memory: %s", strerror(errno));
    }
    bool mapped = map_at(shared->mapping, page, memfd, 0);
    for (size_t i = 0; i < 2 && mapped; i++) {
        shared->rings[i] = shared->mapping + page + 2 * i * ring_bytes;
        mapped = map_at(shared->rings[i], ring_bytes, memfd, page + i * ring_bytes) &&
                 map_at(shared->rings[i] + ring_bytes, ring_bytes, memfd, page + i * ring_bytes);
    }
    if (!mapped) {
        (void)dss_fail(error_p, DSS_ERR_SYSTEM, "shared memory cannot be mapped: %s", strerror(errno));
        dss_shared_destroy(shared);
        return DSS_ERR_SYSTEM;
    }
    shared->control = (dss_shared_control_t *)(void *)shared->mapping;
    *shared_p = shared;
    return DSS_OK;
}

void dss_shared_destroy(dss_shared_t *shared) {
    if (!shared)
        return;
    (void)munmap(shared->mapping, shared->mapping_bytes);
    free(shared);
}

dss_status_t dss_shared_create(size_t ring_bytes, int *memfd_p, dss_shared_t **shared_p, dss_error_t *error_p) {
    if (!ring_bytes || ring_bytes > DSS_SHARED_MAX_RING_BYTES)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "a ring of %zu bytes: expected 1 to %zu", ring_bytes,
                        DSS_SHARED_MAX_RING_BYTES);
    dss_shared_t *shared = NULL;
    size_t rounded_bytes = page_bytes() > DSS_SHARED_MIN_RING_BYTES ? page_bytes() : DSS_SHARED_MIN_RING_BYTES;
    while (rounded_bytes < ring_bytes)
        rounded_bytes *= 2;
    const int memfd = memfd_create("dssync", MFD_ALLOW_SEALING | MFD_CLOEXEC);
    if (memfd < 0)
        return dss_fail(error_p, DSS_ERR_SYSTEM, "memfd_create: %s", strerror(errno));
    dss_status_t status = DSS_OK;
    if (ftruncate(memfd, (off_t)memory_bytes(rounded_bytes)) || fcntl(memfd, F_ADD_SEALS, SEALS))
        status = dss_fail(error_p, DSS_ERR_SYSTEM, "shared memory of %zu bytes cannot be made and sealed: %s",
                          memory_bytes(rounded_bytes), strerror(errno));
    else
        status = shared_map(memfd, rounded_bytes, &shared, error_p);
    if (!shared) {
        (void)close(memfd);
        return status;
    }
    memcpy(shared->control->magic, shared_magic, sizeof shared_magic);
    shared->control->version = DSS_SHARED_VERSION;
    shared->control->ring_bytes = rounded_bytes;
    *memfd_p = memfd;
    *shared_p = shared;
    return DSS_OK;
}

/* Without the seals the peer could cut the memory short under us, and touching it would be a fatal signal. */
static dss_status_t shared_check(int memfd, size_t *ring_bytes_p, dss_error_t *error_p) {
    struct stat status;
    dss_shared_control_t control;
    const int seals = fcntl(memfd, F_GET_SEALS);
    if (seals < 0 || (seals & SEALS) != SEALS)
        return dss_fail(error_p, DSS_ERR_CORRUPT, "what the peer sent is no sealed shared memory: seals %#x, expected %#x",
                        seals < 0 ? 0u : (unsigned)seals, (unsigned)SEALS);
    if (fstat(memfd, &status))
        return dss_fail(error_p, DSS_ERR_SYSTEM, "fstat of the peer's shared memory: %s", strerror(errno));
    const size_t header_bytes = offsetof(dss_shared_control_t, rings);
    if (pread(memfd, &control, header_bytes, 0) != (ssize_t)header_bytes)
        return dss_fail(error_p, DSS_ERR_CORRUPT, "the peer's shared memory has no header");
    if (memcmp(control.magic, shared_magic, sizeof shared_magic) != 0 || control.version != DSS_SHARED_VERSION)
        return dss_fail(error_p, DSS_ERR_CORRUPT, "the peer's shared memory has the wrong magic or version %u, expected %u",
                        control.version, DSS_SHARED_VERSION);
    const uint64_t ring_bytes = control.ring_bytes;
    if (ring_bytes < DSS_SHARED_MIN_RING_BYTES || ring_bytes > DSS_SHARED_MAX_RING_BYTES || ring_bytes & (ring_bytes - 1) ||
        ring_bytes % page_bytes())
        return dss_fail(error_p, DSS_ERR_CORRUPT, "the peer's shared memory has rings of %llu bytes",
                        (unsigned long long)ring_bytes);
    if (status.st_size < 0 || (uint64_t)status.st_size != memory_bytes((size_t)ring_bytes))
        return dss_fail(error_p, DSS_ERR_CORRUPT, "the peer's shared memory has %lld bytes, expected %zu",
                        (long long)status.st_size, memory_bytes((size_t)ring_bytes));
    *ring_bytes_p = (size_t)ring_bytes;
    return DSS_OK;
}

dss_status_t dss_shared_open(int memfd, dss_shared_t **shared_p, dss_error_t *error_p) {
    size_t ring_bytes = 0;
    const dss_status_t status = shared_check(memfd, &ring_bytes, error_p);
    return status != DSS_OK ? status : shared_map(memfd, ring_bytes, shared_p, error_p);
}

/* ---- the stream --------------------------------------------------------------------------------------------------------- */

static shared_stream_t *shared_of(dss_stream_t *stream) {
    return (shared_stream_t *)stream;
}

/* What a ring holds by a position of ours and one of the peer's; more than it can hold breaks the stream, and is 0. */
static size_t held_between(shared_stream_t *stream, uint64_t head, uint64_t tail) {
    if (tail - head <= stream->ring_bytes)
        return (size_t)(tail - head);
    stream->broken = -EPROTO;
    return 0;
}

static size_t incoming_held(shared_stream_t *stream) {
    return held_between(stream, stream->head, atomic_load(stream->incoming_tail));
}

static size_t outgoing_room(shared_stream_t *stream) {
    const size_t held = held_between(stream, atomic_load(stream->outgoing_head), stream->tail);
    return stream->broken ? 0 : stream->ring_bytes - held;
}

/* Sequentially consistent, like all that the two sides say to each other: either a sleeper sees this, or we see that it sleeps. */
static void shared_publish(shared_stream_t *stream) {
    atomic_store(stream->outgoing_tail, stream->tail);
    stream->wrote = true;
}

static void shared_ring(shared_stream_t *stream) {
    const struct iovec ring = {"", 1};
    const uint64_t one = 1;
    if (stream->bell >= 0) {
        (void)!write(stream->bell, &one, sizeof one);
        return;
    }
    const ssize_t sent = stream->doorbell->ops->write(stream->doorbell, &ring, 1); /* no room: rings enough are under way */
    if (sent < 0)
        stream->lost = (int)sent;
}

static void shared_flush(dss_stream_t *base) {
    shared_stream_t *stream = shared_of(base);
    if (!stream->wrote && !stream->consumed)
        return;
    uint32_t satisfied = stream->wrote ? DSS_SHARED_WANTS_DATA : 0;
    const uint32_t wants = atomic_load(stream->peer_wants);
    /* Asked after `wants` was read: a peer that waits for room writes no more, so this is exact. */
    if (stream->consumed && wants & DSS_SHARED_WANTS_ROOM && incoming_held(stream) <= stream->ring_bytes / 2)
        satisfied |= DSS_SHARED_WANTS_ROOM;
    stream->wrote = stream->consumed = false;
    if (wants & satisfied && atomic_fetch_and(stream->peer_wants, ~satisfied) & satisfied)
        shared_ring(stream);
}

/* Copies what fits of one buffer and publishes it piece by piece; how many bytes. */
static size_t shared_put(shared_stream_t *stream, const uint8_t *bytes, size_t bytes_count) {
    size_t put = 0;
    while (put < bytes_count) {
        if (!stream->room && !(stream->room = outgoing_room(stream)))
            break;
        size_t piece = bytes_count - put;
        piece = piece < stream->room ? piece : stream->room;
        piece = piece < PIECE_BYTES ? piece : PIECE_BYTES;
        uint8_t *target = stream->outgoing + (stream->tail & (stream->ring_bytes - 1));
        if (stream->streaming)
            dss_copy_streaming(target, bytes + put, piece);
        else
            memcpy(target, bytes + put, piece);
        stream->tail += piece;
        stream->room -= piece;
        put += piece;
        if (piece == PIECE_BYTES || !stream->room) {
            shared_publish(stream);
            shared_flush(&stream->base);
        }
    }
    return put;
}

static ssize_t shared_write(dss_stream_t *base, const struct iovec *list, int list_count) {
    shared_stream_t *stream = shared_of(base);
    const uint64_t begin = stream->tail;
    if (stream->lost || stream->broken)
        return stream->broken ? stream->broken : stream->lost;
    for (int i = 0; i < list_count; i++) {
        if (shared_put(stream, list[i].iov_base, list[i].iov_len) < list[i].iov_len)
            break;
    }
    if (stream->tail != begin) {
        shared_publish(stream);
        stream->complained = false;
    }
    return stream->broken ? stream->broken : (ssize_t)(stream->tail - begin);
}

/* For a caller that never sleeps: asks for the end of the doorbell without taking rings that a sleeping thread must see. */
static void shared_look(shared_stream_t *stream) {
    struct pollfd doorbell = {stream->base.fd, POLLRDHUP, 0};
    if (poll(&doorbell, 1, 0) > 0)
        stream->lost = doorbell.revents & POLLERR ? -ECONNRESET : -EPIPE;
}

static ssize_t shared_peek(dss_stream_t *base, size_t wanted, const uint8_t **bytes_p) {
    shared_stream_t *stream = shared_of(base);
    size_t held = incoming_held(stream);
    wanted = wanted ? wanted : 1;
    if (held >= wanted) {
        stream->empty_peeks = 0;
    } else if (!stream->lost && ++stream->empty_peeks % PEEKS_BETWEEN_LOOKS == 0) {
        shared_look(stream);
        held = incoming_held(stream); /* it may have written before it went */
    }
    if (stream->broken)
        return stream->broken;
    if (!held || (stream->lost && held < wanted && stream->told && held == stream->told_bytes))
        return stream->lost;
    stream->told = true;
    stream->told_bytes = held;
    *bytes_p = stream->incoming + (stream->head & (stream->ring_bytes - 1));
    return (ssize_t)(held < stream->window_bytes ? held : stream->window_bytes);
}

static void shared_consume(dss_stream_t *base, size_t bytes_count) {
    shared_stream_t *stream = shared_of(base);
    stream->head += bytes_count;
    stream->told = false;
    stream->consumed = true;
    atomic_store(stream->incoming_head, stream->head);
    if (bytes_count >= PIECE_BYTES)
        shared_flush(base);
}

static uint32_t shared_arm(dss_stream_t *base, bool want_room) {
    shared_stream_t *stream = shared_of(base);
    (void)atomic_fetch_or(stream->own_wants, want_room ? DSS_SHARED_WANTS_DATA | DSS_SHARED_WANTS_ROOM : DSS_SHARED_WANTS_DATA);
    const size_t held = incoming_held(stream);
    const bool came = held && !(stream->told && held == stream->told_bytes);
    const bool has_room = want_room && outgoing_room(stream) >= stream->ring_bytes / 2;
    if (want_room && !has_room && !stream->complained) {
        stream->complained = true;
        shared_ring(stream); /* the peer may sleep on what it cannot use yet: see peer_waits() */
    }
    return came || has_room || stream->lost || stream->broken ? 0 : EPOLLIN;
}

static void shared_woken(dss_stream_t *base, uint32_t events) {
    shared_stream_t *stream = shared_of(base);
    const uint8_t *rings;
    const ssize_t count = stream->doorbell->ops->peek(stream->doorbell, 1, &rings); /* an end behind the rings wakes us again */
    (void)events;
    if (count > 0)
        stream->doorbell->ops->consume(stream->doorbell, (size_t)count);
    if (count < 0)
        stream->lost = (int)count;
}

static bool shared_peer_waits(dss_stream_t *base) {
    const shared_stream_t *stream = shared_of(base);
    return stream->lost || atomic_load(stream->peer_wants) & DSS_SHARED_WANTS_ROOM;
}

static void shared_close(dss_stream_t *base) {
    shared_stream_t *stream = shared_of(base);
    stream->doorbell->ops->close(stream->doorbell);
    if (stream->bell >= 0)
        (void)close(stream->bell);
    dss_shared_destroy(stream->shared);
    free(stream);
}

static const dss_stream_ops_t shared_ops = {"shm",      shared_write, shared_peek,       shared_consume, shared_flush,
                                            shared_arm, shared_woken, shared_peer_waits, shared_close};

dss_stream_t *dss_stream_shared_create(dss_shared_t *shared, bool creator, dss_stream_t *doorbell, dss_error_t *error_p) {
    const size_t own = creator ? 0 : 1;
    const size_t peer = 1 - own;
    shared_stream_t *stream = calloc(1, sizeof *stream);
    if (!stream) {
        (void)dss_fail(error_p, DSS_ERR_NO_MEMORY, "no memory for a stream");
        return NULL;
    }
    stream->base.ops = &shared_ops;
    stream->base.fd = doorbell->fd;
    stream->base.out_fd = doorbell->fd;
    stream->shared = shared;
    stream->doorbell = doorbell;
    stream->bell = -1;
    stream->ring_bytes = shared->ring_bytes;
    stream->room = shared->ring_bytes;
    stream->window_bytes = shared->ring_bytes / 4 > DSS_STREAM_MAX_WANTED ? shared->ring_bytes / 4 : DSS_STREAM_MAX_WANTED;
    stream->outgoing = shared->rings[own];
    stream->outgoing_tail = &shared->control->rings[own].tail;
    stream->outgoing_head = &shared->control->rings[own].head;
    stream->own_wants = &shared->control->sides[own].wants;
    stream->incoming = shared->rings[peer];
    stream->incoming_tail = &shared->control->rings[peer].tail;
    stream->incoming_head = &shared->control->rings[peer].head;
    stream->peer_wants = &shared->control->sides[peer].wants;
    return &stream->base;
}

void dss_stream_shared_set_bell(dss_stream_t *base, int bell) {
    shared_of(base)->bell = bell;
}

bool dss_stream_shared_show(dss_stream_t *base, int fd) {
    return base->ops == &shared_ops && dss_stream_socket_send_fd(shared_of(base)->doorbell, fd, "", 1) == DSS_OK;
}

int dss_stream_shared_take_shown(dss_stream_t *base) {
    return base->ops == &shared_ops ? dss_stream_socket_take_fd(shared_of(base)->doorbell) : -1;
}

void dss_stream_shared_set_streaming(dss_stream_t *base, bool streaming) {
    shared_of(base)->streaming = streaming;
}
