/* What the system refuses: shared memory, descriptors, Unix sockets, memory. Ranks of one host (processes) then use the next best
 * with a line in the log, or say what is wrong. Refusals are made with --wrap, see core.mk. */
#define _GNU_SOURCE /* memfd_create */

#include "processes.h"

#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <sys/resource.h>

#define COUNT 100000u

static bool refuse_memfd;
static bool refuse_board;
static bool refuse_unix;
static uint32_t limited_rank = NOBODY;
static uint32_t called_rank = NOBODY; /* posts when the others are connected to it */
static atomic_uint allocations_left;  /* then one fails; 0: none does */

/* NOLINTBEGIN(*reserved-identifier,cert-dcl*): the linker chose these names */
int __real_memfd_create(const char *name, unsigned flags);
int __wrap_memfd_create(const char *name, unsigned flags);
int __real_connect(int fd, const struct sockaddr *address, socklen_t bytes);
int __wrap_connect(int fd, const struct sockaddr *address, socklen_t bytes);
void *__real_malloc(size_t bytes);
void *__wrap_malloc(size_t bytes);
void *__real_calloc(size_t count, size_t bytes);
void *__wrap_calloc(size_t count, size_t bytes);
void *__real_realloc(void *old, size_t bytes);
void *__wrap_realloc(void *old, size_t bytes);
/* NOLINTEND(*reserved-identifier,cert-dcl*) */

int __wrap_memfd_create(const char *name, unsigned flags) {
    if (!refuse_memfd && !(refuse_board && strstr(name, "board")))
        return __real_memfd_create(name, flags);
    errno = EPERM;
    return -1;
}

/* As in a network namespace of one's own: abstract names of others mean nothing there. */
int __wrap_connect(int fd, const struct sockaddr *address, socklen_t bytes) {
    if (!refuse_unix || address->sa_family != AF_UNIX)
        return __real_connect(fd, address, bytes);
    errno = ECONNREFUSED;
    return -1;
}

static bool allocation_fails(void) {
    return atomic_load(&allocations_left) > 0 && atomic_fetch_sub(&allocations_left, 1) == 1;
}

void *__wrap_malloc(size_t bytes) {
    return allocation_fails() ? NULL : __real_malloc(bytes);
}

void *__wrap_calloc(size_t count, size_t bytes) {
    return allocation_fails() ? NULL : __real_calloc(count, bytes);
}

void *__wrap_realloc(void *old, size_t bytes) {
    return allocation_fails() ? NULL : __real_realloc(old, bytes);
}

/* ---- ranks -------------------------------------------------------------------------------------------------------------- */

/* So many more may be opened. Returns what the limit was. */
static struct rlimit limit_descriptors(uint32_t count) {
    struct rlimit before;
    const int lowest = dup(0);
    CHECK_EQUAL(getrlimit(RLIMIT_NOFILE, &before), 0);
    close(lowest);
    const struct rlimit limit = {.rlim_cur = (rlim_t)lowest + count, .rlim_max = before.rlim_max};
    CHECK_EQUAL(setrlimit(RLIMIT_NOFILE, &limit), 0);
    return before;
}

/* Reports how the first call went and over what, in `text`. */
static void reduce_once(process_t *self, dss_engine_t *engine) {
    static float values[COUNT];
    const dss_segment_t segment = {values, COUNT};
    const float ranks = (float)(self->world_size * (self->world_size + 1) / 2);
    ranks_call_t call;
    dss_engine_stats_t stats;
    for (uint32_t i = 0; i < COUNT; i++)
        values[i] = (float)((self->rank + 1) * (i % 1000));
    if (self->rank == limited_rank)
        (void)limit_descriptors(1); /* the connection, and nothing that comes with its messages */
    process_report(self, "made", DSS_OK, NULL);
    process_await_go(self);
    do
        dss_engine_stats(engine, &stats);
    while (self->rank == called_rank && stats.shared_memory_peers + stats.unix_peers + stats.tcp_peers < self->world_size - 1);
    ranks_post(engine, ranks_params(engine, DSS_OPERATION_ALL_REDUCE, DSS_FLOAT32, &segment, 0), &call);
    const dss_status_t status = ranks_wait(&call);
    for (uint32_t i = 0; status == DSS_OK && i < COUNT; i++)
        CHECK_FOR(values[i] == ranks * (float)(i % 1000), "rank %u, value %u", self->rank, i);
    dss_engine_stats(engine, &stats);
    if (status == DSS_OK)
        (void)snprintf(call.text, sizeof call.text, "%u shm, %u unix, %u tcp", stats.shared_memory_peers, stats.unix_peers,
                       stats.tcp_peers);
    process_report(self, "done", status, call.text);
    process_await_go(self);
}

static void run_refused(uint32_t world_size, dss_transport_t transport, dss_status_t status, const char *text) {
    processes_start(world_size, transport, reduce_once);
    processes_expect_all("made", NOBODY);
    processes_go_all(NOBODY);
    for (uint32_t i = 0; i < world_size; i++) {
        const message_t message = processes_expect(i, "done");
        if (message.status != status)
            CHECK_FAIL("rank %u: '%s', %s", i, dss_status_string(message.status), message.text);
        CHECK_CONTAINS(message.text, text);
    }
}

static void end_refused(void) {
    processes_go_all(NOBODY);
    processes_join(NOBODY);
    refuse_memfd = refuse_board = refuse_unix = false;
    limited_rank = called_rank = NOBODY;
}

static uint32_t count_lines(const char *what) {
    uint32_t count = 0;
    for (uint32_t i = 0; i < processes.world_size; i++)
        for (uint32_t line = 0; line < atomic_load(&processes.shared->log_counts[i]) && line < 16; line++)
            count += strstr(processes.shared->log[i][line], what) != NULL;
    return count;
}

/* ---- refusals ----------------------------------------------------------------------------------------------------------- */

static void shared_memory_where_nothing_is_refused(void) {
    run_refused(3, DSS_TRANSPORT_AUTO, DSS_OK, "2 shm, 0 unix, 0 tcp");
    end_refused();
    run_refused(3, DSS_TRANSPORT_SHM, DSS_OK, "2 shm, 0 unix, 0 tcp");
    end_refused();
}

static void no_memfd(void) {
    refuse_memfd = true;
    run_refused(3, DSS_TRANSPORT_AUTO, DSS_OK, "0 shm, 2 unix, 0 tcp");
    CHECK(count_lines("no shared memory with rank") >= 3); /* a connection each; once, or once on either side */
    CHECK(count_lines("memfd_create: Operation not permitted") >= 3);
    end_refused();
}

static void no_memfd_and_shared_memory_asked_for(void) {
    refuse_memfd = true;
    run_refused(2, DSS_TRANSPORT_SHM, DSS_ERR_PEER_LOST, "cannot share memory");
    end_refused();
}

/* Sums before and after all that can read each other's boards do; reports what was told over them. */
static void reduce_and_see(process_t *self, dss_engine_t *engine) {
    static float values[COUNT];
    const dss_segment_t segment = {values, COUNT};
    const float ranks = (float)(self->world_size * (self->world_size + 1) / 2);
    const uint32_t readers = refuse_board ? 0 : self->world_size - 1;
    ranks_call_t call;
    dss_engine_stats_t stats;
    process_report(self, "made", DSS_OK, NULL);
    process_await_go(self);
    for (uint64_t sequence = 0; sequence < 3; sequence++) {
        for (uint32_t i = 0; i < COUNT; i++)
            values[i] = (float)((self->rank + 1) * (i % 1000));
        ranks_post(engine, ranks_params(engine, DSS_OPERATION_ALL_REDUCE, DSS_FLOAT32, &segment, sequence), &call);
        if (ranks_wait(&call) != DSS_OK)
            CHECK_FAIL("rank %u: %s", self->rank, call.text);
        for (uint32_t i = 0; i < COUNT; i++)
            CHECK_FOR(values[i] == ranks * (float)(i % 1000), "rank %u, value %u", self->rank, i);
        do
            dss_engine_stats(engine, &stats);
        while (stats.board_readers < readers);
    }
    CHECK_EQUAL(stats.board_readers, readers);
    if (readers > 0)
        CHECK(stats.board_bytes >= readers * (COUNT / self->world_size * sizeof(float)));
    else
        CHECK_EQUAL(stats.board_bytes, 0);
    process_report(self, "done", DSS_OK, NULL);
    process_await_go(self);
}

static void run_boards(void) {
    processes_start(4, DSS_TRANSPORT_SHM, reduce_and_see);
    processes_expect_all("made", NOBODY);
    processes_go_all(NOBODY);
    processes_expect_all("done", NOBODY);
    end_refused();
}

static void results_are_read_from_boards(void) {
    run_boards();
}

static void no_boards(void) {
    refuse_board = true;
    run_boards();
}

/* Neither into the process that calls nor into the one that is called. */
static void no_descriptor_can_be_passed(void) {
    for (uint32_t rank = 0; rank < 2; rank++) {
        called_rank = 1;
        limited_rank = rank;
        run_refused(2, DSS_TRANSPORT_AUTO, DSS_OK, "0 shm, 1 unix, 0 tcp");
        CHECK(count_lines("no shared memory with rank") >= 1);
        end_refused();
    }
}

static void barrier_without_descriptors(process_t *self, dss_engine_t *engine) {
    struct rlimit before = {0};
    ranks_call_t call;
    if (self->rank == 1)
        before = limit_descriptors(0);
    process_report(self, "made", DSS_OK, NULL);
    process_await_go(self);
    if (self->rank == 1) {
        while (atomic_load(&processes.shared->log_counts[1]) == 0) /* rank 0 has called */
            processes_doze();
        const double begin = check_cpu_seconds();
        const uint64_t until_ns = processes_now_ns() + SECOND_NS / 2;
        while (processes_now_ns() < until_ns)
            processes_doze();
        CHECK_FOR(check_cpu_seconds() < begin + 0.25, "%.3f s of a processor", check_cpu_seconds() - begin);
        CHECK_CONTAINS(processes.shared->log[1][0], "cannot take a caller, tries again: Too many open files");
        CHECK_EQUAL(setrlimit(RLIMIT_NOFILE, &before), 0);
    }
    ranks_post(engine, ranks_params(engine, DSS_OPERATION_BARRIER, DSS_FLOAT32, NULL, 0), &call);
    const dss_status_t status = ranks_wait(&call);
    process_report(self, "done", status, call.text);
    process_await_go(self);
}

/* Callers wait until there are descriptors again, and the rank does not burn a processor meanwhile. */
static void no_descriptors_for_a_while(void) {
    processes_start(2, DSS_TRANSPORT_TCP, barrier_without_descriptors);
    processes_expect_all("made", NOBODY);
    processes_go_all(NOBODY);
    for (uint32_t i = 0; i < 2; i++) {
        const message_t message = processes_expect(i, "done");
        if (message.status != DSS_OK)
            CHECK_FAIL("rank %u: %s", i, message.text);
    }
    end_refused();
}

/* The name of an interface that others could reach, as DSSYNC_SOCKET_IFNAME has it; empty: there is none. */
static void find_interface(char name[IF_NAMESIZE]) {
    struct ifaddrs *all = NULL;
    name[0] = 0;
    CHECK_EQUAL(getifaddrs(&all), 0);
    for (const struct ifaddrs *each = all; each && !name[0]; each = each->ifa_next)
        if (each->ifa_addr && each->ifa_addr->sa_family == AF_INET && each->ifa_flags & IFF_UP && !(each->ifa_flags & IFF_LOOPBACK))
            (void)snprintf(name, IF_NAMESIZE, "%s", each->ifa_name);
    freeifaddrs(all);
}

static void no_unix_sockets(void) {
    static char name[IF_NAMESIZE];
    find_interface(name);
    if (!name[0]) {
        printf("skipped no_unix_sockets: no interface but the loopback\n");
        return;
    }
    refuse_unix = true;
    processes_interfaces = name;
    run_refused(3, DSS_TRANSPORT_AUTO, DSS_OK, "0 shm, 0 unix, 2 tcp");
    processes_interfaces = NULL;
    end_refused();
}

/* ---- another user ------------------------------------------------------------------------------------------------------- */

static void become_another_user(process_t *self) {
    if (self->rank == 0)
        return;
    CHECK_EQUAL(setuid(65534), 0);
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* a change of user ends it */
}

/* They cannot share memory, in one network namespace: TCP serves, on the loopback as well. */
static void ranks_of_two_users(void) {
    static const char *const streams[] = {"0 shm, 0 unix, 2 tcp", "1 shm, 0 unix, 1 tcp", "1 shm, 0 unix, 1 tcp"};
    if (geteuid() != 0) {
        printf("skipped ranks_of_two_users: only root may become somebody else\n");
        return;
    }
    uint8_t all[RANKS_MOST * DSS_CARD_BYTES];
    processes_fork(3, DSS_TRANSPORT_AUTO, reduce_once, become_another_user);
    processes_gather(all, DSS_CARD_BYTES);
    processes_gather(all, sizeof(uint32_t));
    processes_expect_all("made", NOBODY);
    processes_go_all(NOBODY);
    for (uint32_t i = 0; i < 3; i++) {
        const message_t message = processes_expect(i, "done");
        CHECK_STATUS(message.status, DSS_OK);
        CHECK_CONTAINS(message.text, streams[i]);
    }
    end_refused();
}

/* ---- errors of create --------------------------------------------------------------------------------------------------- */

static void report_create(process_t *self) {
    dss_engine_t *engine = NULL;
    dss_error_t error = {0};
    const dss_status_t status = process_create(self, &engine, &error);
    process_report(self, "created", status, error.text);
    dss_engine_destroy(engine);
    exit(0);
}

static void run_create(dss_transport_t transport, const char *text) {
    uint8_t all[RANKS_MOST * DSS_CARD_BYTES];
    refuse_unix = true;
    processes_fork(2, transport, NULL, report_create);
    processes_gather(all, DSS_CARD_BYTES);
    processes_gather(all, sizeof(uint32_t));
    for (uint32_t i = 0; i < 2; i++) {
        const message_t message = processes_expect(i, "created");
        CHECK_STATUS(message.status, DSS_ERR_INVALID_ARGUMENT);
        CHECK_CONTAINS(message.text, text);
    }
    processes_join(NOBODY);
    refuse_unix = false;
}

static void no_unix_sockets_is_an_error_where_nothing_else_serves(void) {
    run_create(DSS_TRANSPORT_SHM, "transport=shm was asked for, and ranks 0 and 1 are not on one host");
    run_create(DSS_TRANSPORT_AUTO, "listens on a loopback address");
}

/* ---- no memory ---------------------------------------------------------------------------------------------------------- */

static unsigned failing_allocation;

/* One allocation of rank 1 fails: whatever comes of it, both ranks end, with a result or an error. */
static void starve(process_t *self, dss_engine_t *engine) {
    static float values[COUNT];
    const dss_segment_t segment = {values, COUNT};
    ranks_call_t call = {0};
    dss_error_t error = {0};
    dss_operation_params_t params = ranks_params(engine, DSS_OPERATION_ALL_REDUCE, DSS_FLOAT16, &segment, 0);
    params.done = ranks_done;
    params.argument = &call;
    params.timeout_ns = 5 * SECOND_NS;
    if (self->rank == 1)
        atomic_store(&allocations_left, failing_allocation);
    dss_status_t status = dss_engine_post(engine, &params, &call.operation, &error);
    if (status == DSS_OK)
        status = ranks_wait(&call);
    else
        dss_engine_abort(engine, "no memory");
    const bool survived = atomic_exchange(&allocations_left, 0) > 0;
    process_report(self, survived ? "survived" : "done", status, status == DSS_OK ? NULL : call.text);
    process_await_go(self);
}

static bool run_starved(dss_transport_t transport) {
    bool survived = false;
    processes_start(3, transport, starve);
    for (uint32_t i = 0; i < 3; i++) {
        message_t message;
        process_receive(&processes.ranks[i], &message, sizeof message, "its end");
        if (message.status == DSS_ERR_TIMED_OUT)
            CHECK_FAIL("allocation %u, rank %u: %s", failing_allocation, i, message.text);
        survived = survived || strcmp(message.what, "survived") == 0;
    }
    processes_go_all(NOBODY);
    processes_join(NOBODY);
    return survived;
}

static void each_allocation_fails_over(dss_transport_t transport) {
    failing_allocation = 1;
    while (!run_starved(transport))
        failing_allocation++;
    CHECK_FOR(failing_allocation > 5, "%u allocations", failing_allocation);
}

static void each_allocation_fails_over_shared_memory(void) {
    each_allocation_fails_over(DSS_TRANSPORT_AUTO);
}

static void each_allocation_fails_over_tcp(void) {
    each_allocation_fails_over(DSS_TRANSPORT_TCP);
}

int main(void) {
    RUN(shared_memory_where_nothing_is_refused);
    RUN(results_are_read_from_boards);
    RUN(no_boards);
    RUN(no_memfd);
    RUN(no_memfd_and_shared_memory_asked_for);
    RUN(no_descriptor_can_be_passed);
    RUN(no_descriptors_for_a_while);
    RUN(no_unix_sockets);
    RUN(ranks_of_two_users);
    RUN(no_unix_sockets_is_an_error_where_nothing_else_serves);
    RUN(each_allocation_fails_over_shared_memory);
    RUN(each_allocation_fails_over_tcp);
    return 0;
}
