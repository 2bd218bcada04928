/* The engine end to end: ranks are threads, values are compared with plain sums. */
#include "ranks.h"

typedef struct load {
    uint32_t count;
    dss_operation_kind_t kind;
} load_t;

#define ARRAY_COUNT 7u /* the values of large operations are spread over so many arrays */

static float value_of(uint32_t rank, uint64_t index) {
    return (float)((rank * 7919u + index * 104729u) % 1000u) - 500.0f;
}

static void reduce_and_compare(dss_engine_t *engine, uint32_t rank, void *argument) {
    const load_t *load = argument;
    const uint32_t world_size = dss_engine_world_size(engine);
    float *values = malloc((load->count + 1) * sizeof *values);
    for (uint64_t sequence = 0; sequence < 3; sequence++) {
        for (uint32_t i = 0; i < load->count; i++)
            values[i] = value_of(rank, i + sequence);
        dss_segment_t segments[ARRAY_COUNT];
        for (uint32_t i = 0; i < ARRAY_COUNT; i++) {
            const uint32_t begin = (uint32_t)((uint64_t)load->count * i * i / (ARRAY_COUNT * ARRAY_COUNT));
            const uint32_t end = (uint32_t)((uint64_t)load->count * (i + 1) * (i + 1) / (ARRAY_COUNT * ARRAY_COUNT));
            segments[i] = (dss_segment_t){values + begin, end - begin};
        }
        ranks_call_t call;
        dss_operation_params_t params = ranks_params(engine, load->kind, DSS_FLOAT32, segments, sequence);
        params.segment_count = ARRAY_COUNT;
        ranks_post(engine, params, &call);
        if (ranks_wait(&call) != DSS_OK)
            CHECK_FAIL("rank %u: %s", rank, call.text);
        for (uint32_t i = 0; i < load->count; i++) {
            float sum = 0; /* of small integers: exact in any order */
            for (uint32_t other = 0; other < world_size; other++)
                sum += value_of(other, i + sequence);
            const float expected = load->kind == DSS_OPERATION_AVERAGE ? sum / (float)world_size : sum;
            if (fabsf(values[i] - expected) > fabsf(expected) * 1e-6f)
                CHECK_FAIL("rank %u, element %u of %u: %g, expected %g", rank, i, load->count, (double)values[i], (double)expected);
        }
    }
    free(values);
}

/* Rounding once is exact to half a unit in the last place of a bfloat16, however many ranks: partial sums stay in float32. */
static void average_halves(dss_engine_t *engine, uint32_t rank, void *argument) {
    const load_t *load = argument;
    const uint32_t world_size = dss_engine_world_size(engine);
    uint16_t *values = malloc((load->count + 1) * sizeof *values);
    for (uint32_t i = 0; i < load->count; i++) {
        const float value = value_of(rank, i) / 4; /* ten bits: rounded here, once */
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        values[i] = (uint16_t)(bits >> 16);
    }
    const dss_segment_t segment = {values, load->count};
    ranks_call_t call;
    ranks_post(engine, ranks_params(engine, DSS_OPERATION_AVERAGE, DSS_BFLOAT16, &segment, 0), &call);
    if (ranks_wait(&call) != DSS_OK)
        CHECK_FAIL("rank %u: %s", rank, call.text);
    for (uint32_t i = 0; i < load->count; i++) {
        double sum = 0;
        for (uint32_t other = 0; other < world_size; other++) {
            const float value = value_of(other, i) / 4;
            uint32_t bits;
            memcpy(&bits, &value, sizeof bits);
            bits &= 0xffff0000u;
            float cut;
            memcpy(&cut, &bits, sizeof cut);
            sum += (double)cut;
        }
        const uint32_t bits = (uint32_t)values[i] << 16;
        float got;
        memcpy(&got, &bits, sizeof got);
        const double expected = sum / world_size;
        if (fabs((double)got - expected) > fabs(expected) / 256 * 1.001)
            CHECK_FAIL("rank %u, element %u of %u: %g, expected %g", rank, i, load->count, (double)got, expected);
    }
    free(values);
}

static void run_sizes(uint32_t world_size, dss_transport_t transport) {
    static const uint32_t counts[] = {0, 1, 3, 1000, 2048, 2049, 10007, 300001, 1500000};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        load_t load = {counts[i], i % 2 == 0 ? DSS_OPERATION_AVERAGE : DSS_OPERATION_ALL_REDUCE};
        ranks_run(world_size, transport, reduce_and_compare, &load);
        if (i % 2 == 0)
            ranks_run(world_size, transport, average_halves, &load);
    }
}

static void sums_over_shared_memory(void) {
    for (uint32_t world_size = 1; world_size <= 5; world_size++)
        run_sizes(world_size, DSS_TRANSPORT_SHM);
}

static void sums_over_tcp(void) {
    for (uint32_t world_size = 1; world_size <= 5; world_size++)
        run_sizes(world_size, DSS_TRANSPORT_TCP);
}

int main(void) {
    RUN(sums_over_shared_memory);
    RUN(sums_over_tcp);
    return 0;
}
