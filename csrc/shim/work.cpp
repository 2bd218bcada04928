#include "work.hpp"

#include "text.hpp"

#include <ATen/core/ivalue.h>
#include <ATen/core/jit_type.h>
#include <c10/core/StreamGuard.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <sstream>

namespace dssync {

namespace {

// DDP and friends expect a list of tensors; only several output lists make a list of lists.
c10::intrusive_ptr<c10::ivalue::Future> makeFuture(const std::vector<Tensors> &outputs, const SideStreams *streams) {
    auto type = c10::ListType::create(c10::TensorType::get());
    if (outputs.size() > 1) {
        type = c10::ListType::create(type);
    }
    return c10::make_intrusive<c10::ivalue::Future>(type, streams == nullptr ? std::vector<c10::Device>{} : streams->devices());
}

c10::IValue futureValue(const std::vector<Tensors> &outputs) {
    if (outputs.empty()) {
        return c10::IValue(Tensors());
    }
    return outputs.size() > 1 ? c10::IValue(outputs) : c10::IValue(outputs.front());
}

} // namespace

WorkDssync::WorkDssync(const Operation &operation, std::shared_ptr<const GroupLabel> group, uint64_t sequence,
                       std::vector<Tensors> outputs, const Tensors &inputs, std::shared_ptr<const SideStreams> streams,
                       std::shared_ptr<std::atomic<int64_t>> pendingCount)
    : Work(group->rank, operation.type, operation.title, inputs), operation_(operation), group_(std::move(group)),
      sequence_(sequence), outputs_(std::move(outputs)), inputs_(inputs), streams_(std::move(streams)),
      future_(makeFuture(outputs_, streams_.get())), pending_(std::move(pendingCount)) {}

void WorkDssync::attach(std::vector<c10::intrusive_ptr<c10d::Work>> inner, std::function<void()> finish) {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        inner_ = std::move(inner);
        finish_ = std::move(finish);
        innerLeft_ = inner_.size();
        attached_ = true;
    }
    // inner_ changes no more until the last callback has run, and that one keeps this work alive.
    auto self = c10::intrusive_ptr<WorkDssync>::reclaim_copy(this);
    const size_t count = inner_.size();
    for (size_t i = 0; i < count; ++i) {
        inner_[i]->getFuture()->addCallback([self](c10::ivalue::Future &future) { self->innerCompleted(future.exception_ptr()); });
    }
}

void WorkDssync::attachLazy(c10::intrusive_ptr<c10d::Work> inner, std::function<void()> finish) {
    std::lock_guard<std::mutex> lock(mutex_);
    inner_.push_back(std::move(inner));
    finish_ = std::move(finish);
    lazy_ = attached_ = true;
    cv_.notify_all();
}

void WorkDssync::driveBy(std::function<void(std::chrono::milliseconds)> drive) {
    std::lock_guard<std::mutex> lock(mutex_);
    attached_ = true;
    if (!completed_) {
        drive_ = std::move(drive);
    }
    cv_.notify_all(); // who waits already may drive
}

void WorkDssync::innerCompleted(const std::exception_ptr &error) {
    std::exception_ptr first;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        if (error && !innerError_) {
            innerError_ = error;
        }
        first = innerError_;
    }
    if (innerLeft_.fetch_sub(1) == 1) {
        settle(first);
    }
}

void WorkDssync::settle(const std::exception_ptr &innerError) {
    std::exception_ptr error = innerError;
    if (!error && finish_) {
        try {
            finish_();
        } catch (...) {
            error = std::current_exception();
        }
    }
    complete(error ? translate(error, "transfer") : nullptr);
}

void WorkDssync::complete(const std::exception_ptr &error) {
    if (completing_.exchange(true)) {
        return;
    }
    finish_ = nullptr; // drops staging memory
    pending_.done();
    if (error) {
        future_->setError(error);
    } else {
        // The future records events on the current streams: on ours, where the copies back to the device were enqueued.
        std::optional<c10::MultiStreamGuard> onSideStreams;
        if (streams_ && !streams_->streams().empty()) {
            onSideStreams.emplace(streams_->streams());
        }
        future_->markCompleted(futureValue(outputs_));
    }
    finish(error);                                        // ends the profiler's range
    std::function<void(std::chrono::milliseconds)> drive; // dropped outside the lock: it may own the last of much
    std::lock_guard<std::mutex> lock(mutex_);
    drive.swap(drive_);
}

std::string WorkDssync::describe() const {
    std::ostringstream out;
    out << "on rank " << group_->rank << " of " << group_->size << " (" << group_->label << ")";
    if (const auto tensors = describeTensors(inputs_); !tensors.empty()) {
        out << ", " << tensors;
    }
    return out.str();
}

std::exception_ptr WorkDssync::translate(const std::exception_ptr &error, const char *phase) const {
    const auto text = exceptionText(error);
    std::ostringstream out;
    out << "dssync: " << operation_.name << " #" << sequence_ << " failed " << describe() << ", phase " << phase << ": "
        << asSentence(text) << adviceFor(text);
    return withText(error, out.str());
}

int WorkDssync::sourceRank() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return inner_.size() == 1 ? inner_.front()->sourceRank() : Work::sourceRank();
}

std::vector<at::Tensor> WorkDssync::result() {
    TORCH_CHECK(isCompleted(), "Work needs to be completed before calling result(). Should call wait() before result().");
    TORCH_CHECK(outputs_.size() <= 1, "work result does not support list of lists, use .getFuture() and value()");
    return outputs_.empty() ? Tensors() : outputs_.front();
}

void WorkDssync::synchronize() {
    if (streams_ && !streams_->streams().empty()) {
        future_->wait(); // complete by now: makes the current streams wait for the copies back
    }
}

bool WorkDssync::wait(std::chrono::milliseconds timeout) {
    {
        const auto deadline = std::chrono::steady_clock::now() + timeout;
        std::unique_lock<std::mutex> lock(mutex_);
        bool driven = false;
        auto ready = [&] { return completed_ || lazy_ || (drive_ && !driven); };
        auto waitUntilReady = [&] {
            return timeout == kNoTimeout ? (cv_.wait(lock, ready), true) : cv_.wait_until(lock, deadline, ready);
        };
        bool inTime = waitUntilReady();
        if (inTime && !completed_ && !lazy_) {
            const auto drive = drive_;
            driven = true;
            lock.unlock();
            drive(timeout);
            lock.lock();
            inTime = waitUntilReady();
        }
        if (!inTime) {
            const auto text = std::make_exception_ptr(std::runtime_error("Operation timed out after " + describeSeconds(timeout)));
            lock.unlock();
            std::rethrow_exception(translate(text, attached_ ? "transfer" : "start"));
        }
    }
    if (lazy_) {
        waitLazily(timeout);
    }
    if (auto error = exception()) {
        std::rethrow_exception(error);
    }
    synchronize();
    if (c10d::allow_inflight_collective_as_graph_input()) {
        c10d::unregister_work(c10::intrusive_ptr<WorkDssync>::reclaim_copy(this));
    }
    return true;
}

void WorkDssync::waitLazily(std::chrono::milliseconds timeout) {
    std::lock_guard<std::mutex> one(lazyMutex_);
    if (isCompleted()) {
        return;
    }
    std::exception_ptr error;
    try {
        inner_.front()->wait(timeout);
    } catch (...) {
        error = std::current_exception();
    }
    settle(error);
}

void WorkDssync::abort() {
    c10::intrusive_ptr<Work> inner;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        if (lazy_) {
            inner = inner_.front();
        }
    }
    if (inner) {
        inner->abort();
    } else {
        Work::abort();
    }
}

c10::intrusive_ptr<c10::ivalue::Future> WorkDssync::getFuture() {
    std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!lazy_, "dssync: ", operation_.name, " #", sequence_,
                " has no future: it completes inside wait(), as it does on gloo. Call wait().");
    return future_;
}

} // namespace dssync
