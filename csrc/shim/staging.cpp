#include "staging.hpp"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

namespace dssync {

at::Tensor Staging::host(const at::Tensor &tensor, bool copy, bool back) {
    if (!tensor.defined() || (tensor.is_cpu() && (tensor.layout() != at::kStrided || tensor.is_non_overlapping_and_dense()))) {
        return tensor;
    }
    at::AutoDispatchBelowADInplaceOrView raw; // no autograd, no version counters
    at::Tensor host;
    if (tensor.layout() != at::kStrided) {
        host = tensor.to(at::kCPU); // sparse: blocks, there is no other way
    } else if (!tensor.is_cpu()) {
        host = streams_->toHost(tensor, copy);
    } else {
        host = copy ? tensor.contiguous() : at::empty(tensor.sizes(), tensor.options());
    }
    if (back) {
        back_.emplace_back(host, tensor);
    }
    return host;
}

void Staging::copyBack() const {
    at::AutoDispatchBelowADInplaceOrView raw;
    for (const auto &[host, tensor] : back_) {
        if (tensor.is_cpu() || tensor.layout() != at::kStrided) {
            tensor.copy_(host);
        } else {
            streams_->toDevice(host, tensor);
        }
    }
}

at::Tensor Staging::in(const at::Tensor &tensor) {
    return host(tensor, true, false);
}

at::Tensor Staging::out(const at::Tensor &tensor) {
    return host(tensor, false, true);
}

at::Tensor Staging::inOut(const at::Tensor &tensor) {
    return host(tensor, true, true);
}

Tensors Staging::in(const Tensors &tensors) {
    Tensors hosts;
    for (const auto &tensor : tensors) {
        hosts.push_back(in(tensor));
    }
    return hosts;
}

Tensors Staging::out(const Tensors &tensors) {
    Tensors hosts;
    for (const auto &tensor : tensors) {
        hosts.push_back(out(tensor));
    }
    return hosts;
}

Tensors Staging::inOut(const Tensors &tensors) {
    Tensors hosts;
    for (const auto &tensor : tensors) {
        hosts.push_back(inOut(tensor));
    }
    return hosts;
}

} // namespace dssync
