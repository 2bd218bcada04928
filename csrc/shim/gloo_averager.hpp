/*
 * gloo_averager.hpp: averages through inner groups of another backend, one launch after the other, on a thread of its own.
 *
 * A thread of its own, because forming a group blocks until its members have come: no caller and no other averager may wait for
 * that. Launches are matched by (name, step). On each group a header (step, layout, dtypes, sizes) is compared before any payload
 * moves, since Gloo aborts the process when sizes differ. The first error sticks: the ranks are out of step from then on. It is
 * told to the other ranks through the store, and all inner groups are dropped, so that peers blocked in a transfer wake at once.
 */
#pragma once

#include "averager.hpp"
#include "gil.hpp"
#include "group_cache.hpp"
#include "watch.hpp"

namespace dssync {

struct GlooAveragerOptions {
    std::string name;
    c10::intrusive_ptr<c10d::Store> store; // a connection of its own
    int rank;
    PlanHandle plan;
    std::shared_ptr<const PythonCallback> makeGroup; // (store, rank, size, timeout) -> inner backend
    std::chrono::milliseconds timeout;
    size_t bucketBytes;
    size_t maxGroups;
};

class AveragerThread;

class GlooAverager final : public Averager {
  public:
    explicit GlooAverager(GlooAveragerOptions options);
    ~GlooAverager() override; // shutdown(abort)

    c10::intrusive_ptr<WorkDssync> launch(const Operation &operation, uint64_t step, uint64_t layout, std::vector<Part> parts,
                                          std::string what, bool willWait) override;
    void shutdown(bool abort) override;
    void setTimeout(std::chrono::milliseconds timeout) override;
    const PlanHandle &plan() const override;
    AveragerStats stats() const override;

  private:
    const std::shared_ptr<AveragerThread> thread_; // outlives this object while it is stuck in an inner backend
};

} // namespace dssync
