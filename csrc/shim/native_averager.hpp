/*
 * native_averager.hpp: averages on the native engine: each launch becomes one operation for each round and dtype, posted at once.
 *
 * It has no thread and forms no groups: the members travel with the operation, so a group that never met before costs nothing.
 * Values are exchanged from and into the tensors themselves; only device tensors and those with gaps go through a host copy.
 */
#pragma once

#include "averager.hpp"
#include "engine.hpp"
#include "post_queue.hpp"

#include <condition_variable>
#include <mutex>

namespace dssync {

class NativeAverager final : public Averager {
  public:
    NativeAverager(std::string name, std::shared_ptr<Engine> engine, PlanHandle plan, std::chrono::milliseconds timeout);
    ~NativeAverager() override; // shutdown(abort)

    c10::intrusive_ptr<WorkDssync> launch(const Operation &operation, uint64_t step, uint64_t layout, std::vector<Part> parts,
                                          std::string what, bool willWait) override;
    void settle(uint64_t step, bool discard) override;
    void shutdown(bool abort) override;
    void setTimeout(std::chrono::milliseconds timeout) override;
    const PlanHandle &plan() const override;
    AveragerStats stats() const override;

  private:
    struct State;

    const std::shared_ptr<State> state_; // of launches that are under way, too
};

} // namespace dssync
