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

// What becomes of the part of a crossing round that goes between racks.
enum class Crossing {
    Awaited,  // it is part of the launch
    Delayed,  // the plan's delay applies: settle() adds its correction
    Positive, // the same, of variances, which must not become negative: settle() keeps a quarter of each
    Moments   // the same, of second moments. Their racks always take the mean at once: a worker's own may be far below its rack's,
              // and a quarter of that makes its steps too long
};

struct Part {
    uint32_t round; // or kExactRound, kRackRound
    Tensors tensors;
    Crossing crossing = Crossing::Awaited;
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
    // Adds the corrections of delayed crossings that were launched at `step` or before, in the order of their launches, once they
    // are there, or drops them. The same calls on every rank, at the same places among the launches.
    virtual void settle(uint64_t step, bool discard) {
        (void)step; // an engine that delays nothing has nothing to settle
        (void)discard;
    }
    // No launches from now on; with `abort` at once, else after what has been launched, for at most two seconds. What is left
    // fails.
    virtual void shutdown(bool abort) = 0;
    virtual void setTimeout(std::chrono::milliseconds timeout) = 0;
    virtual const PlanHandle &plan() const = 0;
    virtual AveragerStats stats() const = 0;
};

// Throws unless all rounds are of the plan and all tensors can be averaged in place; gives back the tensors of all parts.
Tensors checkParts(const PlanHandle &plan, const std::vector<Part> &parts, const std::string &what);
// The parts of equal rounds, crossed alike, put together, in the order in which the rounds come.
std::vector<Part> joinRounds(const std::vector<Part> &parts);
std::exception_ptr averagerShutDown(const std::string &what);

constexpr std::chrono::milliseconds kShutdownPatience{2000};

} // namespace dssync
