/* Many mixed operations, many at once, on ranks that post and wait in orders of their own, over every transport: all kinds, dtypes
 * and reductions, random groups and sizes, arrays in pieces that are not aligned. Each result is compared with a plain reduction,
 * and is the same to the last bit on all members. `soak_test SEED COUNT` repeats a run, or makes a longer one. */
#include "ranks.h"

#include <semaphore.h>

#include "memory_stream.h"

#define BED_COUNT 200u   /* operations of one set of engines */
#define WINDOW_COUNT 20u /* posted before any of them is waited for */
#define PIECES_MOST 5u
#define GUARD 0xa5u

typedef struct soak_call {
    dss_operation_kind_t kind;
    dss_dtype_t dtype;
    dss_reduction_t reduction;
    dss_key_t key;
    uint32_t members[RANKS_MOST];
    uint32_t member_count;
    uint32_t count;
    uint32_t index;              /* in the whole run: what the values depend on */
    uint64_t hashes[RANKS_MOST]; /* of the results, by rank */
} soak_call_t;

typedef struct bed {
    uint64_t seed;
    uint32_t world_size;
    uint32_t call_count;
    soak_call_t calls[BED_COUNT];
    memory_fabric_t *fabric; /* NULL: sockets */
    pthread_barrier_t barrier;
} bed_t;

/* One rank's part in a call. */
typedef struct part {
    soak_call_t *call;
    uint32_t rank;
    uint8_t *bytes; /* pieces and guards between them; owned */
    size_t bytes_count;
    dss_segment_t pieces[PIECES_MOST];
    uint32_t piece_count;
    dss_operation_t *operation;
    atomic_int done_count;
    dss_status_t status;
    char text[400];
    sem_t *done; /* of the rank */
} part_t;

/* ---- values ------------------------------------------------------------------------------------------------------------- */

static uint32_t mix(uint32_t call, uint32_t rank, uint32_t index) {
    uint32_t bits = index * 0x9e3779b1u ^ (rank + 1) * 0x85ebca6bu ^ (call + 1) * 0xc2b2ae35u;
    bits ^= bits >> 15;
    bits *= 0x2c1b3c6du;
    return bits ^ bits >> 13;
}

static bool is_floating(dss_dtype_t dtype) {
    return dtype <= DSS_BFLOAT16;
}

/* Such that sums and products stay small, and half types hold it exactly. */
static double float_value(const soak_call_t *call, uint32_t rank, uint32_t index) {
    const uint32_t bits = mix(call->index, rank, index);
    const double value = (double)(bits % 129u) / 64.0 - 1.0; /* -1 to 1 in steps of 1/64 */
    if (call->dtype == DSS_FLOAT16 || call->dtype == DSS_BFLOAT16)
        return call->reduction == DSS_PRODUCT ? 1.0 + ((double)(bits % 33u) - 16.0) / 64.0 : value;
    const double fine = value + (double)(bits >> 8) * 0x1p-32;
    return (double)(float)(call->reduction == DSS_PRODUCT ? 1.0 + fine / 4.0 : fine);
}

static void put_value(const soak_call_t *call, uint32_t rank, uint32_t index, uint8_t *at) {
    const uint64_t wide = mix(call->index, rank, index) * (uint64_t)0x100000001u;
    const double real = is_floating(call->dtype) ? float_value(call, rank, index) : 0;
    const float narrow = (float)real;
    if (call->dtype == DSS_FLOAT64)
        memcpy(at, &real, sizeof real);
    else if (call->dtype == DSS_FLOAT32)
        memcpy(at, &narrow, sizeof narrow);
    else if (is_floating(call->dtype))
        CHECK_STATUS(dss_narrow_scaled(call->dtype, &narrow, 1.0, at, 1), DSS_OK);
    else
        memcpy(at, &wide, dss_dtype_bytes(call->dtype)); /* little-endian: the low bytes */
}

static double get_float(dss_dtype_t dtype, const uint8_t *at) {
    double real = 0;
    float narrow = 0;
    if (dtype == DSS_FLOAT64) {
        memcpy(&real, at, sizeof real);
        return real;
    }
    CHECK_STATUS(dss_widen(dtype, at, &narrow, 1), DSS_OK);
    return (double)narrow;
}

/* Sign-extended where the dtype has a sign. */
static uint64_t as_integer(dss_dtype_t dtype, uint64_t wide) {
    switch (dtype) {
    case DSS_INT8:
        return (uint64_t)(int64_t)(int8_t)(uint8_t)wide;
    case DSS_UINT8:
        return (uint8_t)wide;
    case DSS_INT32:
        return (uint64_t)(int64_t)(int32_t)(uint32_t)wide;
    default:
        return wide;
    }
}

static uint64_t reduce_integers(dss_reduction_t reduction, uint64_t left, uint64_t right) {
    switch (reduction) {
    case DSS_SUM:
        return left + right;
    case DSS_PRODUCT:
        return left * right;
    case DSS_MIN:
        return (int64_t)left < (int64_t)right ? left : right;
    case DSS_MAX:
        return (int64_t)left > (int64_t)right ? left : right;
    case DSS_BAND:
        return left & right;
    case DSS_BOR:
        return left | right;
    default:
        return left ^ right;
    }
}

static double reduce_floats(dss_reduction_t reduction, double left, double right) {
    switch (reduction) {
    case DSS_SUM:
        return left + right;
    case DSS_PRODUCT:
        return left * right;
    case DSS_MIN:
        return left < right ? left : right;
    default:
        return left > right ? left : right;
    }
}

static double tolerance_of(const soak_call_t *call, double expected) {
    static const double roundings[] = {0x1p-24, 0x1p-53, 0x1p-11, 0x1p-8};
    const double accumulated = call->dtype == DSS_FLOAT64 ? 0x1p-53 : 0x1p-24;
    if (call->reduction == DSS_MIN || call->reduction == DSS_MAX)
        return 0;
    return fabs(expected) * roundings[call->dtype] + 2.0 * call->member_count * call->member_count * accumulated;
}

static void check_value(const soak_call_t *call, uint32_t rank, uint32_t index, const uint8_t *at) {
    if (is_floating(call->dtype)) {
        double expected = float_value(call, call->members[0], index);
        for (uint32_t i = 1; i < call->member_count; i++)
            expected = reduce_floats(call->reduction, expected, float_value(call, call->members[i], index));
        if (call->kind == DSS_OPERATION_AVERAGE)
            expected /= call->member_count;
        const double value = get_float(call->dtype, at);
        if (!(fabs(value - expected) <= tolerance_of(call, expected)))
            CHECK_FAIL("call %u (kind %d, %s of %s, %u ranks) on rank %u, element %u of %u: %.9g, expected %.9g", call->index,
                       (int)call->kind, dss_reduction_name(call->reduction), dss_dtype_name(call->dtype), call->member_count, rank,
                       index, call->count, value, expected);
        return;
    }
    uint64_t expected = 0;
    uint64_t value = 0;
    for (uint32_t i = 0; i < call->member_count; i++) {
        const uint64_t next = as_integer(call->dtype, mix(call->index, call->members[i], index) * (uint64_t)0x100000001u);
        expected = i == 0 ? next : reduce_integers(call->reduction, expected, next);
    }
    memcpy(&value, at, dss_dtype_bytes(call->dtype));
    if (as_integer(call->dtype, value) != as_integer(call->dtype, expected))
        CHECK_FAIL("call %u (%s of %s, %u ranks) on rank %u, element %u of %u: %" PRIx64 ", expected %" PRIx64, call->index,
                   dss_reduction_name(call->reduction), dss_dtype_name(call->dtype), call->member_count, rank, index, call->count,
                   value, expected);
}

/* ---- one rank's part ---------------------------------------------------------------------------------------------------- */

static void part_done(void *argument, dss_status_t status, const char *text) {
    part_t *part = argument;
    part->status = status;
    snprintf(part->text, sizeof part->text, "%s", text ? text : "");
    atomic_fetch_add(&part->done_count, 1);
    sem_post(part->done);
}

/* Cuts the vector into pieces with guards around them, at odd places. */
static void part_fill(part_t *part, uint64_t *chance) {
    const soak_call_t *call = part->call;
    const size_t element = dss_dtype_bytes(call->dtype);
    uint32_t index = 0;
    size_t at = 0;
    part->bytes_count = call->count * element + 64 * PIECES_MOST;
    part->bytes = malloc(part->bytes_count);
    CHECK(part->bytes);
    memset(part->bytes, GUARD, part->bytes_count);
    part->piece_count = 1 + (check_random_below(chance, 3) == 0 ? check_random_below(chance, PIECES_MOST) : 0);
    for (uint32_t i = 0; i < part->piece_count; i++) {
        const uint32_t left = call->count - index;
        const uint32_t count = i + 1 == part->piece_count ? left : check_random_below(chance, left + 1);
        at += check_random_below(chance, 64);
        part->pieces[i] = (dss_segment_t){part->bytes + at, count};
        for (uint32_t j = 0; j < count; j++)
            put_value(call, part->rank, index++, part->bytes + at + j * element);
        at += count * element;
    }
}

static void part_post(part_t *part, dss_engine_t *engine, uint64_t *chance, bool will_wait) {
    const soak_call_t *call = part->call;
    dss_error_t error = {0};
    part_fill(part, chance);
    const dss_operation_params_t params = {.params_bytes = sizeof params,
                                           .kind = call->kind,
                                           .dtype = call->dtype,
                                           .reduction = call->reduction,
                                           .key = call->key,
                                           .members = call->members,
                                           .member_count = call->member_count,
                                           .segments = part->pieces,
                                           .segment_count = call->kind == DSS_OPERATION_BARRIER ? 0 : part->piece_count,
                                           .timeout_ns = (uint64_t)200 * 1000000000u,
                                           .will_wait = will_wait,
                                           .what = "call of the soak",
                                           .done = part_done,
                                           .argument = part};
    const bool watched = will_wait || check_random_below(chance, 4) > 0; /* else nobody keeps the handle */
    if (dss_engine_post(engine, &params, watched ? &part->operation : NULL, &error) != DSS_OK)
        CHECK_FAIL("call %u on rank %u: %s", call->index, part->rank, error.text);
}

static void part_wait(part_t *part) {
    if (!part->operation)
        return;
    (void)dss_operation_wait(part->operation, 1000); /* a look */
    CHECK(dss_operation_wait(part->operation, UINT64_MAX));
    CHECK_EQUAL(atomic_load(&part->done_count), 1);
    dss_operation_release(part->operation);
    part->operation = NULL;
}

/* After its callback. */
static void part_finish(part_t *part) {
    soak_call_t *call = part->call;
    const size_t element = dss_dtype_bytes(call->dtype);
    uint64_t hash = 0;
    uint32_t index = 0;
    const uint8_t *guarded = part->bytes;
    if (part->status != DSS_OK)
        CHECK_FAIL("call %u on rank %u: %s: %s", call->index, part->rank, dss_status_string(part->status), part->text);
    CHECK_EQUAL(atomic_load(&part->done_count), 1);
    for (uint32_t i = 0; i < part->piece_count; i++) {
        const dss_segment_t *piece = &part->pieces[i];
        const uint8_t *values = piece->values;
        for (; guarded < values; guarded++)
            CHECK_EQUAL(*guarded, GUARD);
        for (uint32_t j = 0; call->kind != DSS_OPERATION_BARRIER && j < piece->element_count; j++)
            check_value(call, part->rank, index++, values + j * element);
        hash = dss_hash(values, piece->element_count * element, hash);
        guarded = values + piece->element_count * element;
    }
    for (; guarded < part->bytes + part->bytes_count; guarded++)
        CHECK_EQUAL(*guarded, GUARD);
    call->hashes[part->rank] = hash;
    free(part->bytes);
    part->bytes = NULL;
}

/* ---- a rank ------------------------------------------------------------------------------------------------------------- */

typedef struct window {
    part_t *parts[WINDOW_COUNT];
    uint32_t part_count;
} window_t;

static bool has_member(const soak_call_t *call, uint32_t rank) {
    for (uint32_t i = 0; i < call->member_count; i++)
        if (call->members[i] == rank)
            return true;
    return false;
}

static void *wait_for_window(void *argument) {
    const window_t *window = argument;
    for (uint32_t i = 0; i < window->part_count; i++)
        part_wait(window->parts[i]);
    return NULL;
}

/* Some at once, some from another thread, the rest at the end. */
static void wait_for_some(const window_t *window, uint64_t *chance) {
    window_t other = {0};
    window_t own = {0};
    pthread_t thread;
    for (uint32_t i = window->part_count; i-- > 0;) /* the last one posted first */
        switch (check_random_below(chance, 3)) {
        case 0:
            other.parts[other.part_count++] = window->parts[i];
            break;
        case 1:
            own.parts[own.part_count++] = window->parts[i];
            break;
        default:
            break;
        }
    if (other.part_count > 0)
        CHECK_EQUAL(pthread_create(&thread, NULL, wait_for_window, &other), 0);
    (void)wait_for_window(&own);
    if (other.part_count > 0)
        pthread_join(thread, NULL);
}

static void run_rank(dss_engine_t *engine, uint32_t rank, void *argument) {
    bed_t *bed = argument;
    part_t *parts = calloc(BED_COUNT, sizeof *parts);
    uint64_t chance = bed->seed * 31 + rank + 1;
    uint32_t posted = 0;
    sem_t done;
    CHECK(parts && sem_init(&done, 0, 0) == 0);
    if (bed->fabric)
        memory_fabric_join(bed->fabric, engine);
    pthread_barrier_wait(&bed->barrier);
    for (uint32_t begin = 0; begin < bed->call_count; begin += WINDOW_COUNT) {
        window_t window = {0};
        for (uint32_t i = begin; i < bed->call_count && i < begin + WINDOW_COUNT; i++) {
            if (!has_member(&bed->calls[i], rank))
                continue;
            const uint32_t at = check_random_below(&chance, window.part_count + 1); /* an order of its own */
            parts[i] = (part_t){.call = &bed->calls[i], .rank = rank, .done = &done};
            window.parts[window.part_count++] = window.parts[at];
            window.parts[at] = &parts[i];
        }
        for (uint32_t i = 0; i < window.part_count; i++)
            part_post(window.parts[i], engine, &chance, i + 1 == window.part_count);
        posted += window.part_count;
        if (window.part_count > 0)
            part_wait(window.parts[window.part_count - 1]); /* as it promised */
        wait_for_some(&window, &chance);
    }
    for (; posted > 0; posted--)
        CHECK_EQUAL(sem_wait(&done), 0);
    for (uint32_t i = 0; i < bed->call_count; i++)
        if (parts[i].call) {
            part_wait(&parts[i]);
            part_finish(&parts[i]);
        }
    pthread_barrier_wait(&bed->barrier);
    if (bed->fabric)
        memory_fabric_leave(bed->fabric, engine);
    sem_destroy(&done);
    free(parts);
}

/* ---- beds --------------------------------------------------------------------------------------------------------------- */

static void choose_members(soak_call_t *call, uint32_t world_size, uint64_t *chance) {
    const bool everyone = check_random_below(chance, 4) == 0;
    while (call->member_count == 0)
        for (uint32_t rank = 0; rank < world_size; rank++)
            if (everyone || check_random_below(chance, 2))
                call->members[call->member_count++] = rank;
}

static void choose_call(soak_call_t *call, const bed_t *bed, uint32_t index, uint32_t first, uint64_t *chance) {
    const uint32_t kind = check_random_below(chance, 16);
    *call = (soak_call_t){.index = first + index,
                          .key = {.channel = check_random_below(chance, 4), .sequence = index / 3, .part = index}};
    choose_members(call, bed->world_size, chance);
    call->count = check_random_below(chance, (2u << check_random_below(chance, 18)) + 1);
    call->count = call->count < 300000 ? call->count : 300000;
    call->kind = kind == 0 ? DSS_OPERATION_BARRIER : kind < 8 ? DSS_OPERATION_AVERAGE : DSS_OPERATION_ALL_REDUCE;
    if (call->kind == DSS_OPERATION_BARRIER)
        call->count = 0;
    else if (call->kind == DSS_OPERATION_AVERAGE)
        call->dtype = (dss_dtype_t)check_random_below(chance, DSS_BFLOAT16 + 1);
    else
        do {
            call->dtype = (dss_dtype_t)check_random_below(chance, DSS_INT64 + 1);
            call->reduction = (dss_reduction_t)check_random_below(chance, DSS_BXOR + 1);
        } while (!dss_reduction_takes(call->reduction, call->dtype));
}

static memory_fabric_t *choose_fabric(uint64_t seed, uint64_t *chance) {
    static const size_t capacities[] = {3000, 20000, (size_t)64 << 10};
    static const size_t most[] = {0, 3000, 20000};
    memory_fabric_t *fabric = memory_fabric_create(seed);
    fabric->capacity = capacities[check_random_below(chance, 3)];
    fabric->most_at_once = most[check_random_below(chance, 3)];
    fabric->delays = check_random_below(chance, 2) == 0;
    return fabric;
}

static void run_bed(bed_t *bed, dss_transport_t transport) {
    pthread_barrier_init(&bed->barrier, NULL, bed->world_size);
    ranks_run(bed->world_size, transport, run_rank, bed);
    pthread_barrier_destroy(&bed->barrier);
    if (bed->fabric)
        memory_fabric_destroy(bed->fabric);
    for (uint32_t i = 0; i < bed->call_count; i++)
        for (uint32_t member = 1; member < bed->calls[i].member_count; member++)
            CHECK_FOR(bed->calls[i].hashes[bed->calls[i].members[member]] == bed->calls[i].hashes[bed->calls[i].members[0]],
                      "call %u, ranks %u and %u", bed->calls[i].index, bed->calls[i].members[0], bed->calls[i].members[member]);
}

static uint64_t seed = 1;
static uint32_t count = 900 - 700 * IS_SANITIZED;

static void mixed_operations_over_every_transport(void) {
    static bed_t bed;
    uint64_t chance = seed * 0x9e3779b97f4a7c15u + 1;
    for (uint32_t first = 0, turn = 0; first < count; first += BED_COUNT, turn++) {
        alarm(CHECK_WATCHDOG_SECONDS); /* for each bed, however many there are */
        bed = (bed_t){.seed = check_random(&chance), .world_size = 4 + check_random_below(&chance, 3)};
        bed.call_count = count - first < BED_COUNT ? count - first : BED_COUNT;
        for (uint32_t i = 0; i < bed.call_count; i++)
            choose_call(&bed.calls[i], &bed, i, first, &chance);
        if (turn % 3 == 2)
            bed.fabric = choose_fabric(bed.seed, &chance);
        run_bed(&bed, turn % 3 == 0 ? DSS_TRANSPORT_SHM : DSS_TRANSPORT_TCP);
    }
}

int main(int argument_count, char **arguments) {
    seed = argument_count > 1 ? strtoull(arguments[1], NULL, 10) : seed;
    count = argument_count > 2 ? (uint32_t)strtoul(arguments[2], NULL, 10) : count;
    printf("soak_test: seed %" PRIu64 ", %u operations\n", seed, count);
    RUN(mixed_operations_over_every_transport);
    return 0;
}
