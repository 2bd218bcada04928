/*
 * averager.hpp: averages lists of tensors in the groups of a plan, one launch after the other, on a thread of its own.
 *
 * A thread of its own, because forming a group blocks until its members have come: no caller and no other averager may wait for
 * that. Launches are matched by (name, step). On each group a header (step, layout, dtypes, sizes) is compared before any payload
 * moves, since Gloo aborts the process when sizes differ. The first error sticks: the ranks are out of step from then on. It is
 * told to the other ranks through the store, and all inner groups are dropped, so that peers blocked in a transfer wake at once.
 */
#pragma once

#include "buckets.hpp"
#include "gil.hpp"
#include "group_cache.hpp"
#include "plan_handle.hpp"
#include "watch.hpp"
#include "work.hpp"

#include <memory>
#include <string>
#include <vector>

namespace dssync {

struct AveragerOptions {
    std::string name;
    c10::intrusive_ptr<c10d::Store> store; // a connection of its own
    int rank;
    PlanHandle plan;
    std::shared_ptr<const PythonCallback> makeGroup; // (store, rank, size, timeout) -> inner backend
    std::chrono::milliseconds timeout;
    size_t bucketBytes;
    size_t maxGroups;
};

struct Part {
    uint32_t round; // or kExactRound
    Tensors tensors;
};

struct AveragerStats {
    uint64_t launches = 0;
    uint64_t bytesSent = 0; // payload this rank put on the wire: 2 (s-1)/s of each bucket
    double secondsWaiting = 0;
    uint64_t groupsFormed = 0;
    uint64_t groupsCached = 0;
    std::optional<uint64_t> lastStep;
    std::optional<std::string> error;
};

class AveragerThread;

class Averager {
  public:
    explicit Averager(AveragerOptions options);
    ~Averager(); // shutdown(abort)
    Averager(const Averager &) = delete;
    Averager &operator=(const Averager &) = delete;

    // Averages the tensors in place; returns at once. Throws if an earlier launch failed or a tensor cannot be averaged.
    c10::intrusive_ptr<WorkDssync> launch(const Operation &operation, uint64_t step, uint64_t layout, std::vector<Part> parts,
                                          std::string what);
    // Ends the thread; with `abort` at once, else after what has been launched, for at most two seconds. What is left fails.
    void shutdown(bool abort);
    void setTimeout(std::chrono::milliseconds timeout);
    const PlanHandle &plan() const;
    AveragerStats stats() const;

  private:
    const std::shared_ptr<AveragerThread> thread_; // outlives this object while it is stuck in an inner backend
};

} // namespace dssync
