/* Those who are not of the job: the parent plays them, on the ports and Unix sockets of ranks that are exchanging values meanwhile.
 * They are dropped, with a line in the log, and the ranks go on as if nothing were. */
#define _GNU_SOURCE /* MAP_ANONYMOUS */

#include "processes.h"

#include <netinet/in.h>
#include <sys/resource.h>

#define WORLD 3u
#define VISITED 1u
#define COUNT 5000u
#define FLOOD 300u

/* ---- ranks -------------------------------------------------------------------------------------------------------------- */

/* Rank 0 puts into the sum that it is time to stop. */
static void exchange_until_told(process_t *self, dss_engine_t *engine) {
    static float values[COUNT];
    bool stop = false;
    for (uint64_t step = 0; !stop; step++) {
        char go;
        const dss_segment_t segment = {values, COUNT};
        ranks_call_t call;
        for (uint32_t i = 0; i < COUNT; i++)
            values[i] = (float)((self->rank + 1) * (i % 1000));
        values[0] = self->rank == 0 && recv(self->socket, &go, 1, MSG_DONTWAIT) == 1 ? 1.0f : 0.0f;
        ranks_post(engine, ranks_params(engine, DSS_OPERATION_ALL_REDUCE, DSS_FLOAT32, &segment, step), &call);
        if (ranks_wait(&call) != DSS_OK)
            CHECK_FAIL("rank %u, step %" PRIu64 ": %s", self->rank, step, call.text);
        for (uint32_t i = 1; i < COUNT; i++)
            CHECK_FOR(values[i] == (float)(6 * (i % 1000)), "rank %u, step %" PRIu64 ", value %u", self->rank, step, i);
        stop = values[0] > 0;
        atomic_fetch_add(&processes.shared->steps[self->rank], 1);
    }
    process_report(self, "stopped", DSS_OK, NULL);
    process_await_go(self);
}

static void check_progress(void) {
    for (uint32_t i = 0; i < WORLD; i++) {
        const uint32_t before = atomic_load(&processes.shared->steps[i]);
        const uint64_t begin_ns = processes_now_ns();
        while (atomic_load(&processes.shared->steps[i]) < before + 5) {
            CHECK_FOR(processes_now_ns() < begin_ns + 5 * SECOND_NS, "rank %u goes on", i);
            processes_doze();
        }
    }
}

static void stop_exchange(void) {
    processes_go(0);
    processes_expect_all("stopped", NOBODY);
    processes_go_all(NOBODY);
    processes_join(NOBODY);
}

/* ---- strangers ---------------------------------------------------------------------------------------------------------- */

static int visit(uint32_t rank, bool unix_socket) {
    struct sockaddr_storage storage;
    const dss_card_t *card = &processes.cards[rank];
    const socklen_t length =
        unix_socket ? dss_unix_to_socket(card->unix_name, &storage) : dss_address_to_socket(&card->address, &storage);
    const int fd = socket(storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const struct timeval patience = {.tv_sec = 20};
    CHECK(fd >= 0);
    CHECK_EQUAL(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience), 0);
    CHECK_EQUAL(connect(fd, (struct sockaddr *)&storage, length), 0);
    return fd;
}

/* May be cut short by the other end. */
static void tell(int fd, const void *bytes, size_t bytes_count) {
    for (size_t sent = 0; sent < bytes_count;) {
        const ssize_t piece = send(fd, (const char *)bytes + sent, bytes_count - sent, MSG_NOSIGNAL);
        if (piece <= 0)
            return;
        sent += (size_t)piece;
    }
}

/* The other end hangs up, having said nothing. */
static void check_dropped(int fd, const char *who) {
    char answer;
    const ssize_t got = recv(fd, &answer, 1, 0);
    CHECK_FOR(got == 0 || (got < 0 && errno == ECONNRESET), "%s: %zd, %s", who, got, strerror(errno));
    close(fd);
}

static void await_log(uint32_t rank, uint32_t count) {
    while (atomic_load(&processes.shared->log_counts[rank]) < count)
        processes_doze();
}

typedef struct stranger {
    const char *who;
    uint8_t bytes[4 * DSS_HANDSHAKE_MESSAGE_BYTES];
    size_t bytes_count;
    bool hangs_up;
} stranger_t;

static void hello_of(stranger_t *stranger, dss_identity_t identity, uint32_t to) {
    static const uint8_t nonce[DSS_NONCE_BYTES] = {1, 2, 3};
    dss_handshake_t handshake;
    dss_handshake_dial(&handshake, &identity, to, DSS_WAY_FORTH, nonce, stranger->bytes);
    stranger->bytes_count = DSS_HANDSHAKE_MESSAGE_BYTES;
}

static void receive_strangers(bool unix_socket) {
    const dss_card_t *card = &processes.cards[0];
    dss_identity_t identity = {.epoch = card->epoch, .rank = 0, .world_size = WORLD};
    stranger_t strangers[] = {
        {.who = "garbage"},     {.who = "much garbage"},   {.who = "half a message", .bytes_count = 30, .hangs_up = true},
        {.who = "another job"}, {.who = "another secret"}, {.who = "another world"},
        {.who = "itself"},      {.who = "wrong number"}};
    uint64_t chance = 7;
    for (size_t i = 0; i < sizeof strangers[0].bytes; i++)
        strangers[0].bytes[i] = strangers[1].bytes[i] = (uint8_t)check_random(&chance);
    strangers[0].bytes_count = DSS_HANDSHAKE_MESSAGE_BYTES;
    strangers[1].bytes_count = sizeof strangers[1].bytes;
    hello_of(&strangers[4], identity, VISITED);
    hello_of(&strangers[2], identity, VISITED);
    strangers[2].bytes_count = 30;
    memcpy(identity.secret, card->secret, sizeof identity.secret);
    identity.epoch++;
    hello_of(&strangers[3], identity, VISITED);
    identity.epoch--;
    identity.world_size++;
    hello_of(&strangers[5], identity, VISITED);
    identity.world_size--;
    identity.rank = VISITED;
    hello_of(&strangers[6], identity, VISITED);
    identity.rank = 0;
    hello_of(&strangers[7], identity, 2);
    for (size_t i = 0; i < sizeof strangers / sizeof *strangers; i++) {
        const uint32_t logged = atomic_load(&processes.shared->log_counts[VISITED]);
        const int fd = visit(VISITED, unix_socket);
        tell(fd, strangers[i].bytes, strangers[i].bytes_count);
        if (strangers[i].hangs_up)
            close(fd);
        else
            check_dropped(fd, strangers[i].who);
        await_log(VISITED, logged + 1);
        CHECK_CONTAINS(processes.shared->log[VISITED][logged % 16], "dropped a caller: ");
        check_progress();
    }
}

/* Some megabytes that nobody reads. */
static void receive_a_lot(bool unix_socket) {
    static const uint8_t garbage[4 << 20];
    const int fd = visit(VISITED, unix_socket);
    tell(fd, garbage, sizeof garbage);
    check_dropped(fd, "a lot of garbage");
    check_progress();
}

static void run_strangers(dss_transport_t transport) {
    processes_start(WORLD, transport, exchange_until_told);
    check_progress();
    const int silent = visit(VISITED, false);
    const uint64_t begin_ns = processes_now_ns();
    for (int unix_socket = 0; unix_socket <= (transport == DSS_TRANSPORT_AUTO); unix_socket++) {
        receive_strangers(unix_socket);
        receive_a_lot(unix_socket);
    }
    if (transport == DSS_TRANSPORT_TCP) { /* once is enough: it takes ten seconds */
        check_dropped(silent, "one that says nothing");
        CHECK(processes_now_ns() > begin_ns + 9 * SECOND_NS);
        CHECK(processes_now_ns() < begin_ns + 10 * SECOND_NS + 2 * PROMPTLY_NS);
    } else {
        close(silent);
    }
    stop_exchange();
}

static void strangers_on_shared_memory_and_tcp(void) {
    run_strangers(DSS_TRANSPORT_AUTO);
}

static void strangers_on_tcp(void) {
    run_strangers(DSS_TRANSPORT_TCP);
}

/* ---- a flood ------------------------------------------------------------------------------------------------------------ */

static void meet(process_t *self, dss_engine_t *engine) {
    ranks_call_t call;
    process_report(self, "made", DSS_OK, NULL);
    process_await_go(self);
    ranks_post(engine, ranks_params(engine, DSS_OPERATION_BARRIER, DSS_FLOAT32, NULL, 0), &call);
    const dss_status_t status = ranks_wait(&call);
    process_report(self, "met", status, call.text);
    process_await_go(self);
}

/* Ranks that have no connection yet find each other although many callers hold every place. */
static void run_flood(dss_transport_t transport, bool unix_socket) {
    static int visitors[WORLD * FLOOD];
    processes_start(WORLD, transport, meet);
    processes_expect_all("made", NOBODY);
    for (uint32_t i = 0; i < WORLD * FLOOD; i++)
        visitors[i] = visit(i % WORLD, unix_socket);
    const uint64_t begin_ns = processes_now_ns();
    processes_go_all(NOBODY);
    for (uint32_t i = 0; i < WORLD; i++) {
        const message_t message = processes_expect(i, "met");
        if (message.status != DSS_OK)
            CHECK_FAIL("rank %u: %s", i, message.text);
        CHECK(message.at_ns < begin_ns + 2 * PROMPTLY_NS);
        CHECK(atomic_load(&processes.shared->log_counts[i]) > 0);
    }
    for (uint32_t i = 0; i < WORLD * FLOOD; i++)
        close(visitors[i]);
    processes_go_all(NOBODY);
    processes_join(NOBODY);
}

static void flood_on_tcp(void) {
    run_flood(DSS_TRANSPORT_TCP, false);
}

static void flood_on_unix_sockets(void) {
    run_flood(DSS_TRANSPORT_AUTO, true);
}

/* ---- two connections over TCP ------------------------------------------------------------------------------------------- */

/* The whole handshake, as rank 0 would do it; the verdict. */
static dss_verdict_t introduce(int fd, dss_way_t way) {
    static const uint8_t nonce[DSS_NONCE_BYTES] = {1, 2, 3};
    const dss_card_t *card = &processes.cards[0];
    dss_identity_t identity = {.epoch = card->epoch, .rank = 0, .world_size = WORLD};
    dss_handshake_t handshake;
    uint8_t message[DSS_HANDSHAKE_MESSAGE_BYTES];
    uint8_t answer[DSS_HANDSHAKE_MESSAGE_BYTES];
    memcpy(identity.secret, card->secret, sizeof identity.secret);
    dss_handshake_dial(&handshake, &identity, VISITED, way, nonce, message);
    tell(fd, message, sizeof message);
    while (handshake.state != DSS_HANDSHAKE_DONE) {
        bool answers = false;
        CHECK_EQUAL(recv(fd, message, sizeof message, MSG_WAITALL), sizeof message);
        CHECK_STATUS(dss_handshake_step(&handshake, message, answer, &answers, NULL), DSS_OK);
        if (answers)
            tell(fd, answer, sizeof answer);
    }
    return handshake.verdict;
}

static void a_way_back_that_nobody_waits_for_is_refused(void) {
    processes_start(WORLD, DSS_TRANSPORT_TCP, exchange_until_told);
    check_progress();
    const int fd = visit(VISITED, false);
    CHECK_EQUAL(introduce(fd, DSS_WAY_BACK), DSS_VERDICT_DUPLICATE);
    check_dropped(fd, "a second way back");
    check_progress();
    stop_exchange();
}

/* Welcomed, and then neither a second call nor silence: its operations end with an error that says so, and do not wait. */
static void half_a_connection_that_ends_is_an_error(void) {
    for (int speaks = 0; speaks < 2; speaks++) {
        static const uint8_t garbage[DSS_HANDSHAKE_MESSAGE_BYTES] = "dss";
        processes_start(WORLD, DSS_TRANSPORT_TCP, meet);
        processes_expect_all("made", NOBODY);
        const int fd = visit(VISITED, false);
        CHECK_EQUAL(introduce(fd, DSS_WAY_FORTH), DSS_VERDICT_WELCOME);
        if (speaks) {
            tell(fd, garbage, sizeof garbage);
            check_dropped(fd, "one that spoke too early");
        } else {
            close(fd);
        }
        processes_go_all(NOBODY);
        for (uint32_t i = 0; i < WORLD; i++) {
            const message_t message = processes_expect(i, "met");
            CHECK(message.status == DSS_ERR_PEER_LOST || message.status == DSS_ERR_FAILED);
            if (i == VISITED) {
                CHECK_CONTAINS(message.text, "rank 0 (");
                CHECK_CONTAINS(message.text,
                               speaks ? "it spoke where it had nothing to say" : "closed the connection in the handshake");
            }
        }
        processes_go_all(NOBODY);
        processes_join(NOBODY);
    }
}

/* ---- where a rank listens ----------------------------------------------------------------------------------------------- */

/* All its listening sockets are Unix sockets or bound to the address on the card, no wider. */
static void check_listeners(process_t *self, dss_engine_t *engine) {
    uint32_t inet_count = 0;
    const dss_address_t *expected = &processes.cards[self->rank].address;
    (void)engine;
    process_receive(self, &processes.cards[self->rank], sizeof(dss_card_t), "its card");
    for (int fd = 0; fd < 256; fd++) {
        struct sockaddr_storage storage = {0};
        socklen_t length = sizeof storage;
        int listens = 0;
        socklen_t listens_bytes = sizeof listens;
        if (getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &listens_bytes) != 0 || !listens)
            continue;
        CHECK_EQUAL(getsockname(fd, (struct sockaddr *)&storage, &length), 0);
        if (storage.ss_family == AF_UNIX)
            continue;
        dss_address_t address = {0};
        dss_address_from_socket(&storage, &address);
        inet_count++;
        CHECK_EQUAL(address.family, expected->family);
        CHECK_EQUAL(address.port, expected->port);
        CHECK(memcmp(address.bytes, expected->bytes, sizeof address.bytes) == 0);
        CHECK(dss_address_is_loopback(&address)); /* the interface of this test */
    }
    CHECK_EQUAL(inet_count, 1);
    process_report(self, "checked", DSS_OK, NULL);
    process_await_go(self);
}

static void listens_on_one_address(void) {
    processes_start(2, DSS_TRANSPORT_AUTO, check_listeners);
    for (uint32_t i = 0; i < 2; i++)
        process_send(&processes.ranks[i], &processes.cards[i], sizeof(dss_card_t));
    processes_expect_all("checked", NOBODY);
    processes_go_all(NOBODY);
    processes_join(NOBODY);
}

int main(void) {
    struct rlimit files;
    CHECK_EQUAL(getrlimit(RLIMIT_NOFILE, &files), 0);
    files.rlim_cur = files.rlim_max;
    CHECK_EQUAL(setrlimit(RLIMIT_NOFILE, &files), 0);
    RUN(listens_on_one_address);
    RUN(a_way_back_that_nobody_waits_for_is_refused);
    RUN(half_a_connection_that_ends_is_an_error);
    RUN(flood_on_tcp);
    RUN(flood_on_unix_sockets);
    RUN(strangers_on_shared_memory_and_tcp);
    RUN(strangers_on_tcp);
    return 0;
}
