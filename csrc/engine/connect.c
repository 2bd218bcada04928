#define _GNU_SOURCE /* accept4, struct ucred */
/*
 * Connections, from the first packet until both sides know each other.
 *
 * Whoever first needs a peer calls it: on the Unix socket if it is on this host, else over TCP. Two ranks that call each other at
 * the same time keep the call of the lower one. Over TCP the caller calls a second time, so that each way has a connection of its
 * own: in one that carries both at once, acknowledgements wait in front of a slow link behind the other way's data, clump, and
 * with reno the links idle in turns. After the handshake, ranks of one host pass each other shared memory; where that is
 * refused they stay on the Unix socket. Nothing here waits: calls are moved on by what epoll reports and by the tick.
 */
#include "engine.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "descriptors.h"
#include "stream_shared.h"
#include "stream_socket.h"

#define REDIAL_NS ((uint64_t)100 * 1000000u)
#define CONNECT_PATIENCE_NS ((uint64_t)15 * 1000000000u) /* a host answers, however busy its processes are */
#define MAX_HANG_UPS 5u                                  /* a peer that hangs up so often in a row will not do otherwise */

/* After the handshake on a Unix socket: the dialer offers shared memory, the acceptor says whether it took it. */
static const uint8_t offer_some[DSS_HANDSHAKE_MESSAGE_BYTES] = "dssS1 shared memory";
static const uint8_t offer_bell[DSS_HANDSHAKE_MESSAGE_BYTES] = "dssS2 doorbell";
static const uint8_t offer_none[DSS_HANDSHAKE_MESSAGE_BYTES] = "dssS0";
static const uint8_t answer_taken[DSS_HANDSHAKE_MESSAGE_BYTES] = "dssT1";
static const uint8_t answer_refused[DSS_HANDSHAKE_MESSAGE_BYTES] = "dssT0";

static int open_socket(int family) {
    dss_descriptor_begin();
    return dss_descriptor_end(socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
}

/* ---- listening ---------------------------------------------------------------------------------------------------------- */

static dss_status_t listen_tcp(dss_engine_t *engine, dss_address_t *address_p, dss_error_t *error_p) {
    struct sockaddr_storage storage;
    char text[DSS_ADDRESS_TEXT_BYTES];
    socklen_t length = dss_address_to_socket(address_p, &storage);
    const int fd = open_socket(storage.ss_family);
    if (fd < 0)
        return dss_fail(error_p, DSS_ERR_SYSTEM, "socket: %s", strerror(errno));
    engine->listeners[0].fd = fd;
    if (bind(fd, (struct sockaddr *)&storage, length) != 0 || listen(fd, SOMAXCONN) != 0)
        return dss_fail(error_p, DSS_ERR_SYSTEM, "cannot listen on %s: %s", dss_address_text(address_p, text), strerror(errno));
    length = sizeof storage;
    if (getsockname(fd, (struct sockaddr *)&storage, &length) != 0)
        return dss_fail(error_p, DSS_ERR_SYSTEM, "getsockname: %s", strerror(errno));
    dss_address_from_socket(&storage, address_p);
    return DSS_OK;
}

/* Not to be had (another kind of container): then everything goes over TCP. */
static bool listen_unix(dss_engine_t *engine, const uint8_t name[DSS_UNIX_NAME_BYTES]) {
    struct sockaddr_storage storage;
    const socklen_t length = dss_unix_to_socket(name, &storage);
    const int fd = open_socket(AF_UNIX);
    if (fd < 0)
        return false;
    if (bind(fd, (struct sockaddr *)&storage, length) != 0 || listen(fd, SOMAXCONN) != 0) {
        dss_descriptor_close(fd);
        return false;
    }
    engine->listeners[1].fd = fd;
    return true;
}

dss_status_t dss_connect_listen(dss_engine_t *engine, const char *interfaces, const char *reach, dss_card_t *card_p,
                                dss_error_t *error_p) {
    dss_status_t status = dss_address_choose(interfaces, reach, &card_p->address, error_p);
    if (status == DSS_OK)
        status = listen_tcp(engine, &card_p->address, error_p);
    if (status == DSS_OK && engine->transport != DSS_TRANSPORT_TCP) {
        status = dss_random_bytes(card_p->unix_name, sizeof card_p->unix_name, error_p);
        card_p->has_unix = status == DSS_OK && listen_unix(engine, card_p->unix_name);
    }
    return status;
}

/* Another user's Unix sockets would not take our calls, nor we theirs. */
static bool has_our_user(int fd) {
    struct ucred credentials;
    socklen_t length = sizeof credentials;
    return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &credentials, &length) == 0 && credentials.uid == geteuid();
}

bool dss_connect_reaches(const dss_card_t *card, bool *ours_p) {
    struct sockaddr_storage storage;
    if (!card->has_unix)
        return false;
    const socklen_t length = dss_unix_to_socket(card->unix_name, &storage);
    const int fd = open_socket(AF_UNIX);
    if (fd < 0)
        return false;
    const bool connected = connect(fd, (struct sockaddr *)&storage, length) == 0;
    const bool reached = connected || errno == EAGAIN; /* whose the queue is does not show: only our own ranks would fill it */
    *ours_p = connected ? has_our_user(fd) : reached;
    dss_descriptor_close(fd);
    return reached;
}

/* ---- calls -------------------------------------------------------------------------------------------------------------- */

static void leave_books(dss_call_t *call) {
    dss_engine_t *engine = call->engine;
    dss_peer_t *peer = call->peer;
    if (peer && peer->dial == call) {
        peer->dial = NULL;
        return;
    }
    if (peer && peer->forth == call) {
        peer->forth = NULL;
        return;
    }
    for (dss_call_t **at = &engine->calls; *at; at = &(*at)->next)
        if (*at == call) {
            *at = call->next;
            engine->call_count--;
            return;
        }
}

/* Also takes it off the engine's or the peer's books. */
static void end_call(dss_call_t *call) {
    dss_engine_t *engine = call->engine;
    leave_books(call);
    if (call->stream) {
        dss_watch_set(engine, &call->watch, 0);
        call->stream->ops->close(call->stream);
        call->stream = NULL;
    }
    dss_shared_destroy(call->shared);
    call->shared = NULL;
    free(call->problem);
    call->problem = NULL;
    call->next = engine->trash;
    engine->trash = call;
}

/* Owns the stream from then on, also when it returns NULL: memory is out. */
static dss_call_t *make_call(dss_engine_t *engine, dss_stream_t *stream, bool unix_socket) {
    dss_call_t *call = calloc(1, sizeof *call);
    if (!call) {
        stream->ops->close(stream);
        return NULL;
    }
    call->engine = engine;
    call->unix_socket = unix_socket;
    call->stream = stream;
    call->watch = (dss_watch_t){.kind = DSS_WATCH_CALL, .fd = stream->fd, .owner = call};
    return call;
}

static dss_call_t *make_socket_call(dss_engine_t *engine, int fd, bool unix_socket) {
    dss_stream_t *stream = dss_stream_socket_create(fd, unix_socket ? "unix" : "tcp", NULL);
    if (!stream) {
        dss_descriptor_close(fd);
        return NULL;
    }
    if (!unix_socket)
        (void)dss_socket_tune_tcp(fd);
    return make_call(engine, stream, unix_socket);
}

static bool say(dss_call_t *call, const uint8_t message[DSS_HANDSHAKE_MESSAGE_BYTES]) {
    const struct iovec list = {.iov_base = (void *)(uintptr_t)message, .iov_len = DSS_HANDSHAKE_MESSAGE_BYTES};
    return call->stream->ops->write(call->stream, &list, 1) == (ssize_t)DSS_HANDSHAKE_MESSAGE_BYTES;
}

static bool say_hello(dss_call_t *call) {
    uint8_t nonce[DSS_NONCE_BYTES];
    uint8_t hello[DSS_HANDSHAKE_MESSAGE_BYTES];
    if (dss_random_bytes(nonce, sizeof nonce, NULL) != DSS_OK)
        return false;
    const dss_way_t way = call->peer->forth ? DSS_WAY_BACK : DSS_WAY_FORTH;
    dss_handshake_dial(&call->handshake, &call->engine->identity, call->peer->rank, way, nonce, hello);
    call->connected = true;
    dss_watch_set(call->engine, &call->watch, EPOLLIN);
    return say(call, hello);
}

static void dial_again(dss_peer_t *peer, uint64_t in_ns) {
    peer->redial_ns = dss_now_ns() + in_ns;
    peer->engine->next_tick_ns = 0;
}

/* The call ended before the peer was ready. */
static void hung_up(dss_call_t *call, const char *why) {
    dss_peer_t *peer = call->peer;
    const bool dialed = peer && peer->dial == call;
    const dss_handshake_state_t state = call->handshake.state; /* one of this job hangs up when the other's call is used */
    const bool proved = state >= DSS_HANDSHAKE_ACCEPTOR_PROOF && state <= DSS_HANDSHAKE_DONE;
    if (!dialed && call->said_anything && !proved)
        dss_engine_log(call->engine, "dropped a caller: %s", why);
    end_call(call);
    if (!dialed || peer->state != DSS_PEER_DIALING)
        return;
    if (++peer->hang_ups > MAX_HANG_UPS)
        dss_peer_lose(peer, "does not take our calls: %s", why);
    else
        dial_again(peer, REDIAL_NS);
}

static void dial_failed(dss_peer_t *peer, int error) {
    if (error == EAGAIN)
        dial_again(peer, REDIAL_NS / 4);                   /* its queue of callers is full */
    else if (error == ECONNREFUSED || error == ECONNRESET) /* reset: it went while we waited to be taken */
        dss_peer_lose(peer, "is gone: nobody listens there any more, its process has ended or shut down its process group");
    else
        dss_peer_lose(peer,
                      "cannot be reached: %s. If that is the wrong network, name the interface to use in DSSYNC_SOCKET_IFNAME",
                      strerror(error));
}

static void begin_dial(dss_peer_t *peer, dss_call_t *call, bool connected) {
    if (!call) {
        dss_peer_lose(peer, "cannot be called: out of memory");
        return;
    }
    call->peer = peer;
    call->deadline_ns = connected ? 0 : dss_now_ns() + CONNECT_PATIENCE_NS;
    peer->dial = call;
    if (!connected)
        dss_watch_set(peer->engine, &call->watch, EPOLLOUT);
    else if (!say_hello(call))
        hung_up(call, "it closed the connection at once");
}

static void dial_fabric(dss_peer_t *peer) {
    const dss_fabric_t *fabric = &peer->engine->fabric;
    dss_stream_t *stream = fabric->dial(fabric->argument, peer->engine->identity.rank, peer->rank);
    if (stream)
        begin_dial(peer, make_call(peer->engine, stream, false), true);
    else
        dial_failed(peer, ECONNREFUSED);
}

void dss_connect_dial(dss_peer_t *peer) {
    dss_engine_t *engine = peer->engine;
    struct sockaddr_storage storage;
    if (engine->fabric.dial) {
        peer->redial_ns = 0;
        peer->state = DSS_PEER_DIALING;
        dial_fabric(peer);
        return;
    }
    const bool unix_socket = peer->same_host && peer->has_unix;
    const socklen_t length =
        unix_socket ? dss_unix_to_socket(peer->unix_name, &storage) : dss_address_to_socket(&peer->address, &storage);
    peer->redial_ns = 0;
    if (engine->transport == DSS_TRANSPORT_SHM && !unix_socket) {
        dss_peer_lose(peer, "is not on this host, and transport=shm was asked for");
        return;
    }
    peer->state = DSS_PEER_DIALING;
    const int fd = open_socket(storage.ss_family);
    if (fd < 0) {
        dss_peer_lose(peer, "cannot be called: socket: %s", strerror(errno));
        return;
    }
    const bool connected = connect(fd, (struct sockaddr *)&storage, length) == 0;
    const int error = connected ? 0 : errno;
    if (!connected && error != EINPROGRESS) {
        dss_descriptor_close(fd);
        dial_failed(peer, error);
        return;
    }
    begin_dial(peer, make_socket_call(engine, fd, unix_socket), connected);
}

static void take_caller(dss_engine_t *engine, dss_call_t *call, const uint8_t nonce[DSS_NONCE_BYTES]) {
    if (!call)
        return;
    call->connected = true;
    call->deadline_ns = dss_now_ns() + DSS_HANDSHAKE_PATIENCE_NS;
    dss_handshake_accept(&call->handshake, &engine->identity, nonce);
    call->next = engine->calls;
    engine->calls = call;
    engine->call_count++;
    dss_watch_set(engine, &call->watch, EPOLLIN);
    dss_connect_progress(call, EPOLLIN); /* what it has said already may keep its place for it when many call at once */
}

void dss_connect_take(dss_engine_t *engine, dss_stream_t *stream) {
    uint8_t nonce[DSS_NONCE_BYTES];
    dss_engine_lock(engine);
    if (dss_random_bytes(nonce, sizeof nonce, NULL) == DSS_OK)
        take_caller(engine, make_call(engine, stream, false), nonce);
    else
        stream->ops->close(stream);
    dss_engine_wake(engine);
    dss_engine_unlock(engine);
}

/* Callers who never say anything must not keep a rank out: the one that has waited longest makes room. False if none is such. */
static bool drop_a_caller(dss_engine_t *engine) {
    dss_call_t *oldest = NULL;
    for (dss_call_t *call = engine->calls; call; call = call->next)
        if (!call->peer && call->handshake.state == DSS_HANDSHAKE_ACCEPTOR_HELLO)
            oldest = call;
    if (oldest) {
        dss_engine_log(engine, "dropped a caller: too many call at once");
        end_call(oldest);
    }
    return oldest != NULL;
}

/* Who calls waits in the listener's queue and would wake us at once, again and again: until the next tick, then. */
static void turn_deaf(dss_engine_t *engine, const char *why) {
    dss_engine_log(engine, "cannot take a caller, tries again: %s", why);
    engine->deaf = true;
    for (int i = 0; i < 2; i++)
        dss_watch_set(engine, &engine->listeners[i], 0);
}

void dss_connect_accept(dss_engine_t *engine, int listener) {
    const bool unix_socket = listener == engine->listeners[1].fd;
    for (;;) {
        dss_descriptor_begin();
        const int fd = dss_descriptor_end(accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC));
        if (fd < 0) {
            if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM)
                turn_deaf(engine, strerror(errno));
            return;
        }
        uint8_t nonce[DSS_NONCE_BYTES];
        dss_error_t error;
        const char *problem = NULL;
        if (engine->call_count > engine->identity.world_size + 64 && !drop_a_caller(engine))
            problem = "too many call at once";
        else if (unix_socket && !has_our_user(fd))
            problem = "it is another user's process";
        else if (dss_random_bytes(nonce, sizeof nonce, &error) != DSS_OK)
            problem = error.text;
        if (problem) {
            dss_engine_log(engine, "dropped a caller: %s", problem);
            dss_descriptor_close(fd);
            continue;
        }
        take_caller(engine, make_socket_call(engine, fd, unix_socket), nonce);
    }
}

/* The call has served: its stream, or the shared memory over it, is the peer's. */
static void promote(dss_call_t *call, dss_shared_t *shared, bool creator, int bell) {
    dss_peer_t *peer = call->peer;
    dss_stream_t *stream = call->stream;
    dss_watch_set(call->engine, &call->watch, 0);
    if (peer->state == DSS_PEER_LOST) {
        dss_shared_destroy(shared);
        if (bell >= 0)
            close(bell);
        end_call(call);
        return;
    }
    if (shared) {
        dss_stream_t *rings = dss_stream_shared_create(shared, creator, stream, NULL);
        if (!rings) {
            dss_shared_destroy(shared);
            close(bell);
            end_call(call);
            dss_peer_lose(peer, "cannot be connected: out of memory");
            return;
        }
        dss_stream_shared_set_bell(rings, bell);
        dss_stream_shared_set_streaming(rings, call->engine->has_many_neighbours);
        stream = rings;
    }
    if (peer->forth) {
        dss_call_t *forth = peer->forth;
        dss_watch_set(call->engine, &forth->watch, 0);
        stream = peer->dial == call ? dss_stream_socket_join(stream, forth->stream) : dss_stream_socket_join(forth->stream, stream);
        forth->stream = NULL;
        end_call(forth);
    }
    call->stream = NULL;
    call->shared = NULL;
    end_call(call);
    if (call->engine->transport == DSS_TRANSPORT_SHM && !shared) {
        stream->ops->close(stream);
        dss_peer_lose(peer, "cannot share memory with this process, and transport=shm was asked for");
        return;
    }
    dss_peer_ready(peer, stream);
}

/* TCP: the first connection is welcomed; what is still due is the way back. */
static void hold(dss_call_t *call) {
    leave_books(call);
    call->peer->hang_ups = 0;
    call->peer->forth = call;
    call->stage = DSS_CALL_FORTH;
}

static dss_verdict_t decide(const dss_call_t *call) {
    const dss_engine_t *engine = call->engine;
    const dss_peer_t *peer = &engine->peers[call->handshake.peer];
    if (engine->stopping || engine->aborted || peer->state == DSS_PEER_LOST)
        return DSS_VERDICT_LEAVING;
    if (call->handshake.way == DSS_WAY_BACK)
        return peer->taken && peer->forth ? DSS_VERDICT_WELCOME : DSS_VERDICT_DUPLICATE;
    if (peer->state == DSS_PEER_READY || peer->taken || peer->forth || (peer->dial && engine->identity.rank < peer->rank))
        return DSS_VERDICT_DUPLICATE;
    return DSS_VERDICT_WELCOME;
}

/* The caller has proved itself. False if the call is over. */
static bool answer_caller(dss_call_t *call) {
    dss_peer_t *peer = &call->engine->peers[call->handshake.peer];
    const dss_verdict_t verdict = decide(call);
    uint8_t message[DSS_HANDSHAKE_MESSAGE_BYTES];
    dss_handshake_decide(&call->handshake, verdict, message);
    if (!say(call, message)) {
        hung_up(call, "it closed the connection");
        return false;
    }
    if (verdict != DSS_VERDICT_WELCOME) {
        end_call(call);
        return false;
    }
    if (peer->dial)
        end_call(peer->dial); /* both called: the lower rank's call is kept */
    call->peer = peer;
    call->deadline_ns = 0; /* from here on it is a peer: only operations have time-outs */
    if (call->handshake.way == DSS_WAY_BACK) {
        promote(call, NULL, false, -1);
        return false;
    }
    peer->taken = true;
    peer->state = DSS_PEER_AWAITED;
    peer->redial_ns = 0;
    call->stage = DSS_CALL_OFFER;
    if (call->unix_socket)
        return true;
    if (call->engine->fabric.dial) {
        promote(call, NULL, false, -1);
        return false;
    }
    hold(call);
    return true;
}

/* What makes the engine look at its rings: the peer rings it directly. */
static bool say_with_bell(dss_call_t *call, const uint8_t *message) {
    return dss_stream_socket_send_fd(call->stream, call->engine->wake.fd, message, DSS_HANDSHAKE_MESSAGE_BYTES) == DSS_OK;
}

static void offer(dss_call_t *call) {
    int memfd = -1;
    dss_error_t error;
    dss_shared_t *shared = NULL;
    bool said = false;
    call->stage = DSS_CALL_ANSWER;
    if (dss_shared_create(DSS_RING_BYTES, &memfd, &shared, &error) == DSS_OK) {
        call->shared = shared;
        said = dss_stream_socket_send_fd(call->stream, memfd, offer_some, sizeof offer_some) == DSS_OK &&
               say_with_bell(call, offer_bell);
        close(memfd);
    } else {
        dss_engine_log(call->engine, "no shared memory with rank %u, its Unix socket serves: %s", call->peer->rank, error.text);
        said = say(call, offer_none);
    }
    if (!said)
        hung_up(call, "it closed the connection when shared memory was offered");
}

/* The acceptor has all that was offered, or knows that there is nothing. */
static void answer_offer(dss_call_t *call, int bell, const char *problem) {
    dss_shared_t *shared = call->shared;
    call->shared = NULL;
    if (bell < 0) {
        dss_engine_log(call->engine, "no shared memory with rank %u, its Unix socket serves: %s", call->peer->rank, problem);
        dss_shared_destroy(shared);
        shared = NULL;
    }
    if (shared ? say_with_bell(call, answer_taken) : say(call, answer_refused)) {
        promote(call, shared, false, bell);
        return;
    }
    dss_shared_destroy(shared);
    if (bell >= 0)
        close(bell);
    dss_peer_lose(call->peer, "is gone: it closed the connection in the handshake");
    end_call(call);
}

/* False if the call is over. */
static bool take_offer(dss_call_t *call, const uint8_t *message) {
    dss_shared_t *shared = NULL;
    dss_error_t error = {.text = "no descriptor came with the offer"};
    const int memfd = dss_stream_socket_take_fd(call->stream);
    if (memfd >= 0) {
        if (memcmp(message, offer_some, sizeof offer_some) == 0)
            (void)dss_shared_open(memfd, &shared, &error);
        close(memfd);
    }
    call->shared = shared;
    call->problem = shared ? NULL : dss_text_copy(error.text);
    call->stage = DSS_CALL_BELL;
    if (memcmp(message, offer_some, sizeof offer_some) == 0)
        return true; /* the doorbell follows, whether we could use the memory or not */
    answer_offer(call, -1, error.text);
    return false;
}

static void take_bell(dss_call_t *call, const uint8_t *message) {
    int bell = dss_stream_socket_take_fd(call->stream);
    if (bell >= 0 && (!call->shared || memcmp(message, offer_bell, sizeof offer_bell) != 0)) {
        close(bell);
        bell = -1;
    }
    answer_offer(call, bell, call->problem ? call->problem : "no doorbell came with the offer");
}

static void take_answer(dss_call_t *call, const uint8_t *message) {
    dss_shared_t *shared = call->shared;
    int bell = dss_stream_socket_take_fd(call->stream);
    if (bell < 0 || memcmp(message, answer_taken, sizeof answer_taken) != 0) {
        dss_shared_destroy(shared);
        shared = NULL;
        if (bell >= 0)
            close(bell);
        bell = -1;
    }
    call->shared = NULL;
    promote(call, shared, true, bell);
}

/* The dialer knows what the acceptor thinks of it. */
static void take_verdict(dss_call_t *call) {
    dss_peer_t *peer = call->peer;
    switch (call->handshake.verdict) {
    case DSS_VERDICT_WELCOME:
        if (call->unix_socket) {
            offer(call);
        } else if (call->handshake.way == DSS_WAY_BACK || call->engine->fabric.dial) {
            promote(call, NULL, true, -1);
        } else {
            hold(call);
            dss_connect_dial(peer);
        }
        return;
    case DSS_VERDICT_DUPLICATE: /* its own call is on the way; should it never come, we call again */
        end_call(call);
        if (peer->forth) {
            dss_peer_lose(peer, "cannot be connected: one of two connections broke in the handshake");
            return;
        }
        peer->state = DSS_PEER_AWAITED;
        dial_again(peer, 2 * REDIAL_NS);
        return;
    default:
        end_call(call);
        dss_peer_lose(peer, "is shutting down its process group");
    }
}

static void broken(dss_call_t *call, const char *why) {
    dss_peer_t *peer = call->peer;
    const bool accepted = peer && peer->dial != call;
    if (!accepted) {
        hung_up(call, why);
        return;
    }
    end_call(call);
    dss_peer_lose(peer, "is gone: %s", why);
}

/* False if the call is over, or its connection has become the peer's. */
static bool take_message(dss_call_t *call, const uint8_t *message) {
    uint8_t answer[DSS_HANDSHAKE_MESSAGE_BYTES];
    bool has_answer = false;
    dss_error_t error;
    if (call->stage == DSS_CALL_FORTH) {
        broken(call, "it spoke where it had nothing to say");
        return false;
    }
    if (call->stage == DSS_CALL_OFFER)
        return take_offer(call, message);
    if (call->stage == DSS_CALL_BELL) {
        take_bell(call, message);
        return false;
    }
    if (call->stage == DSS_CALL_ANSWER) {
        take_answer(call, message);
        return false;
    }
    if (dss_handshake_step(&call->handshake, message, answer, &has_answer, &error) != DSS_OK) {
        hung_up(call, error.text);
        return false;
    }
    if (has_answer && !say(call, answer)) {
        hung_up(call, "it closed the connection");
        return false;
    }
    if (call->handshake.state == DSS_HANDSHAKE_ACCEPTOR_DECIDE)
        return answer_caller(call);
    if (call->handshake.state == DSS_HANDSHAKE_DONE) {
        const bool offered = call->handshake.verdict == DSS_VERDICT_WELCOME && call->unix_socket;
        take_verdict(call);
        return offered && call->stream;
    }
    return true;
}

void dss_connect_progress(dss_call_t *call, uint32_t events) {
    if (!call->stream)
        return; /* ended while the event was on its way */
    if (!call->connected) {
        int error = 0;
        socklen_t length = sizeof error;
        if (getsockopt(call->watch.fd, SOL_SOCKET, SO_ERROR, &error, &length) != 0)
            error = errno;
        if (error != 0) {
            dss_peer_t *peer = call->peer;
            end_call(call);
            dial_failed(peer, error);
            return;
        }
        if (!(events & EPOLLOUT))
            return;
        call->deadline_ns = 0;
        if (!say_hello(call))
            hung_up(call, "it closed the connection at once");
        return;
    }
    for (;;) {
        const uint8_t *bytes = NULL;
        const ssize_t there = call->stream->ops->peek(call->stream, DSS_HANDSHAKE_MESSAGE_BYTES, &bytes);
        if (there < 0) {
            const bool closed = there == -EPIPE || there == -ECONNRESET;
            broken(call, closed ? "it closed the connection in the handshake, its process has ended or shut down its process group"
                                : strerror((int)-there));
            return;
        }
        call->said_anything = call->said_anything || there > 0;
        if ((size_t)there < DSS_HANDSHAKE_MESSAGE_BYTES)
            return;
        uint8_t message[DSS_HANDSHAKE_MESSAGE_BYTES];
        memcpy(message, bytes, sizeof message);
        call->stream->ops->consume(call->stream, sizeof message);
        if (!take_message(call, message))
            return;
    }
}

/* ---- time --------------------------------------------------------------------------------------------------------------- */

static void tick_peer(dss_peer_t *peer, uint64_t now_ns) {
    if (peer->redial_ns && peer->redial_ns <= now_ns && !peer->dial && !peer->taken)
        dss_connect_dial(peer);
    if (peer->dial && peer->dial->deadline_ns && peer->dial->deadline_ns <= now_ns) {
        end_call(peer->dial);
        dss_peer_lose(peer,
                      "cannot be reached: its host did not answer within 15 s. If that is the wrong network, name the interface "
                      "to use in DSSYNC_SOCKET_IFNAME");
    }
    if (peer->state == DSS_PEER_READY && peer->operations && strcmp(peer->stream->ops->name, "tcp") == 0 &&
        (dss_socket_is_silent(peer->stream->fd, DSS_SILENCE_MS) || dss_socket_is_silent(peer->stream->out_fd, DSS_SILENCE_MS)))
        dss_peer_lose(peer, "is gone: its host has acknowledged nothing for %u s", DSS_SILENCE_MS / 1000);
}

void dss_connect_tick(dss_engine_t *engine, uint64_t now_ns) {
    engine->deaf = false;
    for (int i = 0; i < 2; i++)
        dss_watch_set(engine, &engine->listeners[i], EPOLLIN);
    for (dss_call_t *call = engine->calls; call;) {
        dss_call_t *next = call->next;
        if (call->deadline_ns && call->deadline_ns <= now_ns) {
            call->said_anything = true;
            broken(call, "it did not prove within 10 s that it belongs to this job");
        }
        call = next;
    }
    for (uint32_t i = 0; i < engine->identity.world_size; i++)
        tick_peer(&engine->peers[i], now_ns);
}

void dss_connect_forget(dss_peer_t *peer) {
    peer->redial_ns = 0;
    if (peer->dial)
        end_call(peer->dial);
    if (peer->forth)
        end_call(peer->forth);
}

void dss_connect_close(dss_engine_t *engine) {
    while (engine->calls)
        end_call(engine->calls);
    for (uint32_t i = 0; i < engine->identity.world_size; i++)
        dss_connect_forget(&engine->peers[i]);
    for (int i = 0; i < 2; i++)
        if (engine->listeners[i].fd >= 0) {
            dss_watch_set(engine, &engine->listeners[i], 0);
            dss_descriptor_close(engine->listeners[i].fd);
            engine->listeners[i].fd = -1;
        }
}
