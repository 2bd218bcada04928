/*
 * exact_average.hpp: AVG where the inner backend has only SUM: sums, then divides. Half types are summed in float32.
 */
#pragma once

#include "work.hpp"

namespace dssync {

// Throws unless an average of this dtype means something: floating point or complex.
void requireExactAverage(const Tensors &tensors, const char *operation);
// What to sum: float32 copies of half tensors, the others themselves.
Tensors widened(const Tensors &tensors);
// targets[i] = sums[i] / count; the same tensor may stand on both sides.
void divideInto(const Tensors &sums, int count, const Tensors &targets);

} // namespace dssync
