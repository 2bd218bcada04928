#include "averager.hpp"

#include "text.hpp"

#include <ATen/MemoryOverlap.h>
#include <c10/util/StringUtil.h>

#include <algorithm>

namespace dssync {

namespace {

void requireAverageable(const at::Tensor &tensor) {
    TORCH_CHECK_VALUE(tensor.defined() && tensor.layout() == at::kStrided && coreDtype(tensor.scalar_type()).has_value(),
                      "dssync: only dense float32, float64, float16 and bfloat16 tensors can be averaged, got ",
                      tensor.defined() ? c10::str(dtypeName(tensor.scalar_type()), " with layout ", tensor.layout()) : "none");
    TORCH_CHECK_VALUE(at::has_internal_overlap(tensor) != at::MemOverlap::Yes,
                      "dssync: a tensor whose elements share memory (an expanded one) cannot be averaged in place; pass a clone");
}

} // namespace

Tensors checkParts(const PlanHandle &plan, const std::vector<Part> &parts, const std::string &what) {
    Tensors all;
    for (const auto &part : parts) {
        TORCH_CHECK_VALUE(part.round == kExactRound || part.round == kRackRound || part.round < plan.period(), "dssync: ", what,
                          " asks for round ", part.round, " of a plan of ", plan.period(), " rounds");
        for (const auto &tensor : part.tensors) {
            requireAverageable(tensor);
            all.push_back(tensor);
        }
    }
    return all;
}

std::vector<Part> joinRounds(const std::vector<Part> &parts) {
    std::vector<Part> joined;
    for (const auto &part : parts) {
        auto same = std::find_if(joined.begin(), joined.end(),
                                 [&](const Part &known) { return known.round == part.round && known.crossing == part.crossing; });
        auto &target = same != joined.end() ? *same : joined.emplace_back(Part{part.round, {}, part.crossing});
        target.tensors.insert(target.tensors.end(), part.tensors.begin(), part.tensors.end());
    }
    return joined;
}

std::exception_ptr averagerShutDown(const std::string &what) {
    return std::make_exception_ptr(
        C10_BUILD_ERROR(DistBackendError, c10::str("dssync: ", what, " was not done: the averager has been shut down")));
}

} // namespace dssync
