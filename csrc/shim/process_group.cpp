#include "process_group.hpp"

#include "exact_average.hpp"
#include "text.hpp"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/cat.h>
#include <c10/util/StringUtil.h>

#include <numeric>

namespace dssync {

namespace {

using c10d::OpType;

constexpr Operation kBroadcast{"broadcast", "dssync:broadcast", OpType::BROADCAST};
constexpr Operation kAllReduce{"all_reduce", "dssync:all_reduce", OpType::ALLREDUCE};
constexpr Operation kSparseAllReduce{"sparse_all_reduce", "dssync:sparse_all_reduce", OpType::_ALLREDUCE_SPARSE};
constexpr Operation kAllReduceCoalesced{"all_reduce_coalesced", "dssync:all_reduce", OpType::ALLREDUCE_COALESCED};
constexpr Operation kReduce{"reduce", "dssync:reduce", OpType::REDUCE};
constexpr Operation kAllGather{"all_gather", "dssync:all_gather", OpType::ALLGATHER};
constexpr Operation kAllGatherBase{"all_gather_into_tensor", "dssync:all_gather", OpType::_ALLGATHER_BASE};
constexpr Operation kAllGatherCoalesced{"all_gather_coalesced", "dssync:all_gather", OpType::ALLGATHER_COALESCED};
constexpr Operation kGather{"gather", "dssync:gather", OpType::GATHER};
constexpr Operation kScatter{"scatter", "dssync:scatter", OpType::SCATTER};
constexpr Operation kReduceScatter{"reduce_scatter", "dssync:reduce_scatter", OpType::REDUCE_SCATTER};
constexpr Operation kReduceScatterBase{"reduce_scatter_tensor", "dssync:reduce_scatter", OpType::_REDUCE_SCATTER_BASE};
constexpr Operation kReduceScatterCoalesced{"reduce_scatter_tensor_coalesced", "dssync:reduce_scatter", OpType::COALESCED};
constexpr Operation kAllToAllBase{"all_to_all_single", "dssync:all_to_all", OpType::ALLTOALL_BASE};
constexpr Operation kAllToAll{"all_to_all", "dssync:all_to_all", OpType::ALLTOALL};
constexpr Operation kSend{"send", "dssync:send", OpType::SEND};
constexpr Operation kRecv{"recv", "dssync:recv", OpType::RECV};
constexpr Operation kRecvAnySource{"recv from any source", "dssync:recvAnySource", OpType::RECVANYSOURCE};
constexpr Operation kBarrier{"barrier", "dssync:barrier", OpType::BARRIER};
constexpr Operation kMonitoredBarrier{"monitored_barrier", "dssync:monitored_barrier", OpType::BARRIER};

Tensors concat(const std::vector<Tensors> &lists) {
    Tensors all;
    for (const auto &list : lists) {
        all.insert(all.end(), list.begin(), list.end());
    }
    return all;
}

Tensors concat(Tensors first, const Tensors &second) {
    first.insert(first.end(), second.begin(), second.end());
    return first;
}

std::vector<Tensors> outputsOf(Staging &staging, const std::vector<Tensors> &lists) {
    std::vector<Tensors> hosts;
    for (const auto &list : lists) {
        hosts.push_back(staging.out(list));
    }
    return hosts;
}

std::vector<Tensors> inputsOf(Staging &staging, const std::vector<Tensors> &lists) {
    std::vector<Tensors> hosts;
    for (const auto &list : lists) {
        hosts.push_back(staging.in(list));
    }
    return hosts;
}

bool isAverage(const c10d::ReduceOp &op) {
    return op.op_ == c10d::ReduceOp::AVG;
}

template <typename Options> Options asSum(Options options) {
    options.reduceOp = c10d::ReduceOp::SUM;
    return options;
}

} // namespace

ProcessGroupDssync::ProcessGroupDssync(int rank, int size, ProcessGroupOptions options)
    : Backend(rank, size), gate_(std::move(options.gate)), minBytes_(options.minBytes),
      label_(std::make_shared<GroupLabel>(GroupLabel{rank, size, std::move(options.label)})), inner_(std::move(options.inner)),
      engine_(std::move(options.engine)), averager_(std::move(options.averager)),
      onFirstAverage_(std::move(options.onFirstAverage)), onShutdown_(std::move(options.onShutdown)), timeout_(options.timeout) {
    TORCH_CHECK_VALUE(inner_ && gate_, "dssync: a process group needs an inner backend and a gate");
    TORCH_CHECK_VALUE(inner_->getRank() == rank && inner_->getSize() == size, "dssync: the inner backend is rank ",
                      inner_->getRank(), " of ", inner_->getSize(), ", the group rank ", rank, " of ", size);
    init();
}

ProcessGroupDssync::~ProcessGroupDssync() {
    try {
        close(/*announce=*/pythonAlive(), /*abort=*/false);
    } catch (const std::exception &e) {
        TORCH_WARN("dssync: while a process group was dropped: ", e.what());
    }
}

std::shared_ptr<Averager> ProcessGroupDssync::averager() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return averager_;
}

BackendPtr ProcessGroupDssync::inner() const {
    std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(inner_, "dssync: the process group (", label_->label, ") has been shut down");
    return inner_;
}

// ---- taking down --------------------------------------------------------------------------------------------------------

void ProcessGroupDssync::close(bool announce, bool abort) {
    std::shared_ptr<const PythonCallback> onShutdown;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        onShutdown = std::move(onShutdown_);
    }
    std::exception_ptr error;
    if (announce && onShutdown) {
        try {
            (*onShutdown)(abort); // may launch and run collectives: all is still up
        } catch (...) {
            error = std::current_exception(); // the group comes down all the same
        }
    }
    std::shared_ptr<PostQueue> queue;
    std::shared_ptr<Averager> averager;
    BackendPtr inner;
    std::shared_ptr<Engine> engine;
    std::shared_ptr<const PythonCallback> onFirstAverage;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        engine = std::move(engine_);
        queue = std::move(queue_);
        averager = std::move(averager_);
        inner = std::move(inner_);
        onFirstAverage = std::move(onFirstAverage_);
    }
    {
        GilReleased released;
        queue.reset();
        if (averager) {
            averager->shutdown(abort);
        }
        if (engine) {
            engine->abort("the process group has been shut down");
            engine.reset();
        }
        if (inner) {
            std::vector<BackendPtr> doomed;
            doomed.push_back(std::move(inner));
            destroyBackends(std::move(doomed), /*busy=*/*pending_ > 0);
        }
    }
    if (error) {
        std::rethrow_exception(error);
    }
}

void ProcessGroupDssync::shutdown() {
    close(/*announce=*/true, /*abort=*/false);
}

void ProcessGroupDssync::abort() {
    close(/*announce=*/true, /*abort=*/true);
}

void ProcessGroupDssync::abandon() {
    close(/*announce=*/false, /*abort=*/true);
}

// ---- properties ---------------------------------------------------------------------------------------------------------

void ProcessGroupDssync::setTimeout(std::chrono::milliseconds timeout) {
    inner()->setTimeout(timeout);
    std::lock_guard<std::mutex> lock(mutex_);
    timeout_ = timeout;
    if (averager_) {
        averager_->setTimeout(timeout);
    }
}

c10::intrusive_ptr<c10d::Backend::Options> ProcessGroupDssync::getBackendOptions() {
    return inner()->getBackendOptions();
}

void ProcessGroupDssync::setGroupUid(const std::string &uid) {
    Backend::setGroupUid(uid);
    inner()->setGroupUid(uid);
}

void ProcessGroupDssync::setSequenceNumberForGroup() {
    // Nothing to agree on: calls are counted from 0 on every rank.
}

uint64_t ProcessGroupDssync::getSequenceNumberForGroup() {
    return sequence_;
}

void ProcessGroupDssync::enableCollectivesTiming() {
    inner()->enableCollectivesTiming();
}

bool ProcessGroupDssync::supportsSplitting() const {
    return inner()->supportsSplitting();
}

c10::intrusive_ptr<c10d::Backend> ProcessGroupDssync::wrap(BackendPtr inner, const char *how) const {
    if (!inner) {
        return nullptr; // this rank is not in the new group
    }
    const int rank = inner->getRank();
    const int size = inner->getSize();
    ProcessGroupOptions options{
        std::move(inner), nullptr, gate_, nullptr, minBytes_, nullptr, nullptr, c10::str(how, label_->label), timeout_};
    return c10::make_intrusive<ProcessGroupDssync>(rank, size, std::move(options));
}

c10::intrusive_ptr<c10d::Backend> ProcessGroupDssync::split(const c10::intrusive_ptr<c10d::Store> &store,
                                                            const std::vector<int> &ranks,
                                                            const c10::intrusive_ptr<c10d::Backend::Options> &options) {
    return wrap(inner()->split(store, ranks, options), "split of ");
}

c10::intrusive_ptr<c10d::Backend> ProcessGroupDssync::merge(const c10::intrusive_ptr<c10d::Store> &store,
                                                            const c10::intrusive_ptr<c10d::Backend::Options> &options,
                                                            const int &rank, const int &size) {
    return wrap(inner()->merge(store, options, rank, size), "merge with ");
}

// ---- calls --------------------------------------------------------------------------------------------------------------

BackendPtr ProcessGroupDssync::enter(const Operation &operation) {
    gate_->pass(operation.name);
    std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK_WITH(DistBackendError, inner_, "dssync: ", operation.name, " on rank ", label_->rank, " of ", label_->size, " (",
                     label_->label, ") after the process group was shut down");
    return inner_;
}

c10::intrusive_ptr<WorkDssync> ProcessGroupDssync::makeWork(const Operation &operation, TensorLists outputs, const Tensors &inputs,
                                                            std::shared_ptr<const SideStreams> streams) {
    return c10::make_intrusive<WorkDssync>(operation, label_, ++sequence_, std::move(outputs), inputs, std::move(streams),
                                           pending_);
}

ProcessGroupDssync::WorkPtr ProcessGroupDssync::start(Call call) {
    auto work = makeWork(call.operation, std::move(call.outputs), call.inputs, call.staging->streams());
    std::shared_ptr<PostQueue> queue;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        queue = queue_;
    }
    const bool onDevice = call.staging->onDevice();
    auto task = [work, call = std::move(call)](bool dropped) {
        try {
            TORCH_CHECK_WITH(DistBackendError, !dropped, "the process group was shut down");
            call.staging->ready();
            auto finish = [staging = call.staging, finish = call.finish] {
                at::AutoDispatchBelowADInplaceOrView raw; // the values change behind autograd's back, as with any backend
                if (finish) {
                    finish();
                }
                staging->copyBack();
            };
            if (call.engine) {
                auto done = [work, finish](const std::exception_ptr &failure) {
                    auto outcome = failure;
                    try {
                        if (!outcome) {
                            finish();
                        }
                    } catch (...) {
                        outcome = work->translate(std::current_exception(), "copy back");
                    }
                    work->complete(outcome);
                };
                work->driveBy(call.engine->post({call.native}, call.what, call.timeout, call.willWait, std::move(done)));
                return;
            }
            auto posted = call.post(*call.inner);
            if (call.lazy) {
                work->attachLazy(std::move(posted.front()), std::move(finish));
            } else {
                work->attach(std::move(posted), std::move(finish));
            }
        } catch (...) {
            const auto error = work->translate(std::current_exception(), "start");
            work->complete(error);
            std::rethrow_exception(error);
        }
    };
    if (queue) {
        queue->runOrQueue(onDevice, std::move(task));
    } else {
        task(/*dropped=*/true);
    }
    return work;
}

namespace {
const uint64_t kExactChannel = dss_hash("exact", 5, 0);

bool isEngineTensor(const at::Tensor &tensor, dss_reduction_t reduction, at::ScalarType dtype) {
    return tensor.layout() == at::kStrided && tensor.scalar_type() == dtype &&
           dss_reduction_takes(reduction, *engineDtype(dtype)) != 0;
}

// What must be alike on all ranks for element to meet element: tensors travel in the order of their memory. Shapes may differ.
uint64_t layoutOf(const Tensors &hosts) {
    std::vector<int64_t> words;
    for (const auto &host : hosts) {
        words.insert(words.end(), {static_cast<int64_t>(host.scalar_type()), host.numel()});
        for (int64_t i = 0; i < host.dim() && !host.is_contiguous(); ++i) {
            if (host.size(i) != 1) { // else its stride means nothing
                words.insert(words.end(), {host.size(i), host.stride(i)});
            }
        }
    }
    return dss_hash(words.data(), words.size() * sizeof(int64_t), 0);
}
} // namespace

std::optional<ProcessGroupDssync::Call> ProcessGroupDssync::nativeCall(const Operation &operation, const BackendPtr &inner,
                                                                       const Tensors &tensors, const c10d::ReduceOp &op,
                                                                       std::chrono::milliseconds timeout, bool willWait) {
    const bool average = isAverage(op);
    const auto dtype = tensors.empty() ? at::kByte : tensors.front().scalar_type();
    const auto reduction = average ? std::optional(DSS_SUM) : engineReduction(op, dtype == at::kBool);
    if (!reduction || !engineDtype(dtype) || (average && !coreDtype(dtype))) {
        return std::nullopt;
    }
    for (const auto &tensor : tensors) {
        if (!isEngineTensor(tensor, *reduction, dtype)) {
            return std::nullopt;
        }
    }
    auto staging = std::make_shared<Staging>(tensors);
    Call call{operation, inner, staging, tensors, {}, nullptr};
    if (!tensors.empty()) {
        call.outputs = {tensors};
    }
    {
        std::lock_guard<std::mutex> lock(mutex_);
        call.engine = engine_;
        call.timeout = timeout == c10d::kUnsetTimeout ? timeout_ : timeout;
        call.native.key = {kExactChannel, nativeCalls_, 0, 0};
        if (engine_) {
            ++nativeCalls_;
        }
    }
    if (!call.engine) {
        return std::nullopt;
    }
    call.willWait = willWait && !call.staging->onDevice();
    call.what = c10::str(operation.name, " call ", call.native.key.sequence, " of the ", label_->label);
    call.native.kind = tensors.empty() ? DSS_OPERATION_BARRIER : average ? DSS_OPERATION_AVERAGE : DSS_OPERATION_ALL_REDUCE;
    call.native.reduction = *reduction;
    call.native.members.resize(getSize());
    std::iota(call.native.members.begin(), call.native.members.end(), 0);
    call.native.tensors = staging->inOut(tensors);
    call.native.layout = layoutOf(call.native.tensors);
    return call;
}

bool ProcessGroupDssync::isAveraged(const Tensors &tensors) const {
    if (tensors.size() != 1 || gate_->exactDepth() > 0) {
        return false;
    }
    const auto &tensor = tensors.front();
    return tensor.layout() == at::kStrided && coreDtype(tensor.scalar_type()).has_value() &&
           tensor.numel() * static_cast<int64_t>(tensor.element_size()) >= minBytes_;
}

ProcessGroupDssync::WorkPtr ProcessGroupDssync::average(Averager &averager, const at::Tensor &tensor, bool willWait) {
    std::shared_ptr<const PythonCallback> first;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        first = std::move(onFirstAverage_);
    }
    if (first) {
        (*first)("all_reduce(AVG) of " + describeTensors({tensor}));
    }
    const int64_t shape[] = {static_cast<int64_t>(tensor.scalar_type()), tensor.numel()};
    const uint64_t layout = dss_hash(shape, sizeof(shape), 0);
    std::lock_guard<std::mutex> lock(averageMutex_); // calls are launched in the order of their numbers
    const uint64_t call = averages_++;
    ++sequence_;
    std::vector<Part> parts{{dss_plan_round_of_call(averager.plan().get(), call), {tensor}}};
    return averager.launch(kAllReduce, call, layout, std::move(parts), c10::str("all_reduce(AVG) call ", call), willWait);
}

ProcessGroupDssync::WorkPtr ProcessGroupDssync::broadcast(Tensors &tensors, const c10d::BroadcastOptions &options) {
    auto inner = enter(kBroadcast);
    auto staging = std::make_shared<Staging>(tensors);
    auto hosts = staging->inOut(tensors);
    return start({kBroadcast, inner, staging, tensors, {tensors}, [hosts, options](c10d::Backend &to) mutable {
                      return Posted{to.broadcast(hosts, options)};
                  }});
}

ProcessGroupDssync::WorkPtr ProcessGroupDssync::allreduce(Tensors &tensors, const c10d::AllreduceOptions &options) {
    auto inner = enter(kAllReduce);
    if (isAverage(options.reduceOp)) {
        if (auto averager = this->averager(); averager && isAveraged(tensors)) {
            return average(*averager, tensors.front(), !options.asyncOp && tensors.front().is_cpu());
        }
    }
    if (auto call = tensors.size() == 1
                        ? nativeCall(kAllReduce, inner, tensors, options.reduceOp, options.timeout, !options.asyncOp)
                        : std::nullopt) {
        return start(std::move(*call));
    }
    if (isAverage(options.reduceOp)) {
        return allreduceAverage(kAllReduce, inner, tensors, [options = asSum(options)](c10d::Backend &to, Tensors &sums) {
            return to.allreduce(sums, options);
        });
    }
    auto staging = std::make_shared<Staging>(tensors);
    auto hosts = staging->inOut(tensors);
    return start({kAllReduce, inner, staging, tensors, {tensors}, [hosts, options](c10d::Backend &to) mutable {
                      return Posted{to.allreduce(hosts, options)};
                  }});
}

ProcessGroupDssync::WorkPtr ProcessGroupDssync::allreduceAverage(const Operation &operation, const BackendPtr &inner,
                                                                 const Tensors &tensors, SumPost post) {
    requireExactAverage(tensors, operation.name);
    auto staging = std::make_shared<Staging>(tensors);
    auto hosts = staging->inOut(tensors);
    auto sums = std::make_shared<Tensors>(); // filled when the hosts hold their values
    return start({operation,
                  inner,
                  staging,
                  tensors,
                  {tensors},
                  [hosts, sums, post](c10d::Backend &to) {
                      *sums = widened(hosts);
                      return Posted{post(to, *sums)};
                  },
                  [hosts, sums, size = getSize()] { divideInto(*sums, size, hosts); }});
}

ProcessGroupDssync::WorkPtr ProcessGroupDssync::allreduce_sparse(Tensors &tensors, const c10d::AllreduceOptions &options) {
    auto inner = enter(kSparseAllReduce);
    auto staging = std::make_shared<Staging>(tensors);
    auto hosts = staging->inOut(tensors);
    return start({kSparseAllReduce, inner, staging, tensors, {tensors}, [hosts, options](c10d::Backend &to) mutable {
                      return Posted{to.allreduce_sparse(hosts, options)};
                  }});
}

ProcessGroupDssync::WorkPtr ProcessGroupDssync::allreduce_coalesced(Tensors &tensors,
                                                                    const c10d::AllreduceCoalescedOptions &options) {
    auto inner = enter(kAllReduceCoalesced);
    if (auto call = !tensors.empty() ? nativeCall(kAllReduceCoalesced, inner, tensors, options.reduceOp, options.timeout, false)
                                     : std::nullopt) {
        return start(std::move(*call));
    }
    if (isAverage(options.reduceOp)) {
        return allreduceAverage(kAllReduceCoalesced, inner, tensors, [options = asSum(options)](c10d::Backend &to, Tensors &sums) {
            return to.allreduce_coalesced(sums, options);
        });
    }
    auto staging = std::make_shared<Staging>(tensors);
    auto hosts = staging->inOut(tensors);
    return start({kAllReduceCoalesced, inner, staging, tensors, {tensors}, [hosts, options](c10d::Backend &to) mutable {
                      return Posted{to.allreduce_coalesced(hosts, options)};
                  }});
}

ProcessGroupDssync::WorkPtr ProcessGroupDssync::reduce(Tensors &tensors, const c10d::ReduceOptions &options) {
    auto inner = enter(kReduce);
    const bool average = isAverage(options.reduceOp);
    if (average) {
        requireExactAverage(tensors, kReduce.name);
    }
    auto staging = std::make_shared<Staging>(tensors);
    auto hosts = staging->inOut(tensors);
    auto sums = std::make_shared<Tensors>();
    std::function<void()> finish;
    if (average && options.rootRank == getRank()) {
        finish = [hosts, sums, size = getSize()] { divideInto(*sums, size, hosts); };
    }
    return start({kReduce,
                  inner,
                  staging,
                  tensors,
                  {tensors},
                  [hosts, sums, average, options](c10d::Backend &to) {
                      *sums = average ? widened(hosts) : hosts;
                      return Posted{to.reduce(*sums, average ? asSum(options) : options)};
                  },
                  finish});
}

ProcessGroupDssync::WorkPtr ProcessGroupDssync::allgather(TensorLists &outputs, Tensors &inputs,
                                                          const c10d::AllgatherOptions &options) {
    auto inner = enter(kAllGather);
    auto staging = std::make_shared<Staging>(concat(inputs, concat(outputs)));
    auto to = outputsOf(*staging, outputs);
    auto from = staging->in(inputs);
    return start({kAllGather, inner, staging, inputs, outputs,
                  [to, from, options](c10d::Backend &backend) mutable { return Posted{backend.allgather(to, from, options)}; }});
}

ProcessGroupDssync::WorkPtr ProcessGroupDssync::_allgather_base(at::Tensor &output, at::Tensor &input,
                                                                const c10d::AllgatherOptions &options) {
    auto inner = enter(kAllGatherBase);
    auto staging = std::make_shared<Staging>(Tensors{input, output});
    auto to = staging->out(output);
    auto from = staging->in(input);
    return start({kAllGatherBase, inner, staging, {input}, {{output}}, [to, from, options](c10d::Backend &backend) mutable {
                      return Posted{backend._allgather_base(to, from, options)};
                  }});
}

ProcessGroupDssync::WorkPtr ProcessGroupDssync::allgather_coalesced(TensorLists &outputs, Tensors &inputs,
                                                                    const c10d::AllgatherOptions &options) {
    auto inner = enter(kAllGatherCoalesced);
    auto staging = std::make_shared<Staging>(concat(inputs, concat(outputs)));
    auto to = outputsOf(*staging, outputs);
    auto from = staging->in(inputs);
    return start({kAllGatherCoalesced, inner, staging, inputs, outputs, [to, from, options](c10d::Backend &backend) mutable {
                      return Posted{backend.allgather_coalesced(to, from, options)};
                  }});
}

ProcessGroupDssync::WorkPtr ProcessGroupDssync::allgather_into_tensor_coalesced(Tensors &outputs, Tensors &inputs,
                                                                                const c10d::AllgatherOptions &options) {
    auto inner = enter(kAllGatherBase);
    TORCH_CHECK_VALUE(!outputs.empty() && outputs.size() == inputs.size(),
                      "dssync: all_gather_into_tensor_coalesced needs as many outputs as inputs, got ", outputs.size(), " and ",
                      inputs.size());
    auto staging = std::make_shared<Staging>(concat(inputs, outputs));
    auto to = staging->out(outputs);
    auto from = staging->in(inputs);
    // One call each: Gloo's coalesced one has no future and completes only inside wait().
    return start({kAllGatherBase, inner, staging, inputs, {outputs}, [to, from, options](c10d::Backend &backend) mutable {
                      Posted posted;
                      for (size_t i = 0; i < to.size(); ++i) {
                          posted.push_back(backend._allgather_base(to[i], from[i], options));
                      }
                      return posted;
                  }});
}

ProcessGroupDssync::WorkPtr ProcessGroupDssync::gather(TensorLists &outputs, Tensors &inputs, const c10d::GatherOptions &options) {
    auto inner = enter(kGather);
    auto staging = std::make_shared<Staging>(concat(inputs, concat(outputs)));
    auto to = outputsOf(*staging, outputs);
    auto from = staging->in(inputs);
    return start({kGather, inner, staging, inputs, outputs,
                  [to, from, options](c10d::Backend &backend) mutable { return Posted{backend.gather(to, from, options)}; }});
}

ProcessGroupDssync::WorkPtr ProcessGroupDssync::scatter(Tensors &outputs, TensorLists &inputs,
                                                        const c10d::ScatterOptions &options) {
    auto inner = enter(kScatter);
    auto staging = std::make_shared<Staging>(concat(outputs, concat(inputs)));
    auto to = staging->out(outputs);
    auto from = inputsOf(*staging, inputs);
    return start({kScatter, inner, staging, concat(inputs), {outputs}, [to, from, options](c10d::Backend &backend) mutable {
                      return Posted{backend.scatter(to, from, options)};
                  }});
}

// Gloo reduce-scatters by an all-reduce that it finishes only inside wait(), without a future; this is the same all-reduce,
// finished on its own, with AVG and half types summed in float32.
ProcessGroupDssync::WorkPtr ProcessGroupDssync::reduceScatter(const Operation &operation, const BackendPtr &inner,
                                                              const Tensors &outputs, const TensorLists &inputs,
                                                              const std::vector<int64_t> &offsets,
                                                              const c10d::ReduceScatterOptions &options) {
    const bool average = isAverage(options.reduceOp);
    if (average) {
        requireExactAverage(outputs, operation.name);
    }
    c10d::AllreduceOptions reduceOptions;
    reduceOptions.reduceOp = average ? c10d::ReduceOp(c10d::ReduceOp::SUM) : options.reduceOp;
    reduceOptions.timeout = options.timeout;
    auto staging = std::make_shared<Staging>(concat(outputs, concat(inputs)));
    auto from = inputsOf(*staging, inputs);
    auto to = staging->out(outputs);
    auto sums = std::make_shared<Tensors>();
    return start({operation,
                  inner,
                  staging,
                  concat(inputs),
                  {outputs},
                  [from, sums, average, reduceOptions](c10d::Backend &backend) {
                      at::AutoDispatchBelowADInplaceOrView raw;
                      Posted posted;
                      for (const auto &list : from) {
                          Tensors flat;
                          for (const auto &tensor : list) {
                              flat.push_back(tensor.reshape({-1}));
                          }
                          Tensors sum{at::cat(flat)}; // a copy: inputs are not to change
                          sum = average ? widened(sum) : sum;
                          posted.push_back(backend.allreduce(sum, reduceOptions));
                          sums->push_back(sum.front());
                      }
                      return posted;
                  },
                  [to, sums, offsets, average, size = getSize()] {
                      for (size_t i = 0; i < to.size(); ++i) {
                          auto mine = sums->at(i).narrow(0, offsets[i], to[i].numel()).view(to[i].sizes());
                          to[i].copy_(average ? mine.div_(size) : mine);
                      }
                  }});
}

ProcessGroupDssync::WorkPtr ProcessGroupDssync::reduce_scatter(Tensors &outputs, TensorLists &inputs,
                                                               const c10d::ReduceScatterOptions &options) {
    auto inner = enter(kReduceScatter);
    TORCH_CHECK_VALUE(!outputs.empty() && outputs.size() == inputs.size(),
                      "dssync: reduce_scatter needs as many outputs as lists of inputs, got ", outputs.size(), " and ",
                      inputs.size());
    std::vector<int64_t> offsets;
    for (size_t i = 0; i < outputs.size(); ++i) {
        const auto &list = inputs[i];
        TORCH_CHECK_VALUE(static_cast<int>(list.size()) == getSize(), "dssync: reduce_scatter needs one input for each of the ",
                          getSize(), " ranks, got ", list.size());
        for (const auto &tensor : list) {
            TORCH_CHECK_VALUE(tensor.dtype() == outputs[i].dtype(), "dssync: reduce_scatter of ", tensor.dtype(), " into ",
                              outputs[i].dtype());
        }
        TORCH_CHECK_VALUE(list[getRank()].sizes() == outputs[i].sizes(), "dssync: reduce_scatter puts input ", getRank(),
                          " of sizes ", list[getRank()].sizes(), " into an output of sizes ", outputs[i].sizes());
        offsets.push_back(std::accumulate(list.begin(), list.begin() + getRank(), int64_t{0},
                                          [](int64_t sum, const at::Tensor &tensor) { return sum + tensor.numel(); }));
    }
    return reduceScatter(kReduceScatter, inner, outputs, inputs, offsets, options);
}

ProcessGroupDssync::WorkPtr ProcessGroupDssync::_reduce_scatter_base(at::Tensor &output, at::Tensor &input,
                                                                     const c10d::ReduceScatterOptions &options) {
    Tensors outputs{output};
    Tensors inputs{input};
    return reduceScatterTensors(kReduceScatterBase, outputs, inputs, options);
}

ProcessGroupDssync::WorkPtr ProcessGroupDssync::reduce_scatter_tensor_coalesced(Tensors &outputs, Tensors &inputs,
                                                                                const c10d::ReduceScatterOptions &options) {
    return reduceScatterTensors(kReduceScatterCoalesced, outputs, inputs, options);
}

ProcessGroupDssync::WorkPtr ProcessGroupDssync::reduceScatterTensors(const Operation &operation, const Tensors &outputs,
                                                                     const Tensors &inputs,
                                                                     const c10d::ReduceScatterOptions &options) {
    auto inner = enter(operation);
    TORCH_CHECK_VALUE(!outputs.empty() && outputs.size() == inputs.size(), "dssync: ", operation.name,
                      " needs as many outputs as inputs, got ", outputs.size(), " and ", inputs.size());
    TensorLists lists;
    std::vector<int64_t> offsets;
    for (size_t i = 0; i < outputs.size(); ++i) {
        TORCH_CHECK_VALUE(inputs[i].dtype() == outputs[i].dtype() && inputs[i].numel() == outputs[i].numel() * getSize(),
                          "dssync: ", operation.name, " needs an input of ", getSize(),
                          " times the output's size, and of its dtype; got ", describeTensors({inputs[i]}), " and ",
                          describeTensors({outputs[i]}));
        lists.push_back({inputs[i]});
        offsets.push_back(getRank() * outputs[i].numel());
    }
    return reduceScatter(operation, inner, outputs, lists, offsets, options);
}

ProcessGroupDssync::WorkPtr ProcessGroupDssync::alltoall_base(at::Tensor &output, at::Tensor &input,
                                                              std::vector<int64_t> &outputSplits, std::vector<int64_t> &inputSplits,
                                                              const c10d::AllToAllOptions &options) {
    auto inner = enter(kAllToAllBase);
    auto staging = std::make_shared<Staging>(Tensors{input, output});
    auto to = staging->out(output);
    auto from = staging->in(input);
    return start({kAllToAllBase,
                  inner,
                  staging,
                  {input},
                  {{output}},
                  [to, from, outputSplits, inputSplits, options](c10d::Backend &backend) mutable {
                      return Posted{backend.alltoall_base(to, from, outputSplits, inputSplits, options)};
                  }});
}

ProcessGroupDssync::WorkPtr ProcessGroupDssync::alltoall(Tensors &outputs, Tensors &inputs, const c10d::AllToAllOptions &options) {
    auto inner = enter(kAllToAll);
    auto staging = std::make_shared<Staging>(concat(inputs, outputs));
    auto to = staging->out(outputs);
    auto from = staging->in(inputs);
    return start({kAllToAll, inner, staging, inputs, {outputs}, [to, from, options](c10d::Backend &backend) mutable {
                      return Posted{backend.alltoall(to, from, options)};
                  }});
}

ProcessGroupDssync::WorkPtr ProcessGroupDssync::send(Tensors &tensors, int destination, int tag) {
    auto inner = enter(kSend);
    auto staging = std::make_shared<Staging>(tensors);
    auto hosts = staging->in(tensors);
    return start({kSend,
                  inner,
                  staging,
                  tensors,
                  {},
                  [hosts, destination, tag](c10d::Backend &to) mutable { return Posted{to.send(hosts, destination, tag)}; },
                  {},
                  /*lazy=*/true});
}

ProcessGroupDssync::WorkPtr ProcessGroupDssync::recv(Tensors &tensors, int source, int tag) {
    auto inner = enter(kRecv);
    auto staging = std::make_shared<Staging>(tensors);
    auto hosts = staging->out(tensors);
    return start({kRecv,
                  inner,
                  staging,
                  tensors,
                  {tensors},
                  [hosts, source, tag](c10d::Backend &from) mutable { return Posted{from.recv(hosts, source, tag)}; },
                  {},
                  /*lazy=*/true});
}

ProcessGroupDssync::WorkPtr ProcessGroupDssync::recvAnysource(Tensors &tensors, int tag) {
    auto inner = enter(kRecvAnySource);
    auto staging = std::make_shared<Staging>(tensors);
    auto hosts = staging->out(tensors);
    return start({kRecvAnySource,
                  inner,
                  staging,
                  tensors,
                  {tensors},
                  [hosts, tag](c10d::Backend &from) mutable { return Posted{from.recvAnysource(hosts, tag)}; },
                  {},
                  /*lazy=*/true});
}

ProcessGroupDssync::WorkPtr ProcessGroupDssync::barrier(const c10d::BarrierOptions &options) {
    auto inner = enter(kBarrier);
    if (auto call = nativeCall(kBarrier, inner, {}, c10d::ReduceOp::SUM, options.timeout, !options.asyncOp)) {
        return start(std::move(*call));
    }
    return start({kBarrier, inner, std::make_shared<Staging>(Tensors()), {}, {}, [options](c10d::Backend &to) {
                      return Posted{to.barrier(options)};
                  }});
}

void ProcessGroupDssync::monitoredBarrier(const c10d::BarrierOptions &options, bool waitAllRanks) {
    auto inner = enter(kMonitoredBarrier);
    auto work = makeWork(kMonitoredBarrier, {}, {}, nullptr); // for the profiler, and for the words of an error
    try {
        inner->monitoredBarrier(options, waitAllRanks);
        work->complete();
    } catch (...) {
        work->complete(work->translate(std::current_exception(), "wait"));
        work->wait();
    }
}

} // namespace dssync
