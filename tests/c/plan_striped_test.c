#include "dense.h"
#include "racks.h"

static uint32_t rack_size(const dss_topology_t *topology, uint32_t rack) {
    const uint32_t *members;
    uint32_t member_count;
    CHECK_STATUS(dss_topology_rack(topology, rack, &members, &member_count), DSS_OK);
    return member_count;
}

/* Of `group` in `round`: how many racks it touches, and the workers that these racks hold. */
static uint32_t count_racks(const dss_topology_t *topology, const uint32_t *members, uint32_t member_count, uint32_t *workers_p) {
    uint32_t rack_count = 0;
    uint64_t seen[4] = {0};
    *workers_p = 0;
    for (uint32_t i = 0; i < member_count; i++) {
        const uint32_t rack = dss_topology_rack_of(topology, members[i]);
        if (seen[rack / 64] >> rack % 64 & 1)
            continue;
        seen[rack / 64] |= UINT64_C(1) << rack % 64;
        *workers_p += rack_size(topology, rack);
        rack_count++;
    }
    return rack_count;
}

/* Of any P rounds in a row exactly one crosses, in groups of whole racks; the others stay inside racks (hybrid: alone). */
static void check_shape(const dss_plan_t *plan, const dss_topology_t *topology) {
    const uint32_t stripe_count = dss_plan_stripe_count(plan);
    const uint32_t period = dss_plan_period(plan);
    check_partitions(plan);
    CHECK_EQUAL(period % stripe_count, 0);
    for (uint32_t first = 0; first < period; first++) {
        uint32_t crossing_count = 0;
        for (uint32_t i = 0; i < stripe_count; i++)
            crossing_count += (uint32_t)dss_plan_is_crossing(plan, (first + i) % period);
        CHECK_EQUAL(crossing_count, 1);
    }
    for (uint32_t round = 0; round < period; round++) {
        for (uint32_t group = 0; group < dss_plan_group_count(plan, round); group++) {
            const uint32_t *members;
            uint32_t member_count;
            uint32_t workers;
            CHECK_STATUS(dss_plan_group(plan, round, group, &members, &member_count), DSS_OK);
            const uint32_t rack_count = count_racks(topology, members, member_count, &workers);
            if (dss_plan_is_crossing(plan, round))
                CHECK_EQUAL(member_count, workers);
            else
                CHECK_EQUAL(rack_count, 1);
            if (!dss_plan_is_crossing(plan, round) && dss_plan_kind(plan) == DSS_PLAN_HYBRID)
                CHECK_EQUAL(member_count, 1);
        }
    }
    for (uint32_t rank = 0; rank < dss_plan_world_size(plan); rank++)
        CHECK_EQUAL(dss_plan_rack_of(plan, rank), dss_topology_rack_of(topology, rank));
}

/* All agree exactly after a period of rounds, begun anywhere, and the last correction is in after `delay` more steps. */
static void check_exact(const dss_plan_t *plan) {
    const uint32_t n = dss_plan_world_size(plan);
    for (uint32_t first = 0; first < dss_plan_period(plan); first++) {
        double *product = dense_period(plan, first);
        CHECK_NEAR(dense_distance_to_mean(product, n), 0, 1e-6);
        free(product);
    }
    double rho = -1;
    CHECK_STATUS(dss_plan_contraction(plan, &rho), DSS_OK);
    CHECK_NEAR(rho, 0, 0);
    CHECK_EQUAL(dss_plan_longest_wait(plan), dss_plan_period(plan) + dss_plan_delay(plan));
}

/* The rounds between two crossings, whichever they are, make each rack's matrix the average of the rack. */
static int racks_agree_between_crossings(const dss_plan_t *plan) {
    const uint32_t n = dss_plan_world_size(plan);
    const uint32_t stripe_count = dss_plan_stripe_count(plan);
    double *product = calloc((size_t)n * n, sizeof *product);
    double *round = calloc((size_t)n * n, sizeof *round);
    double *next = calloc((size_t)n * n, sizeof *next);
    int agree = 1;
    for (uint32_t first = 0; first < dss_plan_period(plan); first += stripe_count) {
        for (size_t i = 0; i < (size_t)n * n; i++)
            product[i] = i % (n + 1) == 0;
        for (uint32_t i = 0; i + 1 < stripe_count; i++) {
            dense_round(plan, first + i, round);
            dense_multiply(round, product, n, next);
            memcpy(product, next, (size_t)n * n * sizeof *product);
        }
        for (uint32_t i = 0; i < n; i++)
            for (uint32_t j = 0; j < n; j++)
                for (uint32_t k = 0; k < n; k++)
                    agree &= dss_plan_rack_of(plan, i) != dss_plan_rack_of(plan, k) ||
                             fabs(product[(size_t)i * n + j] - product[(size_t)k * n + j]) < 1e-9;
    }
    free(product);
    free(round);
    free(next);
    return agree;
}

static void plans_are_striped_for_any_racks(void) {
    uint64_t random = 3;
    for (uint32_t trial = 0; trial < 300; trial++) {
        uint32_t sizes[8];
        const uint32_t rack_count = 2 + check_random_below(&random, 7);
        const int equal = trial % 2;
        for (uint32_t rack = 0; rack < rack_count; rack++)
            sizes[rack] = rack && equal ? sizes[0] : 1 + check_random_below(&random, 7);
        const double uplink = trial % 3 ? 100e6 : 1e9;
        dss_topology_t *topology = make_racks(rack_count, sizes, 1 + trial % 3 / 2, 500e6, uplink);
        dss_plan_params_t params = racks_params(trial % 5 ? DSS_PLAN_STRIPED : DSS_PLAN_HYBRID, topology);
        params.max_period = 1 + check_random_below(&random, 10);
        params.seed = trial;
        if (trial % 4 == 0)
            params.delay = check_random_below(&random, params.max_period);
        dss_plan_t *plan = make_from(&params);
        CHECK(dss_plan_period(plan) <= params.max_period);
        CHECK(dss_plan_delay(plan) < dss_plan_stripe_count(plan));
        if (params.delay != DSS_DELAY_AUTO)
            CHECK_EQUAL(dss_plan_delay(plan), params.delay);
        else
            CHECK_EQUAL(dss_plan_delay(plan) > 0, dss_plan_stripe_count(plan) > 1);
        check_shape(plan, topology);
        if (trial < 100) {
            const int keeps = dss_plan_keeps_values(plan, dss_plan_period(plan) - 1);
            check_exact(plan);
            CHECK_EQUAL(keeps,
                        dss_plan_kind(plan) == DSS_PLAN_STRIPED && dss_plan_delay(plan) > 0 && racks_agree_between_crossings(plan));
        }
        dss_plan_t *again = make_from(&params);
        CHECK_EQUAL(dss_plan_hash(again), dss_plan_hash(plan));
        dss_plan_destroy(again);
        dss_plan_destroy(plan);
        dss_topology_destroy(topology);
    }
}

static void check_keeps(const dss_topology_t *topology, uint32_t max_period, uint32_t delay, int expected) {
    dss_plan_params_t params = racks_params(DSS_PLAN_STRIPED, topology);
    params.max_period = max_period;
    params.delay = delay;
    for (int kind = DSS_PLAN_STRIPED; kind <= DSS_PLAN_HYBRID; kind++) {
        params.kind = (dss_plan_kind_t)kind;
        dss_plan_t *plan = make_from(&params);
        const int keeps = expected && kind == DSS_PLAN_STRIPED;
        for (uint32_t round = 0; round <= dss_plan_period(plan); round++)
            CHECK_FOR(dss_plan_keeps_values(plan, round) == (keeps && dss_plan_is_crossing(plan, round)),
                      "kind %d, %u workers, P %u, delay %u, round %u", kind, dss_plan_world_size(plan), dss_plan_stripe_count(plan),
                      delay, round);
        dss_plan_destroy(plan);
    }
}

/* Racks of two and three agree after one round, of four and six after two, of eight after three; random rounds of a prime rack
 * never do. Without a delay there is nothing to keep, and one rack that does not agree is enough. */
static void values_are_kept_where_local_rounds_agree(void) {
    static const uint32_t rounds_needed[] = {0, 1, 1, 1, 2, UINT32_MAX, 2, UINT32_MAX, 3};
    for (uint32_t size = 1; size <= 8; size++) {
        dss_topology_t *topology = make_equal_racks(4, size, 500e6, 100e6);
        for (uint32_t stripes = 2; stripes <= 6; stripes++) /* so great a delay leaves P no choice */
            check_keeps(topology, stripes, stripes - 1, stripes - 1 >= rounds_needed[size]);
        check_keeps(topology, 8, 0, 0);
        check_keeps(topology, 8, 7, rounds_needed[size] < 8);
        dss_topology_destroy(topology);
    }
    static const uint32_t sizes[][3] = {{4, 2, 1}, {4, 5, 4}};
    for (uint32_t i = 0; i < 2; i++) {
        dss_topology_t *topology = make_racks(3, sizes[i], 1, 500e6, 100e6);
        check_keeps(topology, 3, 2, i == 0);
        dss_topology_destroy(topology);
    }
}

/* Sixteen racks behind slow uplinks: all at once put 15/8 of a stripe on each, in pairs 1. Where the period may be long, that is
 * as quick with fewer stripes. */
static void many_equal_racks_pair_up_in_mixed_radix(void) {
    dss_topology_t *topology = make_equal_racks(16, 2, 1e9, 100e6);
    dss_plan_params_t params = racks_params(DSS_PLAN_STRIPED, topology);
    params.max_period = 64;
    dss_plan_t *plan = make_from(&params);
    const uint32_t stripe_count = dss_plan_stripe_count(plan);
    CHECK_EQUAL(dss_plan_period(plan), 4 * stripe_count);
    for (uint32_t round = stripe_count - 1; round < 4 * stripe_count; round += stripe_count)
        CHECK_EQUAL(dss_plan_group_count(plan, round), 8);
    check_shape(plan, topology);
    check_exact(plan);
    dss_plan_destroy(plan);
    dss_topology_destroy(topology);
}

static double step_s(const dss_plan_params_t *params) {
    dss_plan_t *plan = make_from(params);
    const dss_cost_t cost = cost_for(plan, params->topology, params->compute_s);
    dss_plan_destroy(plan);
    return params->compute_s + cost.sync_s;
}

/* With two racks max_period only bounds P, so the times of the best plans under each bound tell whether P was the smallest. */
static void the_smallest_period_near_the_best_is_chosen(void) {
    static const double uplinks[] = {20e6, 100e6, 250e6, 500e6, 2e9, 10e9};
    for (size_t i = 0; i < 6; i++) {
        for (int k = 0; k < 3; k++) {
            dss_topology_t *topology = make_equal_racks(2, 4, 500e6, uplinks[i]);
            dss_plan_params_t params = racks_params(DSS_PLAN_STRIPED, topology);
            params.compute_s = 0.5 * k;
            dss_plan_t *plan = make_from(&params);
            const double chosen_s = step_s(&params);
            for (uint32_t most = 1; most <= 8; most++) {
                params.max_period = most;
                const double bounded_s = step_s(&params);
                CHECK_FOR(chosen_s <= 1.05 * bounded_s + 1e-12, "P %u: %g, at most %u: %g", dss_plan_period(plan), chosen_s, most,
                          bounded_s);
                CHECK_FOR(most >= dss_plan_period(plan) || bounded_s > chosen_s, "P %u: %g, at most %u: %g", dss_plan_period(plan),
                          chosen_s, most, bounded_s);
            }
            dss_plan_destroy(plan);
            dss_topology_destroy(topology);
        }
    }
}

static void the_smallest_delay_that_hides_a_crossing_is_chosen(void) {
    for (uint32_t trial = 0; trial < 20; trial++) {
        dss_topology_t *topology = make_equal_racks(2 + trial % 3, 4, 500e6, 10e6 * (1 + trial));
        dss_plan_params_t params = racks_params(DSS_PLAN_STRIPED, topology);
        params.compute_s = 0.1 * (trial % 4);
        dss_plan_t *plan = make_from(&params);
        const dss_cost_t cost = cost_for(plan, topology, params.compute_s);
        const uint32_t delay = dss_plan_delay(plan);
        const double step = fmax(params.compute_s + cost.foreground_s, cost.bound_s);
        if (delay + 1 < dss_plan_stripe_count(plan))
            CHECK(delay * step >= 1.1 * cost.background_s);
        if (delay > 1)
            CHECK((delay - 1) * step < 1.1 * cost.background_s);
        dss_plan_destroy(plan);
        dss_topology_destroy(topology);
    }
}

/* Seven workers fall into 2 + 2 + 3: the one behind a slow NIC always averages with one other only. */
static void slow_hosts_stand_in_the_smallest_groups(void) {
    static const uint32_t host_of[] = {0, 1, 2, 3, 4, 5, 6, 7};
    static const uint32_t rack_of[] = {0, 0, 0, 0, 0, 0, 0, 1};
    static const dss_link_t uplinks[] = {{1e7, 0}, {1e7, 0}};
    for (uint32_t slow = 0; slow < 7; slow++) {
        dss_link_t nics[8];
        for (uint32_t host = 0; host < 8; host++)
            nics[host] = (dss_link_t){host == slow ? 1e7 : 1e8, 0};
        const dss_topology_params_t params = {sizeof params, 8, 8, 2, host_of, rack_of, nics, uplinks, {1e9, 0}};
        dss_topology_t *topology = NULL;
        CHECK_STATUS(dss_topology_create(&params, &topology, NULL), DSS_OK);
        dss_plan_params_t wanted = racks_params(DSS_PLAN_STRIPED, topology);
        wanted.group_size = 2;
        wanted.delay = 7;
        dss_plan_t *plan = make_from(&wanted);
        uint32_t larger_count = 0;
        for (uint32_t round = 0; round + 1 < 8; round++) {
            const uint32_t *members;
            uint32_t member_count;
            CHECK_STATUS(dss_plan_group_of_rank(plan, round, slow, &members, &member_count), DSS_OK);
            CHECK_EQUAL(member_count, 2);
            for (uint32_t group = 0; group < dss_plan_group_count(plan, round); group++) {
                CHECK_STATUS(dss_plan_group(plan, round, group, &members, &member_count), DSS_OK);
                larger_count += member_count == 3;
            }
        }
        CHECK_EQUAL(larger_count, 7);
        check_shape(plan, topology);
        dss_plan_destroy(plan);
        dss_topology_destroy(topology);
    }
}

/* Two hosts of two in a rack, their ranks interleaved: the first local round needs no network. */
static void local_rounds_begin_inside_hosts(void) {
    static const uint32_t host_of[] = {0, 1, 2, 3, 0, 1, 2, 3};
    static const uint32_t rack_of[] = {0, 1, 0, 1};
    static const dss_link_t nics[] = {{1e8, 0}, {1e8, 0}, {1e8, 0}, {1e8, 0}};
    static const dss_link_t uplinks[] = {{1e7, 0}, {1e7, 0}};
    const dss_topology_params_t params = {sizeof params, 8, 4, 2, host_of, rack_of, nics, uplinks, {1e9, 0}};
    dss_topology_t *topology = NULL;
    CHECK_STATUS(dss_topology_create(&params, &topology, NULL), DSS_OK);
    dss_plan_t *plan = make_for(DSS_PLAN_STRIPED, topology);
    CHECK(dss_plan_stripe_count(plan) > 2);
    for (uint32_t rank = 0; rank < 4; rank++) {
        const uint32_t *members;
        uint32_t member_count;
        CHECK_STATUS(dss_plan_group_of_rank(plan, 0, rank, &members, &member_count), DSS_OK);
        CHECK(member_count == 2 && members[0] == rank && members[1] == rank + 4);
    }
    check_shape(plan, topology);
    check_exact(plan);
    dss_plan_destroy(plan);
    dss_topology_destroy(topology);
}

static dss_plan_kind_t chosen_kind(const dss_topology_t *topology, double compute_s) {
    dss_plan_params_t params = racks_params(DSS_PLAN_AUTO, topology);
    params.compute_s = compute_s;
    dss_plan_t *plan = make_from(&params);
    const dss_plan_kind_t kind = dss_plan_kind(plan);
    dss_plan_destroy(plan);
    return kind;
}

/* The least time of a step among the kinds that exist; exact where that is as quick. */
static void auto_takes_the_cheapest_kind(void) {
    dss_topology_t *bed = make_bed();
    dss_topology_t *flat = make_equal_racks(1, 8, 1e9, 1e9);
    dss_topology_t *pair = make_equal_racks(2, 1, 500e6, 500e6);
    dss_topology_t *unknown = make_equal_racks(2, 4, INFINITY, INFINITY);
    CHECK_EQUAL(chosen_kind(bed, 0), DSS_PLAN_STRIPED);
    CHECK_EQUAL(chosen_kind(flat, 0), DSS_PLAN_GRID);   /* pairs: 1 of a model on each NIC, exact 1.75 */
    CHECK_EQUAL(chosen_kind(flat, 60), DSS_PLAN_EXACT); /* as fast, beside so much compute */
    CHECK_EQUAL(chosen_kind(pair, 0), DSS_PLAN_EXACT);  /* striped, nobody would average in 7 of 8 rounds */
    CHECK_EQUAL(chosen_kind(unknown, 0), DSS_PLAN_GRID);
    dss_plan_t *blind = make_for(DSS_PLAN_AUTO, unknown);
    dss_plan_t *without = make_plan(DSS_PLAN_AUTO, 8, 0, 0, 0);
    CHECK_EQUAL(dss_plan_hash(blind), dss_plan_hash(without));
    dss_plan_destroy(blind);
    dss_plan_destroy(without);
    dss_topology_destroy(bed);
    dss_topology_destroy(flat);
    dss_topology_destroy(pair);
    dss_topology_destroy(unknown);
}

static void what_cannot_be_striped_is_refused(void) {
    dss_topology_t *bed = make_bed();
    dss_topology_t *flat = make_equal_racks(1, 8, 1e9, 1e9);
    dss_plan_params_t params = racks_params(DSS_PLAN_STRIPED, flat);
    refuse_params(&params, DSS_ERR_IMPOSSIBLE, "a striped plan needs at least 2 racks");
    params.topology = NULL;
    refuse_params(&params, DSS_ERR_INVALID_ARGUMENT, "a striped plan is made around racks and needs a topology");
    params.kind = DSS_PLAN_HYBRID;
    refuse_params(&params, DSS_ERR_INVALID_ARGUMENT, "a hybrid plan is made");
    params = racks_params(DSS_PLAN_STRIPED, bed);
    params.delay = 8;
    refuse_params(&params, DSS_ERR_IMPOSSIBLE, "the delay is 8, but max_period is 8");
    params = racks_params(DSS_PLAN_AUTO, bed);
    params.world_size = 9;
    refuse_params(&params, DSS_ERR_INVALID_ARGUMENT, "the topology holds 8 workers, but world_size is 9");
    params = racks_params(DSS_PLAN_AUTO, bed);
    params.compute_s = NAN;
    refuse_params(&params, DSS_ERR_INVALID_ARGUMENT, "compute_s is");
    dss_topology_destroy(bed);
    dss_topology_destroy(flat);
}

/* The bar is a second for 4,096 workers; the assertion leaves room for sanitizers and busy machines. */
static void thousands_of_workers_are_quick(void) {
    static const struct {
        uint32_t rack_count, rack_size;
    } rows[] = {{128, 32}, {120, 34}, {100, 100}};
    for (size_t i = 0; i < 3; i++) {
        dss_topology_t *topology = make_equal_racks(rows[i].rack_count, rows[i].rack_size, 10e9, 40e9);
        const double begin = check_cpu_seconds();
        dss_plan_t *plan = make_for(DSS_PLAN_AUTO, topology);
        const double planned_s = check_cpu_seconds() - begin;
        const dss_cost_t cost = cost_for(plan, topology, 0);
        printf("   auto for %u workers in %u racks: kind %d in %.3f s, its cost in %.3f s\n", dss_plan_world_size(plan),
               rows[i].rack_count, (int)dss_plan_kind(plan), planned_s, check_cpu_seconds() - begin - planned_s);
        CHECK(planned_s < 5 && cost.sync_s > 0);
        CHECK_EQUAL(isnan(cost.contraction), dss_plan_world_size(plan) > 4096);
        check_partitions(plan);
        dss_plan_destroy(plan);
        dss_topology_destroy(topology);
    }
}

int main(void) {
    RUN(plans_are_striped_for_any_racks);
    RUN(values_are_kept_where_local_rounds_agree);
    RUN(many_equal_racks_pair_up_in_mixed_radix);
    RUN(the_smallest_period_near_the_best_is_chosen);
    RUN(the_smallest_delay_that_hides_a_crossing_is_chosen);
    RUN(slow_hosts_stand_in_the_smallest_groups);
    RUN(local_rounds_begin_inside_hosts);
    RUN(auto_takes_the_cheapest_kind);
    RUN(what_cannot_be_striped_is_refused);
    RUN(thousands_of_workers_are_quick);
}
