/*
 * ranks.h: several ranks in one test program, each a thread with an engine of its own, over whatever transport the test asks for.
 */
#ifndef DSS_RANKS_H
#define DSS_RANKS_H

#include "check.h" /* first: it asks for POSIX, barriers included */

#include <pthread.h>
#include <stdbool.h>

#include "dssync_engine.h"

#define RANKS_MOST 16u

typedef struct ranks {
    uint32_t world_size;
    dss_transport_t transport;
    void (*body)(dss_engine_t *engine, uint32_t rank, void *argument);
    void *argument;
    dss_status_t (*allgather)(void *argument, const void *mine, size_t bytes_each, void *all, dss_error_t *error_p);
    pthread_barrier_t barrier;
    uint8_t cards[RANKS_MOST * 256];
} ranks_t;

typedef struct ranks_one {
    ranks_t *ranks;
    uint32_t rank;
} ranks_one_t;

static inline dss_status_t ranks_allgather(void *argument, const void *mine, size_t bytes_each, void *all, dss_error_t *error_p) {
    const ranks_one_t *one = argument;
    ranks_t *ranks = one->ranks;
    (void)error_p;
    memcpy(ranks->cards + one->rank * bytes_each, mine, bytes_each);
    pthread_barrier_wait(&ranks->barrier);
    memcpy(all, ranks->cards, bytes_each * ranks->world_size);
    pthread_barrier_wait(&ranks->barrier);
    return DSS_OK;
}

static inline void *ranks_main(void *argument) {
    ranks_one_t *one = argument;
    ranks_t *ranks = one->ranks;
    dss_error_t error = {0};
    dss_engine_t *engine = NULL;
    const dss_engine_params_t params = {.params_bytes = sizeof params,
                                        .rank = one->rank,
                                        .world_size = ranks->world_size,
                                        .transport = ranks->transport,
                                        .oob = {.allgather = ranks->allgather, .argument = one}};
    if (dss_engine_create(&params, &engine, &error) != DSS_OK)
        CHECK_FAIL("rank %u: %s", one->rank, error.text);
    ranks->body(engine, one->rank, ranks->argument);
    pthread_barrier_wait(&ranks->barrier); /* nobody leaves while another needs it */
    dss_engine_destroy(engine);
    return NULL;
}

/* `allgather` calls ranks_allgather, and may change what it says. */
static inline void ranks_run_with(uint32_t world_size, dss_transport_t transport,
                                  dss_status_t (*allgather)(void *argument, const void *mine, size_t bytes_each, void *all,
                                                            dss_error_t *error_p),
                                  void (*body)(dss_engine_t *engine, uint32_t rank, void *argument), void *argument) {
    static ranks_t ranks;
    pthread_t threads[RANKS_MOST];
    ranks_one_t ones[RANKS_MOST];
    ranks = (ranks_t){.world_size = world_size, .transport = transport, .body = body, .argument = argument, .allgather = allgather};
    pthread_barrier_init(&ranks.barrier, NULL, world_size);
    for (uint32_t i = 0; i < world_size; i++) {
        ones[i] = (ranks_one_t){.ranks = &ranks, .rank = i};
        CHECK_EQUAL(pthread_create(&threads[i], NULL, ranks_main, &ones[i]), 0);
    }
    for (uint32_t i = 0; i < world_size; i++)
        pthread_join(threads[i], NULL);
    pthread_barrier_destroy(&ranks.barrier);
}

static inline void ranks_run(uint32_t world_size, dss_transport_t transport,
                             void (*body)(dss_engine_t *engine, uint32_t rank, void *argument), void *argument) {
    ranks_run_with(world_size, transport, ranks_allgather, body, argument);
}

/* ---- one call ----------------------------------------------------------------------------------------------------------- */

typedef struct ranks_call {
    dss_operation_t *operation;
    dss_status_t status;
    char text[1600];
    bool done;
} ranks_call_t;

static inline void ranks_done(void *argument, dss_status_t status, const char *text) {
    ranks_call_t *call = argument;
    call->status = status;
    snprintf(call->text, sizeof call->text, "%s", text ? text : "");
    call->done = true;
}

static const uint32_t ranks_everyone[RANKS_MOST] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* What most calls look like; change what differs. `segment` must live until the call is posted. */
static inline dss_operation_params_t ranks_params(dss_engine_t *engine, dss_operation_kind_t kind, dss_dtype_t dtype,
                                                  const dss_segment_t *segment, uint64_t sequence) {
    return (dss_operation_params_t){.params_bytes = sizeof(dss_operation_params_t),
                                    .kind = kind,
                                    .dtype = dtype,
                                    .reduction = DSS_SUM,
                                    .key = {.channel = 1, .sequence = sequence},
                                    .members = ranks_everyone,
                                    .member_count = dss_engine_world_size(engine),
                                    .segments = segment,
                                    .segment_count = segment ? 1 : 0,
                                    .timeout_ns = (uint64_t)60 * 1000000000u,
                                    .will_wait = 1,
                                    .what = "call of the test"};
}

static inline void ranks_post(dss_engine_t *engine, dss_operation_params_t params, ranks_call_t *call) {
    dss_error_t error = {0};
    *call = (ranks_call_t){0};
    params.done = ranks_done;
    params.argument = call;
    if (dss_engine_post(engine, &params, &call->operation, &error) != DSS_OK)
        CHECK_FAIL("post: %s", error.text);
}

static inline dss_status_t ranks_wait(ranks_call_t *call) {
    CHECK(dss_operation_wait(call->operation, UINT64_MAX));
    CHECK(call->done);
    dss_operation_release(call->operation);
    call->operation = NULL;
    return call->status;
}

#endif
