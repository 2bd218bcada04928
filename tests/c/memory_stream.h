/*
 * memory_stream.h: streams between engines of one process, and a fabric that connects them and misbehaves as a test asks.
 *
 * A stream is a queue of bytes each way with an eventfd that is readable exactly while there is something to do, as a socket's fd
 * is. The fabric can break a connection after any number of bytes in either direction, take a few bytes at a time, hold bytes back
 * until a test releases them, and, from a thread of its own, deliver them late and in a seeded order between connections, never out
 * of order within one. That thread also hands callers to the engines they call. One lock guards all of it, and nothing sleeps.
 */
#ifndef DSS_MEMORY_STREAM_H
#define DSS_MEMORY_STREAM_H

#include "check.h" /* first: it asks for POSIX */

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>

#include "engine.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define IS_SANITIZED 1u /* slow: tests take longer strides */
#else
#define IS_SANITIZED 0u
#endif

#define MEMORY_RANKS_MOST 16u
#define MEMORY_HANDSHAKE_BYTES 128u /* each way; taken whole, as an idle socket does */
#define MEMORY_HELD_BYTES ((size_t)64 << 10)

typedef struct memory_fabric memory_fabric_t;
typedef struct memory_link memory_link_t;

/* One direction. */
typedef struct memory_pipe {
    uint8_t *bytes; /* of the fabric's capacity; owned */
    size_t begin;
    size_t end;
    uint64_t written; /* ever */
    uint64_t visible; /* of those: the reader may see them */
} memory_pipe_t;

/* One rank's side of a connection: what the engine holds. */
typedef struct memory_end {
    dss_stream_t stream; /* first: the engine's pointer is this one */
    memory_link_t *link;
    int side;       /* 0: dialed */
    bool signalled; /* the eventfd is readable */
    bool wants_room;
    bool told;  /* the last peek's bytes are not consumed */
    bool taken; /* handed to its engine */
    bool closed;
    uint8_t *held; /* taken off the pipe, not consumed; the engine's lock guards it; owned */
    size_t held_begin;
    size_t held_end;
} memory_end_t;

struct memory_link {
    memory_fabric_t *fabric;
    uint32_t ranks[2]; /* by side */
    uint64_t break_at[2];
    memory_pipe_t pipes[2]; /* by the writer's side */
    memory_end_t ends[2];
    int broken; /* ECONNRESET: at once, on both sides; EPIPE: after what was written; 0: no */
    memory_link_t *next;
};

/* Breaks the nth connection of two ranks when the writer has written so many bytes. */
typedef struct memory_fault {
    uint32_t writer;
    uint32_t reader;
    uint32_t nth;
    bool every; /* and all that follow */
    uint64_t at_bytes;
    int error; /* ECONNRESET or EPIPE; 0: no fault */
} memory_fault_t;

struct memory_fabric {
    size_t capacity;        /* of each direction */
    size_t most_at_once;    /* a write takes 1 to so many bytes, and a peek as few; 0: all there is room for */
    bool delays;            /* bytes become visible late, in an order of chance */
    memory_fault_t fault;   /* these four are set before the first join */
    pthread_mutex_t lock;   /* guards all that follows, and the links */
    pthread_cond_t changed; /* somebody was dialed or taken; and whatever happens, if delays or somebody waits for it */
    uint32_t awaiting_count;
    pthread_t thread;
    bool started; /* the thread */
    bool stopping;
    bool taking; /* the thread is in dss_connect_take() */
    uint64_t chance;
    dss_engine_t *engines[MEMORY_RANKS_MOST];
    bool holds[MEMORY_RANKS_MOST][MEMORY_RANKS_MOST]; /* by writer and reader: nothing becomes visible */
    memory_link_t *links;                             /* owned, to the end */
    memory_pipe_t *favourite;                         /* was delivered last */
};

static inline int memory_error(const memory_link_t *link, int writer) {
    return link->broken ? link->broken : link->ends[writer].closed ? EPIPE : 0;
}

static inline size_t memory_available(const memory_link_t *link, int writer) {
    const memory_pipe_t *pipe = &link->pipes[writer];
    const uint64_t hidden = pipe->written - pipe->visible;
    return link->broken == ECONNRESET ? 0 : pipe->end - pipe->begin - (size_t)hidden;
}

/* Nothing will come any more. */
static inline bool memory_is_over(const memory_link_t *link, int writer) {
    const memory_pipe_t *pipe = &link->pipes[writer];
    return link->broken == ECONNRESET || (memory_error(link, writer) != 0 && pipe->begin == pipe->end);
}

static inline bool memory_is_ready(const memory_end_t *end) {
    const memory_link_t *link = end->link;
    const memory_pipe_t *out = &link->pipes[end->side];
    const bool has_place = end->held_end - end->held_begin < MEMORY_HELD_BYTES;
    return (has_place && memory_available(link, 1 - end->side) > 0) || memory_is_over(link, 1 - end->side) ||
           (end->wants_room && (out->end - out->begin < link->fabric->capacity || memory_error(link, 1 - end->side)));
}

static inline void memory_signal(memory_end_t *end) {
    uint64_t count = 1;
    const bool ready = !end->closed && memory_is_ready(end);
    if (end->closed || ready == end->signalled)
        return;
    if (ready)
        CHECK(write(end->stream.fd, &count, sizeof count) == sizeof count);
    else
        CHECK(read(end->stream.fd, &count, sizeof count) == sizeof count);
    end->signalled = ready;
}

static inline void memory_signal_both(memory_link_t *link) {
    memory_signal(&link->ends[0]);
    memory_signal(&link->ends[1]);
    if (link->fabric->delays || link->fabric->awaiting_count > 0)
        pthread_cond_broadcast(&link->fabric->changed);
}

static inline void memory_show(memory_link_t *link, int writer) {
    const memory_fabric_t *fabric = link->fabric;
    if (!fabric->delays && !fabric->holds[link->ranks[writer]][link->ranks[1 - writer]])
        link->pipes[writer].visible = link->pipes[writer].written;
}

static inline void memory_append(memory_link_t *link, int writer, const uint8_t *bytes, size_t bytes_count) {
    memory_pipe_t *pipe = &link->pipes[writer];
    if (pipe->end + bytes_count > link->fabric->capacity) {
        memmove(pipe->bytes, pipe->bytes + pipe->begin, pipe->end - pipe->begin);
        pipe->end -= pipe->begin;
        pipe->begin = 0;
    }
    memcpy(pipe->bytes + pipe->end, bytes, bytes_count);
    pipe->end += bytes_count;
    pipe->written += bytes_count;
}

/* ---- what the engine calls ---------------------------------------------------------------------------------------------- */

static inline ssize_t memory_write(dss_stream_t *stream, const struct iovec *list, int list_count) {
    memory_end_t *end = (memory_end_t *)stream;
    memory_link_t *link = end->link;
    memory_fabric_t *fabric = link->fabric;
    memory_pipe_t *pipe = &link->pipes[end->side];
    size_t taken = 0;
    pthread_mutex_lock(&fabric->lock);
    const int error = memory_error(link, 1 - end->side);
    size_t room = error ? 0 : fabric->capacity - (pipe->end - pipe->begin);
    if (fabric->most_at_once > 0 && pipe->written >= MEMORY_HANDSHAKE_BYTES) {
        const size_t few = 1 + check_random_below(&fabric->chance, (uint32_t)fabric->most_at_once);
        room = room < few ? room : few;
    }
    if (link->break_at[end->side] - pipe->written < room)
        room = (size_t)(link->break_at[end->side] - pipe->written);
    for (int i = 0; i < list_count && taken < room; i++) {
        const size_t piece = list[i].iov_len < room - taken ? list[i].iov_len : room - taken;
        memory_append(link, end->side, list[i].iov_base, piece);
        taken += piece;
    }
    memory_show(link, end->side);
    if (!error && pipe->written == link->break_at[end->side])
        link->broken = fabric->fault.error;
    memory_signal_both(link);
    pthread_mutex_unlock(&fabric->lock);
    return error ? -error : (ssize_t)taken;
}

/* From the pipe into `held`: all that is asked for, and of the rest as much as chance says. */
static inline void memory_hold(memory_end_t *end, size_t wanted) {
    memory_link_t *link = end->link;
    memory_fabric_t *fabric = link->fabric;
    memory_pipe_t *pipe = &link->pipes[1 - end->side];
    const size_t held = end->held_end - end->held_begin;
    memmove(end->held, end->held + end->held_begin, held);
    size_t more = MEMORY_HELD_BYTES - held;
    if (fabric->most_at_once > 0 && more > 0) {
        const size_t least = wanted > held ? wanted - held : 1;
        const size_t few = least + check_random_below(&fabric->chance, (uint32_t)fabric->most_at_once);
        more = few < more ? few : more;
    }
    const size_t available = memory_available(link, 1 - end->side);
    more = more < available ? more : available;
    memcpy(end->held + held, pipe->bytes + pipe->begin, more);
    pipe->begin += more;
    if (pipe->begin == pipe->end)
        pipe->begin = pipe->end = 0;
    end->held_begin = 0;
    end->held_end = held + more;
    end->told = end->told && more == 0;
}

static inline ssize_t memory_peek(dss_stream_t *stream, size_t wanted, const uint8_t **bytes_p) {
    memory_end_t *end = (memory_end_t *)stream;
    memory_link_t *link = end->link;
    pthread_mutex_lock(&link->fabric->lock);
    memory_hold(end, wanted);
    const size_t held = end->held_end - end->held_begin;
    const bool over = memory_is_over(link, 1 - end->side);
    ssize_t result = (ssize_t)held;
    if (over && (held == 0 || (held < wanted && end->told)))
        result = -memory_error(link, 1 - end->side);
    end->told = held > 0;
    *bytes_p = end->held;
    memory_signal_both(link);
    pthread_mutex_unlock(&link->fabric->lock);
    return result;
}

static inline void memory_consume(dss_stream_t *stream, size_t bytes_count) {
    memory_end_t *end = (memory_end_t *)stream;
    CHECK(bytes_count <= end->held_end - end->held_begin);
    pthread_mutex_lock(&end->link->fabric->lock);
    end->held_begin += bytes_count;
    end->told = false;
    memory_signal(end);
    pthread_mutex_unlock(&end->link->fabric->lock);
}

static inline void memory_flush(dss_stream_t *stream) {
    (void)stream; /* writes have rung */
}

static inline uint32_t memory_arm(dss_stream_t *stream, bool want_room) {
    memory_end_t *end = (memory_end_t *)stream;
    pthread_mutex_lock(&end->link->fabric->lock);
    end->wants_room = want_room;
    memory_signal(end);
    const bool come = end->signalled || (end->held_end > end->held_begin && !end->told);
    pthread_mutex_unlock(&end->link->fabric->lock);
    return come ? 0 : EPOLLIN;
}

static inline void memory_woken(dss_stream_t *stream, uint32_t events) {
    (void)stream; /* the next peek or write finds out what it was */
    (void)events;
}

static inline bool memory_peer_waits(dss_stream_t *stream) {
    (void)stream;
    return true;
}

static inline void memory_close(dss_stream_t *stream) {
    memory_end_t *end = (memory_end_t *)stream;
    pthread_mutex_lock(&end->link->fabric->lock);
    CHECK(!end->closed);
    end->closed = true;
    close(end->stream.fd);
    free(end->held);
    memory_signal_both(end->link);
    pthread_mutex_unlock(&end->link->fabric->lock);
}

static const dss_stream_ops_t memory_stream_ops = {"memory",   memory_write, memory_peek,       memory_consume, memory_flush,
                                                   memory_arm, memory_woken, memory_peer_waits, memory_close};

/* ---- the fabric --------------------------------------------------------------------------------------------------------- */

static inline bool memory_joins(const memory_link_t *link, uint32_t one, uint32_t other) {
    return (link->ranks[0] == one && link->ranks[1] == other) || (link->ranks[0] == other && link->ranks[1] == one);
}

static inline uint64_t memory_break_at(const memory_fabric_t *fabric, const memory_link_t *link, int writer) {
    const memory_fault_t *fault = &fabric->fault;
    uint32_t earlier = 0;
    for (const memory_link_t *other = fabric->links; other; other = other->next)
        earlier += memory_joins(other, fault->writer, fault->reader);
    const bool hit = fault->error && (earlier == fault->nth || (fault->every && earlier > fault->nth)) &&
                     link->ranks[writer] == fault->writer && link->ranks[1 - writer] == fault->reader;
    return hit ? fault->at_bytes : UINT64_MAX;
}

static inline memory_link_t *memory_link_make(memory_fabric_t *fabric, uint32_t from, uint32_t to) {
    memory_link_t *link = calloc(1, sizeof *link);
    CHECK(link);
    link->fabric = fabric;
    link->ranks[0] = from;
    link->ranks[1] = to;
    for (int side = 0; side < 2; side++) {
        link->break_at[side] = memory_break_at(fabric, link, side);
        link->broken = link->break_at[side] == 0 ? fabric->fault.error : link->broken;
        link->pipes[side].bytes = malloc(fabric->capacity);
        memory_end_t *end = &link->ends[side];
        *end = (memory_end_t){.stream = {.ops = &memory_stream_ops, .fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)},
                              .link = link,
                              .side = side,
                              .taken = side == 0,
                              .held = malloc(MEMORY_HELD_BYTES)};
        end->stream.out_fd = end->stream.fd;
        CHECK(link->pipes[side].bytes && end->stream.fd >= 0 && end->held);
    }
    link->next = fabric->links;
    fabric->links = link;
    return link;
}

/* Called under the dialer's lock: the other end is handed over by the fabric's thread. */
static inline dss_stream_t *memory_dial(void *argument, uint32_t from, uint32_t to) {
    memory_fabric_t *fabric = argument;
    pthread_mutex_lock(&fabric->lock);
    memory_link_t *link = fabric->engines[to] ? memory_link_make(fabric, from, to) : NULL;
    if (link)
        memory_signal_both(link);
    pthread_cond_broadcast(&fabric->changed);
    pthread_mutex_unlock(&fabric->lock);
    return link ? &link->ends[0].stream : NULL;
}

static inline memory_end_t *memory_find_caller(memory_fabric_t *fabric) {
    for (memory_link_t *link = fabric->links; link; link = link->next)
        if (!link->ends[1].taken)
            return &link->ends[1];
    return NULL;
}

static inline void memory_take(memory_fabric_t *fabric, memory_end_t *end) {
    dss_engine_t *engine = fabric->engines[end->link->ranks[1]];
    end->taken = true;
    fabric->taking = true;
    pthread_mutex_unlock(&fabric->lock);
    if (engine)
        dss_connect_take(engine, &end->stream);
    else
        memory_close(&end->stream);
    pthread_mutex_lock(&fabric->lock);
    fabric->taking = false;
    pthread_cond_broadcast(&fabric->changed);
}

/* Delivers some of what waits on one connection: most often of the one it was before, so that others are left behind. */
static inline bool memory_deliver(memory_fabric_t *fabric) {
    memory_link_t *chosen = NULL;
    int writer = 0;
    uint32_t waiting = 0;
    const bool stay = check_random_below(&fabric->chance, 8) > 0;
    for (memory_link_t *link = fabric->links; link; link = link->next)
        for (int side = 0; side < 2; side++) {
            memory_pipe_t *pipe = &link->pipes[side];
            if (pipe->visible == pipe->written || fabric->holds[link->ranks[side]][link->ranks[1 - side]])
                continue;
            const bool favoured = stay && pipe == fabric->favourite;
            if (!favoured && check_random_below(&fabric->chance, ++waiting) > 0)
                continue;
            chosen = link;
            writer = side;
            waiting += favoured ? 1000 : 0;
        }
    if (!chosen)
        return false;
    memory_pipe_t *pipe = &chosen->pipes[writer];
    const uint64_t hidden = pipe->written - pipe->visible;
    const uint64_t some = 1 + check_random_below(&fabric->chance, (uint32_t)(2 * hidden));
    pipe->visible += some < hidden ? some : hidden;
    fabric->favourite = pipe;
    memory_signal(&chosen->ends[1 - writer]);
    return true;
}

static inline void *memory_fabric_main(void *argument) {
    memory_fabric_t *fabric = argument;
    pthread_mutex_lock(&fabric->lock);
    while (!fabric->stopping) {
        memory_end_t *caller = memory_find_caller(fabric);
        if (caller) {
            memory_take(fabric, caller);
        } else if (fabric->delays && memory_deliver(fabric)) {
            pthread_mutex_unlock(&fabric->lock); /* let others at it */
            pthread_mutex_lock(&fabric->lock);
        } else {
            pthread_cond_wait(&fabric->changed, &fabric->lock);
        }
    }
    pthread_mutex_unlock(&fabric->lock);
    return NULL;
}

/* What differs from the defaults is set between this and the first join. */
static inline memory_fabric_t *memory_fabric_create(uint64_t seed) {
    memory_fabric_t *fabric = calloc(1, sizeof *fabric);
    CHECK(fabric);
    fabric->capacity = (size_t)64 << 10;
    fabric->chance = seed * 2 + 1;
    pthread_mutex_init(&fabric->lock, NULL);
    pthread_cond_init(&fabric->changed, NULL);
    return fabric;
}

/* After all its engines are destroyed. */
static inline void memory_fabric_destroy(memory_fabric_t *fabric) {
    pthread_mutex_lock(&fabric->lock);
    fabric->stopping = true;
    pthread_cond_broadcast(&fabric->changed);
    pthread_mutex_unlock(&fabric->lock);
    if (fabric->started)
        pthread_join(fabric->thread, NULL);
    while (fabric->links) {
        memory_link_t *link = fabric->links;
        fabric->links = link->next;
        CHECK(link->ends[0].closed); /* or an engine has leaked it */
        if (!link->ends[1].taken)
            memory_close(&link->ends[1].stream);
        CHECK(link->ends[1].closed);
        free(link->pipes[0].bytes);
        free(link->pipes[1].bytes);
        free(link);
    }
    pthread_mutex_destroy(&fabric->lock);
    pthread_cond_destroy(&fabric->changed);
    free(fabric);
}

/* Right after the engine is created; a rank that has not joined cannot be called. */
static inline void memory_fabric_join(memory_fabric_t *fabric, dss_engine_t *engine) {
    dss_engine_lock(engine);
    engine->fabric = (dss_fabric_t){.dial = memory_dial, .argument = fabric};
    dss_engine_unlock(engine);
    pthread_mutex_lock(&fabric->lock);
    fabric->engines[dss_engine_rank(engine)] = engine;
    if (!fabric->started)
        CHECK_EQUAL(pthread_create(&fabric->thread, NULL, memory_fabric_main, fabric), 0);
    fabric->started = true;
    pthread_mutex_unlock(&fabric->lock);
}

/* Before the engine is destroyed. */
static inline void memory_fabric_leave(memory_fabric_t *fabric, const dss_engine_t *engine) {
    pthread_mutex_lock(&fabric->lock);
    fabric->engines[dss_engine_rank(engine)] = NULL;
    while (fabric->taking)
        pthread_cond_wait(&fabric->changed, &fabric->lock);
    pthread_mutex_unlock(&fabric->lock);
}

/* From then on nothing that `writer` sends to `reader` arrives; without `hold`, all that it has sent does. */
static inline void memory_fabric_hold(memory_fabric_t *fabric, uint32_t writer, uint32_t reader, bool hold) {
    pthread_mutex_lock(&fabric->lock);
    fabric->holds[writer][reader] = hold;
    for (memory_link_t *link = fabric->links; link; link = link->next)
        for (int side = 0; side < 2; side++)
            if (link->ranks[side] == writer && link->ranks[1 - side] == reader) {
                memory_show(link, side);
                memory_signal_both(link);
            }
    pthread_cond_broadcast(&fabric->changed);
    pthread_mutex_unlock(&fabric->lock);
}

/* Until `writer` has written so many bytes to `reader` on some connection, or their first one is broken. */
static inline void memory_fabric_await(memory_fabric_t *fabric, uint32_t writer, uint32_t reader, uint64_t bytes) {
    bool come = false;
    pthread_mutex_lock(&fabric->lock);
    fabric->awaiting_count++;
    while (!come) {
        for (memory_link_t *link = fabric->links; link; link = link->next)
            for (int side = 0; side < 2; side++)
                come = come || (link->ranks[side] == writer && link->ranks[1 - side] == reader &&
                                (link->broken || link->ends[0].closed || link->pipes[side].written >= bytes));
        if (!come)
            pthread_cond_wait(&fabric->changed, &fabric->lock);
    }
    fabric->awaiting_count--;
    pthread_mutex_unlock(&fabric->lock);
}

/* Connections between the two that both still hold, and of all that there ever were. */
static inline void memory_fabric_count(memory_fabric_t *fabric, uint32_t one, uint32_t other, uint32_t *open_p, uint32_t *all_p) {
    *open_p = *all_p = 0;
    pthread_mutex_lock(&fabric->lock);
    for (memory_link_t *link = fabric->links; link; link = link->next) {
        *all_p += memory_joins(link, one, other);
        *open_p += memory_joins(link, one, other) && !link->ends[0].closed && !link->ends[1].closed && !link->broken;
    }
    pthread_mutex_unlock(&fabric->lock);
}

#endif
