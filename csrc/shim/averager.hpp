/*
 * averager.hpp: averages lists of tensors in the groups of a plan; over which engine, only its maker knows.
 *
 * Launches are matched by (name, step). The first error sticks: the ranks are out of step from then on.
 */
#pragma once

#include "buckets.hpp"
#include "plan_handle.hpp"
#include "work.hpp"

#include <memory>
#include <string>
#include <vector>

namespace dssync {

struct Part {
    uint32_t round; // or kExactRound
    Tensors tensors;
};

struct AveragerStats {
    uint64_t launches = 0;
    uint64_t bytesSent = 0; // payload this rank put on the wire: 2 (s-1)/s of what each group averages
    double secondsWaiting = 0;
    uint64_t groupsFormed = 0; // inner groups made; the native engine makes none
    uint64_t groupsCached = 0;
    std::optional<uint64_t> lastStep;
    std::optional<std::string> error;
};

class Averager {
  public:
    Averager() = default;
    virtual ~Averager() = default;
    Averager(const Averager &) = delete;
    Averager &operator=(const Averager &) = delete;

    // Averages the tensors in place; returns at once. Throws if an earlier launch failed or a tensor cannot be averaged.
    // willWait: the caller waits right away, so nobody else need be woken to work on it.
    virtual c10::intrusive_ptr<WorkDssync> launch(const Operation &operation, uint64_t step, uint64_t layout,
                                                  std::vector<Part> parts, std::string what, bool willWait) = 0;
    // No launches from now on; with `abort` at once, else after what has been launched, for at most two seconds. What is left
    // fails.
    virtual void shutdown(bool abort) = 0;
    virtual void setTimeout(std::chrono::milliseconds timeout) = 0;
    virtual const PlanHandle &plan() const = 0;
    virtual AveragerStats stats() const = 0;
};

// Throws unless all rounds are of the plan and all tensors can be averaged in place; gives back the tensors of all parts.
Tensors checkParts(const PlanHandle &plan, const std::vector<Part> &parts, const std::string &what);
// The parts of equal rounds put together, in the order in which the rounds come.
std::vector<Part> joinRounds(const std::vector<Part> &parts);
std::exception_ptr averagerShutDown(const std::string &what);

constexpr std::chrono::milliseconds kShutdownPatience{2000};

} // namespace dssync
