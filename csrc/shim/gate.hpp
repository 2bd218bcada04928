/*
 * gate.hpp: the door every collective passes.
 *
 * An average that is due (a GradScaler skipped this rank's step, say) must be launched before this rank's next collective, or ranks
 * would wait for one another crosswise. The gate calls Python for it. It costs one atomic load while nothing is due.
 */
#pragma once

#include "gil.hpp"

#include <atomic>

namespace dssync {

class LaunchGate {
  public:
    explicit LaunchGate(py::object callback) : callback_(std::move(callback)) {}

    // Calls the callback on this thread if the gate is armed, except inside a backward pass and inside the callback itself.
    void pass(const char *operation) const {
        if (armed_.load(std::memory_order_acquire)) {
            callBack(operation);
        }
    }

    bool armed() const {
        return armed_.load(std::memory_order_acquire);
    }
    void setArmed(bool armed) {
        armed_.store(armed, std::memory_order_release);
    }
    int exactDepth() const {
        return exactDepth_.load(std::memory_order_acquire);
    }
    void setExactDepth(int depth) {
        exactDepth_.store(depth, std::memory_order_release);
    }

  private:
    void callBack(const char *operation) const;

    PythonCallback callback_;
    std::atomic<bool> armed_{false};
    std::atomic<int> exactDepth_{0}; // above 0: no AVG may be approximated
};

} // namespace dssync
