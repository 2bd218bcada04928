#include "plans.h"

#define HEADER_BYTES 40u

typedef struct wire {
    unsigned char *bytes; /* owned */
    size_t bytes_bytes;
} wire_t;

static wire_t serialize(const dss_plan_t *plan) {
    wire_t wire = {NULL, 0};
    CHECK_STATUS(dss_plan_serialize(plan, NULL, 0, &wire.bytes_bytes), DSS_OK);
    wire.bytes = malloc(wire.bytes_bytes);
    CHECK_STATUS(dss_plan_serialize(plan, wire.bytes, wire.bytes_bytes, &wire.bytes_bytes), DSS_OK);
    return wire;
}

static void put_u32(unsigned char *bytes, uint32_t value) {
    for (int i = 0; i < 4; i++)
        bytes[i] = (unsigned char)(value >> 8 * i);
}

/* FNV-1a over all but the last 8 bytes, which it becomes: damage that the hash no longer shows. */
static void put_hash(unsigned char *bytes, size_t bytes_bytes) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t i = 0; i + 8 < bytes_bytes; i++)
        hash = (hash ^ bytes[i]) * 0x100000001b3u;
    for (int i = 0; i < 8; i++)
        bytes[bytes_bytes - 8 + i] = (unsigned char)(hash >> 8 * i);
}

/* Whatever the bytes: either refused with a text, or a sound plan that serialises to these very bytes. Returns which. */
static int accepted(const unsigned char *bytes, size_t bytes_bytes) {
    unsigned char *copy = malloc(bytes_bytes ? bytes_bytes : 1); /* of the exact size, so that a sanitizer sees every overrun */
    dss_plan_t *plan = NULL;
    dss_error_t error = {DSS_OK, ""};
    memcpy(copy, bytes, bytes_bytes);
    const dss_status_t status = dss_plan_deserialize(copy, bytes_bytes, &plan, &error);
    if (status != DSS_OK) {
        CHECK_FOR(status == DSS_ERR_CORRUPT || status == DSS_ERR_DISCONNECTED, "%d", (int)status);
        CHECK_FOR(error.status == status && error.text[0] && plan == NULL, "%s", error.text);
    } else {
        const wire_t again = serialize(plan);
        CHECK_FOR(again.bytes_bytes == bytes_bytes && memcmp(again.bytes, bytes, bytes_bytes) == 0,
                  "another form of the same plan");
        check_partitions(plan);
        double rho = -1;
        CHECK_STATUS(dss_plan_contraction(plan, &rho), DSS_OK);
        CHECK_FOR(rho >= 0 && rho < 1, "%g", rho);
        free(again.bytes);
        dss_plan_destroy(plan);
    }
    free(copy);
    return status == DSS_OK;
}

/* Ranks on other machines and other releases read this form. */
static void the_form_is_fixed(void) {
    unsigned char expected[HEADER_BYTES + 2 * 4 + 2 * 3 * 4 + 8] = {'D', 'S', 'S', 'P', 3, 0, 0, 0, 3, 0, 0, 0, 3, 0,
                                                                    0,   0,   2,   0,   0, 0, 2, 0, 0, 0, 0, 0, 0, 0,
                                                                    1,   0,   0,   0,   8, 7, 6, 5, 4, 3, 2, 1};
    static const uint32_t group_of[] = {2, 2, 0, 1, 0, 0};
    static const uint32_t canonical[] = {0, 0, 1, 0, 1, 1};
    dss_plan_t *plan = NULL;
    for (unsigned i = 0; i < 6; i++)
        put_u32(expected + HEADER_BYTES + 8 + 4 * (size_t)i, canonical[i]);
    put_hash(expected, sizeof expected);
    CHECK_STATUS(dss_plan_create_explicit(3, 2, group_of, 0x0102030405060708u, &plan, NULL), DSS_OK);
    const wire_t wire = serialize(plan);
    CHECK_EQUAL(wire.bytes_bytes, sizeof expected);
    for (size_t i = 0; i < sizeof expected; i++)
        CHECK_FOR(wire.bytes[i] == expected[i], "byte %zu is %u, expected %u", i, wire.bytes[i], expected[i]);
    CHECK_FOR(memcmp(expected + sizeof expected - 8, &(uint64_t){dss_plan_hash(plan)}, 8) == 0 || *(const char *)&(int){1} == 0,
              "the hash is not the last 8 bytes");
    free(wire.bytes);
    dss_plan_destroy(plan);
}

static void plans_survive_the_trip(void) {
    static const uint32_t sizes[] = {1, 2, 5, 8, 12, 100, 1500};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        for (int kind = DSS_PLAN_GRID; kind <= DSS_PLAN_RANDOM; kind++) {
            dss_plan_t *plan = make_plan((dss_plan_kind_t)kind, sizes[i], 0, 0, UINT64_MAX - i);
            dss_plan_t *copy = NULL;
            const wire_t wire = serialize(plan);
            CHECK_STATUS(dss_plan_deserialize(wire.bytes, wire.bytes_bytes, &copy, NULL), DSS_OK);
            CHECK_EQUAL(dss_plan_kind(copy), kind);
            CHECK_EQUAL(dss_plan_seed(copy), UINT64_MAX - i);
            CHECK_EQUAL(dss_plan_hash(copy), dss_plan_hash(plan));
            CHECK_EQUAL(dss_plan_max_group_size(copy), dss_plan_max_group_size(plan));
            CHECK_EQUAL(dss_plan_round_of_call(copy, 12345), dss_plan_round_of_call(plan, 12345));
            check_partitions(copy);
            CHECK(accepted(wire.bytes, wire.bytes_bytes));
            free(wire.bytes);
            dss_plan_destroy(plan);
            dss_plan_destroy(copy);
        }
    }
}

static void a_buffer_too_small_is_left_alone(void) {
    dss_plan_t *plan = make_plan(DSS_PLAN_GRID, 8, 0, 0, 0);
    unsigned char bytes[256];
    size_t needed_bytes = 0;
    CHECK_STATUS(dss_plan_serialize(plan, NULL, 0, &needed_bytes), DSS_OK);
    CHECK_EQUAL(needed_bytes, HEADER_BYTES + 3 * 4 + 8 * 3 * 4 + 8);
    memset(bytes, 0x5a, sizeof bytes);
    size_t untouched = 77;
    CHECK_STATUS(dss_plan_serialize(plan, bytes, needed_bytes - 1, &untouched), DSS_ERR_INVALID_ARGUMENT);
    CHECK_EQUAL(untouched, 77);
    CHECK_STATUS(dss_plan_serialize(NULL, bytes, sizeof bytes, &untouched), DSS_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(dss_plan_serialize(plan, bytes, sizeof bytes, NULL), DSS_ERR_INVALID_ARGUMENT);
    for (size_t i = 0; i < sizeof bytes; i++)
        CHECK_EQUAL(bytes[i], 0x5a);
    dss_plan_destroy(plan);
}

static void every_truncation_and_extension_is_refused(void) {
    dss_plan_t *plan = make_plan(DSS_PLAN_RANDOM, 7, 2, 0, 4);
    const wire_t wire = serialize(plan);
    unsigned char longer[1024] = {0};
    for (size_t length = 0; length < wire.bytes_bytes; length++)
        CHECK_FOR(!accepted(wire.bytes, length), "cut to %zu bytes", length);
    memcpy(longer, wire.bytes, wire.bytes_bytes);
    for (size_t length = wire.bytes_bytes + 1; length <= wire.bytes_bytes + 64; length++) {
        dss_plan_t *none = NULL;
        dss_error_t error;
        CHECK_FOR(!accepted(longer, length), "extended to %zu bytes", length);
        put_hash(longer, length); /* a right hash does not make the length right */
        CHECK_STATUS(dss_plan_deserialize(longer, length, &none, &error), DSS_ERR_CORRUPT);
        CHECK_CONTAINS(error.text, "expected 240 for 7 ranks and 6 rounds");
        memset(longer, 0, sizeof longer);
        memcpy(longer, wire.bytes, wire.bytes_bytes);
    }
    CHECK_STATUS(dss_plan_deserialize(NULL, 0, &plan, NULL), DSS_ERR_CORRUPT);
    CHECK_STATUS(dss_plan_deserialize(wire.bytes, wire.bytes_bytes, NULL, NULL), DSS_ERR_INVALID_ARGUMENT);
    free(wire.bytes);
    dss_plan_destroy(plan);
}

static void every_changed_byte_is_refused(void) {
    dss_plan_t *plan = make_plan(DSS_PLAN_RANDOM, 7, 2, 0, 4);
    const wire_t wire = serialize(plan);
    for (size_t i = 0; i < wire.bytes_bytes; i++) {
        for (unsigned change = 1; change < 256; change++) {
            wire.bytes[i] ^= (unsigned char)change;
            CHECK_FOR(!accepted(wire.bytes, wire.bytes_bytes), "byte %zu changed by %#x", i, change);
            wire.bytes[i] ^= (unsigned char)change;
        }
    }
    CHECK(accepted(wire.bytes, wire.bytes_bytes));
    free(wire.bytes);
    dss_plan_destroy(plan);
}

/* 2 racks of 2, striped: one local round and one that crosses, a step late; the pairs agree, so they keep their values. */
static dss_plan_t *make_striped(void) {
    static const uint32_t host_of[] = {0, 1, 2, 3};
    static const uint32_t rack_of[] = {0, 0, 1, 1};
    static const dss_link_t links[] = {{1e8, 0}, {1e8, 0}, {1e8, 0}, {1e8, 0}};
    const dss_topology_params_t racks = {sizeof racks, 4, 4, 2, host_of, rack_of, links, links, {1e9, 0}};
    dss_topology_t *topology = NULL;
    dss_plan_t *plan = NULL;
    CHECK_STATUS(dss_topology_create(&racks, &topology, NULL), DSS_OK);
    const dss_plan_params_t params = {.params_bytes = sizeof params,
                                      .kind = DSS_PLAN_STRIPED,
                                      .world_size = 4,
                                      .max_period = 2,
                                      .topology = topology,
                                      .delay = 1};
    CHECK_STATUS(dss_plan_create(&params, &plan, NULL), DSS_OK);
    dss_topology_destroy(topology);
    return plan;
}

/* Returns how often it was a plan after all. */
static uint32_t damage(dss_plan_t *plan, uint32_t trial_count) {
    const wire_t wire = serialize(plan);
    unsigned char *bytes = malloc(wire.bytes_bytes);
    uint64_t random = 5;
    uint32_t accepted_count = 0;
    for (uint32_t trial = 0; trial < trial_count; trial++) {
        memcpy(bytes, wire.bytes, wire.bytes_bytes);
        for (uint32_t i = 0; i <= trial % 3; i++) {
            const uint32_t at = check_random_below(&random, (uint32_t)wire.bytes_bytes - 8);
            bytes[at] = (unsigned char)check_random_below(&random, trial % 2 ? 256 : 4);
        }
        put_hash(bytes, wire.bytes_bytes);
        accepted_count += (uint32_t)accepted(bytes, wire.bytes_bytes);
    }
    free(bytes);
    free(wire.bytes);
    dss_plan_destroy(plan);
    return accepted_count;
}

/* With the hash made right again, what is left to lie about must be found out by the other checks, or be a plan after all. */
static void damage_under_a_right_hash_is_refused_or_sound(void) {
    const uint32_t of_random = damage(make_plan(DSS_PLAN_RANDOM, 7, 2, 0, 4), 40000);
    const uint32_t of_striped = damage(make_striped(), 40000);
    CHECK_FOR(of_random > 0 && of_random < 40000, "%u", of_random);
    CHECK_FOR(of_striped > 0 && of_striped < 40000, "%u", of_striped);
}

static void refuse_header(size_t offset, uint32_t value, const char *part) {
    dss_plan_t *plan = make_plan(DSS_PLAN_GRID, 4, 2, 0, 0);
    const wire_t wire = serialize(plan);
    dss_plan_t *none = NULL;
    dss_error_t error;
    put_u32(wire.bytes + offset, value);
    put_hash(wire.bytes, wire.bytes_bytes);
    CHECK_STATUS(dss_plan_deserialize(wire.bytes, wire.bytes_bytes, &none, &error), DSS_ERR_CORRUPT);
    CHECK_CONTAINS(error.text, part);
    free(wire.bytes);
    dss_plan_destroy(plan);
}

/* Claims of gigabytes must be refused by arithmetic, before anything is allocated for them. */
static void lies_in_the_header_are_named(void) {
    refuse_header(0, 0x464c457f, "not a serialised plan: they begin 7f 45 4c 46");
    refuse_header(4, 2, "version 2, this library reads 3");
    refuse_header(8, 0, "unknown kind 0");
    refuse_header(8, 8, "unknown kind 8");
    refuse_header(12, 0, "claims 0 ranks");
    refuse_header(12, UINT32_MAX, "claims 4294967295 ranks");
    refuse_header(12, 1u << 24, "expected 134217784 for 16777216 ranks and 2 rounds");
    refuse_header(16, 0, "0 rounds");
    refuse_header(16, 1u << 31, "2147483648 rounds");
    refuse_header(12, (1u << 24) + 1, "claims 16777217 ranks");
    refuse_header(16, 1025, "1025 rounds, expected");
    refuse_header(16, 1024, "for 4 ranks and 1024 rounds");
    refuse_header(20, 0, "made for 0 stripes");
    refuse_header(20, 3, "2 rounds and is made for 3 stripes");
    refuse_header(24, 1, "delay is 1, but no round of the plan crosses racks");
    refuse_header(28, 0, "claims 0 racks for 4 ranks");
    refuse_header(28, 5, "claims 5 racks for 4 ranks");
    refuse_header(28, 2, "has 88 bytes, expected 104");
    refuse_header(HEADER_BYTES, 3, "says 3 of how round 0 crosses");
    refuse_header(HEADER_BYTES, 2, "round 0 crosses racks, but the plan knows only one");
    refuse_header(HEADER_BYTES + 4, 1, "round 1 crosses racks, but the plan knows only one");
    refuse_header(HEADER_BYTES + 8, 4, "puts rank 0 of round 0 in group 4");
    refuse_header(HEADER_BYTES + 8, 3, "smallest member");
}

#define RACKS (HEADER_BYTES + 8)
#define GROUPS (RACKS + 16)

static void racks_and_crossings_survive_the_trip(void) {
    dss_plan_t *plan = make_striped();
    dss_plan_t *copy = NULL;
    const wire_t wire = serialize(plan);
    CHECK(accepted(wire.bytes, wire.bytes_bytes));
    CHECK_STATUS(dss_plan_deserialize(wire.bytes, wire.bytes_bytes, &copy, NULL), DSS_OK);
    CHECK_EQUAL(dss_plan_kind(copy), DSS_PLAN_STRIPED);
    CHECK_EQUAL(dss_plan_stripe_count(copy), 2);
    CHECK_EQUAL(dss_plan_delay(copy), 1);
    CHECK_EQUAL(dss_plan_rack_count(copy), 2);
    CHECK(!dss_plan_is_crossing(copy, 0) && dss_plan_is_crossing(copy, 1) && !dss_plan_is_crossing(copy, 2));
    CHECK(!dss_plan_keeps_values(copy, 0) && dss_plan_keeps_values(copy, 1) && !dss_plan_keeps_values(copy, 2));
    for (uint32_t rank = 0; rank < 4; rank++)
        CHECK_EQUAL(dss_plan_rack_of(copy, rank), rank / 2);
    free(wire.bytes);
    dss_plan_destroy(plan);
    dss_plan_destroy(copy);
}

static void refuse_striped(size_t offset, uint32_t value, const char *part) {
    dss_plan_t *plan = make_striped();
    const wire_t wire = serialize(plan);
    dss_plan_t *none = NULL;
    dss_error_t error;
    put_u32(wire.bytes + offset, value);
    put_hash(wire.bytes, wire.bytes_bytes);
    CHECK_STATUS(dss_plan_deserialize(wire.bytes, wire.bytes_bytes, &none, &error), DSS_ERR_CORRUPT);
    CHECK_STATUS(error.status, DSS_ERR_CORRUPT);
    CHECK_CONTAINS(error.text, part);
    free(wire.bytes);
    dss_plan_destroy(plan);
}

/* What would count a correction twice, or add it too late, must never reach an engine. */
static void crossings_that_contradict_the_racks_are_refused(void) {
    refuse_striped(24, 2, "delay is 2 with 2 stripes and crossings 2 rounds apart");
    refuse_striped(24, UINT32_MAX, "so at most 1");
    refuse_striped(24, 0, "in round 1 workers keep their values until a correction comes, but the delay is 0");
    refuse_striped(HEADER_BYTES + 4, 3, "says 3 of how round 1 crosses racks");
    refuse_striped(HEADER_BYTES, 2, "crossings 1 rounds apart");
    refuse_striped(HEADER_BYTES, 1, "crossings 1 rounds apart");
    refuse_striped(HEADER_BYTES + 4, 0, "round 1 averages ranks 0 and 2 of different racks at once");
    refuse_striped(RACKS, 2, "rank 0 in rack 2, but its racks are 0 to 1");
    refuse_striped(GROUPS + 12, 0, "round 0 averages ranks 0 and 3 of different racks at once");
    refuse_striped(GROUPS + 16 + 12, 1, "rank 3 is not in the group of the others of its rack 1");
    dss_plan_t *plan = make_striped();
    const wire_t wire = serialize(plan);
    dss_plan_t *none = NULL;
    dss_error_t error;
    memcpy(wire.bytes + RACKS, "\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 16); /* all in rack 0 */
    put_hash(wire.bytes, wire.bytes_bytes);
    CHECK_STATUS(dss_plan_deserialize(wire.bytes, wire.bytes_bytes, &none, &error), DSS_ERR_CORRUPT);
    CHECK_CONTAINS(error.text, "rack 1 of the plan is empty");
    free(wire.bytes);
    dss_plan_destroy(plan);
}

/* Alone in the local round nobody gets to know the other of its rack, unless the rack takes its mean when it crosses. */
static void kept_values_need_local_rounds_that_connect_racks(void) {
    dss_plan_t *plan = make_striped();
    const wire_t wire = serialize(plan);
    dss_plan_t *copy = NULL;
    dss_error_t error;
    double rho = -1;
    for (uint32_t rank = 0; rank < 4; rank++)
        put_u32(wire.bytes + GROUPS + 4 * (size_t)rank, rank);
    put_hash(wire.bytes, wire.bytes_bytes);
    CHECK_STATUS(dss_plan_deserialize(wire.bytes, wire.bytes_bytes, &copy, &error), DSS_ERR_DISCONNECTED);
    CHECK_CONTAINS(error.text, "ranks 0 and 1 are never connected: the union of the 2 rounds falls into 3 parts");
    put_u32(wire.bytes + HEADER_BYTES + 4, 1);
    put_hash(wire.bytes, wire.bytes_bytes);
    CHECK_STATUS(dss_plan_deserialize(wire.bytes, wire.bytes_bytes, &copy, &error), DSS_OK);
    CHECK(dss_plan_is_crossing(copy, 1) && !dss_plan_keeps_values(copy, 1));
    CHECK_STATUS(dss_plan_contraction(copy, &rho), DSS_OK);
    CHECK_NEAR(rho, 0, 0);
    free(wire.bytes);
    dss_plan_destroy(plan);
    dss_plan_destroy(copy);
}

static void a_disconnected_plan_is_refused_on_arrival(void) {
    dss_plan_t *plan = make_plan(DSS_PLAN_GRID, 4, 2, 0, 0);
    const wire_t wire = serialize(plan);
    dss_plan_t *none = NULL;
    dss_error_t error;
    memcpy(wire.bytes + HEADER_BYTES + 8 + 16, wire.bytes + HEADER_BYTES + 8, 16); /* round 1 becomes round 0 */
    put_hash(wire.bytes, wire.bytes_bytes);
    CHECK_STATUS(dss_plan_deserialize(wire.bytes, wire.bytes_bytes, &none, &error), DSS_ERR_DISCONNECTED);
    CHECK_CONTAINS(error.text, "ranks 0 and 2 are never connected");
    free(wire.bytes);
    dss_plan_destroy(plan);
}

static void garbage_is_refused(void) {
    uint64_t random = 77;
    unsigned char bytes[512];
    for (uint32_t trial = 0; trial < 20000; trial++) {
        const size_t length = check_random_below(&random, sizeof bytes);
        for (size_t i = 0; i < length; i++)
            bytes[i] = (unsigned char)check_random_below(&random, 256);
        if (trial % 2 && length >= HEADER_BYTES + 8) { /* half of it looks like a plan at first */
            memcpy(bytes, "DSSP\3\0\0", 8);
            put_u32(bytes + 8, 1 + trial % 3);
            put_u32(bytes + 12, 1 + check_random_below(&random, 8));
            put_u32(bytes + 16, 1 + check_random_below(&random, 8));
            put_u32(bytes + 20, 1 + check_random_below(&random, 4));
            put_u32(bytes + 24, check_random_below(&random, 2));
            put_u32(bytes + 28, 1 + check_random_below(&random, 2));
            put_hash(bytes, length);
        }
        (void)accepted(bytes, length);
    }
}

int main(void) {
    RUN(the_form_is_fixed);
    RUN(plans_survive_the_trip);
    RUN(a_buffer_too_small_is_left_alone);
    RUN(every_truncation_and_extension_is_refused);
    RUN(every_changed_byte_is_refused);
    RUN(damage_under_a_right_hash_is_refused_or_sound);
    RUN(lies_in_the_header_are_named);
    RUN(racks_and_crossings_survive_the_trip);
    RUN(crossings_that_contradict_the_racks_are_refused);
    RUN(kept_values_need_local_rounds_that_connect_racks);
    RUN(a_disconnected_plan_is_refused_on_arrival);
    RUN(garbage_is_refused);
}
