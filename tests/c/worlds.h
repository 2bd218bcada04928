/*
 * worlds.h: a few engines over a memory fabric, all handled by one test thread; their own threads make the progress.
 *
 * ranks.h gives each rank a thread, as in life; here one thread posts for every rank in the order that a test wants to see, and a
 * hundred worlds can be alive at once. Cards are exchanged without waiting for each other: the fabric needs no addresses.
 */
#ifndef DSS_WORLDS_H
#define DSS_WORLDS_H

#include "memory_stream.h"

#include <stdatomic.h>

#define WORLD_RANKS_MOST 6u

typedef struct world {
    uint32_t size;
    memory_fabric_t *fabric;
    dss_engine_t *engines[WORLD_RANKS_MOST];
    uint8_t first_card[DSS_CARD_BYTES];
} world_t;

typedef struct world_joiner {
    world_t *world;
    uint32_t rank;
} world_joiner_t;

/* Only rank 0's secret and epoch matter; every rank is a host of its own. */
static inline dss_status_t world_allgather(void *argument, const void *mine, size_t bytes_each, void *all, dss_error_t *error_p) {
    const world_joiner_t *joiner = argument;
    (void)error_p;
    if (joiner->rank == 0 && bytes_each == DSS_CARD_BYTES)
        memcpy(joiner->world->first_card, mine, bytes_each);
    for (uint32_t i = 0; i < joiner->world->size; i++)
        memcpy((uint8_t *)all + i * bytes_each,
               bytes_each == DSS_CARD_BYTES ? (const void *)joiner->world->first_card : (const void *)&i, bytes_each);
    return DSS_OK;
}

/* The fabric is the world's from then on. */
static inline void world_open(world_t *world, uint32_t size, memory_fabric_t *fabric) {
    dss_error_t error = {0};
    *world = (world_t){.size = size, .fabric = fabric};
    for (uint32_t rank = 0; rank < size; rank++) {
        world_joiner_t joiner = {world, rank};
        const dss_engine_params_t params = {.params_bytes = sizeof params,
                                            .rank = rank,
                                            .world_size = size,
                                            .transport = DSS_TRANSPORT_TCP,
                                            .oob = {.allgather = world_allgather, .argument = &joiner}};
        if (dss_engine_create(&params, &world->engines[rank], &error) != DSS_OK)
            CHECK_FAIL("rank %u: %s", rank, error.text);
        memory_fabric_join(fabric, world->engines[rank]);
    }
}

static inline void world_leave(world_t *world, uint32_t rank) {
    if (!world->engines[rank])
        return;
    memory_fabric_leave(world->fabric, world->engines[rank]);
    dss_engine_destroy(world->engines[rank]);
    world->engines[rank] = NULL;
}

static inline void world_close(world_t *world) {
    for (uint32_t rank = 0; rank < world->size; rank++)
        world_leave(world, rank);
    memory_fabric_destroy(world->fabric);
}

/* ---- calls -------------------------------------------------------------------------------------------------------------- */

typedef struct world_call {
    dss_operation_t *operation;
    atomic_int done_count;
    dss_status_t status;
    char text[1800];
} world_call_t;

static pthread_mutex_t world_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t world_changed = PTHREAD_COND_INITIALIZER; /* some call is done */

static inline void world_done(void *argument, dss_status_t status, const char *text) {
    world_call_t *call = argument;
    pthread_mutex_lock(&world_lock);
    call->status = status;
    snprintf(call->text, sizeof call->text, "%s", text ? text : "");
    atomic_fetch_add(&call->done_count, 1);
    pthread_cond_broadcast(&world_changed);
    pthread_mutex_unlock(&world_lock);
}

static const uint32_t world_everyone[WORLD_RANKS_MOST] = {0, 1, 2, 3, 4, 5};

/* A sum over everyone, on channel 1; change what differs. */
static inline dss_operation_params_t world_params(const world_t *world, const dss_segment_t *segment) {
    return (dss_operation_params_t){.params_bytes = sizeof(dss_operation_params_t),
                                    .kind = DSS_OPERATION_ALL_REDUCE,
                                    .dtype = DSS_FLOAT32,
                                    .reduction = DSS_SUM,
                                    .key = {.channel = 1},
                                    .members = world_everyone,
                                    .member_count = world->size,
                                    .segments = segment,
                                    .segment_count = segment ? 1 : 0,
                                    .timeout_ns = (uint64_t)120 * 1000000000u,
                                    .what = "call of the test"};
}

static inline void world_post(const world_t *world, uint32_t rank, dss_operation_params_t params, world_call_t *call) {
    dss_error_t error = {0};
    call->operation = NULL;
    call->status = 1;
    call->text[0] = 0;
    atomic_store(&call->done_count, 0);
    params.done = world_done;
    params.argument = call;
    if (dss_engine_post(world->engines[rank], &params, &call->operation, &error) != DSS_OK)
        CHECK_FAIL("post: %s", error.text);
}

/* Called back exactly once by then; a second time is seen by whoever looks again. */
static inline dss_status_t world_wait(world_call_t *call) {
    if (call->operation) {
        CHECK(dss_operation_wait(call->operation, UINT64_MAX));
        dss_operation_release(call->operation);
        call->operation = NULL;
    }
    CHECK_EQUAL(atomic_load(&call->done_count), 1);
    return call->status;
}

/* The same without driving: until the engine's own thread has called back. */
static inline dss_status_t world_await(world_call_t *call) {
    pthread_mutex_lock(&world_lock);
    while (atomic_load(&call->done_count) == 0)
        pthread_cond_wait(&world_changed, &world_lock);
    pthread_mutex_unlock(&world_lock);
    return world_wait(call);
}

#endif
