/*
 * rho = ||W_P ... W_1 - J||_2, the factor by which one period brings the ranks together.
 *
 * On vectors of mean zero, which every round keeps so, the matrix is M = W_P ... W_1, and rho^2 is the largest eigenvalue of
 * M' M. Each W is symmetric, so M' applies the rounds backwards and a product costs 2 N P, never N^2. Lanczos finds the largest
 * eigenvalue in some ten products where power iteration would stall on close ones. Only three vectors are kept: the orthogonality
 * that is lost without the others brings copies of eigenvalues already found, which do not move the largest. M' M knows no rho
 * below the root of rounding, so exact consensus is asked for first (plan_wait.c).
 *
 * In a crossing in which workers keep their values W = I + M - R, with M the mean over the group and R that over the rack: as M R =
 * R M = M, it is a projection like the averages. When the correction comes does not matter to the product of a period's rounds.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "plan_internal.h"
#include "random.h"

#define MAX_ITERATIONS 2000u
#define WINDOW 8u            /* the estimate must hold still for so many products */
#define TOLERANCE 1e-11      /* relative change of rho^2 over the window */
#define CONSENSUS 1e-12      /* below this only rounding is left: exact consensus */
#define BISECTION_STEPS 100u /* halves an interval of 2 to below the spacing of doubles near any rho^2 that counts */

typedef struct lanczos {
    double *current;  /* [N] unit vector q_k */
    double *previous; /* [N] q_{k-1} */
    double *product;  /* [N] becomes q_{k+1} */
    double *diagonal; /* [MAX_ITERATIONS] of the tridiagonal matrix */
    double *coupling; /* [MAX_ITERATIONS] beside the diagonal: coupling[k] joins k and k + 1 */
    double *scratch;  /* [2 * rack_count] of dss_round_average */
} lanczos_t;

static double mean_of(const uint32_t *members, uint32_t member_count, const double *values) {
    double sum = 0;
    for (uint32_t i = 0; i < member_count; i++)
        sum += values[members[i]];
    return sum / member_count;
}

static void find_rack_means(const dss_plan_t *plan, const double *values, double *means, double *sizes) {
    for (uint32_t rack = 0; rack < plan->rack_count; rack++)
        means[rack] = sizes[rack] = 0;
    for (uint32_t rank = 0; rank < plan->world_size; rank++) {
        means[plan->rack_of[rank]] += values[rank];
        sizes[plan->rack_of[rank]]++;
    }
    for (uint32_t rack = 0; rack < plan->rack_count; rack++)
        means[rack] /= sizes[rack];
}

void dss_round_average(const dss_plan_t *plan, uint32_t round, double *values, double *scratch) {
    const int keeps_values = plan->crossing[round] == DSS_CROSSING_VALUES;
    const uint32_t group_count = dss_plan_group_count(plan, round);
    if (keeps_values)
        find_rack_means(plan, values, scratch, scratch + plan->rack_count);
    for (uint32_t group = 0; group < group_count; group++) {
        uint32_t member_count;
        const uint32_t *members = dss_plan_members(plan, round, group, &member_count);
        const double mean = mean_of(members, member_count, values);
        for (uint32_t i = 0; i < member_count; i++)
            values[members[i]] = keeps_values ? values[members[i]] + mean - scratch[plan->rack_of[members[i]]] : mean;
    }
}

static void apply_twice(const dss_plan_t *plan, double *values, double *scratch) {
    for (uint32_t round = 0; round < plan->period; round++)
        dss_round_average(plan, round, values, scratch);
    for (uint32_t round = plan->period - 1; round-- > 0;) /* the last round is a projection: once is enough */
        dss_round_average(plan, round, values, scratch);
}

static void remove_mean(double *values, uint32_t count) {
    double sum = 0;
    for (uint32_t i = 0; i < count; i++)
        sum += values[i];
    for (uint32_t i = 0; i < count; i++)
        values[i] -= sum / count;
}

static double dot(const double *a, const double *b, uint32_t count) {
    double sum = 0;
    for (uint32_t i = 0; i < count; i++)
        sum += a[i] * b[i];
    return sum;
}

/* Whether the tridiagonal matrix has an eigenvalue above `x`: a pivot of it minus x is positive (Sturm). */
static int any_above(const lanczos_t *state, uint32_t size, double x) {
    double pivot = 1;
    for (uint32_t k = 0; k < size; k++) {
        const double above = k ? state->coupling[k - 1] * state->coupling[k - 1] / pivot : 0;
        pivot = state->diagonal[k] - x - above;
        if (pivot > 0)
            return 1;
        if (pivot == 0)
            pivot = -1e-300;
    }
    return 0;
}

static double largest_eigenvalue(const lanczos_t *state, uint32_t size) {
    double low = 0;
    double high = 1 + 1e-9; /* M is a product of projections */
    for (uint32_t step = 0; step < BISECTION_STEPS && high - low > 1e-14 * high; step++) {
        const double middle = 0.5 * (low + high);
        if (any_above(state, size, middle))
            low = middle;
        else
            high = middle;
    }
    return 0.5 * (low + high);
}

/* One more row of the tridiagonal matrix. Returns whether there is a next vector. */
static int extend(const dss_plan_t *plan, lanczos_t *state, uint32_t k) {
    const uint32_t count = plan->world_size;
    const double back = k ? state->coupling[k - 1] : 0;
    memcpy(state->product, state->current, count * sizeof(double));
    apply_twice(plan, state->product, state->scratch);
    state->diagonal[k] = dot(state->product, state->current, count);
    for (uint32_t i = 0; i < count; i++)
        state->product[i] -= state->diagonal[k] * state->current[i] + back * state->previous[i];
    remove_mean(state->product, count);
    state->coupling[k] = sqrt(dot(state->product, state->product, count));
    if (state->coupling[k] < 1e-14)
        return 0; /* the vectors so far span all that the start has in it */
    for (uint32_t i = 0; i < count; i++)
        state->product[i] /= state->coupling[k];
    double *freed = state->previous;
    state->previous = state->current;
    state->current = state->product;
    state->product = freed;
    return 1;
}

static double iterate(const dss_plan_t *plan, lanczos_t *state) {
    double recent[WINDOW] = {0};
    double estimate = 0;
    int more = 1;
    for (uint32_t k = 0; more && k < MAX_ITERATIONS; k++) {
        more = extend(plan, state, k);
        estimate = largest_eigenvalue(state, k + 1);
        if (k >= WINDOW && fabs(estimate - recent[k % WINDOW]) <= TOLERANCE * estimate)
            break;
        recent[k % WINDOW] = estimate;
    }
    return estimate;
}

/* Returns whether there is anything to contract. */
static int start(const dss_plan_t *plan, lanczos_t *state) {
    if (dss_plan_wait_from(plan, 0, plan->period, state->current, state->scratch))
        return 0;
    dss_random_t random = dss_random_stream(plan->seed, DSS_RANDOM_CONTRACTION, 0);
    for (uint32_t i = 0; i < plan->world_size; i++)
        state->current[i] = (double)(dss_random_next(&random) >> 11) * 0x1p-53 - 0.5;
    remove_mean(state->current, plan->world_size);
    const double norm = sqrt(dot(state->current, state->current, plan->world_size));
    for (uint32_t i = 0; i < plan->world_size; i++)
        state->current[i] /= norm;
    return 1;
}

dss_status_t dss_plan_contraction(const dss_plan_t *plan, double *rho_p) {
    if (!plan || !rho_p)
        return DSS_ERR_INVALID_ARGUMENT;
    const size_t count = plan->world_size;
    double *memory = calloc(3 * count + 2 * (size_t)MAX_ITERATIONS + 2 * (size_t)plan->rack_count, sizeof *memory);
    if (!memory)
        return DSS_ERR_NO_MEMORY;
    double *rows = memory + 3 * count;
    lanczos_t state = {memory, memory + count, memory + 2 * count, rows, rows + MAX_ITERATIONS, rows + 2 * (size_t)MAX_ITERATIONS};
    const double rho = start(plan, &state) ? sqrt(iterate(plan, &state)) : 0;
    *rho_p = rho < CONSENSUS ? 0 : rho > 1 ? 1 : rho;
    free(memory);
    return DSS_OK;
}
