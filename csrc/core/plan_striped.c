/*
 * Striped plans (design rules 7b and 8): P - 1 rounds inside racks, then one in which whole racks average with each other, and
 * again with the next level of racks. A step's P stripes take P rounds in a row, so exactly one of them crosses, and an uplink
 * carries 2(g-1)/g of a stripe a step in groups of g racks. With racks of equal size the racks are numbered in mixed radix, R =
 * g1 * ... * gK, and crossing k averages digit k of the rack away: groups of few racks, exact consensus after all K. Unequal
 * racks would not agree exactly that way, so they all cross at once (K = 1).
 *
 * Inside a rack the rounds are those of a plan of its own size. Its workers stand in the order of their hosts, so that the first
 * level of a grid averages within hosts where sizes allow. Hybrid plans have the same crossings, and local rounds in which everyone
 * is alone: gradients are averaged in the rack by others.
 *
 * A delayed crossing moves rack means, and the differences inside a rack with it only if the rack takes its mean first, which costs
 * a rack-wide average a step. Where the P - 1 local rounds between two crossings bring every rack to exact agreement anyway, that
 * is left to them: workers keep their values until the correction comes. P, the factors and the delay come from the cost model:
 * every shape is made and asked for its time.
 */
#include "plan_internal.h"

#include <stdlib.h>

#include "cost.h"
#include "status.h"

#define MAX_SHAPES_OF_PERIOD 48u                /* ways to group the racks; more, of more levels, are not looked at */
#define MAX_SHAPES (80u * MAX_SHAPES_OF_PERIOD) /* list_shapes looks at 77 of up to 1024 stripe counts */
#define NEARLY_BEST 1.05                        /* times of a step that count as equal */
#define NEVER UINT32_MAX
#define SLOW_SHARE 0.9 /* of the fastest NIC share in the rack: below it a worker is slow */

typedef struct place {
    uint32_t rack;
    uint32_t host;
    uint32_t rank;
} place_t;

/* What all candidates of one search share. */
typedef struct striper {
    const dss_plan_params_t *params;
    const dss_topology_t *topology;
    place_t *places;      /* [N] by rack, host and rank; owned */
    uint32_t *rack_begin; /* [R + 1] offsets into places; owned */
    uint32_t *workers_on; /* [host_count]; owned */
    dss_plan_t **local;   /* [largest rack + 1] plans by size, made where a rack has it; owned */
    uint32_t rack_count;  /* R */
    uint32_t largest;     /* workers of the largest rack */
    uint32_t smallest;    /* and of the smallest */
    uint32_t agree_after; /* local rounds in a row, begun at any, until all of a rack agree, in every rack; NEVER */
} striper_t;

/* One striped plan. */
typedef struct shape {
    uint32_t stripe_count;                  /* P */
    uint32_t level_count;                   /* K */
    uint32_t factors[DSS_GRID_MAX_FACTORS]; /* racks in a group of each level */
    uint32_t delay;                         /* tau */
    double step_s;                          /* of the cost model */
} shape_t;

static int compare_places(const void *a, const void *b) {
    const place_t *left = a;
    const place_t *right = b;
    if (left->rack != right->rack)
        return left->rack < right->rack ? -1 : 1;
    if (left->host != right->host)
        return left->host < right->host ? -1 : 1;
    return left->rank < right->rank ? -1 : 1;
}

static void striper_close(striper_t *striper) {
    for (uint32_t size = 0; striper->local && size <= striper->largest; size++)
        dss_plan_destroy(striper->local[size]);
    free(striper->local);
    free(striper->places);
    free(striper->rack_begin);
    free(striper->workers_on);
}

static void place_workers(striper_t *striper) {
    const uint32_t world_size = striper->params->world_size;
    for (uint32_t rank = 0; rank < world_size; rank++) {
        const uint32_t host = dss_topology_host_of(striper->topology, rank);
        striper->places[rank] = (place_t){dss_topology_rack_of(striper->topology, rank), host, rank};
        striper->rack_begin[striper->places[rank].rack + 1]++;
        striper->workers_on[host]++;
    }
    qsort(striper->places, world_size, sizeof *striper->places, compare_places);
    striper->smallest = world_size;
    for (uint32_t rack = 0; rack < striper->rack_count; rack++) {
        const uint32_t size = striper->rack_begin[rack + 1];
        striper->largest = size > striper->largest ? size : striper->largest;
        striper->smallest = size < striper->smallest ? size : striper->smallest;
        striper->rack_begin[rack + 1] += striper->rack_begin[rack];
    }
}

static dss_status_t make_local_plans(striper_t *striper, dss_error_t *error_p) {
    const dss_plan_params_t *params = striper->params;
    for (uint32_t rack = 0; rack < striper->rack_count; rack++) {
        const uint32_t size = striper->rack_begin[rack + 1] - striper->rack_begin[rack];
        if (striper->local[size])
            continue;
        const dss_plan_params_t local = {
            .params_bytes = sizeof local,
            .world_size = size,
            .group_size = params->group_size < size ? params->group_size : size,
            .max_period = params->max_period > DSS_PLAN_DEFAULT_PERIOD ? params->max_period : DSS_PLAN_DEFAULT_PERIOD,
            .seed = params->seed,
        };
        uint32_t wait;
        dss_status_t status = dss_plan_create(&local, &striper->local[size], error_p);
        if (status == DSS_OK)
            status = dss_plan_find_longest_wait(striper->local[size], &wait);
        if (status != DSS_OK)
            return status;
        wait = wait ? wait : NEVER;
        striper->agree_after = wait > striper->agree_after ? wait : striper->agree_after;
    }
    return DSS_OK;
}

static dss_status_t striper_open(striper_t *striper, const dss_plan_params_t *params, dss_error_t *error_p) {
    *striper = (striper_t){.params = params, .topology = params->topology};
    striper->rack_count = dss_topology_rack_count(params->topology);
    striper->places = calloc(params->world_size, sizeof *striper->places);
    striper->rack_begin = calloc((size_t)striper->rack_count + 1, sizeof *striper->rack_begin);
    striper->workers_on = calloc(dss_topology_host_count(params->topology), sizeof *striper->workers_on);
    dss_status_t status = DSS_ERR_NO_MEMORY;
    if (striper->places && striper->rack_begin && striper->workers_on) {
        place_workers(striper);
        striper->local = calloc((size_t)striper->largest + 1, sizeof *striper->local);
        if (striper->local)
            status = make_local_plans(striper, error_p);
    }
    if (status == DSS_OK)
        return DSS_OK;
    striper_close(striper);
    return status == DSS_ERR_NO_MEMORY
               ? dss_fail(error_p, status, "out of memory for a striped plan of %u ranks", params->world_size)
               : status;
}

static double nic_share(const striper_t *striper, const place_t *place) {
    return dss_topology_nic(striper->topology, place->host).bytes_per_s / striper->workers_on[place->host];
}

/* Where sizes force unequal groups, workers on a slow NIC change places with fast ones that sit in a smallest group: the fewer, the
 * less each has to send. */
static void seat_slow_workers(const striper_t *striper, const place_t *places, uint32_t size, const dss_plan_t *local,
                              uint32_t local_round, uint32_t *seats) {
    double fastest = 0;
    uint32_t fewest = size;
    for (uint32_t i = 0; i < size; i++) {
        const double share = nic_share(striper, &places[i]);
        fastest = share > fastest ? share : fastest;
    }
    for (uint32_t group = 0; group < dss_plan_group_count(local, local_round); group++) {
        uint32_t member_count;
        dss_plan_members(local, local_round, group, &member_count);
        fewest = member_count < fewest ? member_count : fewest;
    }
    uint32_t swapped = 0; /* all before it are slow or sit in larger groups */
    for (uint32_t i = 0; i < size; i++) {
        uint32_t member_count;
        dss_plan_members(local, local_round, seats[i], &member_count);
        if (member_count == fewest || nic_share(striper, &places[i]) >= SLOW_SHARE * fastest)
            continue;
        for (; swapped < size; swapped++) {
            dss_plan_members(local, local_round, seats[swapped], &member_count);
            if (member_count == fewest && nic_share(striper, &places[swapped]) >= SLOW_SHARE * fastest)
                break;
        }
        if (swapped == size)
            return;
        const uint32_t seat = seats[swapped];
        seats[swapped] = seats[i];
        seats[i] = seat;
    }
}

/* The j-th local round of the period, in every rack; `seats` is scratch, a word a worker of the largest rack. */
static void fill_local_round(const striper_t *striper, uint32_t j, uint32_t *seats, uint32_t *group_of) {
    for (uint32_t rack = 0; rack < striper->rack_count; rack++) {
        const uint32_t begin = striper->rack_begin[rack];
        const uint32_t size = striper->rack_begin[rack + 1] - begin;
        const dss_plan_t *local = striper->local[size];
        const uint32_t local_round = j % local->period;
        for (uint32_t i = 0; i < size; i++)
            seats[i] = local->group_of[(size_t)local_round * size + i];
        if (striper->agree_after == NEVER) /* rounds agree exactly only as they were made */
            seat_slow_workers(striper, striper->places + begin, size, local, local_round, seats);
        for (uint32_t i = 0; i < size; i++)
            group_of[striper->places[begin + i].rank] = begin + seats[i];
    }
}

/* Averages the digit of the rack's number that has this factor and stride away. */
static void fill_crossing_round(const dss_plan_t *plan, uint32_t stride, uint32_t factor, uint32_t *group_of) {
    for (uint32_t rank = 0; rank < plan->world_size; rank++)
        group_of[rank] = plan->rack_of[rank] / stride / factor * stride + plan->rack_of[rank] % stride;
}

/* Local rounds come in blocks of P - 1. */
static dss_crossing_t crossing_of(const striper_t *striper, const dss_plan_t *plan) {
    const int rounds_agree = plan->kind == DSS_PLAN_STRIPED && plan->stripe_count - 1 >= striper->agree_after;
    return plan->delay && rounds_agree ? DSS_CROSSING_VALUES : DSS_CROSSING_MEANS;
}

static void fill_rounds(const striper_t *striper, const shape_t *shape, uint32_t *seats, dss_plan_t *plan) {
    const dss_crossing_t crossing = crossing_of(striper, plan);
    uint32_t stride = 1;
    uint32_t local_count = 0;
    for (uint32_t round = 0; round < plan->period; round++) {
        uint32_t *group_of = plan->group_of + (size_t)round * plan->world_size;
        plan->crossing[round] = round % shape->stripe_count == shape->stripe_count - 1 ? crossing : DSS_CROSSING_NONE;
        if (plan->crossing[round]) {
            const uint32_t factor = shape->factors[round / shape->stripe_count];
            fill_crossing_round(plan, stride, factor, group_of);
            stride *= factor;
        } else if (plan->kind == DSS_PLAN_STRIPED) {
            fill_local_round(striper, local_count++, seats, group_of);
        } else {
            for (uint32_t rank = 0; rank < plan->world_size; rank++)
                group_of[rank] = rank;
        }
    }
}

static dss_status_t make_plan(const striper_t *striper, const shape_t *shape, dss_plan_t **plan_p, dss_error_t *error_p) {
    const dss_plan_params_t *params = striper->params;
    dss_plan_t *plan = NULL;
    dss_status_t status =
        dss_plan_allocate(params->kind, params->world_size, shape->stripe_count * shape->level_count, params->seed, &plan, error_p);
    if (status != DSS_OK)
        return status;
    status = dss_plan_take_racks(plan, striper->topology, error_p);
    if (status != DSS_OK) {
        dss_plan_destroy(plan);
        return status;
    }
    plan->stripe_count = shape->stripe_count;
    plan->delay = shape->delay;
    fill_rounds(striper, shape, plan->members, plan); /* the members are sorted later */
    return dss_plan_hand_over(plan, plan_p, error_p);
}

/* Makes the shape for its time, and chooses its delay where that was left open. */
static dss_status_t time_shape(const striper_t *striper, shape_t *shape, dss_error_t *error_p) {
    const dss_plan_params_t *params = striper->params;
    const int open = params->delay == DSS_DELAY_AUTO && shape->stripe_count > 1;
    dss_plan_t *plan = NULL;
    dss_cost_t cost;
    shape->delay = open ? 1 : params->delay == DSS_DELAY_AUTO ? 0 : params->delay;
    dss_status_t status = make_plan(striper, shape, &plan, error_p);
    if (status == DSS_OK)
        status = dss_cost_of_time(plan, striper->topology, params->model_bytes, params->compute_s, &cost, error_p);
    dss_plan_destroy(plan);
    if (status != DSS_OK)
        return status;
    shape->step_s = params->compute_s + cost.sync_s;
    if (open) {
        shape->delay = dss_cost_smallest_delay(&cost, params->compute_s, shape->stripe_count);
        shape->step_s = dss_cost_step_s(&cost, params->compute_s, shape->delay);
    }
    return DSS_OK;
}

typedef struct shapes {
    shape_t *list; /* [MAX_SHAPES] by ascending P, then K; owned */
    uint32_t count;
    uint32_t limit; /* of count, for the P at hand */
} shapes_t;

/* All ways to write `rest` as level_count factors of at most `cap`, descending, behind those of `shape` so far. */
static void list_factors(shapes_t *shapes, shape_t *shape, uint32_t done, uint32_t rest, uint32_t cap) {
    if (shapes->count == shapes->limit)
        return;
    if (done + 1 == shape->level_count) {
        if (rest <= cap) {
            shape->factors[done] = rest;
            shapes->list[shapes->count++] = *shape;
        }
        return;
    }
    for (uint32_t factor = rest / 2 < cap ? rest / 2 : cap; factor >= 2; factor--) {
        shape->factors[done] = factor;
        if (rest % factor == 0)
            list_factors(shapes, shape, done + 1, rest / factor, factor);
    }
}

static void list_shapes(const striper_t *striper, shapes_t *shapes) {
    const dss_plan_params_t *params = striper->params;
    const uint32_t least = params->delay == DSS_DELAY_AUTO ? 1 : params->delay + 1;
    const uint32_t level_limit = striper->smallest == striper->largest ? DSS_GRID_MAX_FACTORS : 1;
    for (uint32_t period = least; period <= params->max_period; period += 1 + period / 16) {
        shapes->limit = shapes->count + MAX_SHAPES_OF_PERIOD;
        for (uint32_t levels = 1; levels <= level_limit && levels * period <= params->max_period; levels++) {
            shape_t shape = {.stripe_count = period, .level_count = levels};
            list_factors(shapes, &shape, 0, striper->rack_count, striper->rack_count);
        }
    }
}

/* The smallest P, then K, that is nearly as quick as the best. */
static const shape_t *choose(const shapes_t *shapes) {
    const shape_t *best = &shapes->list[0];
    const shape_t *chosen = NULL;
    for (uint32_t i = 1; i < shapes->count; i++) {
        if (shapes->list[i].step_s < best->step_s)
            best = &shapes->list[i];
    }
    for (uint32_t i = 0; i < shapes->count; i++) {
        const shape_t *shape = &shapes->list[i];
        if (shape->step_s > NEARLY_BEST * best->step_s)
            continue;
        if (!chosen || (shape->stripe_count == chosen->stripe_count && shape->level_count == chosen->level_count &&
                        shape->step_s < chosen->step_s))
            chosen = shape;
    }
    return chosen;
}

dss_status_t dss_plan_create_striped(const dss_plan_params_t *params, dss_plan_t **plan_p, dss_error_t *error_p) {
    striper_t striper;
    shapes_t shapes = {NULL, 0, 0};
    if (params->delay != DSS_DELAY_AUTO && params->delay >= params->max_period)
        return dss_fail(error_p, DSS_ERR_IMPOSSIBLE,
                        "the delay is %u, but max_period is %u: a correction has to arrive before its stripe crosses again, so at "
                        "most %u",
                        params->delay, params->max_period, params->max_period - 1);
    dss_status_t status = striper_open(&striper, params, error_p);
    if (status != DSS_OK)
        return status;
    shapes.list = calloc(MAX_SHAPES, sizeof *shapes.list);
    if (!shapes.list)
        status = dss_fail(error_p, DSS_ERR_NO_MEMORY, "out of memory for the search of a striped plan");
    else
        list_shapes(&striper, &shapes);
    for (uint32_t i = 0; status == DSS_OK && i < shapes.count; i++)
        status = time_shape(&striper, &shapes.list[i], error_p);
    if (status == DSS_OK)
        status = make_plan(&striper, choose(&shapes), plan_p, error_p);
    free(shapes.list);
    striper_close(&striper);
    return status;
}
