#include "buckets.hpp"

#include <ATen/ops/empty.h>

#include <algorithm>

namespace dssync {

namespace {

at::ScalarType torchDtype(dss_dtype_t accumulator) {
    return accumulator == DSS_FLOAT64 ? at::kDouble : at::kFloat;
}

void require(dss_status_t status) {
    TORCH_CHECK(status == DSS_OK, "dssync: averaging kernel: ", dss_status_string(status));
}

char *at_(const at::Tensor &tensor, size_t element, dss_dtype_t dtype) {
    return static_cast<char *>(tensor.data_ptr()) + element * dss_dtype_bytes(dtype);
}

} // namespace

std::optional<dss_dtype_t> coreDtype(at::ScalarType dtype) {
    switch (dtype) {
    case at::kFloat:
        return DSS_FLOAT32;
    case at::kDouble:
        return DSS_FLOAT64;
    case at::kHalf:
        return DSS_FLOAT16;
    case at::kBFloat16:
        return DSS_BFLOAT16;
    default:
        return std::nullopt;
    }
}

std::vector<Bucket> cutIntoBuckets(const std::vector<at::Tensor> &tensors, size_t bucketBytes) {
    std::vector<Bucket> buckets;
    for (const dss_dtype_t accumulator : {DSS_FLOAT32, DSS_FLOAT64}) {
        const size_t capacity = std::max<size_t>(1, bucketBytes / dss_dtype_bytes(accumulator));
        Bucket bucket{accumulator};
        for (size_t i = 0; i < tensors.size(); ++i) {
            if (dss_dtype_accumulator(*coreDtype(tensors[i].scalar_type())) != accumulator) {
                continue;
            }
            const auto total = static_cast<size_t>(tensors[i].numel());
            for (size_t begin = 0; begin < total;) {
                const size_t count = std::min(total - begin, capacity - bucket.count);
                bucket.segments.push_back({i, begin, count});
                bucket.count += count;
                begin += count;
                if (bucket.count == capacity) {
                    buckets.push_back(std::exchange(bucket, Bucket{accumulator}));
                }
            }
        }
        if (bucket.count > 0) {
            buckets.push_back(std::move(bucket));
        }
    }
    return buckets;
}

void widenInto(const Bucket &bucket, const std::vector<at::Tensor> &tensors, at::Tensor &staging) {
    size_t position = 0;
    for (const auto &segment : bucket.segments) {
        const auto &tensor = tensors[segment.tensor];
        const auto dtype = *coreDtype(tensor.scalar_type());
        require(dss_widen(dtype, at_(tensor, segment.begin, dtype), at_(staging, position, bucket.accumulator), segment.count));
        position += segment.count;
    }
}

void narrowFrom(const Bucket &bucket, const at::Tensor &staging, double scale, const std::vector<at::Tensor> &tensors) {
    size_t position = 0;
    for (const auto &segment : bucket.segments) {
        const auto &tensor = tensors[segment.tensor];
        const auto dtype = *coreDtype(tensor.scalar_type());
        require(dss_narrow_scaled(dtype, at_(staging, position, bucket.accumulator), scale, at_(tensor, segment.begin, dtype),
                                  segment.count));
        position += segment.count;
    }
}

at::Tensor StagingPool::take(const Bucket &bucket) {
    const auto bytes = static_cast<int64_t>(bucket.bytes());
    auto fits = std::find_if(free_.begin(), free_.end(), [&](const at::Tensor &t) { return t.numel() >= bytes; });
    at::Tensor buffer;
    if (fits != free_.end()) {
        buffer = std::move(*fits);
        free_.erase(fits);
    } else {
        if (!free_.empty()) {
            free_.pop_back(); // replaced by the larger one
        }
        buffer = at::empty({bytes}, at::kByte);
    }
    return buffer.slice(0, 0, bytes).view(torchDtype(bucket.accumulator));
}

void StagingPool::give(at::Tensor staging) {
    const auto bytes = static_cast<int64_t>(staging.storage().nbytes());
    free_.push_back(at::empty({0}, at::kByte).set_(staging.storage(), 0, {bytes}, {1}));
}

} // namespace dssync
