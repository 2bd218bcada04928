/*
 * The serialised plan: what rank 0 publishes and every other rank checks. All numbers little-endian:
 *
 *   "DSSP"  version u32  kind u32  world_size u32  period u32  stripe_count u32  delay u32  rack_count u32  seed u64
 *   how it crosses racks u32 [period]  rack u32 [world_size], only where rack_count > 1
 *   group numbers u32 [period][world_size]  hash u64
 *
 * Groups are numbered by their smallest member, so a plan has exactly one form; any other is refused.
 */
#include <string.h>

#include "hash.h"
#include "plan_internal.h"
#include "status.h"

#define WIRE_VERSION 3u
#define HEADER_BYTES 40u
#define HASH_BYTES 8u
#define CHUNK_WORDS 1024u

static const unsigned char magic[4] = {'D', 'S', 'S', 'P'};

static void put_u32(unsigned char *bytes, uint32_t value) {
    for (unsigned i = 0; i < 4; i++)
        bytes[i] = (unsigned char)(value >> (8 * i));
}

static void put_u64(unsigned char *bytes, uint64_t value) {
    put_u32(bytes, (uint32_t)value);
    put_u32(bytes + 4, (uint32_t)(value >> 32));
}

static uint32_t get_u32(const unsigned char *bytes) {
    return bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24;
}

static uint64_t get_u64(const unsigned char *bytes) {
    return get_u32(bytes) | (uint64_t)get_u32(bytes + 4) << 32;
}

static void put_header(unsigned char *bytes, const dss_plan_t *plan) {
    memcpy(bytes, magic, sizeof magic);
    put_u32(bytes + 4, WIRE_VERSION);
    put_u32(bytes + 8, (uint32_t)plan->kind);
    put_u32(bytes + 12, plan->world_size);
    put_u32(bytes + 16, plan->period);
    put_u32(bytes + 20, plan->stripe_count);
    put_u32(bytes + 24, plan->delay);
    put_u32(bytes + 28, plan->rack_count);
    put_u64(bytes + 32, plan->seed);
}

/* At most 2^36 and some. */
static uint64_t wire_bytes(uint64_t world_size, uint64_t period, uint64_t rack_count) {
    return HEADER_BYTES + 4 * (period + (rack_count > 1 ? world_size : 0) + world_size * period) + HASH_BYTES;
}

/* The crossing flags as words, at most DSS_PLAN_MAX_PERIOD of them. */
static void put_crossings(unsigned char *bytes, const dss_plan_t *plan) {
    for (uint32_t round = 0; round < plan->period; round++)
        put_u32(bytes + 4 * (size_t)round, plan->crossing[round]);
}

static uint64_t hash_words(uint64_t hash, const uint32_t *words, size_t word_count) {
    unsigned char bytes[CHUNK_WORDS * 4];
    for (size_t begin = 0; begin < word_count; begin += CHUNK_WORDS) {
        const size_t count = word_count - begin < CHUNK_WORDS ? word_count - begin : CHUNK_WORDS;
        for (size_t i = 0; i < count; i++)
            put_u32(bytes + 4 * i, words[begin + i]);
        hash = dss_hash_more(hash, bytes, 4 * count);
    }
    return hash;
}

uint64_t dss_plan_content_hash(const dss_plan_t *plan) {
    unsigned char bytes[DSS_PLAN_MAX_PERIOD * 4];
    put_header(bytes, plan);
    uint64_t hash = dss_hash_more(DSS_HASH_BEGIN, bytes, HEADER_BYTES);
    put_crossings(bytes, plan);
    hash = dss_hash_more(hash, bytes, 4 * (size_t)plan->period);
    if (plan->rack_of)
        hash = hash_words(hash, plan->rack_of, plan->world_size);
    return hash_words(hash, plan->group_of, (size_t)plan->world_size * plan->period);
}

static unsigned char *put_words(unsigned char *bytes, const uint32_t *words, size_t word_count) {
    for (size_t i = 0; i < word_count; i++, bytes += 4)
        put_u32(bytes, words[i]);
    return bytes;
}

dss_status_t dss_plan_serialize(const dss_plan_t *plan, void *bytes, size_t capacity_bytes, size_t *needed_bytes_p) {
    if (!plan || !needed_bytes_p)
        return DSS_ERR_INVALID_ARGUMENT;
    const uint64_t needed_bytes = wire_bytes(plan->world_size, plan->period, plan->rack_count);
    if (needed_bytes > SIZE_MAX || (bytes && capacity_bytes < needed_bytes))
        return DSS_ERR_INVALID_ARGUMENT;
    *needed_bytes_p = (size_t)needed_bytes;
    if (!bytes)
        return DSS_OK;
    unsigned char *next = bytes;
    put_header(next, plan);
    next += HEADER_BYTES;
    put_crossings(next, plan);
    next += 4 * (size_t)plan->period;
    if (plan->rack_of)
        next = put_words(next, plan->rack_of, plan->world_size);
    next = put_words(next, plan->group_of, (size_t)plan->world_size * plan->period);
    put_u64(next, plan->hash);
    return DSS_OK;
}

/* Everything that can be said without an allocation: what is left is whether the groups make a plan. */
static dss_status_t check_wire(const unsigned char *bytes, size_t bytes_bytes, dss_error_t *error_p) {
    if (!bytes || bytes_bytes < HEADER_BYTES + HASH_BYTES)
        return dss_fail(error_p, DSS_ERR_CORRUPT, "the serialised plan is cut short: %zu bytes, its header alone takes %u",
                        bytes ? bytes_bytes : 0, HEADER_BYTES + HASH_BYTES);
    if (memcmp(bytes, magic, sizeof magic) != 0)
        return dss_fail(error_p, DSS_ERR_CORRUPT, "these bytes are not a serialised plan: they begin %02x %02x %02x %02x", bytes[0],
                        bytes[1], bytes[2], bytes[3]);
    if (get_u32(bytes + 4) != WIRE_VERSION)
        return dss_fail(error_p, DSS_ERR_CORRUPT,
                        "the serialised plan is of version %u, this library reads %u: another version of dssync made it",
                        get_u32(bytes + 4), WIRE_VERSION);
    const uint32_t kind = get_u32(bytes + 8);
    const uint32_t world_size = get_u32(bytes + 12);
    const uint32_t period = get_u32(bytes + 16);
    const uint32_t rack_count = get_u32(bytes + 28);
    if (kind < DSS_PLAN_GRID || kind > DSS_PLAN_HYBRID)
        return dss_fail(error_p, DSS_ERR_CORRUPT, "the serialised plan is of unknown kind %u", kind);
    if (world_size < 1 || world_size > DSS_PLAN_MAX_WORLD_SIZE || period < 1 || period > DSS_PLAN_MAX_PERIOD)
        return dss_fail(error_p, DSS_ERR_CORRUPT, "the serialised plan claims %u ranks and %u rounds, expected 1 to %u and 1 to %u",
                        world_size, period, DSS_PLAN_MAX_WORLD_SIZE, DSS_PLAN_MAX_PERIOD);
    if (rack_count < 1 || rack_count > world_size)
        return dss_fail(error_p, DSS_ERR_CORRUPT, "the serialised plan claims %u racks for %u ranks", rack_count, world_size);
    if (bytes_bytes != wire_bytes(world_size, period, rack_count))
        return dss_fail(error_p, DSS_ERR_CORRUPT, "the serialised plan has %zu bytes, expected %llu for %u ranks and %u rounds",
                        bytes_bytes, (unsigned long long)wire_bytes(world_size, period, rack_count), world_size, period);
    const uint64_t found = get_u64(bytes + bytes_bytes - HASH_BYTES);
    const uint64_t expected = dss_hash_more(DSS_HASH_BEGIN, bytes, bytes_bytes - HASH_BYTES);
    if (found != expected)
        return dss_fail(error_p, DSS_ERR_CORRUPT, "the serialised plan is damaged: its hash is %016llx, expected %016llx",
                        (unsigned long long)found, (unsigned long long)expected);
    return DSS_OK;
}

static dss_status_t get_crossings(const unsigned char *bytes, dss_plan_t *plan, dss_error_t *error_p) {
    for (uint32_t round = 0; round < plan->period; round++) {
        const uint32_t flag = get_u32(bytes + 4 * (size_t)round);
        if (flag > DSS_CROSSING_VALUES)
            return dss_fail(error_p, DSS_ERR_CORRUPT, "the serialised plan says %u of how round %u crosses racks", flag, round);
        plan->crossing[round] = (uint8_t)flag;
    }
    return DSS_OK;
}

/* What the racks are good for is for the gate to say. */
static const unsigned char *get_racks(const unsigned char *bytes, dss_plan_t *plan) {
    for (uint32_t rank = 0; plan->rack_of && rank < plan->world_size; rank++, bytes += 4)
        plan->rack_of[rank] = get_u32(bytes);
    return bytes;
}

static dss_status_t get_groups(const unsigned char *bytes, dss_plan_t *plan, dss_error_t *error_p) {
    const size_t word_count = (size_t)plan->world_size * plan->period;
    for (size_t i = 0; i < word_count; i++) {
        plan->group_of[i] = get_u32(bytes + 4 * i);
        if (plan->group_of[i] >= plan->world_size)
            return dss_fail(error_p, DSS_ERR_CORRUPT, "the serialised plan puts rank %u of round %u in group %u of at most %u",
                            (uint32_t)(i % plan->world_size), (uint32_t)(i / plan->world_size), plan->group_of[i],
                            plan->world_size);
    }
    return DSS_OK;
}

static dss_status_t get_body(const unsigned char *wire, dss_plan_t *plan, dss_error_t *error_p) {
    plan->stripe_count = get_u32(wire + 20);
    plan->delay = get_u32(wire + 24);
    dss_status_t status = dss_plan_allocate_racks(plan, get_u32(wire + 28), error_p);
    if (status == DSS_OK)
        status = get_crossings(wire + HEADER_BYTES, plan, error_p);
    if (status != DSS_OK)
        return status;
    return get_groups(get_racks(wire + HEADER_BYTES + 4 * (size_t)plan->period, plan), plan, error_p);
}

/* The gate's text stays; only whose fault it is differs from a plan made here. */
static dss_status_t contradiction(dss_error_t *error_p) {
    if (error_p)
        error_p->status = DSS_ERR_CORRUPT;
    return DSS_ERR_CORRUPT;
}

dss_status_t dss_plan_deserialize(const void *bytes, size_t bytes_bytes, dss_plan_t **plan_p, dss_error_t *error_p) {
    const unsigned char *wire = bytes;
    dss_plan_t *plan = NULL;
    if (!plan_p)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "plan_p is NULL");
    dss_status_t status = check_wire(wire, bytes_bytes, error_p);
    if (status != DSS_OK)
        return status;
    status = dss_plan_allocate((dss_plan_kind_t)get_u32(wire + 8), get_u32(wire + 12), get_u32(wire + 16), get_u64(wire + 32),
                               &plan, error_p);
    if (status != DSS_OK)
        return status;
    status = get_body(wire, plan, error_p);
    if (status == DSS_OK)
        status = dss_plan_finish(plan, error_p);
    if (status == DSS_ERR_INVALID_ARGUMENT)
        status = contradiction(error_p);
    if (status == DSS_OK && plan->hash != get_u64(wire + bytes_bytes - HASH_BYTES))
        status = dss_fail(error_p, DSS_ERR_CORRUPT, "the serialised plan does not number its groups by their smallest member");
    if (status == DSS_OK)
        *plan_p = plan;
    else
        dss_plan_destroy(plan);
    return status;
}
