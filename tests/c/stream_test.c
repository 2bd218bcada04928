/* The same bytes over a Unix socket, TCP, two TCP connections and shared memory, between threads and between processes; and what
 * each carrier must hold out on its own: dying peers, garbage in shared memory, closes with unread bytes. Whoever sleeps, sleeps in
 * epoll with no time-out: a lost wake-up is a hang, and the watchdog's. */
#define _GNU_SOURCE /* accept4, memfd_create */
#include "check.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "stream_shared.h"
#include "stream_socket.h"

#define PATTERN_BYTES 65521u /* a prime: a piece that is lost, repeated or shifted shows */
#define MOST_BYTES 200000u   /* of one write */

static uint8_t pattern[PATTERN_BYTES + MOST_BYTES];

/* ---- carriers ----------------------------------------------------------------------------------------------------------- */

typedef struct carrier {
    const char *name;
    bool is_tcp;
    bool joins;        /* a connection each way */
    size_t ring_bytes; /* of shared memory; 0: none */
} carrier_t;

static const carrier_t carriers[] = {{"unix", false, false, 0},
                                     {"tcp", true, false, 0},
                                     {"two tcp", true, true, 0},
                                     {"shared memory", false, false, 1u << 20},
                                     {"smallest shared memory", false, false, 1}};
static const carrier_t *const joined_carrier = &carriers[2];
static const carrier_t *const shared_carrier = &carriers[3];

#define FOR_EACH_CARRIER for (const carrier_t *carrier = carriers; carrier < carriers + 5; carrier++)

typedef struct link {
    const carrier_t *carrier;
    int fds[2];
    int second[2]; /* of another connection: side 0 sends on it, side 1 on the first; -1: none */
    int memfd;
    dss_shared_t *shared; /* the creator's, until side 0 is opened */
} link_t;

static void tcp_pair(int fds[2]) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t address_bytes = sizeof address;
    const int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(listener >= 0 && bind(listener, (struct sockaddr *)&address, sizeof address) == 0 && listen(listener, 1) == 0);
    CHECK(getsockname(listener, (struct sockaddr *)&address, &address_bytes) == 0);
    fds[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    CHECK(fds[0] >= 0 && (connect(fds[0], (struct sockaddr *)&address, sizeof address) == 0 || errno == EINPROGRESS));
    fds[1] = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    CHECK(fds[1] >= 0 && close(listener) == 0);
    CHECK_STATUS(dss_socket_tune_tcp(fds[0]), DSS_OK);
    CHECK_STATUS(dss_socket_tune_tcp(fds[1]), DSS_OK);
}

static link_t link_make(const carrier_t *carrier) {
    link_t link = {carrier, {-1, -1}, {-1, -1}, -1, NULL};
    if (carrier->is_tcp)
        tcp_pair(link.fds);
    else
        CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, link.fds) == 0);
    if (carrier->joins)
        tcp_pair(link.second);
    if (carrier->ring_bytes)
        CHECK_STATUS(dss_shared_create(carrier->ring_bytes, &link.memfd, &link.shared, NULL), DSS_OK);
    return link;
}

/* One side's stream, with the epoll that it sleeps in. */
typedef struct end {
    dss_stream_t *stream;
    int epoll;
} end_t;

static void end_watch(const end_t *end, int what, int fd, uint32_t events) {
    struct epoll_event event = {.events = events};
    CHECK(epoll_ctl(end->epoll, what, fd, &event) == 0);
}

static end_t end_open(link_t *link, int side) {
    end_t end = {dss_stream_socket_create(link->fds[side], link->carrier->name, NULL), epoll_create1(EPOLL_CLOEXEC)};
    CHECK(end.stream && end.epoll >= 0);
    if (link->carrier->ring_bytes) {
        dss_shared_t *shared = link->shared;
        if (side == 1)
            CHECK_STATUS(dss_shared_open(link->memfd, &shared, NULL), DSS_OK);
        end.stream = dss_stream_shared_create(shared, side == 0, end.stream, NULL);
        CHECK(end.stream);
    }
    if (link->carrier->joins) {
        dss_stream_t *second = dss_stream_socket_create(link->second[side], link->carrier->name, NULL);
        CHECK(second);
        end.stream = side == 0 ? dss_stream_socket_join(end.stream, second) : dss_stream_socket_join(second, end.stream);
        CHECK_EQUAL(end.stream->out_fd, side == 0 ? link->second[0] : link->fds[1]);
    }
    end_watch(&end, EPOLL_CTL_ADD, end.stream->fd, EPOLLIN);
    return end;
}

/* As the engine does it: for bytes on fd, for room on out_fd. */
static void end_arm(const end_t *end, uint32_t events) {
    const bool joined = end->stream->out_fd != end->stream->fd;
    end_watch(end, EPOLL_CTL_MOD, end->stream->fd, joined ? events & ~(uint32_t)EPOLLOUT : events);
    if (!joined)
        return;
    (void)epoll_ctl(end->epoll, EPOLL_CTL_DEL, end->stream->out_fd, NULL); /* its end would wake us, asked for or not */
    if (events & EPOLLOUT)
        end_watch(end, EPOLL_CTL_ADD, end->stream->out_fd, EPOLLOUT);
}

static void end_close(end_t *end) {
    end->stream->ops->close(end->stream);
    CHECK(close(end->epoll) == 0);
}

/* Both ends in this process. */
static void pair_open(const carrier_t *carrier, link_t *link_p, end_t ends[2]) {
    *link_p = link_make(carrier);
    ends[0] = end_open(link_p, 0);
    ends[1] = end_open(link_p, 1);
}

static void pair_close(link_t *link, end_t ends[2]) {
    end_close(&ends[0]);
    end_close(&ends[1]);
    if (link->memfd >= 0)
        CHECK(close(link->memfd) == 0);
}

/* Side 1 goes on in a child: 0 there. */
static pid_t pair_fork(const carrier_t *carrier, end_t *end_p) {
    link_t link = link_make(carrier);
    const pid_t child = fork();
    CHECK(child >= 0);
    const int side = child == 0 ? 1 : 0;
    CHECK(close(link.fds[1 - side]) == 0);
    if (carrier->joins)
        CHECK(close(link.second[1 - side]) == 0);
    *end_p = end_open(&link, side);
    if (child == 0)
        dss_shared_destroy(link.shared);
    if (link.memfd >= 0)
        CHECK(close(link.memfd) == 0);
    return child;
}

static void expect_exit(pid_t child) {
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK_FOR(WIFEXITED(status) && WEXITSTATUS(status) == 0, "status %#x of a child", (unsigned)status);
}

static void end_sleep(end_t *end, bool want_room) {
    struct epoll_event event = {.events = end->stream->ops->arm(end->stream, want_room)};
    if (!event.events)
        return;
    end_arm(end, event.events);
    int ready;
    do
        ready = epoll_wait(end->epoll, &event, 1, -1);
    while (ready < 0 && errno == EINTR);
    CHECK(ready == 1);
    end->stream->ops->woken(end->stream, event.events);
}

/* Whether the end, armed before, is woken within so long; -1: it must be. */
static bool end_is_rung(end_t *end, uint32_t events, int milliseconds) {
    struct epoll_event event;
    end_arm(end, events);
    return epoll_wait(end->epoll, &event, 1, milliseconds) == 1;
}

static ssize_t put(end_t *end, const void *bytes, size_t bytes_count) {
    const struct iovec piece = {(void *)bytes, bytes_count};
    return end->stream->ops->write(end->stream, &piece, 1);
}

static void put_all(end_t *end, const uint8_t *bytes, size_t bytes_count) {
    for (size_t done = 0; done < bytes_count;) {
        const ssize_t put_count = put(end, bytes + done, bytes_count - done);
        CHECK_FOR(put_count >= 0, "error %zd", put_count);
        done += (size_t)put_count;
        end->stream->ops->flush(end->stream);
        if (done < bytes_count)
            end_sleep(end, true);
    }
}

static void get_all(end_t *end, uint8_t *bytes, size_t bytes_count) {
    for (size_t done = 0; done < bytes_count;) {
        const uint8_t *there;
        ssize_t count = end->stream->ops->peek(end->stream, 1, &there);
        CHECK_FOR(count >= 0, "error %zd", count);
        count = (size_t)count < bytes_count - done ? count : (ssize_t)(bytes_count - done);
        if (count > 0) {
            memcpy(bytes + done, there, (size_t)count);
            end->stream->ops->consume(end->stream, (size_t)count);
            end->stream->ops->flush(end->stream);
            done += (size_t)count;
        } else {
            end_sleep(end, false);
        }
    }
}

/* ---- random traffic ----------------------------------------------------------------------------------------------------- */

typedef struct talker {
    end_t *end;
    uint64_t total_bytes; /* each way */
    uint64_t random;
    uint64_t sent;
    uint64_t received;
} talker_t;

static bool send_some(talker_t *talker) {
    struct iovec list[5];
    const int list_count = 1 + (int)check_random_below(&talker->random, 5);
    uint64_t at = talker->sent;
    for (int i = 0; i < list_count; i++) {
        const uint32_t most = check_random_below(&talker->random, 4) ? 100 : MOST_BYTES;
        const uint64_t left = talker->total_bytes - at;
        const uint64_t wish = check_random_below(&talker->random, most);
        list[i] = (struct iovec){pattern + at % PATTERN_BYTES, wish < left ? wish : left};
        at += list[i].iov_len;
    }
    const ssize_t count = talker->end->stream->ops->write(talker->end->stream, list, list_count);
    CHECK_FOR(count >= 0 && (uint64_t)count <= at - talker->sent, "error %zd", count);
    talker->sent += (uint64_t)count;
    return count > 0;
}

static bool receive_some(talker_t *talker) {
    const uint8_t *bytes;
    const uint64_t left = talker->total_bytes - talker->received;
    const uint64_t wish =
        check_random_below(&talker->random, 3) ? 1 : check_random_below(&talker->random, DSS_STREAM_MAX_WANTED + 1);
    const size_t wanted = wish < left ? wish : left;
    const ssize_t count = talker->end->stream->ops->peek(talker->end->stream, wanted, &bytes);
    CHECK_FOR(count >= 0 && (uint64_t)count <= left, "%zd bytes of %" PRIu64, count, left);
    if (count == 0 || (size_t)count < wanted)
        return false;
    const size_t used = 1 + check_random_below(&talker->random, (uint32_t)count);
    for (size_t done = 0; done < used;) {
        const size_t piece = used - done < MOST_BYTES ? used - done : MOST_BYTES;
        CHECK_FOR(memcmp(bytes + done, pattern + (talker->received + done) % PATTERN_BYTES, piece) == 0, "bytes from %" PRIu64,
                  talker->received + done);
        done += piece;
    }
    talker->end->stream->ops->consume(talker->end->stream, used);
    talker->received += used;
    return true;
}

static void *talk(void *argument) {
    talker_t *talker = argument;
    while (talker->sent < talker->total_bytes || talker->received < talker->total_bytes) {
        const bool sent = talker->sent < talker->total_bytes && send_some(talker);
        const bool received = talker->received < talker->total_bytes && receive_some(talker);
        if (!check_random_below(&talker->random, 3) || !(sent || received))
            talker->end->stream->ops->flush(talker->end->stream);
        if (!sent && !received)
            end_sleep(talker->end, talker->sent < talker->total_bytes);
    }
    talker->end->stream->ops->flush(talker->end->stream);
    return NULL;
}

static void threads_talk_both_ways(void) {
    FOR_EACH_CARRIER {
        link_t link;
        end_t ends[2];
        pair_open(carrier, &link, ends);
        talker_t talkers[2] = {{&ends[0], 12000000, 1, 0, 0}, {&ends[1], 12000000, 2, 0, 0}};
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, talk, &talkers[1]) == 0);
        (void)talk(&talkers[0]);
        CHECK(pthread_join(thread, NULL) == 0);
        pair_close(&link, ends);
    }
}

static void processes_talk_both_ways(void) {
    FOR_EACH_CARRIER {
        end_t end;
        const pid_t child = pair_fork(carrier, &end);
        talker_t talker = {&end, 12000000, child ? 3 : 4, 0, 0};
        (void)talk(&talker);
        end_close(&end);
        if (child == 0)
            _exit(0);
        expect_exit(child);
    }
}

/* ---- sleeping and waking ------------------------------------------------------------------------------------------------ */

#define ROUND_COUNT 5000u

static void play(end_t *end, bool begins) {
    uint64_t random = 5; /* the same lengths on both sides */
    uint8_t bytes[128];
    for (uint32_t round = 0; round < ROUND_COUNT; round++) {
        const size_t bytes_count = 1 + check_random_below(&random, sizeof bytes);
        if (begins)
            put_all(end, pattern + round, bytes_count);
        get_all(end, bytes, bytes_count);
        CHECK_FOR(memcmp(bytes, pattern + round, bytes_count) == 0, "round %u", round);
        if (!begins)
            put_all(end, pattern + round, bytes_count);
    }
}

static void *play_second(void *end) {
    play(end, false);
    return NULL;
}

static void no_wake_up_is_lost_in_many_short_rounds(void) {
    FOR_EACH_CARRIER {
        link_t link;
        end_t ends[2];
        pthread_t thread;
        pair_open(carrier, &link, ends);
        CHECK(pthread_create(&thread, NULL, play_second, &ends[1]) == 0);
        play(&ends[0], true);
        CHECK(pthread_join(thread, NULL) == 0);
        pair_close(&link, ends);

        end_t end;
        const pid_t child = pair_fork(carrier, &end);
        play(&end, child != 0);
        end_close(&end);
        if (child == 0)
            _exit(0);
        expect_exit(child);
    }
}

static uint64_t fill(end_t *end) {
    uint64_t filled = 0;
    for (ssize_t count = 1; count > 0; filled += (uint64_t)count) {
        count = put(end, pattern + filled % PATTERN_BYTES, 50000);
        CHECK_FOR(count >= 0, "error %zd", count);
    }
    end->stream->ops->flush(end->stream);
    return filled;
}

/* Consumes at most so many of the bytes that are there, and checks them. Returns the last answer of peek. */
static ssize_t drain(end_t *end, uint64_t *at, uint64_t most) {
    const uint8_t *bytes;
    ssize_t count = 1;
    for (uint64_t end_at = *at + most; *at < end_at;) {
        count = end->stream->ops->peek(end->stream, 1, &bytes);
        if (count <= 0)
            break;
        uint64_t piece = (uint64_t)count < end_at - *at ? (uint64_t)count : end_at - *at;
        piece = piece < MOST_BYTES ? piece : MOST_BYTES;
        CHECK_FOR(memcmp(bytes, pattern + *at % PATTERN_BYTES, piece) == 0, "bytes from %" PRIu64, *at);
        end->stream->ops->consume(end->stream, piece);
        *at += piece;
    }
    end->stream->ops->flush(end->stream);
    return count;
}

static void a_full_stream_takes_no_more_until_it_is_read(void) {
    FOR_EACH_CARRIER {
        link_t link;
        end_t ends[2];
        pair_open(carrier, &link, ends);
        uint64_t filled = fill(&ends[0]);
        uint64_t drained = 0;
        for (int round = 0; round < 3; round++) {
            const uint64_t before = filled;
            while (before == filled) { /* TCP may need several: its windows open late */
                const uint32_t events = ends[0].stream->ops->arm(ends[0].stream, true);
                CHECK_FOR(ends[1].stream->ops->peer_waits(ends[1].stream), "%s", carrier->name);
                (void)drain(&ends[1], &drained, UINT64_MAX / 2);
                if (events && (drained == filled || end_is_rung(&ends[0], events, 0)))
                    end_sleep(&ends[0], true);
                const ssize_t count = put(&ends[0], pattern + filled % PATTERN_BYTES, 50000);
                CHECK(count >= 0);
                filled += (uint64_t)count;
            }
        }
        while (drained < filled)
            (void)drain(&ends[1], &drained, UINT64_MAX / 2);
        CHECK_EQUAL(drained, filled);
        pair_close(&link, ends);
    }
}

/* One wake-up for half a ring, not one for each piece that is consumed. */
static void a_writer_in_shared_memory_is_rung_at_half(void) {
    link_t link;
    end_t ends[2];
    pair_open(shared_carrier, &link, ends);
    const uint64_t filled = fill(&ends[0]);
    CHECK_EQUAL(filled, shared_carrier->ring_bytes);
    CHECK(!ends[1].stream->ops->peer_waits(ends[1].stream));
    const uint32_t events = ends[0].stream->ops->arm(ends[0].stream, true);
    CHECK_EQUAL(events, EPOLLIN);
    CHECK(ends[1].stream->ops->peer_waits(ends[1].stream));
    uint64_t drained = 0;
    (void)drain(&ends[1], &drained, filled / 2 - 1);
    CHECK(!end_is_rung(&ends[0], events, 0));
    (void)drain(&ends[1], &drained, 1);
    CHECK(end_is_rung(&ends[0], events, -1));
    CHECK(!ends[1].stream->ops->peer_waits(ends[1].stream));
    CHECK_EQUAL(ends[0].stream->ops->arm(ends[0].stream, true), 0); /* there is room now */
    pair_close(&link, ends);
}

/* Whoever leaves bytes where they are must be able to sleep until more come, and may not sleep on what no peek has told of. */
static void arm_counts_only_what_is_news(void) {
    FOR_EACH_CARRIER {
        link_t link;
        end_t ends[2];
        const uint8_t *bytes;
        pair_open(carrier, &link, ends);
        const dss_stream_ops_t *ops = ends[1].stream->ops;
        put_all(&ends[0], pattern, 100);
        end_sleep(&ends[1], false);
        CHECK_EQUAL(ops->peek(ends[1].stream, 100, &bytes), 100);
        uint32_t events = ops->arm(ends[1].stream, false);
        CHECK(events & EPOLLIN);
        CHECK(!end_is_rung(&ends[1], events, 0));
        put_all(&ends[0], pattern + 100, 1);
        CHECK_FOR(end_is_rung(&ends[1], events, -1), "%s", carrier->name);
        ops->woken(ends[1].stream, EPOLLIN);
        CHECK_EQUAL(ops->peek(ends[1].stream, 101, &bytes), 101);
        ops->consume(ends[1].stream, 1);
        CHECK_FOR(ops->arm(ends[1].stream, false) == 0, "%s", carrier->name);
        CHECK_EQUAL(ops->peek(ends[1].stream, 1, &bytes), 100);
        CHECK(memcmp(bytes, pattern + 1, 100) == 0);
        pair_close(&link, ends);
    }
}

/* ---- ends --------------------------------------------------------------------------------------------------------------- */

/* Reads to the end, sleeping; the error there. */
static ssize_t drain_to_end(end_t *end, uint64_t *at) {
    for (;;) {
        const ssize_t count = drain(end, at, UINT64_MAX / 2);
        if (count < 0)
            return count;
        end_sleep(end, false);
    }
}

static void what_was_written_before_a_close_arrives(void) {
    FOR_EACH_CARRIER {
        link_t link;
        end_t ends[2];
        pair_open(carrier, &link, ends);
        const uint64_t filled = fill(&ends[0]);
        put_all(&ends[1], pattern, 1000); /* never read: a plain close() would now throw away what is under way */
        end_sleep(&ends[0], false);       /* until they are there */
        end_close(&ends[0]);
        uint64_t drained = 0;
        const ssize_t error = drain_to_end(&ends[1], &drained);
        CHECK_FOR(error == -EPIPE, "%s: %zd", carrier->name, error);
        CHECK_EQUAL(drained, filled);
        ssize_t refused = 1;
        for (int i = 0; i < 10 && refused >= 0; i++) /* TCP tells the sender at the second write */
            refused = put(&ends[1], pattern, 1);
        if (!carrier->is_tcp)
            CHECK_FOR(refused < 0, "%s", carrier->name);
        end_close(&ends[1]);
        if (link.memfd >= 0)
            CHECK(close(link.memfd) == 0);
    }
}

/* The kernel tells of a reset once, and of an orderly end from then on. */
static void a_reset_that_a_write_met_is_no_orderly_end(void) {
    link_t link = link_make(&carriers[1]);
    end_t end = end_open(&link, 0);
    const uint8_t *bytes;
    const struct linger reset = {1, 0};
    CHECK(setsockopt(link.fds[1], SOL_SOCKET, SO_LINGER, &reset, sizeof reset) == 0);
    CHECK(close(link.fds[1]) == 0);
    ssize_t count = 0;
    while (count >= 0)
        count = put(&end, pattern, 1);
    CHECK_EQUAL(-count, ECONNRESET);
    CHECK_EQUAL(-end.stream->ops->peek(end.stream, 1, &bytes), ECONNRESET);
    CHECK_EQUAL(-put(&end, pattern, 1), ECONNRESET);
    end_close(&end);
}

/* Of two connections ours breaks alone: the peer sees its end and closes the other; until then we can sleep, and read. */
static void a_broken_way_out_is_told_at_the_end_of_the_way_in(void) {
    link_t link = link_make(joined_carrier);
    end_t end = end_open(&link, 0);
    const uint8_t *bytes;
    const struct linger reset = {1, 0};
    CHECK(setsockopt(link.second[1], SOL_SOCKET, SO_LINGER, &reset, sizeof reset) == 0);
    CHECK(close(link.second[1]) == 0);
    ssize_t count = 0;
    while (count >= 0)
        count = put(&end, pattern, 1);
    CHECK_EQUAL(-count, ECONNRESET);
    CHECK_EQUAL(end.stream->ops->peek(end.stream, 1, &bytes), 0);
    const uint32_t events = end.stream->ops->arm(end.stream, true);
    CHECK_EQUAL(events, EPOLLIN);
    CHECK(!end_is_rung(&end, events, 0));
    CHECK_EQUAL(send(link.fds[1], pattern, 5, 0), 5);
    CHECK(end_is_rung(&end, events, -1));
    CHECK_EQUAL(end.stream->ops->peek(end.stream, 1, &bytes), 5);
    end.stream->ops->consume(end.stream, 5);
    CHECK(close(link.fds[1]) == 0);
    end_sleep(&end, true);
    CHECK_EQUAL(-end.stream->ops->peek(end.stream, 1, &bytes), ECONNRESET);
    CHECK_EQUAL(end.stream->ops->arm(end.stream, true), 0);
    end_close(&end);
}

/* Whatever a write fails of, a lack of memory say: the peer must not wait for what will never come. */
static void who_cannot_send_any_more_makes_the_peer_see_an_end(void) {
    link_t link;
    end_t ends[2];
    const uint8_t *bytes;
    pair_open(joined_carrier, &link, ends);
    const struct iovec nowhere = {(void *)(uintptr_t)16, 100}; /* EFAULT: a failure that is not the connection's */
    CHECK_EQUAL(-ends[0].stream->ops->write(ends[0].stream, &nowhere, 1), EFAULT);
    ssize_t count = 0;
    while (count == 0) {
        end_sleep(&ends[1], false);
        count = ends[1].stream->ops->peek(ends[1].stream, 1, &bytes);
    }
    CHECK_EQUAL(-count, EPIPE);
    end_close(&ends[1]);
    end_sleep(&ends[0], false);
    CHECK_EQUAL(-ends[0].stream->ops->peek(ends[0].stream, 1, &bytes), EFAULT);
    end_close(&ends[0]);
}

static void a_cut_off_rest_is_told_once(void) {
    FOR_EACH_CARRIER {
        link_t link;
        end_t ends[2];
        const uint8_t *bytes;
        pair_open(carrier, &link, ends);
        const dss_stream_ops_t *ops = ends[1].stream->ops;
        put_all(&ends[0], pattern, 20);
        end_close(&ends[0]);
        end_sleep(&ends[1], false);
        ssize_t count = ops->peek(ends[1].stream, 48, &bytes);
        CHECK_EQUAL(count, 20);
        CHECK(memcmp(bytes, pattern, 20) == 0);
        while (count > 0) {
            end_sleep(&ends[1], false);
            count = ops->peek(ends[1].stream, 48, &bytes);
        }
        CHECK_FOR(count == -EPIPE, "%s: %zd", carrier->name, count);
        CHECK_EQUAL(ops->arm(ends[1].stream, true), 0);
        CHECK(ops->peer_waits(ends[1].stream));
        end_close(&ends[1]);
        if (link.memfd >= 0)
            CHECK(close(link.memfd) == 0);
    }
}

static void *write_for_ever(void *argument) {
    end_t *end = argument;
    for (uint64_t sent = 0;;) {
        const ssize_t count = put(end, pattern + sent % PATTERN_BYTES, 30000);
        if (count < 0)
            return NULL;
        sent += (uint64_t)count;
        end->stream->ops->flush(end->stream);
        if (count == 0)
            end_sleep(end, true);
    }
}

static void kill_child(pid_t child) {
    CHECK(kill(child, SIGKILL) == 0);
    CHECK(waitpid(child, NULL, 0) == child);
}

static void a_killed_writer_leaves_its_bytes_and_an_error(void) {
    FOR_EACH_CARRIER {
        for (int attempt = 0; attempt < 5; attempt++) {
            end_t end;
            const pid_t child = pair_fork(carrier, &end);
            if (child == 0) {
                (void)write_for_ever(&end);
                _exit(0);
            }
            uint64_t drained = 0;
            while (drained < (uint64_t)attempt * 700000 + 1) {
                CHECK(drain(&end, &drained, 100000) >= 0);
                end_sleep(&end, false);
            }
            kill_child(child);
            const ssize_t error = drain_to_end(&end, &drained);
            CHECK_FOR(error == -EPIPE || error == -ECONNRESET, "%s: %zd", carrier->name, error);
            CHECK_EQUAL(end.stream->ops->arm(end.stream, true), 0);
            if (!carrier->is_tcp)
                CHECK(put(&end, pattern, 1) < 0);
            end_close(&end);
        }
    }
}

/* The peer sleeps and has everything: asleep in epoll, with a full stream, and only peeking, we find out. */
static void a_killed_sleeper_is_noticed(void) {
    FOR_EACH_CARRIER {
        for (int way = 0; way < 3; way++) {
            end_t end;
            const uint8_t *bytes;
            const pid_t child = pair_fork(carrier, &end);
            if (child == 0) {
                put_all(&end, pattern, 1);
                for (;;)
                    (void)pause();
            }
            uint8_t first;
            get_all(&end, &first, 1);
            if (way == 1)
                (void)fill(&end);
            kill_child(child);
            ssize_t count = 0;
            while (count == 0) {
                if (way < 2)
                    end_sleep(&end, way == 1);
                count = end.stream->ops->peek(end.stream, 1, &bytes);
            }
            CHECK_FOR(count == -EPIPE || count == -ECONNRESET, "%s: %zd", carrier->name, count);
            end_close(&end);
        }
    }
}

/* ---- garbage in shared memory ------------------------------------------------------------------------------------------- */

static dss_shared_control_t *control_of(const link_t *link) {
    dss_shared_control_t *control = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, link->memfd, 0);
    CHECK(control != MAP_FAILED);
    return control;
}

static void impossible_positions_are_errors(void) {
    const uint64_t ring_bytes = shared_carrier->ring_bytes;
    const uint64_t tails[] = {99, ring_bytes + 101, UINT64_MAX, 0};
    for (size_t i = 0; i < sizeof tails / sizeof *tails; i++) {
        link_t link;
        end_t ends[2];
        const uint8_t *bytes;
        pair_open(shared_carrier, &link, ends);
        dss_shared_control_t *control = control_of(&link);
        put_all(&ends[0], pattern, 150);
        uint64_t drained = 0;
        (void)drain(&ends[1], &drained, 100);
        atomic_store(&control->rings[0].tail, tails[i]);
        CHECK_EQUAL(-ends[1].stream->ops->peek(ends[1].stream, 1, &bytes), EPROTO);
        CHECK_EQUAL(-put(&ends[1], pattern, 1), EPROTO);
        CHECK_EQUAL(ends[1].stream->ops->arm(ends[1].stream, true), 0);

        const uint64_t heads[] = {ring_bytes + 1, UINT64_MAX, 150 + ring_bytes, 1 - ring_bytes};
        atomic_store(&control->rings[0].head, heads[i]);
        ssize_t count = 1;
        for (uint64_t put_bytes = 0; count > 0 && put_bytes <= 2 * ring_bytes; put_bytes += (uint64_t)count)
            count = put(&ends[0], pattern, 1000);
        CHECK_EQUAL(-count, EPROTO);
        CHECK(munmap(control, 4096) == 0);
        pair_close(&link, ends);
    }
}

typedef struct vandal {
    dss_shared_control_t *control;
    atomic_bool stop;
} vandal_t;

static void *scribble(void *argument) {
    vandal_t *vandal = argument;
    uint64_t random = 6;
    while (!atomic_load(&vandal->stop)) {
        const uint32_t ring = check_random_below(&random, 2);
        const uint64_t value = check_random(&random) >> check_random_below(&random, 64);
        if (check_random_below(&random, 2))
            atomic_store(&vandal->control->rings[ring].tail, value);
        else
            atomic_store(&vandal->control->rings[ring].head, value);
        atomic_store(&vandal->control->sides[ring].wants, (uint32_t)check_random(&random));
        vandal->control->ring_bytes = value;
    }
    return NULL;
}

/* The address sanitizer and the ends of the mapping watch. What is read is nonsense, where it is read from is not. */
static void garbage_that_changes_all_the_time_harms_nobody(void) {
    uint64_t random = 7;
    volatile uint8_t seen = 0;
    for (int round = 0; round < 200; round++) {
        link_t link;
        end_t ends[2];
        pthread_t thread;
        pair_open(shared_carrier + round % 2, &link, ends);
        vandal_t vandal = {control_of(&link), false};
        CHECK(pthread_create(&thread, NULL, scribble, &vandal) == 0);
        for (int i = 0; i < 100; i++) {
            end_t *end = &ends[check_random_below(&random, 2)];
            const uint8_t *bytes;
            (void)put(end, pattern, check_random_below(&random, MOST_BYTES));
            const ssize_t count = end->stream->ops->peek(end->stream, check_random_below(&random, 4096), &bytes);
            if (count > 0) {
                seen = (uint8_t)(seen ^ bytes[0] ^ bytes[count - 1]);
                end->stream->ops->consume(end->stream, (size_t)count);
            }
            (void)end->stream->ops->arm(end->stream, true);
            end->stream->ops->flush(end->stream);
            end->stream->ops->woken(end->stream, EPOLLIN);
        }
        atomic_store(&vandal.stop, true);
        CHECK(pthread_join(thread, NULL) == 0);
        CHECK(munmap(vandal.control, 4096) == 0);
        pair_close(&link, ends);
    }
}

#define ALL_SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

static int forge(size_t size, int seals, const dss_shared_control_t *control) {
    const int memfd = memfd_create("forged", MFD_ALLOW_SEALING | MFD_CLOEXEC);
    const size_t header_bytes = offsetof(dss_shared_control_t, rings);
    CHECK(memfd >= 0);
    if (size >= header_bytes)
        CHECK(pwrite(memfd, control, header_bytes, 0) == (ssize_t)header_bytes);
    CHECK(ftruncate(memfd, (off_t)size) == 0);
    CHECK(!seals || fcntl(memfd, F_ADD_SEALS, seals) == 0);
    return memfd;
}

static void expect_refused(int memfd, const char *part) {
    dss_shared_t *shared = NULL;
    dss_error_t error;
    CHECK_STATUS(dss_shared_open(memfd, &shared, &error), DSS_ERR_CORRUPT);
    CHECK_CONTAINS(error.text, part);
    CHECK(!shared);
    CHECK(close(memfd) == 0);
}

static void memory_of_another_kind_is_refused(void) {
    const size_t page_bytes = (size_t)sysconf(_SC_PAGESIZE);
    int memfd;
    dss_shared_t *shared;
    dss_shared_control_t good;
    CHECK_STATUS(dss_shared_create(300000, &memfd, &shared, NULL), DSS_OK);
    CHECK(pread(memfd, &good, offsetof(dss_shared_control_t, rings), 0) > 0);
    CHECK_EQUAL(good.ring_bytes, 1u << 19);
    dss_shared_destroy(shared);
    CHECK(close(memfd) == 0);
    const size_t size = page_bytes + 2 * good.ring_bytes;

    memfd = forge(size, ALL_SEALS, &good); /* the forger can do it right */
    CHECK_STATUS(dss_shared_open(memfd, &shared, NULL), DSS_OK);
    dss_shared_destroy(shared);
    CHECK(close(memfd) == 0);

    expect_refused(forge(size, 0, &good), "seals");
    expect_refused(forge(size, F_SEAL_SHRINK | F_SEAL_GROW, &good), "seals");
    expect_refused(forge(size, F_SEAL_GROW | F_SEAL_SEAL, &good), "seals");
    expect_refused(forge(0, ALL_SEALS, &good), "header");
    expect_refused(forge(size - 1, ALL_SEALS, &good), "bytes");
    expect_refused(forge(size + page_bytes, ALL_SEALS, &good), "bytes");
    dss_shared_control_t bad = good;
    bad.magic[3] ^= 1;
    expect_refused(forge(size, ALL_SEALS, &bad), "magic");
    bad = good;
    bad.version++;
    expect_refused(forge(size, ALL_SEALS, &bad), "version 2");
    const uint64_t ring_sizes[] = {0, 1, 4096, 3u << 18, (uint64_t)1 << 31, UINT64_MAX, UINT64_MAX / 2 + 1};
    for (size_t i = 0; i < sizeof ring_sizes / sizeof *ring_sizes; i++) {
        bad = good;
        bad.ring_bytes = ring_sizes[i];
        expect_refused(forge(page_bytes + (size_t)(2 * ring_sizes[i] & 0xffffff), ALL_SEALS, &bad), "rings");
    }
    int pipe_fds[2];
    CHECK(pipe(pipe_fds) == 0);
    expect_refused(pipe_fds[0], "seals");
    expect_refused(pipe_fds[1], "seals");
}

static void a_system_without_it_is_told(void) {
    struct rlimit before;
    dss_error_t error;
    int memfd = -7;
    dss_shared_t *shared = NULL;
    CHECK(getrlimit(RLIMIT_NOFILE, &before) == 0);
    const struct rlimit none = {0, before.rlim_max};
    CHECK(setrlimit(RLIMIT_NOFILE, &none) == 0);
    const dss_status_t status = dss_shared_create(1u << 20, &memfd, &shared, &error);
    CHECK(setrlimit(RLIMIT_NOFILE, &before) == 0);
    CHECK_STATUS(status, DSS_ERR_SYSTEM);
    CHECK_CONTAINS(error.text, "memfd_create");
    CHECK(memfd == -7 && !shared);
    CHECK_STATUS(dss_shared_create(0, &memfd, &shared, &error), DSS_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(dss_shared_create(SIZE_MAX, &memfd, &shared, &error), DSS_ERR_INVALID_ARGUMENT);
}

/* ---- sockets ------------------------------------------------------------------------------------------------------------ */

static uint32_t open_descriptors(void) {
    DIR *directory = opendir("/proc/self/fd");
    uint32_t count = 0;
    CHECK(directory);
    while (readdir(directory))
        count++;
    (void)closedir(directory);
    return count;
}

static void descriptors_are_passed_one_at_a_time(void) {
    link_t link;
    end_t ends[2];
    int pipe_fds[2];
    const uint8_t *bytes;
    pair_open(&carriers[0], &link, ends);
    CHECK(pipe(pipe_fds) == 0);
    CHECK_EQUAL(dss_stream_socket_take_fd(ends[1].stream), -1);
    const uint32_t before = open_descriptors();
    CHECK_STATUS(dss_stream_socket_send_fd(ends[0].stream, pipe_fds[0], "first", 5), DSS_OK);
    CHECK_STATUS(dss_stream_socket_send_fd(ends[0].stream, pipe_fds[1], "second", 6), DSS_OK);
    CHECK_EQUAL(ends[1].stream->ops->peek(ends[1].stream, 11, &bytes), 11);
    CHECK(memcmp(bytes, "firstsecond", 11) == 0);
    CHECK_EQUAL(open_descriptors(), before + 1);
    const int fd = dss_stream_socket_take_fd(ends[1].stream);
    CHECK(fd >= 0 && fcntl(fd, F_GETFD) == FD_CLOEXEC);
    struct stat sent;
    struct stat received;
    CHECK(fstat(pipe_fds[0], &sent) == 0 && fstat(fd, &received) == 0);
    CHECK_EQUAL(received.st_ino, sent.st_ino);
    CHECK((fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDONLY);
    CHECK_EQUAL(dss_stream_socket_take_fd(ends[1].stream), -1);
    CHECK(close(fd) == 0);
    CHECK_STATUS(dss_stream_socket_send_fd(ends[0].stream, pipe_fds[0], "x", 1), DSS_OK); /* never taken */
    CHECK_EQUAL(ends[1].stream->ops->peek(ends[1].stream, 12, &bytes), 12);
    CHECK(close(pipe_fds[0]) == 0 && close(pipe_fds[1]) == 0);
    end_close(&ends[1]);
    CHECK_STATUS(dss_stream_socket_send_fd(ends[0].stream, 0, "x", 1), DSS_ERR_PEER_LOST);
    end_close(&ends[0]);
}

/* As a stranger may send them, before any handshake. */
static void surplus_descriptors_are_closed(void) {
    link_t link;
    end_t ends[2];
    const uint8_t *bytes;
    pair_open(&carriers[0], &link, ends);
    const uint32_t before = open_descriptors();
    const int fds[5] = {0, 0, 0, 0, 0};
    char byte = 'x';
    struct iovec piece = {&byte, 1};
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof fds)];
    } control = {0};
    struct msghdr message = {0};
    message.msg_iov = &piece;
    message.msg_iovlen = 1;
    message.msg_control = &control;
    message.msg_controllen = sizeof control;
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof fds);
    memcpy(CMSG_DATA(header), fds, sizeof fds);
    for (int i = 0; i < 20; i++)
        CHECK(sendmsg(ends[0].stream->fd, &message, 0) == 1);
    CHECK_EQUAL(ends[1].stream->ops->peek(ends[1].stream, 20, &bytes), 20);
    CHECK_EQUAL(open_descriptors(), before + 1);
    pair_close(&link, ends);
}

static bool is_silent_within(int fd, uint64_t milliseconds, double seconds) {
    struct timespec begin;
    struct timespec now;
    CHECK(clock_gettime(CLOCK_MONOTONIC, &begin) == 0);
    do {
        if (dss_socket_is_silent(fd, milliseconds))
            return true;
        (void)sched_yield();
        CHECK(clock_gettime(CLOCK_MONOTONIC, &now) == 0);
    } while ((double)(now.tv_sec - begin.tv_sec) + 1e-9 * (double)(now.tv_nsec - begin.tv_nsec) < seconds);
    return false;
}

static void a_host_is_silent_only_if_it_acknowledges_nothing(void) {
    link_t link;
    end_t ends[2];
    pair_open(&carriers[1], &link, ends);
    CHECK(!is_silent_within(ends[0].stream->fd, 0, 0.1));
    (void)fill(&ends[0]); /* the peer reads nothing, but its host answers each probe */
    CHECK(!is_silent_within(ends[0].stream->fd, 0, 1.5));
    CHECK(!dss_socket_is_silent(-1, 0));
    pair_close(&link, ends);

    pair_open(&carriers[1], &link, ends);
    struct sock_filter nothing = {BPF_RET | BPF_K, 0, 0, 0};
    const struct sock_fprog filter = {1, &nothing};
    CHECK(setsockopt(ends[1].stream->fd, SOL_SOCKET, SO_ATTACH_FILTER, &filter, sizeof filter) == 0); /* as if its link was cut */
    put_all(&ends[0], pattern, 1);
    CHECK(is_silent_within(ends[0].stream->fd, 300, 60));
    pair_close(&link, ends);
}

int main(void) {
    uint64_t random = 9;
    for (size_t i = 0; i < sizeof pattern; i++)
        pattern[i] = i < PATTERN_BYTES ? (uint8_t)check_random(&random) : pattern[i - PATTERN_BYTES];
    const uint32_t before = open_descriptors();
    RUN(threads_talk_both_ways);
    RUN(processes_talk_both_ways);
    RUN(no_wake_up_is_lost_in_many_short_rounds);
    RUN(a_full_stream_takes_no_more_until_it_is_read);
    RUN(a_writer_in_shared_memory_is_rung_at_half);
    RUN(arm_counts_only_what_is_news);
    RUN(what_was_written_before_a_close_arrives);
    RUN(a_reset_that_a_write_met_is_no_orderly_end);
    RUN(a_broken_way_out_is_told_at_the_end_of_the_way_in);
    RUN(who_cannot_send_any_more_makes_the_peer_see_an_end);
    RUN(a_cut_off_rest_is_told_once);
    RUN(a_killed_writer_leaves_its_bytes_and_an_error);
    RUN(a_killed_sleeper_is_noticed);
    RUN(impossible_positions_are_errors);
    RUN(garbage_that_changes_all_the_time_harms_nobody);
    RUN(memory_of_another_kind_is_refused);
    RUN(a_system_without_it_is_told);
    RUN(descriptors_are_passed_one_at_a_time);
    RUN(surplus_descriptors_are_closed);
    RUN(a_host_is_silent_only_if_it_acknowledges_nothing);
    CHECK_EQUAL(open_descriptors(), before);
    return 0;
}
