/* Plan, stripes and kernels together, as training uses them with a learning rate of 0: every rank of a small world holds a vector,
 * and stripe s of step t is averaged in the groups of round (t + s) mod P. */
#include "plans.h"

#define ELEMENTS 1000u
#define MAX_WORLD 16u

typedef struct world {
    dss_plan_t *plan; /* owned */
    uint32_t stripe_count;
    double vectors[MAX_WORLD][ELEMENTS];
    double mean[ELEMENTS]; /* of the first vectors */
} world_t;

static world_t *world_new(dss_plan_kind_t kind, uint32_t world_size, uint64_t seed) {
    world_t *world = calloc(1, sizeof *world);
    uint64_t random = seed + 1;
    world->plan = make_plan(kind, world_size, 0, 0, seed);
    world->stripe_count = dss_stripe_count(sizeof world->mean, dss_plan_period(world->plan), 64 * sizeof(double));
    for (uint32_t rank = 0; rank < world_size; rank++) {
        for (uint32_t i = 0; i < ELEMENTS; i++) {
            world->vectors[rank][i] = (double)(check_random(&random) >> 11) * 0x1p-53;
            world->mean[i] += world->vectors[rank][i] / world_size;
        }
    }
    return world;
}

static void world_free(world_t *world) {
    dss_plan_destroy(world->plan);
    free(world);
}

static void average_stripe(world_t *world, uint32_t round, size_t begin, size_t length) {
    for (uint32_t group = 0; group < dss_plan_group_count(world->plan, round); group++) {
        const uint32_t *members;
        uint32_t member_count;
        const void *sources[MAX_WORLD];
        CHECK_STATUS(dss_plan_group(world->plan, round, group, &members, &member_count), DSS_OK);
        for (uint32_t i = 0; i < member_count; i++)
            sources[i] = &world->vectors[members[i]][begin];
        CHECK_STATUS(dss_average(DSS_FLOAT64, sources, member_count, &world->vectors[members[0]][begin], length), DSS_OK);
        for (uint32_t i = 1; i < member_count; i++)
            memcpy(&world->vectors[members[i]][begin], sources[0], length * sizeof(double));
    }
}

static void step(world_t *world, uint64_t step_number) {
    for (uint32_t stripe = 0; stripe < world->stripe_count; stripe++) {
        const size_t begin = dss_stripe_begin(ELEMENTS, world->stripe_count, stripe);
        const size_t end = dss_stripe_begin(ELEMENTS, world->stripe_count, stripe + 1);
        average_stripe(world, dss_plan_round_at(world->plan, step_number, stripe), begin, end - begin);
    }
}

/* sqrt(sum over ranks of the squared distance to the mean) for the stripe that began its period now. */
static double distance(const world_t *world, size_t begin, size_t end) {
    double sum = 0;
    for (uint32_t rank = 0; rank < dss_plan_world_size(world->plan); rank++)
        for (size_t i = begin; i < end; i++)
            sum += (world->vectors[rank][i] - world->mean[i]) * (world->vectors[rank][i] - world->mean[i]);
    return sqrt(sum);
}

static void check_mean_kept(const world_t *world) {
    const uint32_t world_size = dss_plan_world_size(world->plan);
    for (uint32_t i = 0; i < ELEMENTS; i++) {
        double mean = 0;
        for (uint32_t rank = 0; rank < world_size; rank++)
            mean += world->vectors[rank][i] / world_size;
        CHECK_NEAR(mean, world->mean[i], 1e-14);
    }
}

/* Begun at any step: a resumed run goes on in mid-period. */
static void a_grid_agrees_after_one_period(void) {
    for (uint32_t world_size = 1; world_size <= MAX_WORLD; world_size++) {
        for (uint64_t first = 0; first < 3; first++) {
            world_t *world = world_new(DSS_PLAN_GRID, world_size, world_size);
            for (uint64_t t = 0; t < dss_plan_period(world->plan); t++) {
                step(world, first + t);
                check_mean_kept(world);
            }
            for (uint32_t rank = 0; rank < world_size; rank++)
                for (uint32_t i = 0; i < ELEMENTS; i++)
                    CHECK_NEAR(world->vectors[rank][i], world->mean[i], 1e-14);
            world_free(world);
        }
    }
}

/* Stripe 0 begins its period at round 0, which is what rho speaks of. */
static void a_random_plan_contracts_by_rho_each_period(void) {
    for (uint32_t world_size = 2; world_size <= MAX_WORLD; world_size++) {
        world_t *world = world_new(DSS_PLAN_RANDOM, world_size, world_size);
        const size_t end = dss_stripe_begin(ELEMENTS, world->stripe_count, 1);
        const uint32_t period = dss_plan_period(world->plan);
        double rho = -1;
        CHECK_STATUS(dss_plan_contraction(world->plan, &rho), DSS_OK);
        for (uint64_t t = 0; t < 3 * (uint64_t)period;) {
            const double before = distance(world, 0, end);
            do
                step(world, t++);
            while (t % period != 0);
            check_mean_kept(world);
            CHECK_FOR(distance(world, 0, end) <= rho * before + 1e-13, "N %u: rho %g", world_size, rho);
        }
        world_free(world);
    }
}

int main(void) {
    RUN(a_grid_agrees_after_one_period);
    RUN(a_random_plan_contracts_by_rho_each_period);
}
