#include "side_streams.hpp"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace dssync {

SideStreams::SideStreams(const std::vector<at::Tensor> &tensors) {
    for (const auto &tensor : tensors) {
        const auto device = tensor.device();
        if (device.is_cpu() ||
            std::any_of(streams_.begin(), streams_.end(), [&](const c10::Stream &s) { return s.device() == device; })) {
            continue;
        }
        c10::impl::VirtualGuardImpl guard(device.type());
        c10::Event now(device.type());
        now.record(guard.getStream(device));
        streams_.push_back(guard.getStreamFromGlobalPool(device, /*isHighPriority=*/true));
        now.block(streams_.back());
    }
}

std::vector<c10::Device> SideStreams::devices() const {
    std::vector<c10::Device> devices;
    for (const auto &stream : streams_) {
        devices.push_back(stream.device());
    }
    return devices;
}

const c10::Stream &SideStreams::streamOf(const at::Tensor &tensor) const {
    for (const auto &stream : streams_) {
        if (stream.device() == tensor.device()) {
            return stream;
        }
    }
    TORCH_INTERNAL_ASSERT(false, "dssync: no side stream for ", tensor.device());
}

at::Tensor SideStreams::toHost(const at::Tensor &tensor, bool copy) const {
    at::AutoDispatchBelowADInplaceOrView raw; // no autograd, no version counters
    const auto &stream = streamOf(tensor);
    auto host = at::empty(tensor.sizes(), tensor.options().device(at::kCPU).pinned_memory(true).memory_format(std::nullopt));
    // The caching allocator must not reuse this memory for the caller's streams before ours is done with it.
    c10::impl::VirtualGuardImpl(tensor.device().type()).recordDataPtrOnStream(tensor.storage().data_ptr(), stream);
    if (copy) {
        c10::StreamGuard onSideStream(stream);
        host.copy_(tensor, /*non_blocking=*/true);
    }
    return host;
}

void SideStreams::toDevice(const at::Tensor &host, const at::Tensor &tensor) const {
    at::AutoDispatchBelowADInplaceOrView raw;
    c10::StreamGuard onSideStream(streamOf(tensor));
    tensor.copy_(host, /*non_blocking=*/true);
}

void SideStreams::synchronize() const {
    for (const auto &stream : streams_) {
        stream.synchronize();
    }
}

} // namespace dssync
