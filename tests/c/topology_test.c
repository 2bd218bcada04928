#include "check.h"

static const dss_link_t fast = {62.5e6, 50e-6};
static const dss_link_t slow = {12.5e6, 1e-3};

/* Ten workers on five hosts in three racks, nothing in order: racks of 5, 1 and 4 workers. */
static const uint32_t host_of[10] = {4, 0, 2, 0, 3, 4, 1, 2, 0, 4};
static const uint32_t rack_of[5] = {2, 1, 0, 0, 2};

typedef struct made {
    dss_link_t nics[5];
    dss_link_t uplinks[3];
    dss_topology_params_t params;
} made_t;

static made_t *good_params(void) {
    static made_t made;
    for (uint32_t host = 0; host < 5; host++)
        made.nics[host] = (dss_link_t){1e6 * (host + 1), 1e-6 * host};
    for (uint32_t rack = 0; rack < 3; rack++)
        made.uplinks[rack] = rack == 1 ? (dss_link_t){INFINITY, 0} : slow;
    made.params = (dss_topology_params_t){sizeof made.params, 10, 5, 3, host_of, rack_of, made.nics, made.uplinks, {4e9, 1e-6}};
    return &made;
}

static void what_was_given_comes_back(void) {
    made_t *made = good_params();
    dss_topology_t *topology = NULL;
    CHECK_STATUS(dss_topology_create(&made->params, &topology, NULL), DSS_OK);
    memset(made->nics, 0, sizeof made->nics); /* it holds copies */
    memset(made->uplinks, 0, sizeof made->uplinks);
    CHECK_EQUAL(dss_topology_world_size(topology), 10);
    CHECK_EQUAL(dss_topology_host_count(topology), 5);
    CHECK_EQUAL(dss_topology_rack_count(topology), 3);
    for (uint32_t rank = 0; rank < 10; rank++) {
        CHECK_EQUAL(dss_topology_host_of(topology, rank), host_of[rank]);
        CHECK_EQUAL(dss_topology_rack_of(topology, rank), rack_of[host_of[rank]]);
    }
    for (uint32_t host = 0; host < 5; host++) {
        CHECK_EQUAL(dss_topology_rack_of_host(topology, host), rack_of[host]);
        CHECK(dss_topology_nic(topology, host).bytes_per_s == 1e6 * (host + 1));
        CHECK(dss_topology_nic(topology, host).latency_s == 1e-6 * host);
    }
    CHECK(dss_topology_uplink(topology, 0).bytes_per_s == slow.bytes_per_s);
    CHECK(isinf(dss_topology_uplink(topology, 1).bytes_per_s));
    CHECK(dss_topology_memory(topology).bytes_per_s == 4e9);
    dss_topology_destroy(topology);
    dss_topology_destroy(NULL);
}

static void check_racks(const dss_topology_t *topology) {
    uint32_t placed_count = 0;
    for (uint32_t rack = 0; rack < dss_topology_rack_count(topology); rack++) {
        const uint32_t *members;
        uint32_t member_count;
        CHECK_STATUS(dss_topology_rack(topology, rack, &members, &member_count), DSS_OK);
        CHECK_FOR(member_count > 0, "rack %u", rack);
        for (uint32_t i = 0; i < member_count; i++) {
            CHECK_FOR(i == 0 || members[i - 1] < members[i], "rack %u", rack);
            CHECK_EQUAL(dss_topology_rack_of_host(topology, dss_topology_host_of(topology, members[i])), rack);
        }
        placed_count += member_count;
    }
    CHECK_EQUAL(placed_count, dss_topology_world_size(topology)); /* ascending and each in its rack: so each exactly once */
}

/* Workers scattered over hosts and hosts over racks by chance; the first ones so that none stays empty. */
static void racks_hold_their_members_in_order(void) {
    uint64_t random = 7;
    for (uint32_t trial = 0; trial < 300; trial++) {
        uint32_t hosts[60], racks[60];
        dss_link_t links[60];
        const uint32_t rack_count = 1 + check_random_below(&random, 6);
        const uint32_t host_count = rack_count + check_random_below(&random, 20);
        const uint32_t world_size = host_count + check_random_below(&random, 60 - host_count);
        for (uint32_t i = 0; i < 60; i++) {
            links[i] = fast;
            hosts[i] = i < host_count ? host_count - 1 - i : check_random_below(&random, host_count);
            racks[i] = i < rack_count ? rack_count - 1 - i : check_random_below(&random, rack_count);
        }
        const dss_topology_params_t params = {sizeof params, world_size, host_count, rack_count, hosts, racks, links, links, fast};
        dss_topology_t *topology = NULL;
        CHECK_STATUS(dss_topology_create(&params, &topology, NULL), DSS_OK);
        check_racks(topology);
        dss_topology_destroy(topology);
    }
}

static void check_refused(const dss_topology_params_t *params, const char *text) {
    dss_topology_t *topology = NULL;
    dss_error_t error = {DSS_OK, ""};
    CHECK_STATUS(dss_topology_create(params, &topology, &error), DSS_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(error.status, DSS_ERR_INVALID_ARGUMENT);
    CHECK_CONTAINS(error.text, text);
    CHECK(topology == NULL);
    CHECK_STATUS(dss_topology_create(params, &topology, NULL), DSS_ERR_INVALID_ARGUMENT);
}

static void wrong_counts_are_refused_by_value(void) {
    const struct {
        size_t params_bytes;
        uint32_t world_size, host_count, rack_count;
        const char *text;
    } rows[] = {
        {8, 10, 5, 3, "params_bytes is 8"},
        {sizeof(dss_topology_params_t), 0, 5, 3, "world_size is 0"},
        {sizeof(dss_topology_params_t), DSS_PLAN_MAX_WORLD_SIZE + 1, 5, 3, "world_size is 16777217"},
        {sizeof(dss_topology_params_t), 4, 5, 3, "host_count is 5, expected 1 to world_size 4"},
        {sizeof(dss_topology_params_t), 10, 0, 3, "host_count is 0"},
        {sizeof(dss_topology_params_t), 10, 5, 6, "rack_count is 6, expected 1 to host_count 5"},
        {sizeof(dss_topology_params_t), 10, 5, 0, "rack_count is 0"},
        {sizeof(dss_topology_params_t), 10, 4, 3, "rank 0 is said to be in host 4, but the hosts are 0 to 3"},
        {sizeof(dss_topology_params_t), 10, 5, 2, "host 0 is said to be in rack 2, but the racks are 0 to 1"},
        {sizeof(dss_topology_params_t), 6, 5, 3, "host 1 holds no worker"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        dss_topology_params_t params = good_params()->params;
        params.params_bytes = rows[i].params_bytes;
        params.world_size = rows[i].world_size;
        params.host_count = rows[i].host_count;
        params.rack_count = rows[i].rack_count;
        check_refused(&params, rows[i].text);
    }
}

static void empty_racks_and_missing_arrays_are_refused(void) {
    static const uint32_t no_rack_1[5] = {2, 2, 0, 0, 2};
    dss_topology_params_t params = good_params()->params;
    params.rack_of = no_rack_1;
    check_refused(&params, "rack 1 holds no host");
    params.rack_of = NULL;
    check_refused(&params, "NULL");
    check_refused(NULL, "params is NULL");
    CHECK_STATUS(dss_topology_create(&good_params()->params, NULL, NULL), DSS_ERR_INVALID_ARGUMENT);
}

static void wrong_links_are_refused_by_value(void) {
    static const struct {
        dss_link_t link;
        const char *text;
    } rows[] = {
        {{0, 0}, "rate of 0 bytes/s"},    {{-3, 0}, "rate of -3 bytes/s"},     {{NAN, 0}, "rate of "},
        {{1, -0.5}, "latency of -0.5 s"}, {{1, INFINITY}, "latency of inf s"}, {{1, NAN}, "latency of "},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        made_t *made = good_params();
        made->nics[3] = rows[i].link;
        check_refused(&made->params, rows[i].text);
        check_refused(&made->params, "the NIC of host 3");
        made = good_params();
        made->uplinks[2] = rows[i].link;
        check_refused(&made->params, rows[i].text);
        check_refused(&made->params, "the uplink of rack 2");
        made = good_params();
        made->params.memory = rows[i].link;
        check_refused(&made->params, "memory");
    }
}

static void racks_beyond_the_last_are_refused(void) {
    const uint32_t *members = NULL;
    uint32_t member_count = 77;
    dss_topology_t *topology = NULL;
    CHECK_STATUS(dss_topology_create(&good_params()->params, &topology, NULL), DSS_OK);
    CHECK_STATUS(dss_topology_rack(topology, 3, &members, &member_count), DSS_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(dss_topology_rack(NULL, 0, &members, &member_count), DSS_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(dss_topology_rack(topology, 0, NULL, &member_count), DSS_ERR_INVALID_ARGUMENT);
    CHECK(members == NULL && member_count == 77);
    dss_topology_destroy(topology);
}

int main(void) {
    RUN(what_was_given_comes_back);
    RUN(racks_hold_their_members_in_order);
    RUN(wrong_counts_are_refused_by_value);
    RUN(empty_racks_and_missing_arrays_are_refused);
    RUN(wrong_links_are_refused_by_value);
    RUN(racks_beyond_the_last_are_refused);
}
