/*
 * processes.h: several ranks in one test, each a process with an engine of its own, so that a rank can be killed or stopped.
 *
 * The test is the parent: it has one thread and no engine, forks the ranks and talks with each over a socket that keeps messages
 * apart. It plays the bootstrap (every rank hands in its bytes, all get all), waits for what ranks report and tells them to go on,
 * so no test sleeps to be in step. A rank dies with the parent, and has a watchdog of its own.
 */
#ifndef DSS_PROCESSES_H
#define DSS_PROCESSES_H

#include "ranks.h" /* first: it asks for POSIX */

#include <dirent.h>
#include <errno.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>

#include "address.h"

#define SECOND_NS ((uint64_t)1000000000u)
#define PROCESS_PATIENCE_SECONDS 60

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#else
#define SANITIZED 0
#endif
#define PROMPTLY_NS (SANITIZED ? 5 * SECOND_NS : SECOND_NS)

typedef struct message {
    char what[40];
    dss_status_t status;
    uint64_t at_ns;
    uint64_t bytes;
    char text[1600];
} message_t;

typedef struct process {
    uint32_t rank;
    uint32_t world_size;
    pid_t pid;
    int socket; /* the parent's end here, the rank's own end there */
} process_t;

/* Seen by all: when a rank died by its own hand, and what they logged. */
typedef struct processes_shared {
    _Atomic uint64_t died_ns;
    _Atomic uint32_t steps[RANKS_MOST]; /* for tests to count in */
    _Atomic uint32_t log_counts[RANKS_MOST];
    char log[RANKS_MOST][16][256]; /* the last lines of each rank */
} processes_shared_t;

typedef struct processes {
    uint32_t world_size;
    dss_transport_t transport;
    void (*body)(process_t *self, dss_engine_t *engine);
    void (*before)(process_t *self); /* the engine is made; may be NULL */
    process_t ranks[RANKS_MOST];
    processes_shared_t *shared;
    dss_card_t cards[RANKS_MOST];
} processes_t;

static processes_t processes;
static const char *processes_interfaces; /* where ranks listen; set before they are forked */

static inline uint64_t processes_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * SECOND_NS + (uint64_t)now.tv_nsec;
}

static inline void processes_doze(void) {
    const struct timespec millisecond = {.tv_nsec = 1000000};
    nanosleep(&millisecond, NULL);
}

/* ---- either side -------------------------------------------------------------------------------------------------------- */

static inline void process_send(const process_t *process, const void *bytes, size_t bytes_count) {
    CHECK_EQUAL(send(process->socket, bytes, bytes_count, MSG_NOSIGNAL), bytes_count);
}

static inline void process_receive(const process_t *process, void *bytes, size_t bytes_count, const char *what) {
    const ssize_t got = recv(process->socket, bytes, bytes_count, 0);
    if (got != (ssize_t)bytes_count)
        CHECK_FAIL("rank %u, waiting for %s: %zd bytes, expected %zu", process->rank, what, got, bytes_count);
}

/* ---- the rank's side ---------------------------------------------------------------------------------------------------- */

static inline void process_report(const process_t *self, const char *what, dss_status_t status, const char *text) {
    message_t message = {.status = status, .at_ns = processes_now_ns()};
    (void)snprintf(message.what, sizeof message.what, "%s", what);
    (void)snprintf(message.text, sizeof message.text, "%s", text ? text : "");
    process_send(self, &message, sizeof message);
}

static inline void process_await_go(const process_t *self) {
    char go;
    process_receive(self, &go, 1, "the parent");
}

/* The moment is told to the others first. */
static inline void process_die(void) {
    atomic_store(&processes.shared->died_ns, processes_now_ns());
    kill(getpid(), SIGKILL);
}

static inline dss_status_t process_allgather(void *argument, const void *mine, size_t bytes_each, void *all, dss_error_t *error_p) {
    const process_t *self = argument;
    (void)error_p;
    process_send(self, mine, bytes_each);
    process_receive(self, all, bytes_each * self->world_size, "the bootstrap");
    return DSS_OK;
}

static inline void process_log(void *argument, const char *text) {
    const process_t *self = argument;
    processes_shared_t *shared = processes.shared; /* one thread of a rank logs at a time; the count is read first */
    (void)snprintf(shared->log[self->rank][atomic_load(&shared->log_counts[self->rank]) % 16], 256, "%s", text);
    atomic_fetch_add(&shared->log_counts[self->rank], 1);
}

static inline dss_status_t process_create(process_t *self, dss_engine_t **engine_p, dss_error_t *error_p) {
    const dss_engine_params_t params = {.params_bytes = sizeof params,
                                        .rank = self->rank,
                                        .world_size = self->world_size,
                                        .transport = processes.transport,
                                        .interfaces = processes_interfaces,
                                        .oob = {.allgather = process_allgather, .argument = self},
                                        .log = process_log,
                                        .log_argument = self};
    return dss_engine_create(&params, engine_p, error_p);
}

static inline void process_main(process_t *self) {
    dss_engine_t *engine = NULL;
    dss_error_t error = {0};
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    alarm(PROCESS_PATIENCE_SECONDS);
    if (processes.before)
        processes.before(self);
    if (process_create(self, &engine, &error) != DSS_OK)
        CHECK_FAIL("rank %u: %s", self->rank, error.text);
    processes.body(self, engine);
    const uint64_t begin_ns = processes_now_ns();
    dss_engine_destroy(engine);
    CHECK_FOR(processes_now_ns() < begin_ns + SECOND_NS / 2 + PROMPTLY_NS, "the end of rank %u's engine", self->rank);
    exit(0);
}

/* ---- the parent's side -------------------------------------------------------------------------------------------------- */

/* One round of the bootstrap. */
static inline void processes_gather(void *all, size_t bytes_each) {
    for (uint32_t i = 0; i < processes.world_size; i++)
        process_receive(&processes.ranks[i], (char *)all + i * bytes_each, bytes_each, "its part of the bootstrap");
    for (uint32_t i = 0; i < processes.world_size; i++)
        process_send(&processes.ranks[i], all, bytes_each * processes.world_size);
}

static inline void processes_fork(uint32_t world_size, dss_transport_t transport,
                                  void (*body)(process_t *self, dss_engine_t *engine), void (*before)(process_t *self)) {
    processes = (processes_t){.world_size = world_size, .transport = transport, .body = body, .before = before};
    processes.shared = mmap(NULL, sizeof *processes.shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(processes.shared != MAP_FAILED);
    fflush(NULL);
    for (uint32_t i = 0; i < world_size; i++) {
        int pair[2];
        const struct timeval patience = {.tv_sec = PROCESS_PATIENCE_SECONDS};
        CHECK_EQUAL(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair), 0);
        CHECK_EQUAL(setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience), 0);
        processes.ranks[i] = (process_t){.rank = i, .world_size = world_size, .pid = fork(), .socket = pair[0]};
        CHECK(processes.ranks[i].pid >= 0);
        if (processes.ranks[i].pid > 0) {
            close(pair[1]);
            continue;
        }
        for (uint32_t other = 0; other <= i; other++)
            close(processes.ranks[other].socket);
        processes.ranks[i].socket = pair[1];
        process_main(&processes.ranks[i]);
    }
}

/* Forks the ranks and brings them together; returns when the engine of each is being finished. */
static inline void processes_start(uint32_t world_size, dss_transport_t transport,
                                   void (*body)(process_t *self, dss_engine_t *engine)) {
    uint8_t cards[RANKS_MOST * DSS_CARD_BYTES];
    uint32_t hosts[RANKS_MOST];
    processes_fork(world_size, transport, body, NULL);
    processes_gather(cards, DSS_CARD_BYTES);
    for (uint32_t i = 0; i < world_size; i++)
        CHECK_STATUS(dss_card_decode(cards + (size_t)i * DSS_CARD_BYTES, &processes.cards[i], NULL), DSS_OK);
    processes_gather(hosts, sizeof hosts[0]);
}

/* A rank that dies at one of its first calls, made by its engine's thread, may be dead by now, and needs no word any more. */
static inline void processes_go(uint32_t rank) {
    const ssize_t sent = send(processes.ranks[rank].socket, "", 1, MSG_NOSIGNAL);
    CHECK(sent == 1 || errno == EPIPE || errno == ECONNRESET);
}

static inline void processes_go_all(uint32_t except) {
    for (uint32_t i = 0; i < processes.world_size; i++)
        if (i != except)
            processes_go(i);
}

static inline message_t processes_expect(uint32_t rank, const char *what) {
    message_t message;
    process_receive(&processes.ranks[rank], &message, sizeof message, what);
    if (strcmp(message.what, what) != 0)
        CHECK_FAIL("rank %u reports \"%s\" (%s), expected \"%s\"", rank, message.what, message.text, what);
    return message;
}

static inline void processes_expect_all(const char *what, uint32_t except) {
    for (uint32_t i = 0; i < processes.world_size; i++)
        if (i != except)
            (void)processes_expect(i, what);
}

static inline void processes_signal(uint32_t rank, int signal_number) {
    CHECK_EQUAL(kill(processes.ranks[rank].pid, signal_number), 0);
}

/* When. */
static inline uint64_t processes_kill(uint32_t rank) {
    const uint64_t now = processes_now_ns();
    processes_signal(rank, SIGKILL);
    return now;
}

/* Until the rank is stopped. */
static inline void processes_await_stop(uint32_t rank) {
    int status = 0;
    CHECK_EQUAL(waitpid(processes.ranks[rank].pid, &status, WUNTRACED), processes.ranks[rank].pid);
    CHECK_FOR(WIFSTOPPED(status), "rank %u", rank);
}

/* All ranks end, and well, but for the one that was killed. */
static inline void processes_join(uint32_t killed) {
    for (uint32_t i = 0; i < processes.world_size; i++) {
        int status = 0;
        CHECK_EQUAL(waitpid(processes.ranks[i].pid, &status, 0), processes.ranks[i].pid);
        if (i == killed)
            CHECK_FOR(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "rank %u: status %#x", i, (unsigned)status);
        else
            CHECK_FOR(WIFEXITED(status) && WEXITSTATUS(status) == 0, "rank %u: status %#x", i, (unsigned)status);
        close(processes.ranks[i].socket);
    }
    munmap(processes.shared, sizeof *processes.shared);
}

#define NOBODY UINT32_MAX

/* How many entries a folder has; as a process sees its own descriptors and threads. */
static inline uint32_t count_entries(const char *path) {
    uint32_t count = 0;
    DIR *folder = opendir(path);
    CHECK_FOR(folder, "%s", path);
    while (readdir(folder))
        count++;
    closedir(folder);
    return count;
}

#endif
