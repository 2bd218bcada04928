/*
 * Operations that go by hosts and racks, against plain sums. Values are small integers, so that sums are exact in any order.
 */
#include "ranks.h"

#include <math.h>
#include <stdatomic.h>

typedef struct layout {
    const char *name;
    uint32_t world_size;
    uint32_t host_of[12]; /* the lowest rank on the host */
    uint32_t rack_of[12];
} layout_t;

static const layout_t layouts[] = {
    {"two racks of two", 4, {0, 1, 2, 3}, {0, 0, 1, 1}},
    {"unequal racks", 6, {0, 1, 2, 3, 4, 5}, {0, 0, 1, 1, 1, 1}},
    {"racks of one and three", 4, {0, 1, 2, 3}, {7, 3, 3, 3}},
    {"three racks of two, ranks dealt out", 6, {0, 1, 2, 3, 4, 5}, {0, 1, 2, 0, 1, 2}},
    {"two hosts of two, no racks", 4, {0, 0, 2, 2}, {0, 0, 0, 0}},
    {"hosts of one, two and three in two racks", 6, {0, 1, 1, 3, 3, 3}, {0, 0, 0, 1, 1, 1}},
    {"interleaved hosts", 5, {0, 1, 1, 0, 4}, {0, 0, 0, 0, 2}},
};

static const layout_t *current; /* what ranks_allgather tells of hosts */

static dss_status_t lie_of_hosts(void *argument, const void *mine, size_t bytes_each, void *all, dss_error_t *error_p) {
    const dss_status_t status = ranks_allgather(argument, mine, bytes_each, all, error_p);
    if (bytes_each == sizeof(uint32_t))
        memcpy(all, current->host_of, current->world_size * sizeof(uint32_t));
    return status;
}

typedef struct call {
    dss_operation_t *operation;
    dss_status_t status;
    char text[1600];
} call_t;

static void called(void *argument, dss_status_t status, const char *text) {
    call_t *call = argument;
    call->status = status;
    (void)snprintf(call->text, sizeof call->text, "%s", text ? text : "");
}

static void post(dss_engine_t *engine, dss_operation_kind_t kind, dss_dtype_t dtype, uint64_t sequence, void *values, size_t count,
                 call_t *call) {
    uint32_t members[RANKS_MOST];
    for (uint32_t i = 0; i < dss_engine_world_size(engine); i++)
        members[i] = i;
    const size_t half = count / 3; /* two arrays, the second unaligned to chunks and shards */
    const dss_segment_t segments[2] = {{values, half}, {(char *)values + half * dss_dtype_bytes(dtype), count - half}};
    const dss_operation_params_t params = {.params_bytes = sizeof params,
                                           .kind = kind,
                                           .dtype = dtype,
                                           .reduction = DSS_SUM,
                                           .key = {.channel = 7, .sequence = sequence},
                                           .members = members,
                                           .member_count = dss_engine_world_size(engine),
                                           .segments = segments,
                                           .segment_count = 2,
                                           .timeout_ns = (uint64_t)30 * 1000000000u,
                                           .what = "call",
                                           .done = called,
                                           .argument = call};
    dss_error_t error = {0};
    if (dss_engine_post(engine, &params, &call->operation, &error) != DSS_OK)
        CHECK_FAIL("post: %s", error.text);
}

static void wait_for(call_t *call) {
    CHECK(dss_operation_wait(call->operation, UINT64_MAX));
}

static float value_of(uint32_t rank, size_t i) {
    return (float)((rank * 7 + i) % 61);
}

static float sum_of(const layout_t *layout, size_t i) {
    float sum = 0;
    for (uint32_t rank = 0; rank < layout->world_size; rank++)
        sum += value_of(rank, i);
    return sum;
}

static void sum_all(dss_engine_t *engine, uint32_t rank, void *argument) {
    static const size_t counts[] = {20000, 16384 + 1, 300000, 1500001};
    const layout_t *layout = argument;
    CHECK_STATUS(dss_engine_set_racks(engine, layout->rack_of, NULL), DSS_OK);
    for (size_t c = 0; c < sizeof counts / sizeof *counts; c++) {
        const size_t count = counts[c];
        float *sums = malloc(count * sizeof *sums);
        float *means = malloc(count * sizeof *means);
        for (size_t i = 0; i < count; i++)
            sums[i] = means[i] = value_of(rank, i);
        call_t call = {0};
        call_t average = {0};
        post(engine, DSS_OPERATION_ALL_REDUCE, DSS_FLOAT32, 2 * c, sums, count, &call);
        post(engine, DSS_OPERATION_AVERAGE, DSS_FLOAT32, 2 * c + 1, means, count, &average);
        wait_for(&average);
        wait_for(&call);
        CHECK_FOR(call.status == DSS_OK, "%s: %s", layout->name, call.text);
        CHECK_FOR(average.status == DSS_OK, "%s: %s", layout->name, average.text);
        for (size_t i = 0; i < count; i++) {
            CHECK_FOR(sums[i] == sum_of(layout, i), "%s, rank %u, element %zu of %zu: %g, expected %g", layout->name, rank, i,
                      count, (double)sums[i], (double)sum_of(layout, i));
            CHECK_NEAR(means[i], sum_of(layout, i) / (float)layout->world_size, 1e-5);
        }
        dss_operation_release(call.operation);
        dss_operation_release(average.operation);
        free(sums);
        free(means);
    }
}

static void run_layout(const layout_t *layout, void (*body)(dss_engine_t *engine, uint32_t rank, void *argument)) {
    current = layout;
    ranks_run_with(layout->world_size, DSS_TRANSPORT_TCP, lie_of_hosts, body, (void *)(uintptr_t)layout);
}

static void sums_and_means_are_exact(void) {
    for (size_t i = 0; i < sizeof layouts / sizeof *layouts; i++)
        run_layout(&layouts[i], sum_all);
}

static float crossed(const layout_t *layout, dss_operation_kind_t kind, uint32_t rank, size_t i) {
    return value_of(kind == DSS_OPERATION_CROSSING_OF_MEANS ? layout->rack_of[rank] : rank, i); /* means are equal in a rack */
}

static void cross(dss_engine_t *engine, uint32_t rank, const layout_t *layout, dss_operation_kind_t kind) {
    CHECK_STATUS(dss_engine_set_racks(engine, layout->rack_of, NULL), DSS_OK);
    const size_t count = kind == DSS_OPERATION_CROSSING_OF_MEANS ? 50001 : 500001; /* one chunk; several */
    float *values = malloc(count * sizeof *values);
    for (size_t i = 0; i < count; i++)
        values[i] = crossed(layout, kind, rank, i);
    call_t call = {0};
    post(engine, kind, DSS_FLOAT32, 5, values, count, &call);
    for (size_t i = 0; i < count; i++)
        values[i] = 100; /* read at once */
    wait_for(&call);
    CHECK_FOR(call.status == DSS_OK, "%s: %s", layout->name, call.text);
    const dss_segment_t segments[2] = {{values, 11}, {values + 11, count - 11}};
    CHECK_STATUS(dss_operation_correct(call.operation, segments, 2, NULL), DSS_OK);
    dss_error_t error = {0};
    CHECK_STATUS(dss_operation_correct(call.operation, segments, 1, &error), DSS_ERR_INVALID_ARGUMENT);
    CHECK_CONTAINS(error.text, "11 elements");
    for (size_t i = 0; i < count; i++) {
        double mean = 0;
        double rack_sum = 0;
        uint32_t in_rack = 0;
        for (uint32_t j = 0; j < layout->world_size; j++) {
            const bool own = layout->rack_of[j] == layout->rack_of[rank];
            mean += (double)crossed(layout, kind, j, i) / layout->world_size;
            rack_sum += own ? (double)crossed(layout, kind, j, i) : 0;
            in_rack += own;
        }
        CHECK_FOR(fabs((double)values[i] - (100 + mean - rack_sum / in_rack)) < 1e-4, "%s, kind %d, rank %u, element %zu: %g",
                  layout->name, (int)kind, rank, i, (double)values[i]);
    }
    dss_operation_release(call.operation);
    free(values);
}

static void cross_means(dss_engine_t *engine, uint32_t rank, void *argument) {
    cross(engine, rank, argument, DSS_OPERATION_CROSSING_OF_MEANS);
}

static void cross_values(dss_engine_t *engine, uint32_t rank, void *argument) {
    cross(engine, rank, argument, DSS_OPERATION_CROSSING_OF_VALUES);
}

static void run_crossings(void (*body)(dss_engine_t *engine, uint32_t rank, void *argument)) {
    for (size_t i = 0; i < 4; i++)
        run_layout(&layouts[i], body);
    run_layout(&layouts[5], body);
}

static void crossings_of_means_leave_the_weighted_difference(void) {
    run_crossings(cross_means);
}

static void crossings_of_values_leave_the_weighted_difference(void) {
    run_crossings(cross_values);
}

/* The largest sum would be twice what a float16 holds, and more. */
static float large_value_of(uint32_t rank, size_t i) {
    return 1000.0f * (float)(30 + (rank * 7 + i) % 31);
}

static void average_halves(dss_engine_t *engine, const layout_t *layout, dss_dtype_t dtype, double unit, bool crosses) {
    const size_t count = 120001;
    const uint32_t rank = dss_engine_rank(engine);
    float *wide = malloc(count * sizeof *wide);
    uint16_t *halves = malloc(count * sizeof *halves);
    for (size_t i = 0; i < count; i++)
        wide[i] = large_value_of(rank, i);
    CHECK_STATUS(dss_narrow_scaled(dtype, wide, 1.0, halves, count), DSS_OK);
    call_t call = {0};
    post(engine, crosses ? DSS_OPERATION_CROSSING_OF_VALUES : DSS_OPERATION_AVERAGE, dtype, 5 + (uint64_t)dtype, halves, count,
         &call);
    wait_for(&call);
    CHECK_FOR(call.status == DSS_OK, "%s: %s", layout->name, call.text);
    const dss_segment_t segment = {halves, count};
    if (crosses)
        CHECK_STATUS(dss_operation_correct(call.operation, &segment, 1, NULL), DSS_OK);
    CHECK_STATUS(dss_widen(dtype, halves, wide, count), DSS_OK);
    for (size_t i = 0; i < count; i++) {
        double mean = 0;
        double rack_sum = 0;
        uint32_t in_rack = 0;
        for (uint32_t j = 0; j < layout->world_size; j++) {
            const bool own = layout->rack_of[j] == layout->rack_of[rank];
            mean += (double)large_value_of(j, i) / layout->world_size;
            rack_sum += own ? (double)large_value_of(j, i) : 0;
            in_rack += own;
        }
        const double expected = crosses ? (double)large_value_of(rank, i) + mean - rack_sum / in_rack : mean;
        CHECK_FOR(fabs((double)wide[i] - expected) < 4 * unit * 65536, "%s, %s, rank %u, element %zu: %g, expected %g",
                  layout->name, dss_dtype_name(dtype), rank, i, (double)wide[i],
                  expected); /* rounded when read, and in each of three stages */
    }
    dss_operation_release(call.operation);
    free(halves);
    free(wide);
}

static void average_all_halves(dss_engine_t *engine, uint32_t rank, void *argument) {
    const layout_t *layout = argument;
    (void)rank;
    CHECK_STATUS(dss_engine_set_racks(engine, layout->rack_of, NULL), DSS_OK);
    for (int crosses = 0; crosses <= (layout != &layouts[4] && layout != &layouts[6]); crosses++) {
        average_halves(engine, layout, DSS_FLOAT16, 1.0 / 2048, crosses);
        average_halves(engine, layout, DSS_BFLOAT16, 1.0 / 256, crosses);
    }
}

static void means_of_halves_do_not_overflow(void) {
    for (size_t i = 0; i < sizeof layouts / sizeof *layouts; i++)
        run_layout(&layouts[i], average_all_halves);
}

static _Atomic uint64_t bytes_sent; /* by all */

static void cross_little(dss_engine_t *engine, uint32_t rank, void *argument) {
    const layout_t *layout = argument;
    float values[3000] = {0}; /* what a worker exchanges is so little that elsewhere all would send it to all */
    dss_engine_stats_t stats;
    call_t call = {0};
    (void)rank;
    CHECK_STATUS(dss_engine_set_racks(engine, layout->rack_of, NULL), DSS_OK);
    post(engine, DSS_OPERATION_CROSSING_OF_VALUES, DSS_FLOAT32, 5, values, 3000, &call);
    wait_for(&call);
    CHECK_FOR(call.status == DSS_OK, "%s", call.text);
    dss_operation_release(call.operation);
    dss_engine_stats(engine, &stats);
    bytes_sent += stats.bytes_sent;
}

static void an_uplink_carries_each_value_once(void) {
    const uint64_t inside = 6 * 3000 * sizeof(float);             /* up and down in racks of two: half of the values each */
    const uint64_t across = 3 * 3000 * sizeof(float) * 2 * 2 / 3; /* 2(g-1)/g of them out of each of three racks */
    bytes_sent = 0;
    run_layout(&layouts[3], cross_little);
    CHECK_FOR(bytes_sent >= inside + across && bytes_sent < (inside + across) * 11 / 10, "%llu bytes, expected %llu and frames",
              (unsigned long long)bytes_sent, (unsigned long long)(inside + across));
}

static void differ(dss_engine_t *engine, uint32_t rank, void *argument) {
    const layout_t *layout = argument;
    CHECK_STATUS(dss_engine_set_racks(engine, layout->rack_of, NULL), DSS_OK);
    const size_t count = rank == 1 ? 100 : 100000; /* small ones take no hierarchy */
    int32_t *values = calloc(count, sizeof *values);
    call_t call = {0};
    post(engine, DSS_OPERATION_ALL_REDUCE, DSS_INT32, 9, values, count, &call);
    wait_for(&call);
    CHECK(call.status == DSS_ERR_MISMATCH || call.status == DSS_ERR_FAILED);
    CHECK_CONTAINS(call.text, "sum of 100 x int32");
    CHECK_CONTAINS(call.text, "sum of 100000 x int32");
    dss_operation_release(call.operation);
    free(values);
}

static void sizes_that_differ_fail_on_all(void) {
    for (size_t i = 0; i < sizeof layouts / sizeof *layouts; i++)
        run_layout(&layouts[i], differ);
}

static void racks_must_hold_whole_hosts(dss_engine_t *engine, uint32_t rank, void *argument) {
    static const uint32_t racks[] = {0, 1, 0, 0};
    dss_error_t error = {0};
    (void)rank;
    (void)argument;
    CHECK_STATUS(dss_engine_set_racks(engine, racks, &error), DSS_ERR_INVALID_ARGUMENT);
    CHECK_CONTAINS(error.text, "ranks 0 and 1 share a host, and the topology puts them into racks 0 and 1");
}

static void a_host_is_in_one_rack(void) {
    run_layout(&layouts[4], racks_must_hold_whole_hosts);
}

int main(void) {
    RUN(sums_and_means_are_exact);
    RUN(crossings_of_means_leave_the_weighted_difference);
    RUN(crossings_of_values_leave_the_weighted_difference);
    RUN(means_of_halves_do_not_overflow);
    RUN(an_uplink_carries_each_value_once);
    RUN(sizes_that_differ_fail_on_all);
    RUN(a_host_is_in_one_rack);
    return 0;
}
