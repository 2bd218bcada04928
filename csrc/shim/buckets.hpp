/*
 * buckets.hpp: tensors through staging buffers.
 *
 * What is averaged together is cut into buckets of bounded size, each of one accumulator dtype (float64 for float64, float32 for
 * the rest). Values are widened into a buffer, summed there by the inner all-reduce, and scaled back into the tensors. The tensors
 * themselves are never on the wire: after an error each bucket holds either this rank's own values or the average.
 */
#pragma once

#include "dssync.h"

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace dssync {

// The core's number of a floating dtype, if it has one.
std::optional<dss_dtype_t> coreDtype(at::ScalarType dtype);

struct Segment {
    size_t tensor; // its index
    size_t begin;  // first element
    size_t count;
};

struct Bucket {
    dss_dtype_t accumulator;
    size_t count = 0; // elements
    std::vector<Segment> segments{};

    size_t bytes() const {
        return count * dss_dtype_bytes(accumulator);
    }
};

// The same on every rank that gives the same dtypes and sizes. The tensors are contiguous, on the CPU, of dtypes the core knows.
std::vector<Bucket> cutIntoBuckets(const std::vector<at::Tensor> &tensors, size_t bucketBytes);
void widenInto(const Bucket &bucket, const std::vector<at::Tensor> &tensors, at::Tensor &staging);
void narrowFrom(const Bucket &bucket, const at::Tensor &staging, double scale, const std::vector<at::Tensor> &tensors);

// Buffers for buckets, kept for reuse. Used by one thread.
class StagingPool {
  public:
    at::Tensor take(const Bucket &bucket); // one-dimensional, of the accumulator's dtype
    void give(at::Tensor staging);

  private:
    std::vector<at::Tensor> free_; // of bytes
};

} // namespace dssync
