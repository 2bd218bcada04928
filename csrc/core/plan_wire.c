/*
 * The serialised plan: what rank 0 publishes and every other rank checks. All numbers little-endian:
 *
 *   "DSSP"  version u32  kind u32  world_size u32  period u32  seed u64  group numbers u32 [period][world_size]  hash u64
 *
 * Groups are numbered by their smallest member, so a plan has exactly one form; any other is refused.
 */
#include <string.h>

#include "hash.h"
#include "plan_internal.h"
#include "status.h"

#define WIRE_VERSION 1u
#define HEADER_BYTES 28u
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
    put_u64(bytes + 20, plan->seed);
}

/* At most 2^36 + 36. */
static uint64_t wire_bytes(uint64_t world_size, uint64_t period) {
    return HEADER_BYTES + world_size * period * 4 + HASH_BYTES;
}

uint64_t dss_plan_content_hash(const dss_plan_t *plan) {
    unsigned char bytes[CHUNK_WORDS * 4];
    const size_t word_count = (size_t)plan->world_size * plan->period;
    put_header(bytes, plan);
    uint64_t hash = dss_hash_more(DSS_HASH_BEGIN, bytes, HEADER_BYTES);
    for (size_t begin = 0; begin < word_count; begin += CHUNK_WORDS) {
        const size_t count = word_count - begin < CHUNK_WORDS ? word_count - begin : CHUNK_WORDS;
        for (size_t i = 0; i < count; i++)
            put_u32(bytes + 4 * i, plan->group_of[begin + i]);
        hash = dss_hash_more(hash, bytes, 4 * count);
    }
    return hash;
}

dss_status_t dss_plan_serialize(const dss_plan_t *plan, void *bytes, size_t capacity_bytes, size_t *needed_bytes_p) {
    if (!plan || !needed_bytes_p)
        return DSS_ERR_INVALID_ARGUMENT;
    const uint64_t needed_bytes = wire_bytes(plan->world_size, plan->period);
    if (needed_bytes > SIZE_MAX || (bytes && capacity_bytes < needed_bytes))
        return DSS_ERR_INVALID_ARGUMENT;
    *needed_bytes_p = (size_t)needed_bytes;
    if (!bytes)
        return DSS_OK;
    unsigned char *next = bytes;
    put_header(next, plan);
    next += HEADER_BYTES;
    const size_t word_count = (size_t)plan->world_size * plan->period;
    for (size_t i = 0; i < word_count; i++, next += 4)
        put_u32(next, plan->group_of[i]);
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
                        "the serialised plan is of version %u, this library reads %u: install the same dssync on every rank",
                        get_u32(bytes + 4), WIRE_VERSION);
    const uint32_t kind = get_u32(bytes + 8);
    const uint32_t world_size = get_u32(bytes + 12);
    const uint32_t period = get_u32(bytes + 16);
    if (kind < DSS_PLAN_GRID || kind > DSS_PLAN_EXPLICIT)
        return dss_fail(error_p, DSS_ERR_CORRUPT, "the serialised plan is of unknown kind %u", kind);
    if (world_size < 1 || world_size > DSS_PLAN_MAX_WORLD_SIZE || period < 1 || period > DSS_PLAN_MAX_PERIOD)
        return dss_fail(error_p, DSS_ERR_CORRUPT, "the serialised plan claims %u ranks and %u rounds, expected 1 to %u and 1 to %u",
                        world_size, period, DSS_PLAN_MAX_WORLD_SIZE, DSS_PLAN_MAX_PERIOD);
    if (bytes_bytes != wire_bytes(world_size, period))
        return dss_fail(error_p, DSS_ERR_CORRUPT, "the serialised plan has %zu bytes, expected %llu for %u ranks and %u rounds",
                        bytes_bytes, (unsigned long long)wire_bytes(world_size, period), world_size, period);
    const uint64_t found = get_u64(bytes + bytes_bytes - HASH_BYTES);
    const uint64_t expected = dss_hash_more(DSS_HASH_BEGIN, bytes, bytes_bytes - HASH_BYTES);
    if (found != expected)
        return dss_fail(error_p, DSS_ERR_CORRUPT, "the serialised plan is damaged: its hash is %016llx, expected %016llx",
                        (unsigned long long)found, (unsigned long long)expected);
    return DSS_OK;
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

dss_status_t dss_plan_deserialize(const void *bytes, size_t bytes_bytes, dss_plan_t **plan_p, dss_error_t *error_p) {
    const unsigned char *wire = bytes;
    dss_plan_t *plan = NULL;
    if (!plan_p)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "plan_p is NULL");
    dss_status_t status = check_wire(wire, bytes_bytes, error_p);
    if (status != DSS_OK)
        return status;
    status = dss_plan_allocate((dss_plan_kind_t)get_u32(wire + 8), get_u32(wire + 12), get_u32(wire + 16), get_u64(wire + 20),
                               &plan, error_p);
    if (status != DSS_OK)
        return status;
    status = get_groups(wire + HEADER_BYTES, plan, error_p);
    if (status == DSS_OK)
        status = dss_plan_finish(plan, error_p);
    if (status == DSS_OK && plan->hash != get_u64(wire + bytes_bytes - HASH_BYTES))
        status = dss_fail(error_p, DSS_ERR_CORRUPT, "the serialised plan does not number its groups by their smallest member");
    if (status == DSS_OK)
        *plan_p = plan;
    else
        dss_plan_destroy(plan);
    return status;
}
