/* Many threads on one plan and one set of sources, as the shim uses them: no locks, and the same answers as one thread alone. The
 * thread sanitizer watches. */
#include "plans.h"

#include <pthread.h>

#define THREAD_COUNT 4u
#define ELEMENT_COUNT 3000u

typedef struct shared {
    const dss_plan_t *plan;
    const void *sources[3];
    pthread_barrier_t begin; /* so that all work at once */
    double expected_rho;
    uint64_t expected_digest;
} shared_t;

typedef struct worker {
    shared_t *shared;
    double rho;
    uint64_t digest; /* of everything this thread found out */
} worker_t;

static uint64_t digest_of(const shared_t *shared) {
    uint64_t digest = dss_plan_hash(shared->plan);
    float target[ELEMENT_COUNT];
    uint16_t narrow[ELEMENT_COUNT];
    for (uint32_t i = 0; i < 50; i++) {
        const uint32_t round = dss_plan_round_of_call(shared->plan, i);
        const uint32_t *members;
        uint32_t member_count;
        CHECK_STATUS(dss_plan_group_of_rank(shared->plan, round, i, &members, &member_count), DSS_OK);
        digest = dss_hash(members, member_count * sizeof *members, digest);
        CHECK_STATUS(dss_average(DSS_FLOAT32, shared->sources, 3, target, ELEMENT_COUNT), DSS_OK);
        CHECK_STATUS(dss_narrow_scaled(DSS_FLOAT16, target, 0.5, narrow, ELEMENT_COUNT), DSS_OK);
        CHECK_STATUS(dss_average(DSS_FLOAT16, shared->sources, 3, narrow, ELEMENT_COUNT), DSS_OK);
        digest = dss_hash(target, sizeof target, dss_hash(narrow, sizeof narrow, digest));
    }
    return digest;
}

static void *work(void *argument) {
    worker_t *worker = argument;
    pthread_barrier_wait(&worker->shared->begin);
    worker->digest = digest_of(worker->shared);
    CHECK_STATUS(dss_plan_contraction(worker->shared->plan, &worker->rho), DSS_OK);
    return NULL;
}

static void threads_share_a_plan_and_sources(void) {
    static float values[3][ELEMENT_COUNT];
    shared_t shared = {0};
    worker_t workers[THREAD_COUNT];
    pthread_t threads[THREAD_COUNT];
    uint64_t random = 8;
    dss_plan_t *plan = make_plan(DSS_PLAN_RANDOM, 60, 3, 0, 2);
    shared.plan = plan;
    for (uint32_t s = 0; s < 3; s++) {
        for (uint32_t i = 0; i < ELEMENT_COUNT; i++) {
            const uint32_t pair = check_random_below(&random, 0x7c00) << 16 | check_random_below(&random, 0x7c00); /* no NaN */
            memcpy(&values[s][i], &pair, sizeof pair);
        }
        shared.sources[s] = values[s];
    }
    CHECK_STATUS(dss_plan_contraction(plan, &shared.expected_rho), DSS_OK);
    shared.expected_digest = digest_of(&shared);
    CHECK(pthread_barrier_init(&shared.begin, NULL, THREAD_COUNT) == 0);
    for (uint32_t t = 0; t < THREAD_COUNT; t++) {
        workers[t] = (worker_t){&shared, -1, 0};
        CHECK(pthread_create(&threads[t], NULL, work, &workers[t]) == 0);
    }
    for (uint32_t t = 0; t < THREAD_COUNT; t++) {
        CHECK(pthread_join(threads[t], NULL) == 0);
        CHECK_FOR(workers[t].rho == shared.expected_rho, "thread %u: %g", t, workers[t].rho);
        CHECK_EQUAL(workers[t].digest, shared.expected_digest);
    }
    pthread_barrier_destroy(&shared.begin);
    dss_plan_destroy(plan);
}

int main(void) {
    RUN(threads_share_a_plan_and_sources);
}
