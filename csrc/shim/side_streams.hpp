/*
 * side_streams.hpp: copies between devices and pinned host memory, off the caller's streams.
 *
 * Made on the caller's thread: from there on, one stream of each device involved is ordered after what the caller has enqueued so
 * far. Copies may then be enqueued from any thread. Written against c10's device-agnostic interfaces, so the same source builds
 * with any torch; without device tensors it does nothing.
 */
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>

#include <vector>

namespace dssync {

class SideStreams {
  public:
    explicit SideStreams(const std::vector<at::Tensor> &tensors);

    const std::vector<c10::Stream> &streams() const {
        return streams_;
    }
    std::vector<c10::Device> devices() const;

    // A contiguous pinned host tensor of the same shape; `copy` enqueues the values too. Read it only after synchronize().
    at::Tensor toHost(const at::Tensor &tensor, bool copy) const;
    void toDevice(const at::Tensor &host, const at::Tensor &tensor) const;
    // Blocks this thread until all copies enqueued so far are done.
    void synchronize() const;

  private:
    const c10::Stream &streamOf(const at::Tensor &tensor) const;

    std::vector<c10::Stream> streams_; // one a device
};

} // namespace dssync
