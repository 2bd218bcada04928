/* Ranks are processes, over shared memory and over TCP; one is killed, stopped or late in every phase. Whoever waits for it gets an
 * error that names it, promptly; whoever does not goes on. A rank that dies at its nth call of the kernel's socket functions is
 * made with --wrap, see core.mk. */
#define _GNU_SOURCE /* accept4 */

#include "processes.h"

#include "engine.h" /* its lock */

#define WORLD 4u
#define VICTIM 2u
#define LARGE_COUNT ((size_t)(SANITIZED ? 4 : 16) << 20)

static const uint32_t survivors[] = {0, 1, 3};

/* ---- dying at the nth call ---------------------------------------------------------------------------------------------- */

/* NOLINTBEGIN(*reserved-identifier,cert-dcl*): the linker chose these names */
int __real_connect(int fd, const struct sockaddr *address, socklen_t bytes);
int __real_accept4(int fd, struct sockaddr *address, socklen_t *bytes_p, int flags);
ssize_t __real_sendmsg(int fd, const struct msghdr *message, int flags);
ssize_t __real_recvmsg(int fd, struct msghdr *message, int flags);
int __wrap_connect(int fd, const struct sockaddr *address, socklen_t bytes);
int __wrap_accept4(int fd, struct sockaddr *address, socklen_t *bytes_p, int flags);
ssize_t __wrap_sendmsg(int fd, const struct msghdr *message, int flags);
ssize_t __wrap_recvmsg(int fd, struct msghdr *message, int flags);
/* NOLINTEND(*reserved-identifier,cert-dcl*) */

static atomic_uint calls_left; /* in the victim; 0: it does not count */

/* A call that did something, or tried: those that only found nothing there would be counted by chance. */
static void count_call(bool counts) {
    if (counts && atomic_load(&calls_left) > 0 && atomic_fetch_sub(&calls_left, 1) == 1)
        process_die();
}

int __wrap_connect(int fd, const struct sockaddr *address, socklen_t bytes) {
    const int result = __real_connect(fd, address, bytes);
    count_call(true);
    return result;
}

int __wrap_accept4(int fd, struct sockaddr *address, socklen_t *bytes_p, int flags) {
    const int result = __real_accept4(fd, address, bytes_p, flags);
    count_call(result >= 0);
    return result;
}

ssize_t __wrap_sendmsg(int fd, const struct msghdr *message, int flags) {
    const ssize_t result = __real_sendmsg(fd, message, flags);
    count_call(result > 0);
    return result;
}

ssize_t __wrap_recvmsg(int fd, struct msghdr *message, int flags) {
    const ssize_t result = __real_recvmsg(fd, message, flags);
    count_call(result > 0);
    return result;
}

/* ---- what ranks do ------------------------------------------------------------------------------------------------------ */

static dss_operation_params_t barrier_of(dss_engine_t *engine, uint64_t channel, uint64_t sequence) {
    dss_operation_params_t params = ranks_params(engine, DSS_OPERATION_BARRIER, DSS_FLOAT32, NULL, sequence);
    params.key.channel = channel;
    return params;
}

static void report_call(const process_t *self, const char *what, ranks_call_t *call) {
    const dss_status_t status = ranks_wait(call);
    process_report(self, what, status, call->text);
}

/* The others need not notice. */
static void go_on_without_victim(const process_t *self, dss_engine_t *engine) {
    ranks_call_t call;
    dss_operation_params_t params = barrier_of(engine, 2, 0);
    params.members = survivors;
    params.member_count = 3;
    ranks_post(engine, params, &call);
    if (ranks_wait(&call) != DSS_OK)
        CHECK_FAIL("rank %u without rank %u: %s", self->rank, VICTIM, call.text);
}

/* Posts, says so, and waits; then goes on without the victim. The last barrier keeps all until each has done that. */
static void lose_victim(process_t *self, dss_engine_t *engine, dss_operation_params_t params) {
    ranks_call_t call;
    ranks_post(engine, params, &call);
    process_report(self, "posted", DSS_OK, NULL);
    report_call(self, "done", &call);
    go_on_without_victim(self, engine);
    process_report(self, "went on", DSS_OK, NULL);
    process_await_go(self);
}

/* In the parent: all survivors report that they lost the victim, soon after it died or, later, they posted. */
static void check_lost(uint64_t killed_ns) {
    for (size_t i = 0; i < 3; i++) {
        const message_t message = processes_expect(survivors[i], "done");
        if (message.status != DSS_ERR_PEER_LOST && message.status != DSS_ERR_FAILED)
            CHECK_FAIL("rank %u: '%s', %s", survivors[i], dss_status_string(message.status), message.text);
        CHECK_CONTAINS(message.text, "rank 2 (");
        CHECK_CONTAINS(message.text, "is gone");
        CHECK_FOR(message.at_ns < killed_ns + PROMPTLY_NS, "rank %u: %.3f s after the kill: %s", survivors[i],
                  (double)(message.at_ns - killed_ns) / 1e9, message.text);
    }
    processes_expect_all("went on", VICTIM);
    processes_go_all(VICTIM);
    processes_join(VICTIM);
}

/* ---- killed ------------------------------------------------------------------------------------------------------------- */

static void before_anybody_calls(process_t *self, dss_engine_t *engine) {
    process_report(self, "made", DSS_OK, NULL);
    process_await_go(self);
    if (self->rank != VICTIM)
        lose_victim(self, engine, barrier_of(engine, 1, 0));
}

static void killed_before_anybody_calls(dss_transport_t transport) {
    processes_start(WORLD, transport, before_anybody_calls);
    processes_expect_all("made", NOBODY);
    const uint64_t killed_ns = processes_kill(VICTIM);
    processes_go_all(VICTIM);
    processes_expect_all("posted", VICTIM);
    check_lost(killed_ns);
}

/* Its kernel takes the calls, it does not answer them. */
static void killed_while_called(dss_transport_t transport) {
    processes_start(WORLD, transport, before_anybody_calls);
    processes_expect_all("made", NOBODY);
    processes_signal(VICTIM, SIGSTOP);
    processes_await_stop(VICTIM);
    processes_go_all(VICTIM);
    processes_expect_all("posted", VICTIM);
    check_lost(processes_kill(VICTIM));
}

static void killed_in_a_barrier(dss_transport_t transport) {
    processes_start(WORLD, transport, before_anybody_calls);
    processes_expect_all("made", NOBODY);
    processes_go_all(VICTIM);
    processes_expect_all("posted", VICTIM);
    check_lost(processes_kill(VICTIM));
}

static void after_a_barrier(process_t *self, dss_engine_t *engine) {
    ranks_call_t call;
    ranks_post(engine, barrier_of(engine, 3, 0), &call);
    if (ranks_wait(&call) != DSS_OK)
        CHECK_FAIL("rank %u: %s", self->rank, call.text);
    process_report(self, "connected", DSS_OK, NULL);
    dss_engine_stats_t stats = {0};
    while (self->rank != VICTIM && stats.lost_peers == 0) {
        processes_doze();
        dss_engine_stats(engine, &stats);
    }
    before_anybody_calls(self, engine);
}

/* Nobody waits for it, and all notice. */
static void killed_while_idle(dss_transport_t transport) {
    processes_start(WORLD, transport, after_a_barrier);
    processes_expect_all("connected", NOBODY);
    const uint64_t killed_ns = processes_kill(VICTIM);
    processes_expect_all("made", VICTIM);
    CHECK(processes_now_ns() < killed_ns + PROMPTLY_NS);
    processes_go_all(VICTIM);
    processes_expect_all("posted", VICTIM);
    check_lost(killed_ns);
}

static void await_bytes(dss_engine_t *engine, uint64_t bytes) {
    const struct timespec moment = {.tv_nsec = 100000}; /* whoever asks without a pause keeps the engine from its lock */
    dss_engine_stats_t stats = {0};
    while (stats.bytes_received < bytes) {
        nanosleep(&moment, NULL);
        dss_engine_stats(engine, &stats);
    }
}

static void reduce_a_lot(process_t *self, dss_engine_t *engine) {
    float *values = calloc(LARGE_COUNT, sizeof *values);
    const dss_segment_t segment = {values, LARGE_COUNT};
    dss_operation_params_t params = ranks_params(engine, DSS_OPERATION_ALL_REDUCE, DSS_FLOAT32, &segment, 0);
    if (self->rank == VICTIM) {
        ranks_call_t call;
        params.will_wait = 0;
        ranks_post(engine, params, &call);
        await_bytes(engine, (uint64_t)4 << 20);
        process_die();
    }
    lose_victim(self, engine, params);
    free(values);
}

static void killed_in_the_middle(dss_transport_t transport) {
    processes_start(WORLD, transport, reduce_a_lot);
    processes_expect_all("posted", VICTIM);
    siginfo_t information;
    CHECK_EQUAL(waitid(P_PID, (id_t)processes.ranks[VICTIM].pid, &information, WEXITED | WNOWAIT), 0);
    /* The kernel frees a process's memory before it closes the sockets; that of a sanitizer takes long. */
    check_lost(SANITIZED ? processes_now_ns() : atomic_load(&processes.shared->died_ns));
}

static unsigned dying_call; /* which one; counted from 1 */

static void die_at_a_call(process_t *self, dss_engine_t *engine) {
    ranks_call_t call;
    if (self->rank == VICTIM)
        atomic_store(&calls_left, dying_call);
    process_report(self, "made", DSS_OK, NULL);
    process_await_go(self);
    ranks_post(engine, barrier_of(engine, 1, 0), &call);
    const dss_status_t status = ranks_wait(&call);
    if (self->rank == VICTIM) {
        atomic_store(&processes.shared->steps[VICTIM], 1);
        process_die(); /* at the latest */
    }
    process_report(self, "done", status, call.text);
    process_await_go(self);
}

/* False when the victim has got through: there are fewer calls. */
static bool killed_at_call(dss_transport_t transport, unsigned call) {
    siginfo_t information;
    message_t messages[3];
    dying_call = call;
    processes_start(WORLD, transport, die_at_a_call);
    processes_expect_all("made", NOBODY);
    processes_go_all(NOBODY);
    for (size_t i = 0; i < 3; i++)
        messages[i] = processes_expect(survivors[i], "done");
    CHECK_EQUAL(waitid(P_PID, (id_t)processes.ranks[VICTIM].pid, &information, WEXITED | WNOWAIT), 0);
    const uint64_t died_ns = atomic_load(&processes.shared->died_ns);
    const bool died_early = atomic_load(&processes.shared->steps[VICTIM]) == 0;
    for (size_t i = 0; i < 3; i++) {
        if (messages[i].status == DSS_OK)
            continue; /* the victim's part was out already */
        CHECK_CONTAINS(messages[i].text, "rank 2 (");
        CHECK_FOR(messages[i].at_ns < died_ns + PROMPTLY_NS, "call %u, rank %u: %.3f s after the kill: %s", call, survivors[i],
                  (double)(messages[i].at_ns - died_ns) / 1e9, messages[i].text);
    }
    processes_go_all(VICTIM);
    processes_join(VICTIM);
    return died_early;
}

static void killed_at_every_call(dss_transport_t transport) {
    unsigned call = 1;
    while (killed_at_call(transport, call))
        call++;
    CHECK_FOR(call > 6, "%u calls", call); /* or nothing was counted */
}

/* ---- a rank's child ------------------------------------------------------------------------------------------------------ */

static dss_status_t gather_alone(void *argument, const void *mine, size_t bytes_each, void *all, dss_error_t *error_p) {
    (void)argument;
    (void)error_p;
    memcpy(all, mine, bytes_each);
    return DSS_OK;
}

/* A group of its own is the child's affair. The thread sanitizer forbids it threads. */
static void make_own_group(void) {
#ifndef __SANITIZE_THREAD__
    const dss_engine_params_t params = {
        .params_bytes = sizeof params, .world_size = 1, .transport = DSS_TRANSPORT_TCP, .oob = {.allgather = gather_alone}};
    dss_engine_t *engine = NULL;
    ranks_call_t call;
    CHECK_STATUS(dss_engine_create(&params, &engine, NULL), DSS_OK);
    ranks_post(engine, barrier_of(engine, 1, 0), &call);
    CHECK_STATUS(ranks_wait(&call), DSS_OK);
    dss_engine_destroy(engine);
#else
    (void)gather_alone;
#endif
}

/* What a DataLoader's worker is to a rank: it has copies of everything, and lives on. It may not touch the group. */
static void live_on(const process_t *self, dss_engine_t *engine) {
    ranks_call_t call = {0};
    dss_error_t error = {0};
    dss_operation_params_t params = barrier_of(engine, 1, 0);
    char never;
    params.done = ranks_done;
    params.argument = &call;
    CHECK_STATUS(dss_engine_post(engine, &params, &call.operation, &error), DSS_ERR_INVALID_ARGUMENT);
    CHECK_CONTAINS(error.text, "forked child of rank 2");
    dss_engine_close_channel(engine, 1, "the child would");
    dss_engine_abort(engine, "the child would");
    dss_engine_destroy(engine);
    make_own_group();
    process_report(self, "child lives", DSS_OK, NULL);
    while (recv(self->socket, &never, 1, 0) > 0)
        continue;
    _exit(0); /* the test is over */
}

static void fork_a_child(process_t *self, dss_engine_t *engine) {
    ranks_call_t call;
    ranks_post(engine, barrier_of(engine, 3, 0), &call);
    if (ranks_wait(&call) != DSS_OK)
        CHECK_FAIL("rank %u: %s", self->rank, call.text);
    if (self->rank == VICTIM) {
        static ranks_call_t unfinished; /* until the victim is killed */
        ranks_post(engine, barrier_of(engine, 4, 0), &unfinished);
        dss_engine_lock(engine); /* as another thread might have it */
        if (fork() == 0) {
            dss_operation_release(unfinished.operation);
            live_on(self, engine);
        }
        dss_engine_unlock(engine);
    }
    before_anybody_calls(self, engine);
}

/* The rank still works after the fork: the others wait for it, connected, and then it dies. */
static void killed_with_a_child(dss_transport_t transport) {
    processes_start(WORLD, transport, fork_a_child);
    processes_expect_all("made", VICTIM);
    for (int i = 0; i < 2; i++) { /* in any order */
        message_t message;
        process_receive(&processes.ranks[VICTIM], &message, sizeof message, "two reports");
    }
    processes_go_all(VICTIM);
    processes_expect_all("posted", VICTIM);
    check_lost(processes_kill(VICTIM));
}

/* ---- stopped, late ------------------------------------------------------------------------------------------------------ */

static void post_with_patience(process_t *self, dss_engine_t *engine) {
    ranks_call_t call;
    dss_operation_params_t params = barrier_of(engine, 1, 0);
    process_report(self, "made", DSS_OK, NULL);
    process_await_go(self);
    if (self->rank != VICTIM)
        params.timeout_ns = SECOND_NS * 3 / 10;
    ranks_post(engine, params, &call);
    if (self->rank != VICTIM)
        process_report(self, "posted", DSS_OK, NULL);
    report_call(self, "done", &call);
    process_await_go(self);
}

/* Of the ranks beside the victim none may be blamed, wherever values go. */
static void check_blamed(const char *text) {
    for (const char *at = text; (at = strstr(at, " has stopped: ")); at++) {
        const char *blamed = at; /* back to "rank N (address)" */
        while (blamed > text && strncmp(blamed, "rank ", 5) != 0)
            blamed--;
        CHECK_FOR(strncmp(blamed, "rank 2 (", 8) == 0, "%s", text);
    }
}

/* What the others say after their time is over, and what the victim says when it wakes up. */
static void check_timed_out(uint64_t begin_ns, uint64_t timeout_ns, const char *why) {
    for (size_t i = 0; i < 3; i++) {
        const message_t message = processes_expect(survivors[i], "done");
        if (message.status != DSS_ERR_TIMED_OUT && message.status != DSS_ERR_FAILED)
            CHECK_FAIL("rank %u: '%s', %s", survivors[i], dss_status_string(message.status), message.text);
        CHECK_CONTAINS(message.text, "timed out after");
        CHECK_CONTAINS(message.text, "rank 2 ("); /* also where values go round, and not all have it beside them */
        CHECK_CONTAINS(message.text, why);
        check_blamed(message.text);
        CHECK_FOR(message.at_ns < begin_ns + timeout_ns + PROMPTLY_NS, "rank %u: %.3f s", survivors[i],
                  (double)(message.at_ns - begin_ns) / 1e9);
    }
    const uint64_t woken_ns = processes_now_ns();
    processes_signal(VICTIM, SIGCONT);
    const message_t message = processes_expect(VICTIM, "done");
    CHECK_STATUS(message.status, DSS_ERR_FAILED);
    CHECK_CONTAINS(message.text, "gave up");
    CHECK_CONTAINS(message.text, "timed out after");
    CHECK(message.at_ns < woken_ns + PROMPTLY_NS);
    processes_go_all(NOBODY);
    processes_join(NOBODY);
}

static void stopped_before_anybody_calls(dss_transport_t transport) {
    processes_start(WORLD, transport, post_with_patience);
    processes_expect_all("made", NOBODY);
    processes_signal(VICTIM, SIGSTOP);
    processes_await_stop(VICTIM);
    processes_go(VICTIM); /* posts as soon as it wakes up */
    processes_go_all(VICTIM);
    const uint64_t begin_ns = processes_now_ns();
    processes_expect_all("posted", VICTIM);
    check_timed_out(begin_ns, SECOND_NS * 3 / 10, "does not answer");
}

/* Long enough that the victim comes to the middle, also with a sanitizer on a busy machine. */
#define MIDDLE_TIMEOUT_NS ((SANITIZED ? 10 : 3) * SECOND_NS)

static void stop_in_the_middle(process_t *self, dss_engine_t *engine) {
    float *values = calloc(LARGE_COUNT, sizeof *values);
    const dss_segment_t segment = {values, LARGE_COUNT};
    ranks_call_t call;
    dss_operation_params_t params = ranks_params(engine, DSS_OPERATION_ALL_REDUCE, DSS_FLOAT32, &segment, 0);
    params.timeout_ns = self->rank == VICTIM ? 60 * SECOND_NS : MIDDLE_TIMEOUT_NS;
    params.will_wait = self->rank != VICTIM;
    process_report(self, "made", DSS_OK, NULL);
    process_await_go(self);
    ranks_post(engine, params, &call);
    if (self->rank == VICTIM) {
        await_bytes(engine, (uint64_t)1 << 20);
        raise(SIGSTOP);
    }
    report_call(self, "done", &call);
    process_await_go(self);
    free(values);
}

static void stopped_in_the_middle(dss_transport_t transport) {
    processes_start(WORLD, transport, stop_in_the_middle);
    processes_expect_all("made", NOBODY);
    const uint64_t begin_ns = processes_now_ns();
    processes_go_all(NOBODY);
    processes_await_stop(VICTIM);
    check_timed_out(begin_ns, MIDDLE_TIMEOUT_NS, "has stopped");
}

/* The end of an engine is timed in process_main(). */
static void leave_in_the_middle(process_t *self, dss_engine_t *engine) {
    static float values[LARGE_COUNT]; /* until the process ends */
    const dss_segment_t segment = {values, LARGE_COUNT};
    static ranks_call_t call;
    dss_operation_params_t params = ranks_params(engine, DSS_OPERATION_ALL_REDUCE, DSS_FLOAT32, &segment, 0);
    params.will_wait = 0;
    ranks_post(engine, params, &call);
    if (self->rank == VICTIM) {
        await_bytes(engine, (uint64_t)1 << 20);
        raise(SIGSTOP);
    }
    process_await_go(self);
    if (self->rank == VICTIM) {
        report_call(self, "done", &call);
    } else if (self->rank == 1) {
        const uint64_t begin_ns = processes_now_ns();
        dss_engine_abort(engine, "the test has had enough");
        CHECK(processes_now_ns() < begin_ns + PROMPTLY_NS);
        CHECK_STATUS(ranks_wait(&call), DSS_ERR_SHUT_DOWN);
        CHECK_CONTAINS(call.text, "the test has had enough");
        process_report(self, "aborted", DSS_OK, NULL);
    } else { /* with the operation under way, if rank 1 has not reached it yet */
        dss_operation_release(call.operation);
    }
}

static void left_while_stopped(dss_transport_t transport) {
    processes_start(WORLD, transport, leave_in_the_middle);
    processes_await_stop(VICTIM);
    processes_go(1);
    (void)processes_expect(1, "aborted");
    processes_go(0);
    processes_go(3);
    for (size_t i = 0; i < 3; i++) {
        siginfo_t information;
        CHECK_EQUAL(waitid(P_PID, (id_t)processes.ranks[survivors[i]].pid, &information, WEXITED | WNOWAIT), 0);
    }
    processes_signal(VICTIM, SIGCONT);
    processes_go(VICTIM);
    const message_t message = processes_expect(VICTIM, "done");
    if (message.status != DSS_ERR_PEER_LOST && message.status != DSS_ERR_FAILED) /* somebody left, or somebody says so */
        CHECK_FAIL("'%s', %s", dss_status_string(message.status), message.text);
    processes_join(NOBODY);
}

static void post_at_last(process_t *self, dss_engine_t *engine) {
    ranks_call_t call;
    process_report(self, "made", DSS_OK, NULL);
    process_await_go(self);
    ranks_post(engine, barrier_of(engine, 1, 0), &call);
    process_report(self, "posted", DSS_OK, NULL);
    report_call(self, "done", &call);
    process_await_go(self);
}

static void late(dss_transport_t transport) {
    processes_start(WORLD, transport, post_at_last);
    processes_expect_all("made", NOBODY);
    processes_go_all(VICTIM);
    processes_expect_all("posted", VICTIM);
    processes_go(VICTIM);
    (void)processes_expect(VICTIM, "posted");
    for (uint32_t i = 0; i < WORLD; i++)
        CHECK_STATUS(processes_expect(i, "done").status, DSS_OK);
    processes_go_all(NOBODY);
    processes_join(NOBODY);
}

/* ---- what is left behind ------------------------------------------------------------------------------------------------ */

static void *do_nothing(void *argument) {
    return argument;
}

static void come_and_go(process_t *self) {
    pthread_t first; /* a sanitizer starts a thread of its own with it */
    CHECK_EQUAL(pthread_create(&first, NULL, do_nothing, NULL), 0);
    pthread_join(first, NULL);
    processes_doze(); /* the kernel forgets a joined thread a moment later */
    const uint32_t descriptors = count_entries("/proc/self/fd");
    const uint32_t threads = count_entries("/proc/self/task");
    dss_engine_t *engine = NULL;
    dss_error_t error = {0};
    ranks_call_t call;
    if (process_create(self, &engine, &error) != DSS_OK)
        CHECK_FAIL("rank %u: %s", self->rank, error.text);
    ranks_post(engine, barrier_of(engine, 1, 0), &call);
    CHECK_STATUS(ranks_wait(&call), DSS_OK);
    process_report(self, "done", DSS_OK, NULL);
    process_await_go(self);
    dss_engine_destroy(engine);
    CHECK_EQUAL(count_entries("/proc/self/fd"), descriptors);
    while (count_entries("/proc/self/task") > threads) /* or the watchdog ends it */
        processes_doze();
    exit(0);
}

static void nothing_is_left(dss_transport_t transport) {
    uint8_t all[RANKS_MOST * DSS_CARD_BYTES];
    const uint32_t entries = count_entries("/dev/shm");
    processes_fork(WORLD, transport, NULL, come_and_go);
    processes_gather(all, DSS_CARD_BYTES);
    processes_gather(all, sizeof(uint32_t));
    processes_expect_all("done", NOBODY);
    CHECK_EQUAL(count_entries("/dev/shm"), entries);
    processes_go_all(NOBODY);
    processes_join(NOBODY);
}

/* ---- both transports ---------------------------------------------------------------------------------------------------- */

static void killed_over(dss_transport_t transport) {
    killed_before_anybody_calls(transport);
    killed_while_called(transport);
    killed_in_a_barrier(transport);
    killed_while_idle(transport);
    killed_in_the_middle(transport);
}

static void stopped_or_late_over(dss_transport_t transport) {
    stopped_before_anybody_calls(transport);
    stopped_in_the_middle(transport);
    left_while_stopped(transport);
    late(transport);
    nothing_is_left(transport);
}

static void killed_over_shared_memory(void) {
    killed_over(DSS_TRANSPORT_AUTO);
}

static void killed_over_tcp(void) {
    killed_over(DSS_TRANSPORT_TCP);
}

static void killed_with_a_child_over_shared_memory(void) {
    killed_with_a_child(DSS_TRANSPORT_AUTO);
}

static void killed_with_a_child_over_tcp(void) {
    killed_with_a_child(DSS_TRANSPORT_TCP);
}

static void killed_at_every_call_over_shared_memory(void) {
    killed_at_every_call(DSS_TRANSPORT_AUTO);
}

static void killed_at_every_call_over_tcp(void) {
    killed_at_every_call(DSS_TRANSPORT_TCP);
}

static void stopped_or_late_over_shared_memory(void) {
    stopped_or_late_over(DSS_TRANSPORT_AUTO);
}

static void stopped_or_late_over_tcp(void) {
    stopped_or_late_over(DSS_TRANSPORT_TCP);
}

int main(void) {
    RUN(killed_over_shared_memory);
    RUN(killed_over_tcp);
    RUN(killed_with_a_child_over_shared_memory);
    RUN(killed_with_a_child_over_tcp);
    RUN(killed_at_every_call_over_shared_memory);
    RUN(killed_at_every_call_over_tcp);
    RUN(stopped_or_late_over_shared_memory);
    RUN(stopped_or_late_over_tcp);
    return 0;
}
