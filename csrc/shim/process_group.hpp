/*
 * process_group.hpp: the backend that torch.distributed sees.
 *
 * all_reduce(AVG) of floating-point tensors above a size goes to the averager, where there is one. With a native engine, it carries
 * all other all_reduces and barriers; every other collective, and without an engine those too, go to an inner backend (Gloo)
 * through c10d's virtual methods, as they are. What to do is decided in Python; this class translates.
 */
#pragma once

#include "averager.hpp"
#include "engine.hpp"
#include "gate.hpp"
#include "post_queue.hpp"
#include "reaper.hpp"
#include "staging.hpp"

#include <torch/csrc/distributed/c10d/Backend.hpp>

namespace dssync {

struct ProcessGroupOptions {
    BackendPtr inner;
    std::shared_ptr<Engine> engine; // null: the inner backend carries everything
    std::shared_ptr<LaunchGate> gate;
    std::shared_ptr<Averager> averager; // null: every call is exact
    int64_t minBytes;                   // smallest tensor that is averaged in groups
    std::shared_ptr<const PythonCallback> onFirstAverage;
    std::shared_ptr<const PythonCallback> onShutdown; // (abort: whether nothing may be waited for)
    std::string label;
    std::chrono::milliseconds timeout;
};

class ProcessGroupDssync final : public c10d::Backend {
  public:
    ProcessGroupDssync(int rank, int size, ProcessGroupOptions options);
    ~ProcessGroupDssync() override;

    const std::string getBackendName() const override {
        return "dssync";
    }
    std::shared_ptr<Averager> averager() const;
    BackendPtr inner() const;

    // At interpreter exit: no due launch, no waiting; pending work is left to detached threads.
    void abandon();
    void shutdown() override;
    void abort() override;

    void setTimeout(std::chrono::milliseconds timeout) override;
    c10::intrusive_ptr<c10d::Backend::Options> getBackendOptions() override;
    void setGroupUid(const std::string &uid) override;
    void setSequenceNumberForGroup() override;
    uint64_t getSequenceNumberForGroup() override;
    void enableCollectivesTiming() override;
    bool supportsSplitting() const override;
    c10::intrusive_ptr<c10d::Backend> split(const c10::intrusive_ptr<c10d::Store> &store, const std::vector<int> &ranks,
                                            const c10::intrusive_ptr<c10d::Backend::Options> &options) override;
    c10::intrusive_ptr<c10d::Backend> merge(const c10::intrusive_ptr<c10d::Store> &store,
                                            const c10::intrusive_ptr<c10d::Backend::Options> &options, const int &rank,
                                            const int &size) override;

    using WorkPtr = c10::intrusive_ptr<c10d::Work>;
    using TensorLists = std::vector<Tensors>;

    WorkPtr broadcast(Tensors &tensors, const c10d::BroadcastOptions &options) override;
    WorkPtr allreduce(Tensors &tensors, const c10d::AllreduceOptions &options) override;
    WorkPtr allreduce_sparse(Tensors &tensors, const c10d::AllreduceOptions &options) override;
    WorkPtr allreduce_coalesced(Tensors &tensors, const c10d::AllreduceCoalescedOptions &options) override;
    WorkPtr reduce(Tensors &tensors, const c10d::ReduceOptions &options) override;
    WorkPtr allgather(TensorLists &outputs, Tensors &inputs, const c10d::AllgatherOptions &options) override;
    WorkPtr _allgather_base(at::Tensor &output, at::Tensor &input, const c10d::AllgatherOptions &options) override;
    WorkPtr allgather_coalesced(TensorLists &outputs, Tensors &inputs, const c10d::AllgatherOptions &options) override;
    WorkPtr allgather_into_tensor_coalesced(Tensors &outputs, Tensors &inputs, const c10d::AllgatherOptions &options) override;
    WorkPtr gather(TensorLists &outputs, Tensors &inputs, const c10d::GatherOptions &options) override;
    WorkPtr scatter(Tensors &outputs, TensorLists &inputs, const c10d::ScatterOptions &options) override;
    WorkPtr reduce_scatter(Tensors &outputs, TensorLists &inputs, const c10d::ReduceScatterOptions &options) override;
    WorkPtr _reduce_scatter_base(at::Tensor &output, at::Tensor &input, const c10d::ReduceScatterOptions &options) override;
    WorkPtr reduce_scatter_tensor_coalesced(Tensors &outputs, Tensors &inputs, const c10d::ReduceScatterOptions &options) override;
    WorkPtr alltoall_base(at::Tensor &output, at::Tensor &input, std::vector<int64_t> &outputSplits,
                          std::vector<int64_t> &inputSplits, const c10d::AllToAllOptions &options) override;
    WorkPtr alltoall(Tensors &outputs, Tensors &inputs, const c10d::AllToAllOptions &options) override;
    WorkPtr send(Tensors &tensors, int destination, int tag) override;
    WorkPtr recv(Tensors &tensors, int source, int tag) override;
    WorkPtr recvAnysource(Tensors &tensors, int tag) override;
    WorkPtr barrier(const c10d::BarrierOptions &options) override;
    void monitoredBarrier(const c10d::BarrierOptions &options, bool waitAllRanks) override;

  private:
    using Posted = std::vector<WorkPtr>;

    // One call, ready to be posted.
    struct Call {
        Operation operation;
        BackendPtr inner;
        std::shared_ptr<const Staging> staging;
        Tensors inputs;      // for the profiler and for errors
        TensorLists outputs; // the result, and the future's value
        std::function<Posted(c10d::Backend &)> post;
        std::function<void()> finish = {}; // before what was written is copied back
        bool lazy = false;                 // it completes inside wait()
        EngineOperation native = {};       // in place of `post`, if `engine` is there
        std::shared_ptr<Engine> engine = {};
        std::chrono::milliseconds timeout = {};
        bool willWait = false;
        std::string what = {}; // for the engine's errors
    };

    BackendPtr enter(const Operation &operation); // passes the gate; throws after shutdown
    c10::intrusive_ptr<WorkDssync> makeWork(const Operation &operation, TensorLists outputs, const Tensors &inputs,
                                            std::shared_ptr<const SideStreams> streams);
    WorkPtr start(Call call);
    bool isAveraged(const Tensors &tensors) const;
    WorkPtr average(Averager &averager, const at::Tensor &tensor, bool willWait);
    // The call, if the engine takes it; all_reduces and barriers are numbered on every rank alike.
    std::optional<Call> nativeCall(const Operation &operation, const BackendPtr &inner, const Tensors &tensors,
                                   const c10d::ReduceOp &op, std::chrono::milliseconds timeout, bool willWait);
    using SumPost = std::function<WorkPtr(c10d::Backend &, Tensors &)>;
    WorkPtr allreduceAverage(const Operation &operation, const BackendPtr &inner, const Tensors &tensors, SumPost post);
    WorkPtr reduceScatter(const Operation &operation, const BackendPtr &inner, const Tensors &outputs, const TensorLists &inputs,
                          const std::vector<int64_t> &offsets, const c10d::ReduceScatterOptions &options);
    WorkPtr reduceScatterTensors(const Operation &operation, const Tensors &outputs, const Tensors &inputs,
                                 const c10d::ReduceScatterOptions &options);
    c10::intrusive_ptr<c10d::Backend> wrap(BackendPtr inner, const char *how) const;
    void close(bool announce, bool abort);

    const std::shared_ptr<LaunchGate> gate_;
    const int64_t minBytes_;
    const std::shared_ptr<const GroupLabel> label_;
    const std::shared_ptr<std::atomic<int64_t>> pending_ = std::make_shared<std::atomic<int64_t>>(0);

    mutable std::mutex mutex_;
    BackendPtr inner_; // null after shutdown; this and what follows guarded by mutex_
    std::shared_ptr<Engine> engine_;
    uint64_t nativeCalls_ = 0;
    std::shared_ptr<Averager> averager_;
    std::shared_ptr<const PythonCallback> onFirstAverage_; // null once called
    std::shared_ptr<const PythonCallback> onShutdown_;     // null once called
    std::shared_ptr<PostQueue> queue_ = std::make_shared<PostQueue>();
    std::chrono::milliseconds timeout_;
    std::atomic<uint64_t> sequence_{0};

    std::mutex averageMutex_;
    uint64_t averages_ = 0; // all_reduce(AVG) calls given to the averager; guarded by averageMutex_
};

} // namespace dssync
