#include "native_averager.hpp"

#include "text.hpp"

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/util/StringUtil.h>

namespace dssync {

namespace {

constexpr unsigned kRepeatBits = 16;

struct Staged {
    at::Tensor original;
    at::Tensor host;
};

uint64_t hashShapes(const Tensors &tensors, uint64_t layout) {
    uint64_t hash = dss_hash(&layout, sizeof(layout), 0);
    for (const auto &tensor : tensors) {
        const int64_t shape[] = {static_cast<int64_t>(tensor.scalar_type()), tensor.numel()};
        hash = dss_hash(shape, sizeof(shape), hash);
    }
    return hash;
}

// The tensors of each dtype, in the order in which the dtypes come.
std::vector<Tensors> byDtype(const Tensors &tensors) {
    std::vector<Tensors> sorted;
    for (const auto &tensor : tensors) {
        auto same = std::find_if(sorted.begin(), sorted.end(),
                                 [&](const Tensors &known) { return known.front().scalar_type() == tensor.scalar_type(); });
        (same != sorted.end() ? *same : sorted.emplace_back()).push_back(tensor);
    }
    return sorted;
}

} // namespace

struct NativeAverager::State {
    State(std::string name_, std::shared_ptr<Engine> engine_, PlanHandle plan_, std::chrono::milliseconds timeout_)
        : name(std::move(name_)), channel(dss_hash(name.data(), name.size(), dss_hash("average", 7, 0))),
          engine(std::move(engine_)), plan(std::move(plan_)),
          label(std::make_shared<GroupLabel>(
              GroupLabel{static_cast<int>(engine->rank()), static_cast<int>(engine->size()), "averages of " + name})),
          timeout(timeout_) {}

    const std::string name;
    const uint64_t channel;
    const std::shared_ptr<Engine> engine;
    const PlanHandle plan;
    const std::shared_ptr<const GroupLabel> label;
    const std::shared_ptr<std::atomic<int64_t>> pending = std::make_shared<std::atomic<int64_t>>(0);
    std::shared_ptr<PostQueue> queue = std::make_shared<PostQueue>(); // device tensors wait there for their copies to the host

    std::mutex mutex; // guards what follows
    std::condition_variable changed;
    std::chrono::milliseconds timeout;
    std::exception_ptr error; // sticks
    bool closed = false;
    size_t underWay = 0;
    uint64_t repeats = 0; // launches of the last step that came before its latest one
    AveragerStats stats;

    // Before the work completes: who sees its outcome must find it counted, and nothing more launched after a failure.
    void record(const std::exception_ptr &failure, std::chrono::steady_clock::time_point since) {
        std::lock_guard<std::mutex> lock(mutex);
        stats.secondsWaiting += std::chrono::duration<double>(std::chrono::steady_clock::now() - since).count();
        if (failure && !error && !closed) {
            error = failure;
            stats.error = exceptionText(failure);
        }
    }

    // After the work has completed: shutdown() returns when nothing is under way any more.
    void countAsOver() {
        std::lock_guard<std::mutex> lock(mutex);
        --underWay;
        changed.notify_all();
    }
};

NativeAverager::NativeAverager(std::string name, std::shared_ptr<Engine> engine, PlanHandle plan, std::chrono::milliseconds timeout)
    : state_(std::make_shared<State>(std::move(name), std::move(engine), std::move(plan), timeout)) {
    TORCH_CHECK_VALUE(state_->plan.worldSize() == state_->engine->size(), "dssync: a plan for ", state_->plan.worldSize(),
                      " ranks on an engine of ", state_->engine->size());
}

NativeAverager::~NativeAverager() {
    shutdown(/*abort=*/true);
}

c10::intrusive_ptr<WorkDssync> NativeAverager::launch(const Operation &operation, uint64_t step, uint64_t layout,
                                                      std::vector<Part> parts, std::string what, bool willWait) {
    const auto all = checkParts(state_->plan, parts, what);
    auto streams = std::make_shared<const SideStreams>(all);
    auto work =
        c10::make_intrusive<WorkDssync>(operation, state_->label, step, std::vector<Tensors>{all}, all, streams, state_->pending);
    std::shared_ptr<PostQueue> queue;
    std::chrono::milliseconds timeout{};
    std::exception_ptr error;
    uint64_t sequence = 0;
    {
        std::lock_guard<std::mutex> lock(state_->mutex);
        error = state_->closed && !state_->error ? averagerShutDown(what) : state_->error;
        if (!error) {
            ++state_->stats.launches;
            ++state_->underWay;
            // A step is launched more than once, and a fast rank may be at the second while another is at the first.
            state_->repeats = state_->stats.lastStep == step ? state_->repeats + 1 : 0;
            state_->stats.lastStep = step;
            sequence = step << kRepeatBits | (state_->repeats & ((uint64_t{1} << kRepeatBits) - 1));
        }
        queue = state_->queue;
        timeout = state_->timeout;
    }
    if (error) {
        work->complete(error);
        std::rethrow_exception(error);
    }

    auto staged = std::make_shared<std::vector<Staged>>();
    const auto since = std::chrono::steady_clock::now();
    auto done = [state = state_, work, staged, streams, since](const std::exception_ptr &failure) {
        auto outcome = failure;
        if (!outcome) {
            try {
                at::AutoDispatchBelowADInplaceOrView raw;
                for (const auto &pair : *staged) {
                    if (pair.original.is_cpu()) {
                        pair.original.copy_(pair.host);
                    } else {
                        streams->toDevice(pair.host, pair.original);
                    }
                }
            } catch (...) {
                outcome = std::current_exception();
            }
        }
        state->record(outcome, since);
        work->complete(outcome);
        state->countAsOver();
    };
    std::vector<EngineOperation> operations;
    try {
        at::AutoDispatchBelowADInplaceOrView raw; // no autograd, no version counters
        for (auto &part : joinRounds(parts)) {
            const auto members = state_->plan.groupOfRank(part.round, state_->engine->rank());
            if (members.size() < 2) {
                continue;
            }
            const uint64_t shapes = hashShapes(part.tensors, layout);
            uint32_t number = 0;
            for (auto &tensors : byDtype(part.tensors)) {
                for (auto &tensor : tensors) {
                    if (!tensor.is_cpu() || !tensor.is_contiguous()) {
                        staged->push_back({tensor, tensor.is_cpu() ? tensor.contiguous() : streams->toHost(tensor, /*copy=*/true)});
                        tensor = staged->back().host;
                    }
                }
                const uint32_t bucket = (part.round & 0xffffffu) << 8 | (number++ & 0xffu);
                operations.push_back(
                    {DSS_OPERATION_AVERAGE, DSS_SUM, {state_->channel, sequence, bucket}, members, tensors, shapes});
                const double size = static_cast<double>(members.size());
                double share = 0;
                for (const auto &tensor : tensors) {
                    share += static_cast<double>(tensor.numel()) * static_cast<double>(tensor.element_size());
                }
                std::lock_guard<std::mutex> lock(state_->mutex);
                state_->stats.bytesSent += static_cast<uint64_t>(2 * (size - 1) / size * share);
            }
        }
    } catch (...) { // a copy to the host
        done(std::current_exception());
        throw;
    }
    auto post = [state = state_, work, streams, operations = std::move(operations), what = std::move(what), timeout, willWait,
                 done](bool dropped) {
        if (dropped) {
            done(averagerShutDown(what));
            return;
        }
        try {
            streams->synchronize();
            work->driveBy(state->engine->post(operations, what, timeout, willWait, done));
        } catch (...) {
            done(std::current_exception());
            throw;
        }
    };
    queue->runOrQueue(!streams->streams().empty(), std::move(post));
    return work;
}

void NativeAverager::shutdown(bool abort) {
    GilReleased released;
    std::shared_ptr<PostQueue> queue;
    {
        std::unique_lock<std::mutex> lock(state_->mutex);
        if (std::exchange(state_->closed, true)) {
            return;
        }
        if (!abort) {
            state_->changed.wait_for(lock, kShutdownPatience * 3 / 4, [this] { return state_->underWay == 0; });
        }
        queue = std::exchange(state_->queue, std::make_shared<PostQueue>());
    }
    queue.reset(); // what waits in it is dropped
    state_->engine->closeChannel(state_->channel, "the averager has been shut down");
}

void NativeAverager::setTimeout(std::chrono::milliseconds timeout) {
    std::lock_guard<std::mutex> lock(state_->mutex);
    state_->timeout = timeout;
}

const PlanHandle &NativeAverager::plan() const {
    return state_->plan;
}

AveragerStats NativeAverager::stats() const {
    std::lock_guard<std::mutex> lock(state_->mutex);
    return state_->stats;
}

} // namespace dssync
