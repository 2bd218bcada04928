/*
 * dense.h: plans as N x N matrices, the slow way, to hold the library's shortcuts against. Row-major. The spectral norm comes from
 * Jacobi's eigenvalue method on A' A, which has nothing in common with the library's.
 */
#ifndef DSS_TEST_DENSE_H
#define DSS_TEST_DENSE_H

#include "check.h"

/* W of one round: row i has 1/s at the s members of i's group. In a crossing in which workers keep their values the mean of i's
 * rack is replaced by that of its group: besides, row i has 1 at i and loses 1/r at the r workers of its rack. */
static inline void dense_round(const dss_plan_t *plan, uint32_t round, double *matrix) {
    const uint32_t n = dss_plan_world_size(plan);
    memset(matrix, 0, (size_t)n * n * sizeof *matrix);
    for (uint32_t rank = 0; rank < n; rank++) {
        const uint32_t *members;
        uint32_t member_count;
        CHECK_STATUS(dss_plan_group_of_rank(plan, round, rank, &members, &member_count), DSS_OK);
        for (uint32_t i = 0; i < member_count; i++)
            matrix[(size_t)rank * n + members[i]] = 1.0 / member_count;
        double rack_size = 0;
        for (uint32_t i = 0; i < n; i++)
            rack_size += dss_plan_rack_of(plan, i) == dss_plan_rack_of(plan, rank);
        for (uint32_t i = 0; dss_plan_keeps_values(plan, round) && i < n; i++)
            matrix[(size_t)rank * n + i] -= dss_plan_rack_of(plan, i) == dss_plan_rack_of(plan, rank) ? 1 / rack_size : 0;
        matrix[(size_t)rank * n + rank] += dss_plan_keeps_values(plan, round);
    }
}

/* The same from raw group numbers, for plans that the library refuses. */
static inline void dense_round_of_numbers(const uint32_t *group_of, uint32_t n, double *matrix) {
    for (uint32_t i = 0; i < n; i++) {
        uint32_t size = 0;
        for (uint32_t j = 0; j < n; j++)
            size += group_of[j] == group_of[i];
        for (uint32_t j = 0; j < n; j++)
            matrix[(size_t)i * n + j] = group_of[j] == group_of[i] ? 1.0 / size : 0;
    }
}

/* And of a crossing in which workers keep their values: I + M - R. */
static inline void dense_correction_of_numbers(const uint32_t *group_of, const uint32_t *rack_of, uint32_t n, double *matrix) {
    double *racks = malloc((size_t)n * n * sizeof *racks);
    dense_round_of_numbers(group_of, n, matrix);
    dense_round_of_numbers(rack_of, n, racks);
    for (size_t i = 0; i < (size_t)n * n; i++)
        matrix[i] += (i % (n + 1) == 0) - racks[i];
    free(racks);
}

static inline void dense_multiply(const double *a, const double *b, uint32_t n, double *product) {
    memset(product, 0, (size_t)n * n * sizeof *product);
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t k = 0; k < n; k++)
            for (uint32_t j = 0; j < n; j++)
                product[(size_t)i * n + j] += a[(size_t)i * n + k] * b[(size_t)k * n + j];
}

/* One Jacobi rotation that zeroes element (p, q) of the symmetric matrix. */
static inline void dense_rotate(double *s, uint32_t n, uint32_t p, uint32_t q) {
    const double apq = s[(size_t)p * n + q];
    if (fabs(apq) < 1e-300)
        return;
    const double theta = (s[(size_t)q * n + q] - s[(size_t)p * n + p]) / (2 * apq);
    const double tangent = (theta < 0 ? -1 : 1) / (fabs(theta) + sqrt(theta * theta + 1));
    const double cosine = 1 / sqrt(tangent * tangent + 1);
    const double sine = tangent * cosine;
    for (uint32_t k = 0; k < n; k++) {
        const double kp = s[(size_t)k * n + p];
        const double kq = s[(size_t)k * n + q];
        s[(size_t)k * n + p] = cosine * kp - sine * kq;
        s[(size_t)k * n + q] = sine * kp + cosine * kq;
    }
    for (uint32_t k = 0; k < n; k++) {
        const double pk = s[(size_t)p * n + k];
        const double qk = s[(size_t)q * n + k];
        s[(size_t)p * n + k] = cosine * pk - sine * qk;
        s[(size_t)q * n + k] = sine * pk + cosine * qk;
    }
}

/* ||matrix - J||_2 */
static inline double dense_distance_to_mean(const double *matrix, uint32_t n) {
    double *s = calloc((size_t)n * n, sizeof *s);
    for (uint32_t k = 0; k < n; k++)
        for (uint32_t i = 0; i < n; i++)
            for (uint32_t j = 0; j < n; j++)
                s[(size_t)i * n + j] += (matrix[(size_t)k * n + i] - 1.0 / n) * (matrix[(size_t)k * n + j] - 1.0 / n);
    for (int sweep = 0; sweep < 60; sweep++) {
        double off = 0;
        for (uint32_t p = 0; p < n; p++) {
            for (uint32_t q = p + 1; q < n; q++) {
                off += fabs(s[(size_t)p * n + q]);
                dense_rotate(s, n, p, q);
            }
        }
        if (off < 1e-15)
            break;
    }
    double largest = 0;
    for (uint32_t i = 0; i < n; i++)
        largest = s[(size_t)i * n + i] > largest ? s[(size_t)i * n + i] : largest;
    free(s);
    return sqrt(largest);
}

/* W_{first-1} ... W_{first+1} W_{first}: one period, begun at any round. Freed by the caller. */
static inline double *dense_period(const dss_plan_t *plan, uint32_t first) {
    const uint32_t n = dss_plan_world_size(plan);
    const uint32_t period = dss_plan_period(plan);
    double *product = malloc((size_t)n * n * sizeof *product);
    double *round = malloc((size_t)n * n * sizeof *round);
    double *next = malloc((size_t)n * n * sizeof *next);
    dense_round(plan, first % period, product);
    for (uint32_t step = 1; step < period; step++) {
        dense_round(plan, (first + step) % period, round);
        dense_multiply(round, product, n, next);
        double *freed = product;
        product = next;
        next = freed;
    }
    free(round);
    free(next);
    return product;
}

#endif
