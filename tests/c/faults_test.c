/* What happens when connections break at any byte, are slow, or out of order, and when ranks do not agree: every rank gets the
 * right values or an error that names the culprit, soon, and nobody else is disturbed. */
#include "worlds.h"

#include <stdlib.h>

#define BATCH_COUNT                                                                                                                \
    48u /* worlds at once: a broken handshake is tried again after a tenth of a second, which none waits for alone */

static float value_of(uint32_t rank, uint64_t index) {
    return (float)((rank * 7919u + index * 104729u) % 1000u) - 500.0f;
}

static void fill(float *values, uint32_t count, uint32_t rank) {
    for (uint32_t i = 0; i < count; i++)
        values[i] = value_of(rank, i);
}

/* Sums of small integers: exact in any order. */
static void check_sums(const float *values, uint32_t count, const uint32_t *members, uint32_t member_count, uint32_t rank) {
    for (uint32_t i = 0; i < count; i++) {
        float sum = 0;
        for (uint32_t member = 0; member < member_count; member++)
            sum += value_of(members[member], i);
        if (values[i] != sum)
            CHECK_FAIL("rank %u, element %u of %u: %g, expected %g", rank, i, count, (double)values[i], (double)sum);
    }
}

/* ---- a break at every byte ---------------------------------------------------------------------------------------------- */

typedef struct broken_world {
    world_t world;
    memory_fault_t fault;
    float *values[3];
    world_call_t calls[3];
    float more[6][3];
    world_call_t more_calls[6];
} broken_world_t;

typedef struct breakage {
    uint32_t size;
    uint32_t count; /* elements */
    bool in_turn;   /* rank 0 calls everyone before they post */
} breakage_t;

static void broken_open(broken_world_t *broken, const breakage_t *breakage, memory_fault_t fault) {
    memory_fabric_t *fabric = memory_fabric_create(fault.at_bytes + 1);
    fabric->fault = fault;
    broken->fault = fault;
    world_open(&broken->world, breakage->size, fabric);
    for (uint32_t rank = 0; rank < breakage->size; rank++) {
        broken->values[rank] = malloc((breakage->count + 1) * sizeof(float));
        CHECK(broken->values[rank]);
        fill(broken->values[rank], breakage->count, rank);
    }
}

static void broken_post(broken_world_t *broken, const breakage_t *breakage, uint32_t rank) {
    const dss_segment_t segment = {broken->values[rank], breakage->count};
    if (breakage->in_turn && rank > 0)
        memory_fabric_await(broken->world.fabric, rank, 0, MEMORY_HANDSHAKE_BYTES);
    world_post(&broken->world, rank, world_params(&broken->world, &segment), &broken->calls[rank]);
}

static bool names_rank(const char *text, uint32_t rank) {
    char name[32];
    snprintf(name, sizeof name, "rank %u (", rank);
    return strstr(text, name) != NULL;
}

static void broken_check(broken_world_t *broken, const breakage_t *breakage) {
    const memory_fault_t *fault = &broken->fault;
    for (uint32_t rank = 0; rank < breakage->size; rank++) {
        world_call_t *call = &broken->calls[rank];
        if (world_wait(call) == DSS_OK) {
            check_sums(broken->values[rank], breakage->count, world_everyone, breakage->size, rank);
            continue;
        }
        const bool is_near = rank == fault->writer || rank == fault->reader;
        const bool names_other = names_rank(call->text, rank == fault->writer ? fault->reader : fault->writer);
        const bool is_told = call->status == DSS_ERR_FAILED && strstr(call->text, " gave up: ") &&
                             (names_rank(call->text, fault->writer) || names_rank(call->text, fault->reader));
        if (!is_told && !(is_near && call->status == DSS_ERR_PEER_LOST && names_other))
            CHECK_FAIL("rank %u, %u broken to %u at %" PRIu64 ": %s: %s", rank, fault->writer, fault->reader, fault->at_bytes,
                       dss_status_string(call->status), call->text);
    }
}

static bool is_broken(const memory_fault_t *fault, uint32_t one, uint32_t other) {
    return (one == fault->writer && other == fault->reader) || (one == fault->reader && other == fault->writer);
}

/* Those whose connection has held go on, on another channel. */
static void broken_go_on(broken_world_t *broken) {
    for (uint32_t i = 0; i < 6; i++) {
        const uint32_t rank = i / 2;
        const uint32_t other = i % 2 == 0 ? (rank + 1) % 3 : (rank + 2) % 3;
        const uint32_t members[2] = {rank < other ? rank : other, rank < other ? other : rank};
        if (is_broken(&broken->fault, rank, other))
            continue;
        fill(broken->more[i], 3, rank);
        const dss_segment_t segment = {broken->more[i], 3};
        dss_operation_params_t params = world_params(&broken->world, &segment);
        params.key.channel = 2 + rank + other;
        params.members = members;
        params.member_count = 2;
        world_post(&broken->world, rank, params, &broken->more_calls[i]);
    }
}

static void broken_check_more(broken_world_t *broken) {
    for (uint32_t i = 0; i < 6; i++) {
        const uint32_t rank = i / 2;
        const uint32_t other = i % 2 == 0 ? (rank + 1) % 3 : (rank + 2) % 3;
        const uint32_t members[2] = {rank, other};
        if (is_broken(&broken->fault, rank, other))
            continue;
        if (world_wait(&broken->more_calls[i]) != DSS_OK)
            CHECK_FAIL("rank %u, undisturbed by a break between %u and %u: %s", rank, broken->fault.writer, broken->fault.reader,
                       broken->more_calls[i].text);
        check_sums(broken->more[i], 3, members, 2, rank);
    }
}

static void broken_close(broken_world_t *broken) {
    world_close(&broken->world);
    for (uint32_t rank = 0; rank < broken->world.size; rank++) {
        CHECK_EQUAL(atomic_load(&broken->calls[rank].done_count), 1);
        free(broken->values[rank]);
    }
}

/* Breaks after offsets begin, begin + stride, ... below end; of one direction. */
static void break_range(const breakage_t *breakage, memory_fault_t fault, uint64_t begin, uint64_t end, uint64_t stride) {
    static broken_world_t worlds[BATCH_COUNT];
    while (begin < end) {
        uint32_t count = 0;
        for (; count < BATCH_COUNT && begin < end; begin += stride) {
            fault.at_bytes = begin;
            broken_open(&worlds[count++], breakage, fault);
        }
        for (uint32_t rank = 0; rank < breakage->size; rank++)
            for (uint32_t i = 0; i < count; i++)
                broken_post(&worlds[i], breakage, rank);
        for (uint32_t i = 0; i < count; i++) {
            broken_check(&worlds[i], breakage);
            if (breakage->size == 3)
                broken_go_on(&worlds[i]);
        }
        for (uint32_t i = 0; i < count; i++) {
            if (breakage->size == 3)
                broken_check_more(&worlds[i]);
            broken_close(&worlds[i]);
        }
    }
}

/* Every `stride` bytes of the first two ranks' connection, and fewer of the others. */
static void break_everywhere(const breakage_t *breakage, int error, uint64_t bytes, uint64_t stride) {
    static uint64_t chance = 88172645463325252u;
    for (uint32_t writer = 0; writer < breakage->size; writer++)
        for (uint32_t reader = 0; reader < breakage->size; reader++) {
            const memory_fault_t fault = {.writer = writer, .reader = reader, .error = error};
            const uint64_t step = writer + reader == 1 ? stride : 4 * stride + 1;
            if (writer != reader)
                break_range(breakage, fault, check_random_below(&chance, (uint32_t)step), bytes, step);
        }
}

/* What one rank writes to another: the handshake, two headers, a signature, the values, a goodbye. */
static uint64_t bytes_of(uint64_t value_bytes) {
    const uint64_t padded = (value_bytes + DSS_FRAME_ALIGNMENT - 1) / DSS_FRAME_ALIGNMENT * DSS_FRAME_ALIGNMENT;
    return MEMORY_HANDSHAKE_BYTES + 3 * DSS_FRAME_BYTES + DSS_SIGNATURE_BYTES + padded + 2;
}

static void pairs_reset_at_every_byte(void) {
    for (int in_turn = 0; in_turn < 2; in_turn++) {
        const breakage_t breakage = {2, 5, in_turn != 0};
        break_everywhere(&breakage, ECONNRESET, bytes_of(20), 1 + 6 * IS_SANITIZED);
    }
}

static void pairs_closed_at_every_byte(void) {
    for (int in_turn = 0; in_turn < 2; in_turn++) {
        const breakage_t breakage = {2, 5, in_turn != 0};
        break_everywhere(&breakage, EPIPE, bytes_of(20), 1 + 6 * IS_SANITIZED);
    }
}

static void small_groups_reset_at_every_byte(void) {
    const breakage_t breakage = {3, 4, true};
    break_everywhere(&breakage, ECONNRESET, bytes_of(16), 1 + 10 * IS_SANITIZED);
}

static void small_groups_closed_at_every_byte(void) {
    const breakage_t breakage = {3, 4, false};
    break_everywhere(&breakage, EPIPE, bytes_of(16), 2 + 11 * IS_SANITIZED);
}

/* Two ranks never come through to each other, whoever calls: the third hears of it too. */
static void handshakes_that_always_break_end(void) {
    const breakage_t in_turn = {3, 4, true};
    const breakage_t at_once = {3, 4, false};
    for (uint32_t writer = 0; writer < 2; writer++) {
        const memory_fault_t fault = {.writer = writer, .reader = 1 - writer, .every = true, .error = ECONNRESET};
        break_range(&in_turn, fault, 0, MEMORY_HANDSHAKE_BYTES, 9 + 10 * IS_SANITIZED);
        break_range(&at_once, fault, 3, MEMORY_HANDSHAKE_BYTES, 9 + 10 * IS_SANITIZED);
    }
}

/* Two phases of 2732 bytes each way: every byte in the end of the one and the begin of the next, and in strides elsewhere. */
static void sharded_groups_break_anywhere(void) {
    const uint32_t count = 2049;
    const uint64_t all = bytes_of(2 * 2732) + DSS_FRAME_BYTES;
    const breakage_t in_turn = {3, count, true};
    const breakage_t at_once = {3, count, false};
    break_everywhere(&in_turn, ECONNRESET, all, 19 + 200 * IS_SANITIZED);
    break_everywhere(&at_once, EPIPE, all, 23 + 200 * IS_SANITIZED);
    const memory_fault_t fault = {.writer = 0, .reader = 1, .error = EPIPE};
    break_range(&in_turn, fault, bytes_of(2732) - 70, bytes_of(2732) + 20, 1 + 10 * IS_SANITIZED);
}

/* ---- slow, late and out of order ---------------------------------------------------------------------------------------- */

#define MIXED_COUNT 40u /* operations in flight at once */
#define MIXED_MOST 30000u

/* One operation as all its members know it. */
typedef struct mixed {
    uint32_t members[4];
    uint32_t member_count;
    uint32_t count;
    dss_key_t key;
    dss_operation_kind_t kind;
} mixed_t;

typedef struct mixed_call {
    world_call_t call;
    float *values;
} mixed_call_t;

static float rough_value(uint32_t rank, uint32_t operation, uint32_t index) {
    return value_of(rank + operation, index) * 0.1f + 1.0f / (float)(1 + rank); /* a sum depends on its order */
}

static void mixed_make(mixed_t *mixed, uint32_t index, uint64_t *chance) {
    *mixed = (mixed_t){.kind = index % 3 == 0 ? DSS_OPERATION_AVERAGE : DSS_OPERATION_ALL_REDUCE,
                       .key = {.channel = index % 5, .sequence = index / 5, .part = index % 2}};
    while (mixed->member_count < 2) {
        mixed->member_count = 0;
        const uint32_t set = check_random_below(chance, 16);
        for (uint32_t rank = 0; rank < 4; rank++)
            if (set >> rank & 1)
                mixed->members[mixed->member_count++] = rank;
    }
    mixed->count = index % 4 == 0 ? check_random_below(chance, MIXED_MOST) : check_random_below(chance, 3000);
}

static bool mixed_has(const mixed_t *mixed, uint32_t rank) {
    for (uint32_t i = 0; i < mixed->member_count; i++)
        if (mixed->members[i] == rank)
            return true;
    return false;
}

static void mixed_post(const world_t *world, const mixed_t *mixed, uint32_t rank, uint32_t index, mixed_call_t *call) {
    call->values = malloc((mixed->count + 1) * sizeof(float));
    CHECK(call->values);
    for (uint32_t i = 0; i < mixed->count; i++)
        call->values[i] = rough_value(rank, index, i);
    const dss_segment_t segment = {call->values, mixed->count};
    dss_operation_params_t params = world_params(world, &segment);
    params.kind = mixed->kind;
    params.key = mixed->key;
    params.members = mixed->members;
    params.member_count = mixed->member_count;
    world_post(world, rank, params, &call->call);
}

/* All operations of a seed on four ranks, each posting in an order of its own; the values go to results[operation][rank]. */
static void mixed_run(memory_fabric_t *fabric, const mixed_t *all, uint64_t order, float *results[MIXED_COUNT][4]) {
    const bool may_fail = fabric->fault.error != 0;
    static mixed_call_t calls[MIXED_COUNT][4];
    uint32_t next[4 * MIXED_COUNT];
    world_t world;
    world_open(&world, 4, fabric);
    for (uint32_t i = 0; i < 4 * MIXED_COUNT; i++) {
        const uint32_t at = check_random_below(&order, i + 1);
        next[i] = next[at];
        next[at] = i;
    }
    for (uint32_t i = 0; i < 4 * MIXED_COUNT; i++)
        if (mixed_has(&all[next[i] / 4], next[i] % 4))
            mixed_post(&world, &all[next[i] / 4], next[i] % 4, next[i] / 4, &calls[next[i] / 4][next[i] % 4]);
    for (uint32_t i = 4 * MIXED_COUNT; i-- > 0;) {
        mixed_call_t *call = &calls[next[i] / 4][next[i] % 4];
        results[next[i] / 4][next[i] % 4] = NULL;
        if (!mixed_has(&all[next[i] / 4], next[i] % 4))
            continue;
        const dss_status_t status = i % 2 ? world_wait(&call->call) : world_await(&call->call);
        if (status == DSS_OK)
            results[next[i] / 4][next[i] % 4] = call->values;
        else if (may_fail && (status == DSS_ERR_PEER_LOST || status == DSS_ERR_FAILED))
            free(call->values); /* the engine may not touch them any more */
        else
            CHECK_FAIL("operation %u on rank %u: %s", next[i] / 4, next[i] % 4, call->call.text);
    }
    world_close(&world);
}

static void mixed_check(const mixed_t *mixed, uint32_t index, float *const results[4], float *const plain[4]) {
    const uint32_t first = mixed->members[0];
    for (uint32_t i = 0; i < mixed->count; i++) {
        double sum = 0;
        for (uint32_t member = 0; member < mixed->member_count; member++)
            sum += (double)rough_value(mixed->members[member], index, i);
        if (mixed->kind == DSS_OPERATION_AVERAGE)
            sum /= mixed->member_count;
        CHECK_NEAR((double)results[first][i], sum, 1e-4);
    }
    for (uint32_t member = 0; member < mixed->member_count; member++) {
        const uint32_t rank = mixed->members[member];
        CHECK_FOR(memcmp(results[rank], results[first], mixed->count * sizeof(float)) == 0, "operation %u, rank %u", index, rank);
        CHECK_FOR(memcmp(results[rank], plain[rank], mixed->count * sizeof(float)) == 0, "operation %u, rank %u", index, rank);
    }
}

static memory_fabric_t *mixed_fabric(uint64_t seed) {
    memory_fabric_t *fabric = memory_fabric_create(seed);
    fabric->delays = seed % 2 == 0;
    fabric->capacity = seed % 3 == 0 ? 777 : seed % 3 == 1 ? 4096 : (size_t)64 << 10;
    fabric->most_at_once = seed % 3 == 0 ? 300 : 5000;
    return fabric;
}

static void mixed_free(float *results[MIXED_COUNT][4]) {
    for (uint32_t i = 0; i < 4 * MIXED_COUNT; i++)
        free(results[i / 4][i % 4]);
}

static mixed_t mixed_all[MIXED_COUNT];
static float *mixed_plain[MIXED_COUNT][4];
static float *mixed_results[MIXED_COUNT][4];

static void mixed_begin(void) {
    uint64_t chance = 2463534242u;
    for (uint32_t i = 0; i < MIXED_COUNT; i++)
        mixed_make(&mixed_all[i], i, &chance);
    mixed_run(memory_fabric_create(1), mixed_all, 1, mixed_plain);
}

/* The same operations over smaller and slower fabrics. */
static void delays_change_no_bit(void) {
    mixed_begin();
    for (uint64_t seed = 1; seed <= 12u - 8u * IS_SANITIZED; seed++) {
        mixed_run(mixed_fabric(seed), mixed_all, seed + 1, mixed_results);
        for (uint32_t i = 0; i < MIXED_COUNT; i++)
            mixed_check(&mixed_all[i], i, mixed_results[i], mixed_plain[i]);
        mixed_free(mixed_results);
    }
    mixed_free(mixed_plain);
}

/* Many operations under way when a connection breaks: those that succeed have the values that they would have had. */
static void breaks_change_no_bit(void) {
    uint64_t chance = 362436069u;
    mixed_begin();
    for (uint64_t seed = 1; seed <= 60u - 45u * IS_SANITIZED; seed++) {
        memory_fabric_t *fabric = mixed_fabric(seed);
        fabric->fault.writer = check_random_below(&chance, 4);
        fabric->fault.reader = (fabric->fault.writer + 1 + check_random_below(&chance, 3)) % 4;
        fabric->fault.at_bytes = check_random_below(&chance, 2u << check_random_below(&chance, 18));
        fabric->fault.error = seed % 4 < 2 ? ECONNRESET : EPIPE;
        mixed_run(fabric, mixed_all, seed + 1, mixed_results);
        for (uint32_t i = 0; i < 4 * MIXED_COUNT; i++) {
            const float *values = mixed_results[i / 4][i % 4];
            CHECK_FOR(!values || memcmp(values, mixed_plain[i / 4][i % 4], mixed_all[i / 4].count * sizeof(float)) == 0,
                      "seed %" PRIu64 ", operation %u, rank %u", seed, i / 4, i % 4);
        }
        mixed_free(mixed_results);
    }
    mixed_free(mixed_plain);
}

/* Every byte a write of its own: frames and elements are cut everywhere. */
static void single_bytes_are_enough(void) {
    const uint32_t count = 2100; /* sharded */
    float values[3][2100];
    world_call_t calls[3];
    world_t world;
    memory_fabric_t *fabric = memory_fabric_create(9);
    fabric->most_at_once = 1;
    fabric->capacity = 200;
    world_open(&world, 3, fabric);
    for (uint32_t rank = 0; rank < 3; rank++) {
        fill(values[rank], count, rank);
        const dss_segment_t segment = {values[rank], count};
        world_post(&world, rank, world_params(&world, &segment), &calls[rank]);
    }
    for (uint32_t rank = 0; rank < 3; rank++) {
        if (world_await(&calls[rank]) != DSS_OK)
            CHECK_FAIL("rank %u: %s", rank, calls[rank].text);
        check_sums(values[rank], count, world_everyone, 3, rank);
    }
    world_close(&world);
}

/* A group's last element comes before its turn, and behind it, on the same connection, is what the others wait for. */
static void last_element_holds_nobody_up(void) {
    const uint32_t count = 3 * (DSS_FRAME_PAYLOAD / sizeof(float) + 1); /* each shard: a frame and one element */
    const uint32_t pair[2] = {0, 2};
    float *values[3];
    float small[2] = {1, 2};
    world_call_t calls[3];
    world_call_t small_calls[2];
    world_t world;
    world_open(&world, 3, memory_fabric_create(1));
    for (uint32_t i = 0; i < 3; i++) {
        const uint32_t rank = (i + 2) % 3; /* 2, 0, and at the end 1 */
        const dss_segment_t segment = {values[rank] = malloc(count * sizeof(float)), count};
        CHECK(values[rank]);
        fill(values[rank], count, rank);
        if (rank == 1) /* whose turn it is in rank 0's shard; it posts when the small operation behind is done */
            CHECK_STATUS(world_await(&small_calls[0]), DSS_OK);
        world_post(&world, rank, world_params(&world, &segment), &calls[rank]);
        if (rank == 1)
            continue;
        if (rank == 0)
            memory_fabric_await(world.fabric, 2, 0, count * sizeof(float) / 3);
        const dss_segment_t small_segment = {&small[rank / 2], 1};
        dss_operation_params_t params = world_params(&world, &small_segment);
        params.key.channel = 2;
        params.members = pair;
        params.member_count = 2;
        world_post(&world, rank, params, &small_calls[rank / 2]);
    }
    CHECK_STATUS(world_await(&small_calls[1]), DSS_OK);
    for (uint32_t rank = 0; rank < 3; rank++) {
        CHECK_STATUS(world_await(&calls[rank]), DSS_OK);
        check_sums(values[rank], count, world_everyone, 3, rank);
        free(values[rank]);
    }
    CHECK_EQUAL(small[0], 3);
    world_close(&world);
}

/* ---- ahead of the others ------------------------------------------------------------------------------------------------ */

#define EAGER_COUNT 80u /* pairs of DSS_EAGER_BYTES each: more than DSS_EAGER_TOTAL together */

typedef struct eager {
    world_t world;
    float *values[2][EAGER_COUNT];
    world_call_t calls[2][EAGER_COUNT];
} eager_t;

static const uint32_t eager_elements = DSS_EAGER_BYTES / sizeof(float);

static void eager_post(eager_t *eager, uint32_t rank, uint32_t index, uint64_t channel, uint64_t timeout_ns) {
    float **values = &eager->values[rank][index];
    *values = malloc(DSS_EAGER_BYTES);
    CHECK(*values);
    fill(*values, eager_elements, rank + index);
    const dss_segment_t segment = {*values, eager_elements};
    dss_operation_params_t params = world_params(&eager->world, &segment);
    params.key = (dss_key_t){.channel = channel, .sequence = index};
    params.timeout_ns = timeout_ns;
    world_post(&eager->world, rank, params, &eager->calls[rank][index]);
}

static void eager_finish(eager_t *eager) {
    for (uint32_t index = 0; index < EAGER_COUNT; index++)
        for (uint32_t rank = 0; rank < 2; rank++) {
            const uint32_t members[2] = {index, index + 1};
            if (world_wait(&eager->calls[rank][index]) != DSS_OK)
                CHECK_FAIL("operation %u on rank %u: %s", index, rank, eager->calls[rank][index].text);
            check_sums(eager->values[rank][index], eager_elements, members, 2, rank);
            free(eager->values[rank][index]);
        }
}

static void values_may_come_before_the_post(void) {
    static eager_t eager;
    world_open(&eager.world, 2, memory_fabric_create(1));
    for (uint32_t index = 0; index < EAGER_COUNT; index++)
        eager_post(&eager, 0, index, 1, UINT64_MAX);
    memory_fabric_await(eager.world.fabric, 0, 1, DSS_EAGER_TOTAL);
    for (uint32_t index = EAGER_COUNT; index-- > 0;)
        eager_post(&eager, 1, index, 1, UINT64_MAX);
    eager_finish(&eager);
    world_close(&eager.world);
}

/* What was sent ahead on a channel that has failed does not count any more. */
static void failed_channel_gives_its_room_back(void) {
    static eager_t eager;
    world_open(&eager.world, 2, memory_fabric_create(1));
    for (uint64_t channel = 1; channel <= 3; channel++) {
        for (uint32_t index = 0; index < EAGER_COUNT; index++)
            eager_post(&eager, 0, index, channel, (uint64_t)300 * 1000000u);
        memory_fabric_await(eager.world.fabric, 0, 1, channel * DSS_EAGER_TOTAL);
        for (uint32_t index = 0; index < EAGER_COUNT; index++) {
            CHECK(world_await(&eager.calls[0][index]) != DSS_OK);
            CHECK_CONTAINS(eager.calls[0][index].text, "rank 1");
            CHECK_CONTAINS(eager.calls[0][index].text, "has not launched call of the test");
            free(eager.values[0][index]);
        }
    }
    for (uint32_t index = 0; index < EAGER_COUNT; index++)
        eager_post(&eager, 0, index, 9, UINT64_MAX);
    for (uint32_t index = 0; index < EAGER_COUNT; index++)
        eager_post(&eager, 1, index, 9, UINT64_MAX);
    eager_finish(&eager);
    world_close(&eager.world);
}

/* ---- ranks that do not agree -------------------------------------------------------------------------------------------- */

typedef struct disagreement {
    const char *common;  /* what the others have; part of the error */
    const char *special; /* what one has */
    void (*change)(dss_operation_params_t *params);
} disagreement_t;

static void change_count(dss_operation_params_t *params) {
    static float values[11];
    static const dss_segment_t segment = {values, 11};
    params->segments = &segment;
}

static void change_many(dss_operation_params_t *params) {
    static float values[20000];
    static const dss_segment_t segment = {values, 20000};
    params->segments = &segment;
}

static void change_dtype(dss_operation_params_t *params) {
    params->dtype = DSS_INT32;
}

static void change_reduction(dss_operation_params_t *params) {
    params->reduction = DSS_MAX;
}

static void change_kind(dss_operation_params_t *params) {
    params->kind = DSS_OPERATION_AVERAGE;
}

static void change_to_barrier(dss_operation_params_t *params) {
    params->kind = DSS_OPERATION_BARRIER;
    params->segment_count = 0;
}

static void change_layout(dss_operation_params_t *params) {
    params->layout++;
}

static void go_on_together(world_t *world, uint64_t channel) {
    float values[WORLD_RANKS_MOST][7];
    world_call_t calls[WORLD_RANKS_MOST];
    for (uint32_t rank = 0; rank < world->size; rank++) {
        fill(values[rank], 7, rank);
        const dss_segment_t segment = {values[rank], 7};
        dss_operation_params_t params = world_params(world, &segment);
        params.key.channel = channel;
        world_post(world, rank, params, &calls[rank]);
    }
    for (uint32_t rank = 0; rank < world->size; rank++) {
        if (world_wait(&calls[rank]) != DSS_OK)
            CHECK_FAIL("rank %u cannot go on: %s", rank, calls[rank].text);
        check_sums(values[rank], 7, world_everyone, world->size, rank);
    }
}

static void check_disagreement(world_call_t *call, const char *one, const char *other) {
    const dss_status_t status = world_wait(call);
    if (status != DSS_ERR_MISMATCH && status != DSS_ERR_FAILED)
        CHECK_FAIL("%s: %s", dss_status_string(status), call->text);
    CHECK_CONTAINS(call->text, "the ranks did not call the same thing");
    CHECK_CONTAINS(call->text, one);
    CHECK_CONTAINS(call->text, other);
}

static void disagreements_fail_everywhere(void) {
    static const disagreement_t all[] = {
        {"all_reduce sum of 9 x float32 over 3 ranks", "all_reduce sum of 11 x float32 over 3 ranks", change_count},
        {"all_reduce sum of 9 x float32 over 3 ranks", "all_reduce sum of 20000 x float32 over 3 ranks", change_many},
        {"all_reduce sum of 9 x float32 over 3 ranks", "all_reduce sum of 9 x int32 over 3 ranks", change_dtype},
        {"all_reduce sum of 9 x float32 over 3 ranks", "all_reduce max of 9 x float32 over 3 ranks", change_reduction},
        {"all_reduce sum of 9 x float32 over 3 ranks", "average of 9 x float32 over 3 ranks", change_kind},
        {"all_reduce sum of 9 x float32 over 3 ranks", "barrier over 3 ranks", change_to_barrier},
        {"all_reduce sum of 9 x float32 over 3 ranks", "names of the tensors differ", change_layout},
    };
    static float values[3][9];
    world_t world;
    uint64_t channel = 10;
    world_open(&world, 3, memory_fabric_create(1));
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        for (uint32_t order = 0; order < 9; order++) { /* who differs, and who posts first */
            world_call_t calls[3];
            for (uint32_t step = 0; step < 3; step++) {
                const uint32_t rank = (step + order / 3) % 3;
                const dss_segment_t segment = {values[rank], 9};
                dss_operation_params_t params = world_params(&world, &segment);
                params.key.channel = channel;
                if (rank == order % 3)
                    all[i].change(&params);
                world_post(&world, rank, params, &calls[rank]);
            }
            for (uint32_t rank = 0; rank < 3; rank++)
                check_disagreement(&calls[rank], all[i].common, all[i].special);
            go_on_together(&world, channel + 1);
            channel += 2;
        }
    world_close(&world);
}

static void groups_that_differ_fail_everywhere(void) {
    static const struct {
        uint32_t members[4][4];
        uint32_t counts[4];
        const char *one;
        const char *other;
    } cases[] = {
        {{{0, 1, 2}, {0, 1, 3}, {0, 1, 2}, {0, 1, 3}}, {3, 3, 3, 3}, "over 3 ranks", "the groups are not of the same ranks"},
        {{{0, 1}, {0, 1, 2}, {0, 1, 2}, {3}}, {2, 3, 3, 1}, "over 2 ranks", "over 3 ranks"},
        {{{0, 1, 2, 3}, {0, 1, 2, 3}, {0, 1, 2, 3}, {1, 3}}, {4, 4, 4, 2}, "over 4 ranks", "over 2 ranks"},
    };
    static float values[4][9];
    world_t world;
    world_open(&world, 4, memory_fabric_create(1));
    for (uint32_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        world_call_t calls[4];
        for (uint32_t rank = 0; rank < 4; rank++) {
            const dss_segment_t segment = {values[rank], 9};
            dss_operation_params_t params = world_params(&world, &segment);
            params.key.channel = 100 + 2 * i;
            params.members = cases[i].members[rank];
            params.member_count = cases[i].counts[rank];
            world_post(&world, rank, params, &calls[rank]);
        }
        for (uint32_t rank = 0; rank < 4; rank++)
            if (cases[i].counts[rank] == 1)
                (void)world_wait(&calls[rank]); /* alone, but it may have heard that the channel has failed */
            else
                check_disagreement(&calls[rank], cases[i].one, cases[i].other);
        go_on_together(&world, 101 + 2 * i);
    }
    world_close(&world);
}

/* ---- ranks that stay away ----------------------------------------------------------------------------------------------- */

static void absent_rank_is_named(void) {
    static float values[3][40000]; /* shards that are not sent ahead: nobody can finish without the other two */
    world_t world;
    world_call_t calls[3];
    world_open(&world, 3, memory_fabric_create(1));
    go_on_together(&world, 7); /* now all are connected */
    for (uint32_t rank = 0; rank < 3; rank++) {
        const dss_segment_t segment = {values[rank], 40000};
        dss_operation_params_t params = world_params(&world, &segment);
        params.timeout_ns = (uint64_t)(rank == 0 ? 300 : 100000) * 1000000u;
        params.what = "step 17";
        if (rank == 2) /* too late */
            CHECK_STATUS(world_await(&calls[0]), DSS_ERR_TIMED_OUT);
        world_post(&world, rank, params, &calls[rank]);
    }
    CHECK_STATUS(world_await(&calls[1]), DSS_ERR_FAILED);
    CHECK_STATUS(world_await(&calls[2]), DSS_ERR_FAILED);
    for (uint32_t rank = 0; rank < 3; rank++) {
        CHECK_CONTAINS(calls[rank].text, "timed out after 0.3 s: ");
        CHECK_CONTAINS(calls[rank].text, "rank 2 (");
        CHECK_CONTAINS(calls[rank].text, "has not launched step 17");
    }
    CHECK_CONTAINS(calls[2].text, "rank 0 gave up: ");
    go_on_together(&world, 2);
    world_close(&world);
}

/* Each has launched what the other has not, on a channel of its own: where neither can know, both are told. */
static void calls_that_never_meet_are_named(void) {
    float values[2][9];
    world_t world;
    world_call_t calls[2];
    world_open(&world, 2, memory_fabric_create(1));
    go_on_together(&world, 7);
    for (uint32_t rank = 0; rank < 2; rank++) {
        const dss_segment_t segment = {values[rank], 8 + rank};
        fill(values[rank], 9, rank);
        dss_operation_params_t params = world_params(&world, &segment);
        params.kind = rank == 0 ? DSS_OPERATION_ALL_REDUCE : DSS_OPERATION_AVERAGE;
        params.key.channel = 10 + rank;
        params.timeout_ns = (uint64_t)300 * 1000000u;
        world_post(&world, rank, params, &calls[rank]);
    }
    for (uint32_t rank = 0; rank < 2; rank++)
        CHECK_STATUS(world_await(&calls[rank]), DSS_ERR_TIMED_OUT);
    CHECK_CONTAINS(calls[0].text, "(but average of 9 x float32 over 2 ranks, which this rank has not)");
    CHECK_CONTAINS(calls[1].text, "(but all_reduce sum of 8 x float32 over 2 ranks, which this rank has not)");
    go_on_together(&world, 2);
    world_close(&world);
}

static void rank_without_an_answer_is_named(void) {
    float values[9];
    world_t world;
    world_call_t call;
    const dss_segment_t segment = {values, 9};
    world_open(&world, 2, memory_fabric_create(1));
    memory_fabric_hold(world.fabric, 1, 0, true);
    fill(values, 9, 0);
    dss_operation_params_t params = world_params(&world, &segment);
    params.timeout_ns = (uint64_t)250 * 1000000u;
    world_post(&world, 0, params, &call);
    CHECK_STATUS(world_await(&call), DSS_ERR_TIMED_OUT);
    CHECK_CONTAINS(call.text, "rank 1 (");
    CHECK_CONTAINS(call.text, "does not answer the handshake");
    memory_fabric_hold(world.fabric, 1, 0, false);
    go_on_together(&world, 2);
    world_close(&world);
}

/* The waiter goes, and nobody drives: the time-out is kept all the same. */
static void time_out_needs_no_waiter(void) {
    float values[9];
    world_t world;
    world_call_t call;
    const dss_segment_t segment = {values, 9};
    world_open(&world, 2, memory_fabric_create(1));
    go_on_together(&world, 7);
    fill(values, 9, 0);
    dss_operation_params_t params = world_params(&world, &segment);
    params.timeout_ns = (uint64_t)400 * 1000000u;
    params.will_wait = 1;
    world_post(&world, 0, params, &call);
    CHECK_EQUAL(dss_operation_wait(call.operation, 20 * 1000000u), 0);
    CHECK_STATUS(world_await(&call), DSS_ERR_TIMED_OUT);
    world_close(&world);
}

/* ---- the end under way -------------------------------------------------------------------------------------------------- */

/* A frame that was begun is finished with the values that it began with, whatever becomes of its operation. */
static void cancelled_frame_keeps_its_values(void) {
    const uint32_t count = 30000;
    float *values[2];
    world_call_t calls[2];
    world_t world;
    memory_fabric_t *fabric = memory_fabric_create(1);
    fabric->capacity = 1000;
    world_open(&world, 2, fabric);
    go_on_together(&world, 7);
    memory_fabric_hold(fabric, 0, 1, true);
    for (uint32_t rank = 0; rank < 2; rank++) {
        values[rank] = malloc(count * sizeof(float));
        CHECK(values[rank]);
        fill(values[rank], count, rank);
    }
    for (uint32_t rank = 2; rank-- > 0;) {
        const dss_segment_t segment = {values[rank], count};
        dss_operation_params_t params = world_params(&world, &segment);
        params.timeout_ns = (uint64_t)(rank == 0 ? 300 : 100000) * 1000000u;
        world_post(&world, rank, params, &calls[rank]);
    }
    memory_fabric_hold(fabric, 0, 1, false); /* what was written by now arrives: the OPEN and some values */
    memory_fabric_hold(fabric, 0, 1, true);
    CHECK_STATUS(world_await(&calls[0]), DSS_ERR_TIMED_OUT);
    memset(values[0], 0, count * sizeof(float));
    memory_fabric_hold(fabric, 0, 1, false);
    if (world_await(&calls[1]) == DSS_OK)
        check_sums(values[1], count, world_everyone, 2, 1);
    else
        CHECK_CONTAINS(calls[1].text, "rank 0 gave up: ");
    go_on_together(&world, 2);
    world_close(&world);
    free(values[0]);
    free(values[1]);
}

/* Rank 1 has all it needs and goes, while rank 0 still has to use what came from it. */
static void peer_may_go_when_all_is_exchanged(void) {
    const uint32_t count = 30000;
    float *values[2];
    world_call_t calls[2];
    dss_engine_stats_t stats = {0};
    world_t world;
    memory_fabric_t *fabric = memory_fabric_create(1);
    fabric->capacity = 1000;
    fabric->fault = (memory_fault_t){.writer = 0,
                                     .reader = 1,
                                     .at_bytes = MEMORY_HANDSHAKE_BYTES + 2 * DSS_FRAME_BYTES + DSS_SIGNATURE_BYTES + 4 * count,
                                     .error = EPIPE};
    world_open(&world, 2, fabric);
    for (uint32_t rank = 0; rank < 2; rank++) {
        values[rank] = malloc(count * sizeof(float));
        CHECK(values[rank]);
        fill(values[rank], count, rank);
        const dss_segment_t segment = {values[rank], count};
        world_post(&world, rank, world_params(&world, &segment), &calls[rank]);
        if (rank == 0) {
            memory_fabric_await(fabric, 1, 0, MEMORY_HANDSHAKE_BYTES);
            memory_fabric_await(fabric, 0, 1, MEMORY_HANDSHAKE_BYTES + DSS_FRAME_BYTES);
            memory_fabric_hold(fabric, 0, 1, true);
        }
    }
    while (stats.bytes_received < 2 * DSS_FRAME_BYTES + DSS_SIGNATURE_BYTES + 4 * count)
        dss_engine_stats(world.engines[0], &stats);
    memory_fabric_hold(fabric, 0, 1, false);
    for (uint32_t rank = 0; rank < 2; rank++) {
        if (world_await(&calls[rank]) != DSS_OK)
            CHECK_FAIL("rank %u: %s", rank, calls[rank].text);
        check_sums(values[rank], count, world_everyone, 2, rank);
    }
    world_close(&world);
    free(values[0]);
    free(values[1]);
}

/* Rank 0's connections: all work; or nothing that it says arrives; or nothing that is said to it. */
typedef enum obstruction { OBSTRUCTION_NONE, OBSTRUCTION_OUT, OBSTRUCTION_IN, OBSTRUCTION_END } obstruction_t;

typedef struct unfinished {
    world_t world;
    float *values[3][4];
    world_call_t calls[3][4];
} unfinished_t;

/* On three ranks four operations each, of which the ends are under way, waited for, or not begun. */
static void unfinished_open(unfinished_t *unfinished, bool connected, obstruction_t obstruction) {
    static const uint32_t counts[4] = {1, 9, 5000, 200000};
    memory_fabric_t *fabric = memory_fabric_create(1);
    fabric->capacity = 5000;
    world_open(&unfinished->world, 3, fabric);
    if (connected)
        go_on_together(&unfinished->world, 99);
    for (uint32_t rank = 1; rank < 3; rank++) {
        memory_fabric_hold(fabric, 0, rank, obstruction == OBSTRUCTION_OUT);
        memory_fabric_hold(fabric, rank, 0, obstruction == OBSTRUCTION_IN);
    }
    for (uint32_t rank = 0; rank < 3; rank++)
        for (uint32_t i = 0; i < 4; i++) {
            float **values = &unfinished->values[rank][i];
            *values = malloc(counts[i] * sizeof(float));
            CHECK(*values);
            fill(*values, counts[i], rank);
            const dss_segment_t segment = {*values, counts[i]};
            dss_operation_params_t params = world_params(&unfinished->world, &segment);
            params.key.channel = i;
            world_post(&unfinished->world, rank, params, &unfinished->calls[rank][i]);
        }
}

static void unfinished_release(unfinished_t *unfinished) {
    for (uint32_t rank = 1; rank < 3; rank++) {
        memory_fabric_hold(unfinished->world.fabric, 0, rank, false);
        memory_fabric_hold(unfinished->world.fabric, rank, 0, false);
    }
}

static void unfinished_close(unfinished_t *unfinished) {
    world_close(&unfinished->world);
    for (uint32_t i = 0; i < 12; i++) {
        CHECK_EQUAL(atomic_load(&unfinished->calls[i / 4][i % 4].done_count), 1);
        free(unfinished->values[i / 4][i % 4]);
    }
}

/* A result or an error that names rank 0, or the rank that was told by it. */
static void unfinished_check(unfinished_t *unfinished) {
    static const uint32_t counts[4] = {1, 9, 5000, 200000};
    for (uint32_t rank = 1; rank < 3; rank++)
        for (uint32_t i = 0; i < 4; i++) {
            world_call_t *call = &unfinished->calls[rank][i];
            if (world_await(call) == DSS_OK)
                check_sums(unfinished->values[rank][i], counts[i], world_everyone, 3, rank);
            else if (call->status != DSS_ERR_PEER_LOST && call->status != DSS_ERR_FAILED)
                CHECK_FAIL("rank %u: %s: %s", rank, dss_status_string(call->status), call->text);
            else
                CHECK_CONTAINS(call->text, "rank 0 (");
        }
}

static void aborted_rank_lets_all_go(void) {
    static unfinished_t unfinished;
    for (int connected = 0; connected < 2; connected++)
        for (obstruction_t obstruction = OBSTRUCTION_NONE; obstruction < OBSTRUCTION_END; obstruction++) {
            world_t *world = &unfinished.world;
            unfinished_open(&unfinished, connected != 0, obstruction);
            dss_engine_abort(world->engines[0], "the test says so");
            for (uint32_t i = 0; i < 4; i++) {
                world_call_t *call = &unfinished.calls[0][i];
                if (world_wait(call) == DSS_OK)
                    continue;
                CHECK_STATUS(call->status, DSS_ERR_SHUT_DOWN);
                CHECK_CONTAINS(call->text, "the test says so");
            }
            float value = 1;
            world_call_t late;
            const dss_segment_t segment = {&value, 1};
            dss_operation_params_t params = world_params(world, &segment);
            params.key.channel = 77;
            world_post(world, 0, params, &late);
            CHECK_STATUS(world_wait(&late), DSS_ERR_SHUT_DOWN);
            CHECK_CONTAINS(late.text, "the test says so");
            unfinished_release(&unfinished);
            unfinished_check(&unfinished);
            unfinished_close(&unfinished);
        }
}

/* Rank 0 gives up between its last word in the handshake and rank 1's. */
static void abort_in_the_handshake_is_told(void) {
    float values[2][5];
    world_t world;
    world_call_t calls[2];
    memory_fabric_t *fabric = memory_fabric_create(1);
    world_open(&world, 2, fabric);
    memory_fabric_hold(fabric, 1, 0, true);
    for (uint32_t rank = 0; rank < 2; rank++) {
        fill(values[rank], 5, rank);
        const dss_segment_t segment = {values[rank], 5};
        dss_operation_params_t params = world_params(&world, &segment);
        params.timeout_ns = (uint64_t)20 * 1000000000u;
        params.key.sequence = rank; /* rank 1 has nothing from rank 0 that it could finish with */
        world_post(&world, rank, params, &calls[rank]);
        if (rank == 1)
            break;
        memory_fabric_await(fabric, 1, 0, MEMORY_HANDSHAKE_BYTES / 2);
        memory_fabric_hold(fabric, 1, 0, false); /* the CHALLENGE arrives, the VERDICT does not */
        memory_fabric_hold(fabric, 1, 0, true);
        memory_fabric_await(fabric, 1, 0, MEMORY_HANDSHAKE_BYTES);
        dss_engine_abort(world.engines[0], "the test says so");
        memory_fabric_hold(fabric, 1, 0, false);
    }
    CHECK_STATUS(world_await(&calls[0]), DSS_ERR_SHUT_DOWN);
    CHECK_STATUS(world_await(&calls[1]), DSS_ERR_PEER_LOST);
    CHECK_CONTAINS(calls[1].text, "has shut down its process group");
    world_close(&world);
}

static void destroyed_rank_lets_all_go(void) {
    static unfinished_t unfinished;
    for (int connected = 0; connected < 2; connected++)
        for (obstruction_t obstruction = OBSTRUCTION_NONE; obstruction < OBSTRUCTION_END; obstruction++) {
            unfinished_open(&unfinished, connected != 0, obstruction);
            for (uint32_t i = 0; i < 4; i++) {
                dss_operation_release(unfinished.calls[0][i].operation);
                unfinished.calls[0][i].operation = NULL;
            }
            const uint64_t begin = dss_now_ns();
            world_leave(&unfinished.world, 0);
            CHECK(dss_now_ns() - begin < (uint64_t)5 * 1000000000u);
            for (uint32_t i = 0; i < 4; i++) {
                world_call_t *call = &unfinished.calls[0][i];
                CHECK_EQUAL(atomic_load(&call->done_count), 1); /* destroy has called back */
                CHECK(call->status == DSS_OK || call->status == DSS_ERR_SHUT_DOWN);
            }
            unfinished_release(&unfinished);
            unfinished_check(&unfinished);
            unfinished_close(&unfinished);
        }
}

/* ---- two that call each other ------------------------------------------------------------------------------------------- */

typedef struct caller {
    world_t *world;
    uint32_t rank;
    pthread_barrier_t *barrier;
} caller_t;

static void *call_at_once(void *argument) {
    const caller_t *caller = argument;
    for (uint64_t sequence = 0; sequence < 2; sequence++) {
        float values[5];
        world_call_t call;
        fill(values, 5, caller->rank);
        const dss_segment_t segment = {values, 5};
        dss_operation_params_t params = world_params(caller->world, &segment);
        params.key.sequence = sequence;
        pthread_barrier_wait(caller->barrier);
        world_post(caller->world, caller->rank, params, &call);
        if (world_wait(&call) != DSS_OK)
            CHECK_FAIL("rank %u: %s", caller->rank, call.text);
        check_sums(values, 5, world_everyone, 2, caller->rank);
    }
    return NULL;
}

static void both_call_and_one_connection_stays(void) {
    uint32_t crossed = 0;
    for (uint64_t round = 0; round < 300u - 200u * IS_SANITIZED; round++) {
        world_t world;
        pthread_t threads[2];
        caller_t callers[2];
        pthread_barrier_t barrier;
        uint32_t open = 0;
        uint32_t all = 0;
        memory_fabric_t *fabric = memory_fabric_create(round);
        fabric->delays = round % 2 == 0;
        world_open(&world, 2, fabric);
        pthread_barrier_init(&barrier, NULL, 2);
        for (uint32_t rank = 0; rank < 2; rank++) {
            callers[rank] = (caller_t){&world, rank, &barrier};
            CHECK_EQUAL(pthread_create(&threads[rank], NULL, call_at_once, &callers[rank]), 0);
        }
        pthread_join(threads[0], NULL);
        pthread_join(threads[1], NULL);
        pthread_barrier_destroy(&barrier);
        memory_fabric_count(fabric, 0, 1, &open, &all);
        crossed += all > 1;
        CHECK_EQUAL(open, 1);
        world_close(&world);
    }
    CHECK(crossed > 0);
}

int main(void) {
    RUN(pairs_reset_at_every_byte);
    RUN(pairs_closed_at_every_byte);
    RUN(small_groups_reset_at_every_byte);
    RUN(small_groups_closed_at_every_byte);
    RUN(handshakes_that_always_break_end);
    RUN(sharded_groups_break_anywhere);
    RUN(delays_change_no_bit);
    RUN(breaks_change_no_bit);
    RUN(single_bytes_are_enough);
    RUN(last_element_holds_nobody_up);
    RUN(values_may_come_before_the_post);
    RUN(failed_channel_gives_its_room_back);
    RUN(disagreements_fail_everywhere);
    RUN(groups_that_differ_fail_everywhere);
    RUN(absent_rank_is_named);
    RUN(calls_that_never_meet_are_named);
    RUN(rank_without_an_answer_is_named);
    RUN(time_out_needs_no_waiter);
    RUN(cancelled_frame_keeps_its_values);
    RUN(peer_may_go_when_all_is_exchanged);
    RUN(aborted_rank_lets_all_go);
    RUN(abort_in_the_handshake_is_told);
    RUN(destroyed_rank_lets_all_go);
    RUN(both_call_and_one_connection_stays);
    return 0;
}
