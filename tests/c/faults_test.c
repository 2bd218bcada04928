/* What happens when connections break at any byte, are slow, or out of order, and when ranks do not agree: every rank gets the
 * right values or an error that names the culprit, soon, and nobody else is disturbed. */
#include "worlds.h"

#include <stdlib.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define IS_SANITIZED 1u
#else
#define IS_SANITIZED 0u
#endif

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

/* All of the handshake and of the first frames' headers, and the rest in strides. */
static void break_everywhere(const breakage_t *breakage, int error, uint64_t bytes, uint64_t stride) {
    static uint64_t chance = 88172645463325252u;
    for (uint32_t writer = 0; writer < breakage->size; writer++)
        for (uint32_t reader = 0; reader < breakage->size; reader++) {
            const memory_fault_t fault = {.writer = writer, .reader = reader, .error = error};
            if (writer != reader)
                break_range(breakage, fault, check_random_below(&chance, (uint32_t)stride), bytes, stride);
        }
}

/* What one rank writes to another: the handshake, two headers, a signature, the values, a goodbye. */
static uint64_t bytes_of(uint64_t value_bytes) {
    return MEMORY_HANDSHAKE_BYTES + 2 * DSS_FRAME_BYTES + DSS_SIGNATURE_BYTES + value_bytes + DSS_FRAME_BYTES + 2;
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
    break_everywhere(&breakage, ECONNRESET, bytes_of(16), 1 + 12 * IS_SANITIZED);
}

static void small_groups_closed_at_every_byte(void) {
    const breakage_t breakage = {3, 4, false};
    break_everywhere(&breakage, EPIPE, bytes_of(16), 3 + 10 * IS_SANITIZED);
}

/* Two phases of 2732 bytes each way: every byte in the end of the one and the begin of the next, and in strides elsewhere. */
static void sharded_groups_break_anywhere(void) {
    const uint32_t count = 2049;
    const uint64_t all = bytes_of(2 * 2732) + DSS_FRAME_BYTES;
    const breakage_t in_turn = {3, count, true};
    const breakage_t at_once = {3, count, false};
    break_everywhere(&in_turn, ECONNRESET, all, 61 + 200 * IS_SANITIZED);
    break_everywhere(&at_once, EPIPE, all, 67 + 200 * IS_SANITIZED);
    const memory_fault_t fault = {.writer = 0, .reader = 1, .error = EPIPE};
    break_range(&in_turn, fault, bytes_of(2732) - 70, bytes_of(2732) + 20, 1 + 10 * IS_SANITIZED);
}

int main(void) {
    RUN(pairs_reset_at_every_byte);
    RUN(pairs_closed_at_every_byte);
    RUN(small_groups_reset_at_every_byte);
    RUN(small_groups_closed_at_every_byte);
    RUN(sharded_groups_break_anywhere);
    return 0;
}
