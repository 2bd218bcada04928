/*
 * work.hpp: one call on a dssync group, as torch sees it.
 *
 * It completes when the inner works it stands for have completed and `finish` has run (copies back to the device, the scaling of
 * an average), on the inner backend's thread, without anybody waiting. Gloo's send and receive complete only inside wait(); those
 * are attached with attachLazy() and keep that behaviour. Errors of inner works are translated once, here.
 */
#pragma once

#include "side_streams.hpp"

#include <torch/csrc/distributed/c10d/Work.hpp>

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace dssync {

using Tensors = std::vector<at::Tensor>;

// What kind of call it is; the strings are literals, the profiler keeps the pointer.
struct Operation {
    const char *name;  // "all_reduce"
    const char *title; // "dssync:all_reduce"
    c10d::OpType type;
};

// Which group, for errors; shared by all calls on it.
struct GroupLabel {
    int rank;
    int size;
    std::string label; // "default group"
};

// Counts the calls of a group that are not complete: with any pending, the inner backend must not be joined in place.
class Pending {
  public:
    explicit Pending(std::shared_ptr<std::atomic<int64_t>> count) : count_(std::move(count)) {
        ++*count_;
    }
    ~Pending() {
        done();
    }
    Pending(const Pending &) = delete;
    Pending &operator=(const Pending &) = delete;
    void done() {
        if (!done_.exchange(true)) {
            --*count_;
        }
    }

  private:
    std::shared_ptr<std::atomic<int64_t>> count_;
    std::atomic<bool> done_{false};
};

class WorkDssync final : public c10d::Work {
  public:
    WorkDssync(const Operation &operation, std::shared_ptr<const GroupLabel> group, uint64_t sequence, std::vector<Tensors> outputs,
               const Tensors &inputs, std::shared_ptr<const SideStreams> streams,
               std::shared_ptr<std::atomic<int64_t>> pendingCount);

    // Follow these inner works; at least one. `finish` runs once all have succeeded.
    void attach(std::vector<c10::intrusive_ptr<c10d::Work>> inner, std::function<void()> finish);
    // The same for a work that completes only while somebody waits for it.
    void attachLazy(c10::intrusive_ptr<c10d::Work> inner, std::function<void()> finish);
    // wait() calls `drive`, which works on what this work stands for until that is done or the time is up.
    void driveBy(std::function<void(std::chrono::milliseconds)> drive);
    // Complete now, as a success or with this error, untranslated. Later calls change nothing.
    void complete(const std::exception_ptr &error = nullptr);
    // The error put into a sentence that names call, group, tensors and phase.
    std::exception_ptr translate(const std::exception_ptr &error, const char *phase) const;

    int sourceRank() const override;
    std::vector<at::Tensor> result() override;
    void synchronize() override;
    bool wait(std::chrono::milliseconds timeout = kNoTimeout) override;
    void abort() override;
    c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;
    uint64_t getSequencenumber() const override {
        return sequence_;
    }

  private:
    void innerCompleted(const std::exception_ptr &error);
    void settle(const std::exception_ptr &error);
    void waitLazily(std::chrono::milliseconds timeout);
    std::string describe() const;

    const Operation operation_;
    const std::shared_ptr<const GroupLabel> group_;
    const uint64_t sequence_;
    const std::vector<Tensors> outputs_;
    const Tensors inputs_; // for errors
    const std::shared_ptr<const SideStreams> streams_;
    const c10::intrusive_ptr<c10::ivalue::Future> future_;
    Pending pending_;

    std::vector<c10::intrusive_ptr<c10d::Work>> inner_;
    std::function<void()> finish_;
    std::function<void(std::chrono::milliseconds)> drive_; // guarded by mutex_; dropped when complete
    std::atomic<size_t> innerLeft_{0};
    std::atomic<bool> completing_{false};
    std::exception_ptr innerError_; // the first; guarded by mutex_
    bool lazy_ = false;             // guarded by mutex_, as inner_ and finish_ are until attached
    bool attached_ = false;
    std::mutex lazyMutex_; // one waiter drives a lazy work at a time
};

} // namespace dssync
