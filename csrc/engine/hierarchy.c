/*
 * One operation as many: reduce-scatter inside hosts, then inside racks, exchange between racks, all-gather back down.
 *
 * Whoever reduces a span of the vector in its host owns it there, and exchanges it with the owners in the other hosts of the rack,
 * and so on upwards; where hosts or racks are of unequal size their owners' spans differ, and the pieces exchanged are the common
 * refinement. So a link carries what it must, once: 2(g-1)/g of the vector over the uplink of each of g racks. The vector goes in
 * chunks, a few at a time in each stage and in order, so that all links work at once; each piece of each chunk is an operation of
 * its own (a stage), and its callback posts what comes next. (Hierarchical all-reduce; the delayed crossing is section 3, rule 8,
 * of this project's design.)
 *
 * Averages carry means up, not sums, which half types could not hold; a mean of several is weighted before it meets others. A
 * crossing of means has no way up: its values are equal in a rack. One of values goes up in a copy. Both exchange the spans they
 * own weighted by the size of the racks, and gather differences. Half types go in chunks on any several hosts: in a ring, partial
 * sums of all of a tensor in float32 would be twice its bytes.
 */
#include "engine.h"

#include <stdlib.h>
#include <string.h>

#define WINDOW 16u                  /* chunks in one stage */
#define CHUNK ((uint64_t)256 << 10) /* bytes: the first's way up and the last's down overlap with no others; less costs latency */
#define CHUNK_OF_MEMBER ((uint64_t)8 << 10) /* or so much for each member: what one sends to another must outweigh its frame */
#define CHUNKS_MOST 4096u                   /* twelve bits of a stage's number */
#define MEMBERS_MOST 65535u
#define STEPS_MOST 65535u /* sixteen bits; only racks and hosts of very many different sizes have more */

enum { SCATTER_IN_HOST, SCATTER_IN_RACK, EXCHANGE, GATHER_IN_RACK, GATHER_IN_HOST, STAGE_COUNT };

/* A part of a chunk, in elements from its begin, and the member that holds it reduced. */
typedef struct span {
    uint64_t begin;
    uint64_t end;
    uint32_t owner;
} span_t;

typedef struct spans {
    span_t *list; /* ascending, without gaps; owned */
    size_t count;
} spans_t;

/* A piece that this member reduces with others. */
typedef struct step {
    int stage; /* SCATTER_IN_HOST to EXCHANGE; gathering goes the same way back */
    uint64_t begin;
    uint64_t end;
    uint32_t number;
    uint32_t member_count;
    uint32_t *members; /* ranks, ascending; owned */
} step_t;

typedef struct steps {
    step_t *list; /* owned */
    size_t count;
    size_t capacity;
} steps_t;

typedef struct chunk {
    dss_operation_t *operation;
    uint64_t begin; /* elements */
    const steps_t *steps;
    int stage;
    bool active;
    uint32_t pending; /* operations of its stage */
} chunk_t;

struct dss_hierarchy {
    steps_t steps[2]; /* of all chunks but the last, and of the last */
    chunk_t *chunks;  /* owned */
    uint32_t chunk_count;
    uint32_t inside[STAGE_COUNT]; /* chunks that are active there */
    uint32_t finished;
    uint32_t domains[EXCHANGE + 1]; /* members of the own host, of the own rack, of all */
    uint8_t *correction;            /* of a crossing: of all elements, on the way up what is reduced; owned */
    uint8_t *negative;              /* of a crossing: its rack's mean times -1, of the spans exchanged, chunk after chunk; owned */
    dss_segments_t correction_segments;
};

/* ---- who owns what ------------------------------------------------------------------------------------------------------ */

static uint32_t rank_of(const dss_operation_t *operation, uint32_t member) {
    const dss_peer_t *peer = operation->members[member].peer;
    return peer ? peer->rank : operation->engine->identity.rank;
}

static void count_domains(const dss_operation_t *operation, const uint32_t *domain_of, uint32_t *domains_p) {
    *domains_p = 0;
    for (uint32_t i = 0; i < operation->member_count; i++) {
        uint32_t j = 0;
        while (j < i && domain_of[rank_of(operation, j)] != domain_of[rank_of(operation, i)])
            j++;
        *domains_p += j == i;
    }
}

bool dss_hierarchy_fits(const dss_operation_t *operation) {
    uint32_t hosts = 0;
    uint32_t racks = 0;
    if (operation->member_count > MEMBERS_MOST)
        return false;
    count_domains(operation, operation->engine->hosts, &hosts);
    count_domains(operation, operation->engine->racks, &racks);
    return hosts > 1 && (dss_dtype_accumulator(operation->dtype) != operation->dtype || hosts < operation->member_count ||
                         (racks > 1 && racks < operation->member_count));
}

static bool add_step(steps_t *steps, const step_t *step, const dss_operation_t *operation, const uint32_t *owners) {
    if (steps->count == steps->capacity) {
        const size_t capacity = 2 * steps->capacity + 4;
        step_t *larger = realloc(steps->list, capacity * sizeof *larger);
        if (!larger)
            return false;
        steps->list = larger;
        steps->capacity = capacity;
    }
    uint32_t *members = malloc(step->member_count * sizeof *members);
    if (!members)
        return false;
    for (uint32_t i = 0; i < step->member_count; i++)
        members[i] = rank_of(operation, owners[i]);
    steps->list[steps->count] = *step;
    steps->list[steps->count++].members = members;
    return true;
}

/* The pieces on which all children agree who owns them; each is scattered among its owners, or exchanged. */
static bool combine(const dss_operation_t *operation, const spans_t *children, uint32_t child_count, int stage, steps_t *steps,
                    spans_t *result) {
    size_t most = 0;
    for (uint32_t i = 0; i < child_count; i++)
        most += children[i].count;
    size_t *at = calloc(child_count, sizeof *at);
    uint32_t *owners = calloc(child_count, sizeof *owners);
    result->list = malloc((most * child_count + 1) * sizeof *result->list);
    bool done = at && owners && result->list;
    uint32_t number = 0;
    for (uint64_t begin = 0; done && at[0] < children[0].count; number++) {
        if (number > STEPS_MOST) {
            done = false;
            break;
        }
        uint64_t end = UINT64_MAX;
        bool owned = false;
        for (uint32_t i = 0; i < child_count; i++) {
            const span_t *span = &children[i].list[at[i]];
            end = span->end < end ? span->end : end;
            owned = owned || span->owner == operation->own_index;
            uint32_t place = i; /* members are in the order of ranks, as operations want them */
            for (; place > 0 && owners[place - 1] > span->owner; place--)
                owners[place] = owners[place - 1];
            owners[place] = span->owner;
        }
        const step_t step = {.stage = stage, .begin = begin, .end = end, .number = number, .member_count = child_count};
        done = !owned || child_count == 1 || add_step(steps, &step, operation, owners);
        for (uint32_t i = 0; i < child_count; i++) {
            const span_t part = {begin + dss_stripe_begin((size_t)(end - begin), child_count, i),
                                 begin + dss_stripe_begin((size_t)(end - begin), child_count, i + 1), owners[i]};
            if (part.begin < part.end)
                result->list[result->count++] = part;
        }
        for (uint32_t i = 0; i < child_count; i++)
            at[i] += children[i].list[at[i]].end == end;
        begin = end;
    }
    free(at);
    free(owners);
    return done;
}

/* The spans of all members that are in the same domain as member `first`; `inner` finds those of one inner domain, the ones that
 * `inner_of` tells apart, or where that is NULL of one member. */
typedef bool (*inner_t)(const dss_operation_t *operation, uint32_t first, uint64_t elements, steps_t *steps, spans_t *spans);

static bool combine_domain(const dss_operation_t *operation, const uint32_t *domain_of, const uint32_t *inner_of, uint32_t first,
                           uint64_t elements, inner_t inner, int stage, steps_t *steps, spans_t *result) {
    const uint32_t count = operation->member_count;
    spans_t *children = calloc(count, sizeof *children);
    uint32_t child_count = 0;
    bool done = children != NULL;
    for (uint32_t i = first; done && i < count; i++) {
        if (domain_of && domain_of[rank_of(operation, i)] != domain_of[rank_of(operation, first)])
            continue;
        uint32_t j = first;
        while (inner_of && j < i && inner_of[rank_of(operation, j)] != inner_of[rank_of(operation, i)])
            j++;
        if (inner_of && j < i)
            continue; /* its inner domain has been seen */
        done = inner(operation, i, elements, steps, &children[child_count++]);
    }
    done = done && combine(operation, children, child_count, stage, steps, result);
    for (uint32_t i = 0; children && i < child_count; i++)
        free(children[i].list);
    free(children);
    return done;
}

static bool spans_of_member(const dss_operation_t *operation, uint32_t member, uint64_t elements, steps_t *steps, spans_t *spans) {
    (void)operation;
    (void)steps;
    spans->list = malloc(sizeof *spans->list);
    if (!spans->list)
        return false;
    spans->list[0] = (span_t){0, elements, member};
    spans->count = 1;
    return true;
}

static bool spans_of_host(const dss_operation_t *operation, uint32_t first, uint64_t elements, steps_t *steps, spans_t *spans) {
    return combine_domain(operation, operation->engine->hosts, NULL, first, elements, spans_of_member, SCATTER_IN_HOST, steps,
                          spans);
}

static bool spans_of_rack(const dss_operation_t *operation, uint32_t first, uint64_t elements, steps_t *steps, spans_t *spans) {
    return combine_domain(operation, operation->engine->racks, operation->engine->hosts, first, elements, spans_of_host,
                          SCATTER_IN_RACK, steps, spans);
}

/* All that this member does for one chunk of so many elements. */
static bool make_steps(const dss_operation_t *operation, uint64_t elements, steps_t *steps) {
    const dss_engine_t *engine = operation->engine;
    spans_t all = {0};
    uint32_t racks = 0;
    count_domains(operation, engine->racks, &racks);
    const bool done = racks > 1 ? combine_domain(operation, NULL, engine->racks, 0, elements, spans_of_rack, EXCHANGE, steps, &all)
                                : combine_domain(operation, NULL, engine->hosts, 0, elements, spans_of_host, EXCHANGE, steps, &all);
    free(all.list);
    return done;
}

/* ---- stages ------------------------------------------------------------------------------------------------------------- */

static void stage_done(void *argument, dss_status_t status, const char *text);

static int way_up(int stage) {
    return stage <= EXCHANGE ? stage : 2 * EXCHANGE - stage;
}

/* Whether what the stage leaves is the mean of what went in. Crossings weigh before the exchange, see weigh(). */
static bool carries_means(const dss_operation_t *operation, int stage) {
    return stage < EXCHANGE ? operation->kind != DSS_OPERATION_ALL_REDUCE
                            : stage == EXCHANGE && operation->kind == DSS_OPERATION_AVERAGE;
}

/* Single members meet, and their sum need only be divided. Means of several are weighted before they are summed: see balance(). */
static bool meet_alone(const dss_operation_t *operation, const step_t *step) {
    return step->member_count == operation->hierarchy->domains[step->stage];
}

static const dss_segments_t *values_of(const dss_operation_t *operation) {
    return dss_is_crossing(operation->kind) ? &operation->hierarchy->correction_segments : &operation->segments;
}

static bool post_step(chunk_t *chunk, const step_t *step) {
    dss_operation_t *operation = chunk->operation;
    const dss_hierarchy_t *hierarchy = operation->hierarchy;
    const dss_segments_t *values = values_of(operation);
    const size_t width = dss_dtype_bytes(operation->dtype);
    const uint64_t begin = (chunk->begin + step->begin) * width;
    const uint64_t end = (chunk->begin + step->end) * width;
    dss_segment_t *segments = malloc(values->count * sizeof *segments);
    size_t count = 0;
    dss_error_t error = {DSS_ERR_NO_MEMORY, "out of memory for an operation"};
    for (uint64_t at = begin; segments && at < end;) {
        size_t piece = 0;
        uint8_t *bytes = dss_segments_at(values, at, &piece);
        piece = piece < end - at ? piece : (size_t)(end - at);
        segments[count++] = (dss_segment_t){bytes, piece / width};
        at += piece;
    }
    const dss_operation_params_t params = {.params_bytes = sizeof params,
                                           .kind = operation->kind,
                                           .dtype = operation->dtype,
                                           .reduction = operation->reduction,
                                           .key = operation->key,
                                           .members = step->members,
                                           .member_count = step->member_count,
                                           .segments = segments,
                                           .segment_count = count,
                                           .layout = operation->signature.layout,
                                           .timeout_ns = operation->timeout_ns,
                                           .what = operation->what,
                                           .done = stage_done,
                                           .argument = chunk};
    const uint32_t index = (uint32_t)(chunk - hierarchy->chunks);
    const dss_stage_t stage = {
        .parent = operation,
        .number = (index << 19 | (uint32_t)chunk->stage << 16 | step->number) + 1,
        .skips = {[DSS_PHASE_REDUCE] = chunk->stage > EXCHANGE, [DSS_PHASE_GATHER] = chunk->stage < EXCHANGE},
        .scale = carries_means(operation, chunk->stage) && meet_alone(operation, step) ? 1.0 / step->member_count : 1.0};
    chunk->pending++;
    const dss_status_t status = segments ? dss_engine_post_stage(operation->engine, &params, &stage, &error) : error.status;
    free(segments);
    if (status == DSS_OK)
        return true;
    chunk->pending--;
    dss_operation_fail(operation, status, "start", error.text);
    return false;
}

/* How many elements of a chunk this member exchanges. */
static size_t exchanged(const steps_t *steps) {
    size_t count = 0;
    for (size_t i = 0; i < steps->count; i++)
        count += steps->list[i].stage == EXCHANGE ? (size_t)(steps->list[i].end - steps->list[i].begin) : 0;
    return count;
}

static uint8_t *negative_of(const chunk_t *chunk) {
    const dss_operation_t *operation = chunk->operation;
    const size_t index = (size_t)(chunk - operation->hierarchy->chunks);
    return operation->hierarchy->negative + index * exchanged(&operation->hierarchy->steps[0]) * dss_dtype_bytes(operation->dtype);
}

/* What the own domain's mean is of the mean of those that meet in this stage. */
static double weight_of(const dss_operation_t *operation, const step_t *step) {
    const uint32_t *domains = operation->hierarchy->domains;
    return (double)domains[step->stage - 1] / domains[step->stage];
}

/* Before means meet: weights the spans that this member brings. False when memory is out. */
static bool balance(const chunk_t *chunk) {
    const dss_operation_t *operation = chunk->operation;
    const size_t width = dss_dtype_bytes(operation->dtype);
    bool done = true;
    for (size_t i = 0; done && i < chunk->steps->count; i++) {
        const step_t *step = &chunk->steps->list[i];
        if (step->stage != chunk->stage || meet_alone(operation, step))
            continue;
        uint8_t *wide = malloc((size_t)(step->end - step->begin) * sizeof(double) + 1);
        done = wide != NULL;
        const uint64_t end = (chunk->begin + step->end) * width;
        for (uint64_t at = (chunk->begin + step->begin) * width; done && at < end;) {
            size_t piece = 0;
            uint8_t *bytes = dss_segments_at(values_of(operation), at, &piece);
            piece = piece < end - at ? piece : (size_t)(end - at);
            (void)dss_widen(operation->dtype, bytes, wide, piece / width);
            (void)dss_narrow_scaled(operation->dtype, wide, weight_of(operation, step), bytes, piece / width);
            at += piece;
        }
        free(wide);
    }
    return done;
}

/* Before the exchange: leaves its rack's share of the mean in `correction`, and notes what is to be taken off it again. */
static bool weigh(const chunk_t *chunk) {
    const dss_operation_t *operation = chunk->operation;
    const dss_hierarchy_t *hierarchy = operation->hierarchy;
    const bool is_mean = operation->kind == DSS_OPERATION_CROSSING_OF_MEANS; /* else the rack's mean is in `correction` already */
    const dss_segments_t *values = is_mean ? &operation->segments : &hierarchy->correction_segments;
    const size_t width = dss_dtype_bytes(operation->dtype);
    const double weight = (double)hierarchy->domains[SCATTER_IN_RACK] / operation->member_count;
    uint8_t *sum = malloc(exchanged(chunk->steps) * dss_dtype_bytes(dss_dtype_accumulator(operation->dtype)) + 1);
    uint8_t *negative = negative_of(chunk);
    for (size_t i = 0; sum && i < chunk->steps->count; i++) {
        const step_t *step = &chunk->steps->list[i];
        uint64_t at = (chunk->begin + step->begin) * width;
        const uint64_t end = (chunk->begin + step->end) * width;
        while (step->stage == EXCHANGE && at < end) {
            size_t piece = 0;
            const uint8_t *bytes = dss_segments_at(values, at, &piece);
            piece = piece < end - at ? piece : (size_t)(end - at);
            (void)dss_widen(operation->dtype, bytes, sum, piece / width);
            (void)dss_narrow_scaled(operation->dtype, sum, weight, hierarchy->correction + at, piece / width);
            (void)dss_narrow_scaled(operation->dtype, sum, -1.0, negative, piece / width);
            negative += piece;
            at += piece;
        }
    }
    free(sum);
    return sum != NULL;
}

/* Behind the exchange: the mean over all less its rack's. */
static void subtract(const chunk_t *chunk) {
    const dss_operation_t *operation = chunk->operation;
    const size_t width = dss_dtype_bytes(operation->dtype);
    const uint8_t *negative = negative_of(chunk);
    for (size_t i = 0; i < chunk->steps->count; i++) {
        const step_t *step = &chunk->steps->list[i];
        if (step->stage != EXCHANGE)
            continue;
        const size_t count = (size_t)(step->end - step->begin);
        uint8_t *mean = operation->hierarchy->correction + (chunk->begin + step->begin) * width;
        (void)dss_combine(operation->dtype, DSS_SUM, mean, negative, 1.0, mean, count);
        negative += count * width;
    }
}

static void end_stage(chunk_t *chunk) {
    dss_operation_t *operation = chunk->operation;
    operation->hierarchy->inside[chunk->stage]--;
    chunk->active = false;
    if (chunk->stage == EXCHANGE && dss_is_crossing(operation->kind))
        subtract(chunk);
    chunk->stage++;
    if (chunk->stage == STAGE_COUNT)
        operation->hierarchy->finished++;
}

/* Posts the chunk's stage. What completes at once is told by its callback, later. */
static void begin_stage(chunk_t *chunk) {
    dss_operation_t *operation = chunk->operation;
    chunk->active = true;
    operation->hierarchy->inside[chunk->stage]++;
    const bool weighs = chunk->stage == EXCHANGE && dss_is_crossing(operation->kind);
    const bool balances = chunk->stage > SCATTER_IN_HOST && carries_means(operation, chunk->stage);
    if ((weighs && !weigh(chunk)) || (balances && !balance(chunk))) {
        dss_operation_fail(operation, DSS_ERR_NO_MEMORY, "transfer", "out of memory for an operation");
        return;
    }
    for (size_t i = 0; i < chunk->steps->count && !operation->completed; i++)
        if (chunk->steps->list[i].stage == way_up(chunk->stage) && !post_step(chunk, &chunk->steps->list[i]))
            return;
    if (chunk->pending == 0 && !operation->completed)
        end_stage(chunk);
}

/* Chunks enter each stage in order: if they overtook each other, ranks could fill their windows with different ones, for ever. */
static bool may_enter(const chunk_t *chunk) {
    const dss_hierarchy_t *hierarchy = chunk->operation->hierarchy;
    const chunk_t *before = chunk - 1;
    if (chunk->active || chunk->stage == STAGE_COUNT || hierarchy->inside[chunk->stage] == WINDOW)
        return false;
    return chunk == hierarchy->chunks || before->stage > chunk->stage || (before->stage == chunk->stage && before->active);
}

/* Every chunk as far as it can go. */
static void advance(dss_operation_t *operation) {
    dss_hierarchy_t *hierarchy = operation->hierarchy;
    for (uint32_t i = 0; i < hierarchy->chunk_count && !operation->completed; i++) {
        chunk_t *chunk = &hierarchy->chunks[i];
        while (!operation->completed && may_enter(chunk))
            begin_stage(chunk);
        if (chunk->stage == SCATTER_IN_HOST && !chunk->active)
            break; /* and so wait all that follow */
    }
    if (!operation->completed && hierarchy->finished == hierarchy->chunk_count)
        dss_operation_complete(operation, DSS_OK, NULL);
}

static void stage_done(void *argument, dss_status_t status, const char *text) {
    chunk_t *chunk = argument;
    dss_operation_t *operation = chunk->operation;
    dss_engine_t *engine = operation->engine;
    dss_engine_lock(engine);
    chunk->pending--;
    if (status != DSS_OK && !operation->completed) /* its channel has failed, and this one with it; to be sure */
        dss_operation_fail(operation, status, "transfer", text);
    if (chunk->pending == 0 && !operation->completed) {
        end_stage(chunk);
        advance(operation);
        dss_engine_hand_over(engine);
    }
    dss_engine_unlock(engine);
}

/* ---- begin and end ------------------------------------------------------------------------------------------------------ */

static void count_members(const dss_operation_t *operation, uint32_t *domains) {
    const dss_engine_t *engine = operation->engine;
    const uint32_t own = engine->identity.rank;
    uint32_t racks = 0;
    count_domains(operation, engine->racks, &racks);
    for (uint32_t i = 0; i < operation->member_count; i++) {
        const uint32_t rank = rank_of(operation, i);
        domains[SCATTER_IN_HOST] += engine->hosts[rank] == engine->hosts[own];
        domains[SCATTER_IN_RACK] += engine->racks[rank] == engine->racks[own];
    }
    if (racks == 1) /* hosts exchange with each other */
        domains[SCATTER_IN_RACK] = domains[SCATTER_IN_HOST];
    domains[EXCHANGE] = operation->member_count;
}

static bool make_correction(dss_operation_t *operation) {
    dss_hierarchy_t *hierarchy = operation->hierarchy;
    const size_t width = dss_dtype_bytes(operation->dtype);
    const size_t own = hierarchy->chunk_count == 0
                           ? 0
                           : (hierarchy->chunk_count - 1) * exchanged(&hierarchy->steps[0]) + exchanged(&hierarchy->steps[1]);
    hierarchy->correction = operation->snapshot ? operation->snapshot : malloc((size_t)operation->segments.bytes + 1);
    operation->snapshot = NULL;
    hierarchy->negative = malloc(own * width + 1);
    const dss_segment_t correction = {hierarchy->correction, (size_t)operation->element_count};
    return hierarchy->correction && hierarchy->negative &&
           dss_segments_create(&hierarchy->correction_segments, &correction, 1, width) == DSS_OK;
}

static bool make_chunks(dss_operation_t *operation) {
    const uint64_t width = dss_dtype_bytes(operation->dtype);
    const uint64_t elements = operation->element_count;
    const bool of_means = operation->kind == DSS_OPERATION_CROSSING_OF_MEANS; /* read now, and nobody waits for it: one chunk */
    const uint64_t least = elements * width / CHUNKS_MOST + 1;
    const uint64_t usual = operation->member_count * CHUNK_OF_MEMBER > CHUNK ? operation->member_count * CHUNK_OF_MEMBER : CHUNK;
    const uint64_t bytes = least < usual ? usual : least;
    uint64_t each = (bytes / width + 63) / 64 * 64;
    each = of_means || each > elements ? elements : each;
    dss_hierarchy_t *hierarchy = calloc(1, sizeof *hierarchy);
    if (!hierarchy)
        return false;
    operation->hierarchy = hierarchy;
    count_members(operation, hierarchy->domains);
    hierarchy->chunk_count = elements == 0 ? 0 : (uint32_t)((elements + each - 1) / each);
    hierarchy->chunks = calloc(hierarchy->chunk_count + 1, sizeof *hierarchy->chunks);
    const uint64_t last = hierarchy->chunk_count == 0 ? 0 : elements - (hierarchy->chunk_count - 1) * each;
    if (!hierarchy->chunks || (hierarchy->chunk_count > 1 && !make_steps(operation, each, &hierarchy->steps[0])) ||
        (last > 0 && !make_steps(operation, last, &hierarchy->steps[1])) ||
        (dss_is_crossing(operation->kind) && !make_correction(operation)))
        return false;
    for (uint32_t i = 0; i < hierarchy->chunk_count; i++)
        hierarchy->chunks[i] = (chunk_t){.operation = operation,
                                         .begin = i * each,
                                         .steps = &hierarchy->steps[i + 1 == hierarchy->chunk_count],
                                         .stage = of_means ? EXCHANGE : SCATTER_IN_HOST};
    return true;
}

void dss_hierarchy_begin(dss_operation_t *operation) {
    operation->stage_deadline_ns = operation->deadline_ns;
    operation->deadline_ns = UINT64_MAX;
    if (!make_chunks(operation)) {
        dss_operation_fail(operation, DSS_ERR_NO_MEMORY, "start", "out of memory for an operation");
        return;
    }
    for (uint32_t i = 0; i < operation->member_count; i++)
        operation->members[i].peer = NULL; /* its stages have them */
    advance(operation);
}

void dss_hierarchy_destroy(dss_hierarchy_t *hierarchy) {
    if (!hierarchy)
        return;
    for (int i = 0; i < 2; i++) {
        for (size_t j = 0; j < hierarchy->steps[i].count; j++)
            free(hierarchy->steps[i].list[j].members);
        free(hierarchy->steps[i].list);
    }
    free(hierarchy->chunks);
    free(hierarchy->correction);
    free(hierarchy->negative);
    dss_segments_release(&hierarchy->correction_segments);
    free(hierarchy);
}

dss_status_t dss_operation_correct(const dss_operation_t *operation, const dss_segment_t *segments, size_t segment_count,
                                   dss_error_t *error_p) {
    const size_t width = dss_dtype_bytes(operation->dtype);
    uint64_t count = 0;
    for (size_t i = 0; i < segment_count; i++)
        count += segments[i].element_count;
    if (!dss_is_crossing(operation->kind) || count != operation->element_count)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "%s: %llu elements are to be corrected, it has %llu", operation->what,
                        (unsigned long long)count, (unsigned long long)operation->element_count);
    const dss_status_t status = dss_operation_result(operation, error_p);
    const uint8_t *correction = status == DSS_OK ? operation->hierarchy->correction : NULL;
    for (size_t i = 0; status == DSS_OK && i < segment_count; i++) {
        (void)dss_combine(operation->dtype, DSS_SUM, segments[i].values, correction, 1.0, segments[i].values,
                          segments[i].element_count);
        correction += segments[i].element_count * width;
    }
    return status;
}
