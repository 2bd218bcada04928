/*
 * Mixed radix: N = f1 * f2 * ... * fk, ranks written in those digits. Round l groups the ranks whose other digits agree, so it
 * averages digit l away, and after k rounds, in any order, every rank holds the mean of all. Rounds come in ascending stride,
 * largest factor first. A prime factor of N always stands in one group, whence the limits that the errors name.
 */
#include "plan_internal.h"
#include "status.h"

#define MAX_DIVISORS 512u /* 14414400 has the most below 2^24: 504 */

typedef struct divisors {
    uint32_t values[MAX_DIVISORS]; /* of N, ascending, from 2 (or 1 for N = 1) to N */
    uint32_t count;
} divisors_t;

static void list_divisors(uint32_t number, divisors_t *list) {
    uint32_t low_count = 0;
    list->count = 0;
    for (uint32_t divisor = 2; divisor <= number / divisor; divisor++) {
        if (number % divisor == 0)
            list->values[low_count++] = divisor;
    }
    list->count = low_count;
    for (uint32_t i = low_count; i-- > 0;) {
        if (number / list->values[i] != list->values[i])
            list->values[list->count++] = number / list->values[i];
    }
    list->values[list->count++] = number;
}

static uint32_t largest_prime_factor(uint32_t number) {
    uint32_t largest = 1;
    for (uint32_t divisor = 2; divisor <= number / divisor; divisor++) {
        while (number % divisor == 0 && number > divisor) {
            number /= divisor;
            largest = divisor;
        }
    }
    return number > largest ? number : largest;
}

static int power_reaches(uint64_t base, uint32_t exponent, uint64_t goal) {
    uint64_t power = 1;
    while (exponent-- > 0 && power < goal)
        power *= base;
    return power >= goal;
}

/* Writes `number` as exactly factor_count factors, none above `cap`, in descending order. Returns whether that is possible. */
static int factorise(const divisors_t *list, uint32_t number, uint32_t factor_count, uint32_t cap, uint32_t *factors) {
    if (factor_count == 1) {
        factors[0] = number;
        return number <= cap;
    }
    for (uint32_t i = list->count; i-- > 0;) {
        const uint32_t factor = list->values[i];
        if (factor < 2 || factor > cap || number % factor)
            continue;
        if (!power_reaches(factor, factor_count, number))
            return 0; /* smaller ones reach it even less */
        if (number / factor > 1 && factorise(list, number / factor, factor_count - 1, factor, factors + 1)) {
            factors[0] = factor;
            return 1;
        }
    }
    return 0;
}

/* The smallest cap, at most max_cap, under which N has factor_count factors; fills them. 0: there is none. */
static uint32_t smallest_cap(const divisors_t *list, uint32_t factor_count, uint32_t max_cap, uint32_t *factors) {
    const uint32_t number = list->values[list->count - 1];
    for (uint32_t i = 0; i < list->count && list->values[i] <= max_cap; i++) {
        if (factorise(list, number, factor_count, list->values[i], factors))
            return list->values[i];
    }
    return 0;
}

/* group_size 0: the smallest largest group that at most 3 rounds allow, then the fewest rounds. Always exists: one group of all. */
static uint32_t factorise_auto(const divisors_t *list, uint32_t max_factors, uint32_t *factors) {
    uint32_t best_cap = UINT32_MAX;
    uint32_t best_count = 0;
    for (uint32_t count = 1; count <= max_factors; count++) {
        uint32_t candidate[DSS_GRID_MAX_FACTORS];
        const uint32_t cap = smallest_cap(list, count, best_cap - 1, candidate);
        if (!cap)
            continue;
        best_cap = cap;
        best_count = count;
        for (uint32_t i = 0; i < count; i++)
            factors[i] = candidate[i];
    }
    return best_count;
}

/* group_size given: the fewest rounds that it allows, then the smallest largest group. 0: there are none within max_factors. */
static uint32_t factorise_capped(const divisors_t *list, uint32_t max_factors, uint32_t cap, uint32_t *factors) {
    for (uint32_t count = 1; count <= max_factors; count++) {
        if (smallest_cap(list, count, cap, factors))
            return count;
    }
    return 0;
}

static dss_status_t fail_impossible(const dss_plan_params_t *params, dss_error_t *error_p) {
    divisors_t list;
    uint32_t factors[DSS_GRID_MAX_FACTORS];
    const uint32_t prime = largest_prime_factor(params->world_size);
    if (prime > params->group_size)
        return dss_fail(error_p, DSS_ERR_IMPOSSIBLE,
                        "no grid: world_size %u has the prime factor %u, which does not fit in groups of group_size %u; "
                        "use plan=random or group_size=%u",
                        params->world_size, prime, params->group_size, prime);
    list_divisors(params->world_size, &list);
    const uint32_t needed = factorise_capped(&list, DSS_GRID_MAX_FACTORS, params->group_size, factors);
    uint32_t fitting_size = params->world_size;
    for (uint32_t count = 2; count <= params->max_period && count <= DSS_GRID_MAX_FACTORS; count++) {
        const uint32_t cap = smallest_cap(&list, count, fitting_size - 1, factors);
        fitting_size = cap ? cap : fitting_size;
    }
    return dss_fail(error_p, DSS_ERR_IMPOSSIBLE,
                    "no grid: world_size %u in groups of at most group_size %u needs %u rounds, but max_period is %u; "
                    "use plan=random, max_period=%u or group_size=%u",
                    params->world_size, params->group_size, needed, params->max_period, needed, fitting_size);
}

uint32_t dss_grid_factors(const dss_plan_params_t *params, uint32_t factors[DSS_GRID_MAX_FACTORS]) {
    divisors_t list;
    const uint32_t most = params->group_size ? DSS_GRID_MAX_FACTORS : 3;
    const uint32_t max_factors = params->max_period < most ? params->max_period : most;
    list_divisors(params->world_size, &list);
    return params->group_size ? factorise_capped(&list, max_factors, params->group_size, factors)
                              : factorise_auto(&list, max_factors, factors);
}

dss_status_t dss_plan_create_grid(const dss_plan_params_t *params, dss_plan_t **plan_p, dss_error_t *error_p) {
    uint32_t factors[DSS_GRID_MAX_FACTORS];
    dss_plan_t *plan = NULL;
    const uint32_t factor_count = dss_grid_factors(params, factors);
    if (!factor_count)
        return fail_impossible(params, error_p);
    dss_status_t status = dss_plan_allocate(DSS_PLAN_GRID, params->world_size, factor_count, params->seed, &plan, error_p);
    if (status != DSS_OK)
        return status;
    uint32_t stride = 1;
    for (uint32_t round = 0; round < factor_count; round++) {
        uint32_t *group_of = plan->group_of + (size_t)round * params->world_size;
        for (uint32_t rank = 0; rank < params->world_size; rank++)
            group_of[rank] = rank / stride / factors[round] * stride + rank % stride;
        stride *= factors[round];
    }
    return dss_plan_hand_over(plan, plan_p, error_p);
}
