/* Two connections over TCP, one for each direction: this program's own rank 0, whose listener and handshakes are played by hand,
 * breaks the one or the other while rank 1's engine makes them. */
#include "ranks.h"

#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/time.h>

#include "engine.h"

#define TIMEOUT_NS ((uint64_t)5 * 1000000000u)
#define REDIALS_NS ((uint64_t)400 * 1000000u) /* in which a peer that is lost would have been called again */

typedef struct scene {
    dss_card_t card; /* of rank 0 */
    int listener;
    dss_engine_t *engine; /* rank 1 */
    ranks_call_t call;
    int forth; /* the first connection, welcomed */
} scene_t;

static dss_status_t gather(void *argument, const void *mine, size_t bytes_each, void *all, dss_error_t *error_p) {
    const scene_t *scene = argument;
    uint8_t *both = all;
    (void)error_p;
    memset(both, 0, bytes_each); /* of what is not a card: rank 0 is on another host */
    if (bytes_each == DSS_CARD_BYTES)
        dss_card_encode(&scene->card, both);
    memcpy(both + bytes_each, mine, bytes_each);
    return DSS_OK;
}

static void post(scene_t *scene, uint64_t sequence, ranks_call_t *call) {
    dss_operation_params_t params = ranks_params(scene->engine, DSS_OPERATION_BARRIER, DSS_FLOAT32, NULL, sequence);
    params.timeout_ns = TIMEOUT_NS;
    ranks_post(scene->engine, params, call);
}

static int take_caller(const scene_t *scene) {
    const int fd = accept(scene->listener, NULL, NULL);
    const struct timeval patience = {.tv_sec = 20};
    CHECK(fd >= 0);
    CHECK_EQUAL(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience), 0);
    return fd;
}

static void hear(int fd, dss_handshake_t *handshake, bool answers) {
    uint8_t message[DSS_HANDSHAKE_MESSAGE_BYTES];
    uint8_t answer[DSS_HANDSHAKE_MESSAGE_BYTES];
    bool has_answer = false;
    CHECK_EQUAL(recv(fd, message, sizeof message, MSG_WAITALL), sizeof message);
    CHECK_STATUS(dss_handshake_step(handshake, message, answer, &has_answer, NULL), DSS_OK);
    if (has_answer && answers)
        CHECK_EQUAL(send(fd, answer, sizeof answer, MSG_NOSIGNAL), sizeof answer);
}

/* Up to the caller's HELLO, which is answered or not. */
static void begin_answer(const scene_t *scene, int fd, dss_identity_t *identity, dss_handshake_t *handshake, dss_way_t way,
                         bool answers) {
    static const uint8_t nonce[DSS_NONCE_BYTES] = {9};
    *identity = (dss_identity_t){.epoch = scene->card.epoch, .rank = 0, .world_size = 2};
    memcpy(identity->secret, scene->card.secret, sizeof identity->secret);
    dss_handshake_accept(handshake, identity, nonce);
    hear(fd, handshake, answers);
    CHECK_EQUAL(handshake->way, way);
}

static void answer(const scene_t *scene, int fd, dss_way_t way, dss_verdict_t verdict) {
    dss_identity_t identity;
    dss_handshake_t handshake;
    uint8_t message[DSS_HANDSHAKE_MESSAGE_BYTES];
    begin_answer(scene, fd, &identity, &handshake, way, true);
    hear(fd, &handshake, true);
    dss_handshake_decide(&handshake, verdict, message);
    CHECK_EQUAL(send(fd, message, sizeof message, MSG_NOSIGNAL), sizeof message);
}

/* The engine has posted a barrier, and its first call is welcomed. */
static void open_scene(scene_t *scene) {
    struct sockaddr_in name = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    struct sockaddr_storage storage = {0};
    socklen_t name_bytes = sizeof name;
    dss_error_t error = {0};
    *scene = (scene_t){.card = {.epoch = 77, .secret = "the secret of rank 0"}};
    scene->listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(bind(scene->listener, (struct sockaddr *)&name, name_bytes) == 0 && listen(scene->listener, 8) == 0);
    CHECK(getsockname(scene->listener, (struct sockaddr *)&name, &name_bytes) == 0);
    memcpy(&storage, &name, sizeof name);
    dss_address_from_socket(&storage, &scene->card.address);
    const dss_engine_params_t params = {.params_bytes = sizeof params,
                                        .rank = 1,
                                        .world_size = 2,
                                        .transport = DSS_TRANSPORT_TCP,
                                        .oob = {.allgather = gather, .argument = scene}};
    if (dss_engine_create(&params, &scene->engine, &error) != DSS_OK)
        CHECK_FAIL("%s", error.text);
    post(scene, 0, &scene->call);
    scene->forth = take_caller(scene);
    answer(scene, scene->forth, DSS_WAY_FORTH, DSS_VERDICT_WELCOME);
}

static void reset(int fd) {
    const struct linger linger = {1, 0};
    CHECK_EQUAL(setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof linger), 0);
    close(fd);
}

/* The barrier fails with this text, and rank 0 is lost for good: whatever is posted later fails at once, and nobody calls. */
static void close_scene(scene_t *scene, const char *text) {
    CHECK_STATUS(ranks_wait(&scene->call), DSS_ERR_PEER_LOST);
    CHECK_CONTAINS(scene->call.text, "rank 0 (");
    CHECK_CONTAINS(scene->call.text, text);
    const uint64_t begin_ns = dss_now_ns();
    for (uint64_t sequence = 1; dss_now_ns() < begin_ns + REDIALS_NS; sequence++) {
        ranks_call_t later;
        post(scene, sequence, &later);
        CHECK(ranks_wait(&later) != DSS_OK);
        CHECK_FOR(!strstr(later.text, "timed out"), "%s", later.text);
    }
    CHECK_FOR(dss_now_ns() < begin_ns + REDIALS_NS + TIMEOUT_NS / 2, "an operation waited");
    dss_engine_lock(scene->engine);
    CHECK_EQUAL(scene->engine->stats.lost_peers, 1);
    CHECK(!scene->engine->peers[0].dial && !scene->engine->peers[0].forth);
    dss_engine_unlock(scene->engine);
    dss_engine_destroy(scene->engine);
    if (scene->listener >= 0)
        close(scene->listener);
}

static void the_first_ends_while_the_second_is_redialed(void) {
    scene_t scene;
    dss_identity_t identity;
    dss_handshake_t handshake;
    open_scene(&scene);
    const int back = take_caller(&scene);
    begin_answer(&scene, back, &identity, &handshake, DSS_WAY_BACK, false);
    reset(back);
    reset(scene.forth);
    close_scene(&scene, "closed the connection in the handshake, its process has ended or shut down");
}

static void the_first_ends_before_the_second_is_refused(void) {
    scene_t scene;
    dss_identity_t identity;
    dss_handshake_t handshake;
    uint8_t message[DSS_HANDSHAKE_MESSAGE_BYTES];
    open_scene(&scene);
    const int back = take_caller(&scene);
    begin_answer(&scene, back, &identity, &handshake, DSS_WAY_BACK, true);
    hear(back, &handshake, true);
    close(scene.forth);
    CHECK_EQUAL(recv(back, message, 1, 0), 0); /* the engine has noticed, and hung up here too */
    close(back);
    close_scene(&scene, "closed the connection in the handshake, its process has ended or shut down");
}

/* As a killed process does it: the second call is still in the queue of its listener. */
static void the_listener_ends_and_then_the_first(void) {
    scene_t scene;
    open_scene(&scene);
    close(scene.listener);
    scene.listener = -1;
    reset(scene.forth);
    close_scene(&scene, "its process has ended or shut down its process group");
}

static void the_second_is_refused(void) {
    scene_t scene;
    open_scene(&scene);
    const int back = take_caller(&scene);
    answer(&scene, back, DSS_WAY_BACK, DSS_VERDICT_DUPLICATE);
    close_scene(&scene, "one of two connections broke in the handshake");
    close(back);
    close(scene.forth);
    open_scene(&scene);
    const int leaving = take_caller(&scene);
    answer(&scene, leaving, DSS_WAY_BACK, DSS_VERDICT_LEAVING);
    close_scene(&scene, "is shutting down its process group");
    close(leaving);
    close(scene.forth);
}

/* A call that fails is made again: a few of them are no reason to give the peer up. */
static void the_second_comes_at_the_third_try(void) {
    scene_t scene;
    dss_identity_t identity;
    dss_handshake_t handshake;
    open_scene(&scene);
    for (int i = 0; i < 2; i++) {
        const int back = take_caller(&scene);
        begin_answer(&scene, back, &identity, &handshake, DSS_WAY_BACK, false);
        reset(back);
    }
    const int back = take_caller(&scene);
    answer(&scene, back, DSS_WAY_BACK, DSS_VERDICT_WELCOME);
    uint8_t frame[DSS_FRAME_BYTES];
    CHECK_EQUAL(recv(scene.forth, frame, sizeof frame, MSG_WAITALL), sizeof frame); /* the barrier's OPEN, on the way forth */
    close(back);
    close(scene.forth);
    close_scene(&scene, "is gone: its process has ended");
}

int main(void) {
    RUN(the_first_ends_while_the_second_is_redialed);
    RUN(the_first_ends_before_the_second_is_refused);
    RUN(the_listener_ends_and_then_the_first);
    RUN(the_second_is_refused);
    RUN(the_second_comes_at_the_third_try);
    return 0;
}
