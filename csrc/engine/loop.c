#define _GNU_SOURCE /* clocks, signals, processors */
/*
 * The engine's loop, its thread, and its beginning and end.
 *
 * A pass moves what can be moved on every ready connection. When nothing moves, the driver arms the connections and sleeps in
 * epoll. The driver is whoever waits for an operation; the engine's own thread steps in when nobody waits, and parks while somebody
 * does, so that each event wakes one thread.
 */
#include "engine.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "descriptors.h"

#define EVENT_COUNT 64
#define SPIN_NS ((uint64_t)10 * 1000u)          /* a few looks before the trip through the kernel, which costs more */
#define CROWDED_SPIN_NS ((uint64_t)1 * 1000u)   /* where ranks outnumber processors: who looks keeps another away */
#define PARK_NS ((uint64_t)10 * 1000000u)       /* the thread looks whether the driver has gone */
#define NEAR_FIRST ((uint32_t)1 << 31)          /* beside a host's number: rank 0 is in the same network namespace */
#define FAREWELL_NS ((uint64_t)1000 * 1000000u) /* for what is still in the queues at the end */

uint64_t dss_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void dss_engine_log(dss_engine_t *engine, const char *format, ...) {
    char text[512];
    va_list arguments;
    if (!engine->log)
        return;
    va_start(arguments, format);
    (void)vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    engine->log(engine->log_argument, text);
}

/* ---- the lock ----------------------------------------------------------------------------------------------------------- */

void dss_engine_lock(dss_engine_t *engine) {
    atomic_fetch_add_explicit(&engine->impatient, 1, memory_order_relaxed);
    pthread_mutex_lock(&engine->lock);
    atomic_fetch_sub_explicit(&engine->impatient, 1, memory_order_relaxed);
}

void dss_engine_unlock(dss_engine_t *engine) {
    dss_operation_t *due = engine->completed;
    engine->completed = NULL;
    engine->last_completed_p = &engine->completed;
    pthread_mutex_unlock(&engine->lock);
    if (!due)
        return;
    for (dss_operation_t *operation = due; operation; operation = operation->next)
        operation->done(operation->argument, operation->status,
                        operation->text || operation->status == DSS_OK ? operation->text : dss_status_string(operation->status));
    dss_engine_lock(engine);
    while (due) {
        dss_operation_t *next = due->next;
        due->called = true;
        dss_operation_unreference(due);
        due = next;
    }
    pthread_cond_broadcast(&engine->changed);
    pthread_mutex_unlock(&engine->lock);
}

/* Lets others have the lock, and callbacks run. */
static void step_aside(dss_engine_t *engine) {
    if (!engine->completed && atomic_load_explicit(&engine->impatient, memory_order_relaxed) == 0)
        return;
    const bool wanted = !engine->completed;
    dss_engine_unlock(engine);
    if (wanted)
        sched_yield();
    dss_engine_lock(engine);
}

static void wait_until(pthread_cond_t *condition, pthread_mutex_t *lock, uint64_t until_ns) {
    const struct timespec until = {.tv_sec = (time_t)(until_ns / 1000000000u), .tv_nsec = (long)(until_ns % 1000000000u)};
    (void)pthread_cond_timedwait(condition, lock, &until);
}

/* ---- epoll -------------------------------------------------------------------------------------------------------------- */

void dss_watch_set(dss_engine_t *engine, dss_watch_t *watch, uint32_t events) {
    if (watch->fd < 0 || watch->events == events)
        return;
    struct epoll_event event = {.events = events, .data.ptr = watch};
    const int what = watch->events == 0 ? EPOLL_CTL_ADD : events == 0 ? EPOLL_CTL_DEL : EPOLL_CTL_MOD;
    (void)epoll_ctl(engine->epoll, what, watch->fd, &event);
    watch->events = events;
}

void dss_engine_wake(dss_engine_t *engine) {
    const uint64_t one = 1;
    if (engine->parked && !engine->driven)
        pthread_cond_signal(&engine->park);
    else
        (void)!write(engine->wake.fd, &one, sizeof one);
}

static void handle(dss_engine_t *engine, dss_watch_t *watch, uint32_t events) {
    uint64_t count = 0;
    dss_peer_t *peer = watch->owner;
    switch (watch->kind) {
    case DSS_WATCH_WAKE:
        (void)!read(watch->fd, &count, sizeof count);
        break;
    case DSS_WATCH_LISTENER:
        dss_connect_accept(engine, watch->fd);
        break;
    case DSS_WATCH_CALL:
        dss_connect_progress(watch->owner, events);
        break;
    case DSS_WATCH_PEER:
        if (peer->state == DSS_PEER_READY) {
            peer->stream->ops->woken(peer->stream, events);
            dss_peer_see_board(peer);
        }
        break;
    }
}

static void empty_trash(dss_engine_t *engine) {
    while (engine->trash) {
        dss_call_t *next = engine->trash->next;
        free(engine->trash);
        engine->trash = next;
    }
}

static bool has_output(const dss_peer_t *peer) {
    return peer->state == DSS_PEER_READY &&
           (peer->control.begin < peer->control.end || peer->header_left || peer->payload_left || peer->padding_left);
}

/* False if something has come meanwhile, or was said (a failure, perhaps) and not sent. */
static bool arm_all(dss_engine_t *engine) {
    for (uint32_t i = 0; i < engine->ready_count; i++) {
        dss_peer_t *peer = &engine->peers[engine->ready[i]];
        if (has_output(peer) && !peer->blocked)
            return false;
        const uint32_t events = peer->stream->ops->arm(peer->stream, peer->blocked);
        if (events == 0)
            return false;
        if (peer->out_watch.fd < 0) {
            dss_watch_set(engine, &peer->watch, events);
            continue;
        }
        dss_watch_set(engine, &peer->watch, events & ~(uint32_t)EPOLLOUT);
        dss_watch_set(engine, &peer->out_watch, events & EPOLLOUT);
    }
    return true;
}

/* What cannot be used yet is copied aside: values of another operation, which somebody waits for, may lie behind it. With a single
 * operation under way that cannot be, and it may stay where it is unless the peer waits for its room, or was asked: the answer
 * lies behind it. */
static bool unstall_all(dss_engine_t *engine) {
    const bool single = engine->operations && !engine->operations->next && !engine->operations->asked;
    bool moved = false;
    for (uint32_t i = engine->ready_count; i-- > 0;) { /* backwards: a lost peer's place is taken by the last */
        dss_peer_t *peer = &engine->peers[engine->ready[i]];
        if (peer->stalled && (!single || peer->stream->ops->peer_waits(peer->stream)))
            moved = dss_peer_unstall(peer) || moved;
    }
    return moved;
}

/* Until something happens, or until_ns (UINT64_MAX: however long). */
static void sleep_until(dss_engine_t *engine, uint64_t until_ns) {
    if (unstall_all(engine) || engine->completed || !arm_all(engine))
        return;
    struct epoll_event events[EVENT_COUNT];
    const uint64_t now = dss_now_ns();
    int milliseconds = -1;
    if (until_ns != UINT64_MAX)
        milliseconds = until_ns <= now ? 0 : (int)((until_ns - now) / 1000000u + 1);
    engine->sleepers++;
    pthread_mutex_unlock(&engine->lock);
    const int count = epoll_wait(engine->epoll, events, EVENT_COUNT, milliseconds);
    dss_engine_lock(engine);
    for (int i = 0; i < count; i++)
        handle(engine, events[i].data.ptr, events[i].events);
    if (--engine->sleepers == 0)
        empty_trash(engine);
}

/* ---- driving ------------------------------------------------------------------------------------------------------------ */

bool dss_engine_pass(dss_engine_t *engine) {
    bool moved = false;
    for (uint32_t i = engine->ready_count; i-- > 0;)
        moved = dss_peer_progress(&engine->peers[engine->ready[i]]) || moved;
    if (engine->any_staged) {
        engine->any_staged = false;
        for (dss_operation_t *operation = engine->operations; operation;) {
            dss_operation_t *next = operation->next;
            if (operation->staged) {
                moved = dss_operation_unstage(operation) || moved;
                engine->any_staged = engine->any_staged || operation->staged;
                dss_operation_check(operation);
            }
            operation = next;
        }
    }
    return moved;
}

/* Whether anything waits for the clock. */
static bool is_busy(const dss_engine_t *engine) {
    return engine->operations || engine->call_count > 0 || engine->deaf || engine->next_tick_ns == 0;
}

static void tick(dss_engine_t *engine) {
    const uint64_t now = dss_now_ns();
    if (now < engine->next_tick_ns)
        return;
    engine->next_tick_ns = now + DSS_TICK_NS;
    dss_connect_tick(engine, now);
    for (dss_operation_t *operation = engine->operations; operation;) {
        if (operation->deadline_ns <= now) {
            dss_operation_time_out(operation);
            operation = engine->operations; /* its whole channel failed */
            continue;
        }
        if (!operation->asked && operation->deadline_ns - now <= DSS_ASK_NS)
            dss_operation_ask(operation);
        operation = operation->next;
    }
    for (uint32_t i = 0; i < engine->identity.world_size; i++) /* a redial may be due before the next tick */
        if (engine->peers[i].redial_ns && engine->peers[i].redial_ns < engine->next_tick_ns)
            engine->next_tick_ns = engine->peers[i].redial_ns;
}

static uint64_t earlier(uint64_t one, uint64_t other) {
    return one < other ? one : other;
}

/* Works until the operation is completed. The lock is held, and now and then let go. */
static void drive(dss_engine_t *engine, const dss_operation_t *operation, uint64_t deadline_ns) {
    uint64_t idle_since = 0;
    while (!operation->completed) {
        const bool moved = dss_engine_pass(engine);
        if (operation->completed)
            return;
        step_aside(engine);
        const uint64_t now = dss_now_ns();
        if (now >= deadline_ns)
            return;
        if (now >= engine->next_tick_ns)
            tick(engine); /* also while this operation moves: others have time-outs too */
        if (moved || idle_since == 0)
            idle_since = now;
        if (now - idle_since < engine->spin_ns)
            continue;
        sleep_until(engine, earlier(deadline_ns, engine->next_tick_ns));
        idle_since = 0;
    }
}

/* Whether somebody must work on it, though nobody waits. */
static bool is_needed(const dss_engine_t *engine) {
    bool needed = engine->operations || engine->call_count > 0;
    for (uint32_t i = 0; !needed && i < engine->ready_count; i++)
        needed = has_output(&engine->peers[engine->ready[i]]);
    return needed;
}

void dss_engine_hand_over(dss_engine_t *engine) {
    if (engine->driven || (!engine->parked && is_needed(engine)))
        dss_engine_wake(engine);
    else if (engine->parked && is_needed(engine))
        pthread_cond_signal(&engine->park);
    else if (engine->sleepers > 0 && !arm_all(engine))
        dss_engine_wake(engine);
}

int dss_operation_wait(dss_operation_t *operation, uint64_t timeout_ns) {
    dss_engine_t *engine = operation->engine;
    if (engine->generation != dss_descriptor_generation())
        return 0; /* a forked child waits in vain: nobody works on it there, and its lock may be held for ever */
    const uint64_t now = dss_now_ns();
    const uint64_t deadline_ns = timeout_ns > UINT64_MAX - now ? UINT64_MAX : now + timeout_ns;
    dss_engine_lock(engine);
    while (!operation->called) {
        if (engine->completed) {
            dss_engine_unlock(engine);
            dss_engine_lock(engine);
        } else if (dss_now_ns() >= deadline_ns) {
            break;
        } else if (operation->completed || engine->driven) {
            wait_until(&engine->changed, &engine->lock, earlier(deadline_ns, dss_now_ns() + DSS_TICK_NS));
        } else {
            engine->driven = true;
            drive(engine, operation, deadline_ns);
            engine->driven = false;
            pthread_cond_broadcast(&engine->changed);
            dss_engine_hand_over(engine);
        }
    }
    const int done = operation->called;
    dss_engine_unlock(engine);
    return done;
}

void *dss_engine_main(void *argument) {
    dss_engine_t *engine = argument;
    dss_engine_lock(engine);
    while (!engine->stopping) {
        if (engine->driven) {
            engine->parked = true;
            wait_until(&engine->park, &engine->lock, dss_now_ns() + PARK_NS);
            engine->parked = false;
            continue;
        }
        const bool moved = dss_engine_pass(engine);
        tick(engine);
        step_aside(engine);
        if (moved || engine->stopping || engine->driven)
            continue;
        sleep_until(engine, is_busy(engine) ? engine->next_tick_ns : UINT64_MAX);
        if (engine->driven)
            dss_engine_wake(engine); /* what woke us may have been the driver's */
    }
    dss_engine_unlock(engine);
    return NULL;
}

/* ---- begin and end ------------------------------------------------------------------------------------------------------ */

static dss_status_t make_thread(dss_engine_t *engine, dss_error_t *error_p) {
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are the program's business */
    const int failed = pthread_create(&engine->thread, NULL, dss_engine_main, engine);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed)
        return dss_fail(error_p, DSS_ERR_SYSTEM, "cannot start a thread: %s", strerror(failed));
    engine->has_thread = true;
    return DSS_OK;
}

static dss_status_t make_epoll(dss_engine_t *engine, dss_error_t *error_p) {
    dss_descriptor_begin();
    engine->epoll = dss_descriptor_end(epoll_create1(EPOLL_CLOEXEC));
    dss_descriptor_begin();
    engine->wake.fd = dss_descriptor_end(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
    if (engine->epoll < 0 || engine->wake.fd < 0)
        return dss_fail(error_p, DSS_ERR_SYSTEM, "epoll, eventfd: %s", strerror(errno));
    dss_watch_set(engine, &engine->wake, EPOLLIN);
    return DSS_OK;
}

static void take_card(dss_engine_t *engine, uint32_t rank, const dss_card_t *card) {
    dss_peer_t *peer = &engine->peers[rank];
    peer->address = card->address;
    peer->has_unix = card->has_unix;
    memcpy(peer->unix_name, card->unix_name, sizeof peer->unix_name);
}

/* Everyone's card; rank 0's carries the secret and the epoch. */
static dss_status_t exchange_cards(dss_engine_t *engine, const dss_engine_params_t *params, dss_card_t *card, dss_card_t *cards,
                                   dss_error_t *error_p) {
    uint8_t mine[DSS_CARD_BYTES];
    dss_status_t status = DSS_OK;
    if (params->rank == 0) {
        status = dss_random_bytes(card->secret, sizeof card->secret, error_p);
        if (status == DSS_OK)
            status = dss_random_bytes(&card->epoch, sizeof card->epoch, error_p);
        if (status != DSS_OK)
            return status;
    }
    uint8_t *all = malloc((size_t)params->world_size * DSS_CARD_BYTES);
    if (!all)
        return dss_fail(error_p, DSS_ERR_NO_MEMORY, "out of memory for %u addresses", params->world_size);
    dss_card_encode(card, mine);
    status = params->oob.allgather(params->oob.argument, mine, sizeof mine, all, error_p);
    for (uint32_t i = 0; status == DSS_OK && i < params->world_size; i++) {
        status = dss_card_decode(all + (size_t)i * DSS_CARD_BYTES, &cards[i], error_p);
        if (status == DSS_OK)
            take_card(engine, i, &cards[i]);
    }
    free(all);
    if (status == DSS_OK) {
        memcpy(engine->identity.secret, cards[0].secret, sizeof engine->identity.secret);
        engine->identity.epoch = cards[0].epoch;
    }
    return status;
}

/* Those that this process may use: a container, or taskset, may leave it fewer than the machine has. */
static uint32_t processor_count(void) {
    cpu_set_t usable;
    if (sched_getaffinity(0, sizeof usable, &usable) == 0)
        return (uint32_t)CPU_COUNT(&usable);
    return (uint32_t)sysconf(_SC_NPROCESSORS_ONLN); /* more than a set can hold */
}

/* The lowest rank that can be reached on this host's own sockets names the host; ranks of another user are another host.
 * all_near: everyone is in one network namespace all the same, and a loopback address serves. */
static dss_status_t find_hosts(dss_engine_t *engine, const dss_engine_params_t *params, const dss_card_t *cards, bool *all_near_p,
                               dss_error_t *error_p) {
    uint32_t host = engine->transport == DSS_TRANSPORT_TCP ? params->rank : 0;
    bool near_first = params->rank == 0;
    for (; host < params->rank; host++) {
        bool ours = false;
        const bool reached = dss_connect_reaches(&cards[host], &ours);
        near_first = near_first || (reached && host == 0);
        if (ours)
            break;
    }
    const uint32_t mine = host | (near_first ? NEAR_FIRST : 0);
    uint32_t neighbour_count = 0;
    const dss_status_t status = params->oob.allgather(params->oob.argument, &mine, sizeof mine, engine->hosts, error_p);
    for (uint32_t i = 0; status == DSS_OK && i < params->world_size; i++) {
        *all_near_p = *all_near_p && engine->hosts[i] & NEAR_FIRST;
        engine->hosts[i] &= ~NEAR_FIRST;
        if (engine->hosts[i] > i)
            return dss_fail(error_p, DSS_ERR_CORRUPT, "rank %u names rank %u as the first of its host", i, engine->hosts[i]);
        engine->peers[i].same_host = engine->hosts[i] == host;
        neighbour_count += engine->hosts[i] == host && i != params->rank;
    }
    engine->has_many_neighbours = neighbour_count >= DSS_MANY_NEIGHBOURS;
    engine->spin_ns = neighbour_count < processor_count() ? SPIN_NS : CROWDED_SPIN_NS;
    return status;
}

/* The same answer on every rank. */
static dss_status_t check_reach(const dss_engine_t *engine, const dss_card_t *cards, bool all_near, dss_error_t *error_p) {
    const uint32_t world_size = engine->identity.world_size;
    uint32_t loopback = world_size;
    uint32_t elsewhere = world_size;
    for (uint32_t i = world_size; i-- > 0;) {
        if (engine->hosts[i] != 0)
            elsewhere = i;
        if (dss_address_is_loopback(&cards[i].address))
            loopback = i;
    }
    bool all_loopback = true;
    for (uint32_t i = 0; i < world_size; i++)
        all_loopback = all_loopback && dss_address_is_loopback(&cards[i].address);
    if (engine->transport == DSS_TRANSPORT_SHM && elsewhere < world_size)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT,
                        "transport=shm was asked for, and ranks 0 and %u are not on one host, or not in one network namespace, or "
                        "not the same user's",
                        elsewhere);
    if (loopback < world_size && (!all_loopback || (engine->transport == DSS_TRANSPORT_AUTO && !all_near)))
        return dss_fail(
            error_p, DSS_ERR_INVALID_ARGUMENT,
            "rank %u listens on a loopback address, which ranks on other hosts cannot reach. Name the interface to use in "
            "DSSYNC_SOCKET_IFNAME, or give MASTER_ADDR as others see it",
            loopback);
    return DSS_OK;
}

static dss_engine_t *make_engine(const dss_engine_params_t *params) {
    dss_engine_t *engine = calloc(1, sizeof *engine);
    if (!engine)
        return NULL;
    engine->hosts = calloc(params->world_size, sizeof *engine->hosts);
    engine->racks = calloc(params->world_size, sizeof *engine->racks);
    engine->peers = calloc(params->world_size, sizeof *engine->peers);
    engine->ready = calloc(params->world_size, sizeof *engine->ready);
    engine->identity = (dss_identity_t){.rank = params->rank, .world_size = params->world_size};
    engine->transport = params->transport;
    engine->log = params->log;
    engine->log_argument = params->log_argument;
    engine->generation = dss_descriptor_generation();
    engine->epoll = -1;
    engine->wake = (dss_watch_t){.kind = DSS_WATCH_WAKE, .fd = -1};
    for (int i = 0; i < 2; i++)
        engine->listeners[i] = (dss_watch_t){.kind = DSS_WATCH_LISTENER, .fd = -1};
    engine->last_completed_p = &engine->completed;
    atomic_init(&engine->impatient, 0);
    pthread_mutex_init(&engine->lock, NULL);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&engine->changed, &monotonic);
    pthread_cond_init(&engine->park, &monotonic);
    pthread_condattr_destroy(&monotonic);
    if (!engine->hosts || !engine->racks || !engine->peers || !engine->ready) {
        dss_engine_destroy(engine);
        return NULL;
    }
    for (uint32_t i = 0; i < params->world_size; i++) {
        engine->peers[i].engine = engine;
        engine->peers[i].rank = i;
    }
    return engine;
}

dss_status_t dss_engine_create(const dss_engine_params_t *params, dss_engine_t **engine_p, dss_error_t *error_p) {
    if (params->params_bytes != sizeof *params || params->world_size == 0 || params->rank >= params->world_size ||
        !params->oob.allgather)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "engine: rank %u of %u, params of %zu bytes, expected %zu", params->rank,
                        params->world_size, params->params_bytes, sizeof *params);
    dss_engine_t *engine = make_engine(params);
    dss_card_t *cards = calloc(params->world_size, sizeof *cards);
    dss_card_t card = {0};
    bool all_near = true;
    dss_status_t status = engine && cards ? DSS_OK : dss_fail(error_p, DSS_ERR_NO_MEMORY, "out of memory for an engine");
    if (status == DSS_OK)
        status = make_epoll(engine, error_p);
    if (status == DSS_OK)
        status = dss_connect_listen(engine, params->interfaces, params->reach, &card, error_p);
    if (status == DSS_OK)
        status = exchange_cards(engine, params, &card, cards, error_p);
    if (status == DSS_OK)
        status = find_hosts(engine, params, cards, &all_near, error_p);
    if (status == DSS_OK)
        status = check_reach(engine, cards, all_near, error_p);
    for (int i = 0; status == DSS_OK && i < 2; i++)
        dss_watch_set(engine, &engine->listeners[i], EPOLLIN);
    if (status == DSS_OK)
        status = make_thread(engine, error_p);
    free(cards);
    if (status != DSS_OK) {
        dss_engine_destroy(engine);
        return status;
    }
    *engine_p = engine;
    return DSS_OK;
}

static void fail_all(dss_engine_t *engine, dss_status_t status, const char *reason) {
    while (engine->operations)
        dss_operation_cancel(engine->operations, status, reason);
}

/* What is in the queues leaves first: a peer may need it to finish. */
static void say_goodbye(dss_engine_t *engine) {
    const uint64_t until_ns = dss_now_ns() + FAREWELL_NS;
    for (uint32_t i = 0; i < engine->identity.world_size; i++)
        if (engine->peers[i].state == DSS_PEER_READY)
            dss_peer_say_goodbye(&engine->peers[i]);
    bool left = true;
    while (left && dss_now_ns() < until_ns) {
        (void)dss_engine_pass(engine);
        left = false;
        for (uint32_t i = 0; i < engine->identity.world_size; i++)
            left = left || has_output(&engine->peers[i]);
        if (left)
            sleep_until(engine, until_ns);
    }
}

void dss_engine_destroy(dss_engine_t *engine) {
    if (!engine || engine->generation != dss_descriptor_generation())
        return; /* a forked child's copy: its thread and its connections are the parent's */
    dss_engine_lock(engine);
    engine->stopping = true;
    pthread_cond_signal(&engine->park);
    if (engine->has_thread) {
        const uint64_t one = 1;
        (void)!write(engine->wake.fd, &one, sizeof one);
        pthread_mutex_unlock(&engine->lock);
        pthread_join(engine->thread, NULL);
        dss_engine_lock(engine);
    }
    fail_all(engine, DSS_ERR_SHUT_DOWN, "the process group has been shut down");
    dss_engine_unlock(engine); /* the callbacks; with any due, nobody would sleep */
    dss_engine_lock(engine);
    if (engine->peers)
        say_goodbye(engine);
    dss_engine_unlock(engine);
    if (engine->peers) {
        dss_connect_close(engine);
        for (uint32_t i = 0; i < engine->identity.world_size; i++)
            dss_peer_release(&engine->peers[i]);
    }
    dss_board_destroy(engine->board);
    empty_trash(engine);
    dss_channel_release(engine);
    if (engine->epoll >= 0)
        dss_descriptor_close(engine->epoll);
    if (engine->wake.fd >= 0)
        dss_descriptor_close(engine->wake.fd);
    pthread_mutex_destroy(&engine->lock);
    pthread_cond_destroy(&engine->changed);
    pthread_cond_destroy(&engine->park);
    free(engine->aborted);
    free(engine->hosts);
    free(engine->racks);
    free(engine->peers);
    free(engine->ready);
    free(engine);
}

void dss_engine_abort(dss_engine_t *engine, const char *reason) {
    if (engine->generation != dss_descriptor_generation())
        return;
    dss_engine_lock(engine);
    if (!engine->aborted)
        engine->aborted = dss_text_copy(reason);
    fail_all(engine, DSS_ERR_SHUT_DOWN, reason);
    for (uint32_t i = 0; i < engine->identity.world_size; i++)
        if (engine->peers[i].state == DSS_PEER_READY)
            dss_peer_say_goodbye(&engine->peers[i]);
    (void)dss_engine_pass(engine);
    dss_engine_wake(engine);
    dss_engine_unlock(engine);
}

uint32_t dss_engine_rank(const dss_engine_t *engine) {
    return engine->identity.rank;
}

uint32_t dss_engine_world_size(const dss_engine_t *engine) {
    return engine->identity.world_size;
}

uint32_t dss_engine_host_of(const dss_engine_t *engine, uint32_t rank) {
    return engine->hosts[rank];
}

dss_status_t dss_engine_set_racks(dss_engine_t *engine, const uint32_t *rack_of, dss_error_t *error_p) {
    dss_status_t status = DSS_OK;
    dss_engine_lock(engine);
    for (uint32_t i = 0; i < engine->identity.world_size && status == DSS_OK; i++)
        if (rack_of[i] != rack_of[engine->hosts[i]])
            status = dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT,
                              "ranks %u and %u share a host, and the topology puts them into racks %u and %u: ranks are numbered "
                              "in the order of its hosts",
                              engine->hosts[i], i, rack_of[engine->hosts[i]], rack_of[i]);
    engine->has_racks = status == DSS_OK;
    if (status == DSS_OK)
        memcpy(engine->racks, rack_of, engine->identity.world_size * sizeof *engine->racks);
    dss_engine_unlock(engine);
    return status;
}

void dss_engine_transfers(dss_engine_t *engine, uint64_t *bytes, uint64_t *nanoseconds) {
    memset(bytes, 0, engine->identity.world_size * sizeof *bytes);
    memset(nanoseconds, 0, engine->identity.world_size * sizeof *nanoseconds);
    if (engine->generation != dss_descriptor_generation())
        return;
    dss_engine_lock(engine);
    for (uint32_t i = 0; i < engine->identity.world_size; i++) {
        bytes[i] = engine->peers[i].transfer_bytes;
        nanoseconds[i] = engine->peers[i].transfer_ns;
    }
    dss_engine_unlock(engine);
}

void dss_engine_stats(dss_engine_t *engine, dss_engine_stats_t *stats_p) {
    *stats_p = (dss_engine_stats_t){0};
    if (engine->generation != dss_descriptor_generation())
        return;
    dss_engine_lock(engine);
    *stats_p = engine->stats;
    for (uint32_t i = 0; i < engine->ready_count; i++) {
        const char *name = engine->peers[engine->ready[i]].stream->ops->name;
        stats_p->shared_memory_peers += strcmp(name, "shm") == 0;
        stats_p->tcp_peers += strcmp(name, "tcp") == 0;
        stats_p->unix_peers += strcmp(name, "unix") == 0;
        stats_p->board_readers += engine->peers[engine->ready[i]].sees;
    }
    dss_engine_unlock(engine);
}
