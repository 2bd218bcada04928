/*
 * staging.hpp: the host side of one call's tensors.
 *
 * Inner backends get dense CPU tensors. A dense CPU tensor stands for itself; a device tensor by a pinned copy, and a CPU tensor
 * with gaps between its elements (which Gloo would fill with its neighbours' memory) by a contiguous one.
 */
#pragma once

#include "work.hpp"

#include <utility>

namespace dssync {

class Staging {
  public:
    // On the caller's thread, with all tensors of the call: orders the copies after what the caller has enqueued.
    explicit Staging(const Tensors &tensors) : streams_(std::make_shared<const SideStreams>(tensors)) {}

    at::Tensor in(const at::Tensor &tensor);    // read by the inner backend
    at::Tensor out(const at::Tensor &tensor);   // written
    at::Tensor inOut(const at::Tensor &tensor); // both
    Tensors in(const Tensors &tensors);
    Tensors out(const Tensors &tensors);
    Tensors inOut(const Tensors &tensors);

    bool onDevice() const {
        return !streams_->streams().empty();
    }
    const std::shared_ptr<const SideStreams> &streams() const {
        return streams_;
    }
    // Blocks until the host side holds the values.
    void ready() const {
        streams_->synchronize();
    }
    // Brings what was written to where it belongs; on a device, enqueues that.
    void copyBack() const;

  private:
    at::Tensor host(const at::Tensor &tensor, bool copy, bool back);

    std::shared_ptr<const SideStreams> streams_;
    std::vector<std::pair<at::Tensor, at::Tensor>> back_; // host, original
};

} // namespace dssync
