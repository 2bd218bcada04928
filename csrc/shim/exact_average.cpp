#include "exact_average.hpp"

#include "text.hpp"

#include <ATen/core/Tensor.h>

namespace dssync {

void requireExactAverage(const Tensors &tensors, const char *operation) {
    for (const auto &tensor : tensors) {
        TORCH_CHECK_VALUE(at::isFloatingType(tensor.scalar_type()) || at::isComplexType(tensor.scalar_type()),
                          "dssync: ", operation, " with ReduceOp.AVG needs a floating-point tensor, got ",
                          dtypeName(tensor.scalar_type()), ". Use ReduceOp.SUM and divide.");
    }
}

Tensors widened(const Tensors &tensors) {
    Tensors wide;
    for (const auto &tensor : tensors) {
        wide.push_back(at::isReducedFloatingType(tensor.scalar_type())
                           ? tensor.to(at::kFloat, /*non_blocking=*/false, /*copy=*/true, at::MemoryFormat::Contiguous)
                           : tensor);
    }
    return wide;
}

void divideInto(const Tensors &sums, int count, const Tensors &targets) {
    for (size_t i = 0; i < sums.size(); ++i) {
        auto sum = sums[i];
        sum.div_(count);
        if (!sum.is_same(targets[i])) {
            targets[i].copy_(sum);
        }
    }
}

} // namespace dssync
