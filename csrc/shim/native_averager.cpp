#include "native_averager.hpp"

#include "text.hpp"

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <deque>
#include <map>

namespace dssync {

namespace {

constexpr unsigned kRepeatBits = 16;
constexpr unsigned kEpochShift = 56;

struct Staged {
    at::Tensor original;
    at::Tensor host;
};

// A crossing that waits to be posted, and then for settle().
struct PendingCrossing {
    uint64_t step;
    EngineOperation operation;
    Tensors originals; // of operation.tensors, which may be host copies
    bool positive;
    std::shared_ptr<const DelayedCrossing> posted;
};

double bytesOf(const Tensors &tensors) {
    double bytes = 0;
    for (const auto &tensor : tensors) {
        bytes += static_cast<double>(tensor.numel()) * static_cast<double>(tensor.element_size());
    }
    return bytes;
}

bool isInPlace(const at::Tensor &tensor) {
    return tensor.is_cpu() && tensor.is_contiguous();
}

// Where values must not become negative, a correction takes at most three quarters of one: the next period's takes the rest.
void correct(const PendingCrossing &pending) {
    at::AutoDispatchBelowADInplaceOrView raw;
    Tensors values;
    Tensors before;
    for (const auto &original : pending.originals) {
        values.push_back(isInPlace(original) ? original : original.to(at::kCPU).contiguous());
        if (pending.positive) {
            before.push_back(values.back().clone());
        }
    }
    pending.posted->correct(values);
    for (size_t i = 0; i < values.size(); ++i) {
        if (pending.positive) {
            values[i].copy_(at::maximum(values[i], before[i].mul_(0.25)));
        }
        if (!isInPlace(pending.originals[i])) {
            auto original = pending.originals[i];
            original.copy_(values[i]);
        }
    }
}

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
          engine(std::move(engine_)), plan(std::move(plan_)), delays(engine->hasRacks(plan.racks())),
          label(std::make_shared<GroupLabel>(
              GroupLabel{static_cast<int>(engine->rank()), static_cast<int>(engine->size()), "averages of " + name})),
          timeout(timeout_) {}

    const std::string name;
    const uint64_t channel;
    const std::shared_ptr<Engine> engine;
    const PlanHandle plan;
    const bool delays; // else crossings are waited for: the engine exchanges between its own racks, not those of the plan
    const std::shared_ptr<const GroupLabel> label;
    const std::shared_ptr<std::atomic<int64_t>> pending = std::make_shared<std::atomic<int64_t>>(0);
    std::shared_ptr<PostQueue> queue = std::make_shared<PostQueue>(); // device tensors wait there for their copies to the host

    std::mutex mutex; // guards what follows
    std::condition_variable changed;
    std::chrono::milliseconds timeout;
    std::exception_ptr error; // sticks
    bool closed = false;
    size_t underWay = 0;
    std::deque<PendingCrossing> crossings; // posted ones, in the order of their launches
    uint64_t repeats = 0;                  // launches of the last step that came before its latest one
    uint64_t epoch = 0;                    // steps may be done again, while other ranks still hold crossings of the first time
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

    bool crossesLate(const Part &part) const {
        return delays && part.crossing != Crossing::Awaited && part.round < kRackRound && dss_plan_delay(plan.get()) > 0 &&
               dss_plan_is_crossing(plan.get(), part.round);
    }
    std::vector<uint32_t> ownRack(const std::vector<uint32_t> &members) const {
        const auto *core = plan.get();
        std::vector<uint32_t> rack;
        std::copy_if(members.begin(), members.end(), std::back_inserter(rack),
                     [&](uint32_t member) { return dss_plan_rack_of(core, member) == dss_plan_rack_of(core, engine->rank()); });
        return rack;
    }
    void cross(PendingCrossing crossing, const std::string &what, std::chrono::milliseconds patience) {
        crossing.posted = engine->cross(crossing.operation, "crossing of " + what, patience);
        crossing.operation.tensors.clear(); // they have been read
        std::lock_guard<std::mutex> lock(mutex);
        crossings.push_back(std::move(crossing));
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
            sequence = state_->epoch << kEpochShift | step << kRepeatBits | (state_->repeats & ((uint64_t{1} << kRepeatBits) - 1));
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
    auto crossings = std::make_shared<std::vector<PendingCrossing>>();        // of values, and so with the operations
    auto crossingsOfMeans = std::make_shared<std::vector<PendingCrossing>>(); // behind the averages of their racks
    auto done = [state = state_, work, staged, streams, since, crossingsOfMeans, what, timeout](const std::exception_ptr &failure) {
        auto outcome = failure;
        if (!outcome) {
            try {
                at::AutoDispatchBelowADInplaceOrView raw;
                for (auto &crossing : *crossingsOfMeans) {
                    state->cross(std::move(crossing), what, timeout);
                }
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
    std::map<uint32_t, uint32_t> numbers; // of what has been posted of each round
    try {
        at::AutoDispatchBelowADInplaceOrView raw; // no autograd, no version counters
        for (auto &part : joinRounds(parts)) {
            const auto members = state_->plan.groupOfRank(part.round, state_->engine->rank());
            if (members.size() < 2) {
                continue;
            }
            const bool late = state_->crossesLate(part);
            const bool keepsValues =
                late && part.crossing != Crossing::Moments && dss_plan_keeps_values(state_->plan.get(), part.round) != 0;
            const auto rack = late ? state_->ownRack(members) : members;
            const uint64_t shapes = hashShapes(part.tensors, layout);
            for (auto &tensors : byDtype(part.tensors)) {
                const Tensors originals = tensors;
                for (auto &tensor : tensors) {
                    if (isInPlace(tensor)) {
                        continue;
                    }
                    const auto original = tensor;
                    tensor = tensor.is_cpu() ? tensor.contiguous() : streams->toHost(tensor, /*copy=*/true);
                    if (!keepsValues) {
                        staged->push_back({original, tensor});
                    }
                }
                const uint32_t bucket = (part.round & 0xffffffu) << 8 | (numbers[part.round]++ & 0xffu);
                const double size = static_cast<double>(rack.size());
                double sent = 2 * (size - 1) / size;
                if (size > 1 && !keepsValues) {
                    operations.push_back(
                        {DSS_OPERATION_AVERAGE, DSS_SUM, {state_->channel, sequence, bucket, 0}, rack, tensors, shapes});
                }
                if (rack.size() < members.size()) { // a channel a step: crossings that nobody waits for any more may fail alone
                    const auto kind = keepsValues ? DSS_OPERATION_CROSSING_OF_VALUES : DSS_OPERATION_CROSSING_OF_MEANS;
                    const dss_key_t key{dss_hash(&step, sizeof(step), state_->channel), sequence, bucket, 0};
                    (keepsValues ? crossings : crossingsOfMeans)
                        ->push_back({step,
                                     {kind, DSS_SUM, key, members, tensors, shapes},
                                     originals,
                                     part.crossing != Crossing::Delayed,
                                     nullptr});
                    sent += keepsValues ? 1 / size : 1; // its share to another rack; of means also gathered in its own
                }
                std::lock_guard<std::mutex> lock(state_->mutex);
                state_->stats.bytesSent += static_cast<uint64_t>(sent * bytesOf(tensors));
            }
        }
    } catch (...) { // a copy to the host
        done(std::current_exception());
        throw;
    }
    auto post = [state = state_, work, streams, operations = std::move(operations), crossings, what = std::move(what), timeout,
                 willWait, done](bool dropped) {
        if (dropped) {
            done(averagerShutDown(what));
            return;
        }
        try {
            streams->synchronize();
            for (auto &crossing : *crossings) {
                state->cross(std::move(crossing), what, timeout);
            }
            work->driveBy(state->engine->post(operations, what, timeout, willWait, done));
        } catch (...) {
            done(std::current_exception());
            throw;
        }
    };
    queue->runOrQueue(!streams->streams().empty(), std::move(post));
    return work;
}

void NativeAverager::settle(uint64_t step, bool discard) {
    while (true) {
        std::optional<PendingCrossing> next;
        {
            std::lock_guard<std::mutex> lock(state_->mutex);
            if (state_->crossings.empty() || state_->crossings.front().step > step) {
                state_->epoch += discard ? 1 : 0;
                return;
            }
            next = std::move(state_->crossings.front());
            state_->crossings.pop_front();
        }
        if (discard) {
            (void)next->posted->isOverWithin(kNoTimeout);
            continue;
        }
        const auto since = std::chrono::steady_clock::now();
        try {
            correct(*next);
        } catch (...) {
            state_->record(std::current_exception(), since);
            throw;
        }
        state_->record(nullptr, since);
    }
}

void NativeAverager::shutdown(bool abort) {
    GilReleased released;
    std::vector<uint64_t> channels{state_->channel};
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
        for (const auto &crossing : state_->crossings) {
            channels.push_back(crossing.operation.key.channel);
        }
        state_->crossings.clear();
    }
    queue.reset(); // what waits in it is dropped
    for (const uint64_t channel : channels) {
        state_->engine->closeChannel(channel, "the averager has been shut down");
    }
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
