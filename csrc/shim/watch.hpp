/*
 * watch.hpp: how an averager's thread waits.
 *
 * Every wait ends on what was waited for, on stop(), at its deadline, or when another rank has reported a failure. While a wait
 * lasts (and while the thread idles) this rank's last launched step is written to the store, at most once a second and only when
 * it changed, so that a time-out elsewhere can name who has not come. One mutex guards everything the thread shares with others.
 */
#pragma once

#include <torch/csrc/distributed/c10d/Store.hpp>

#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <optional>
#include <string>

namespace dssync {

using Clock = std::chrono::steady_clock;

class Watch {
  public:
    struct Stopped {}; // thrown by waits after stop()

    Watch(c10::intrusive_ptr<c10d::Store> store, int rank) : store_(std::move(store)), rank_(rank) {}

    std::mutex &mutex() {
        return mutex_;
    }
    void notify() {
        cv_.notify_all();
    }
    void stop();

    // Under `lock`: until ready() or stop(), whichever is first; true if ready. Publishes progress meanwhile.
    bool idle(std::unique_lock<std::mutex> &lock, const std::function<bool()> &ready);
    // Until ready(), called under the mutex; false at the deadline. Throws Stopped, and std::runtime_error if another rank failed.
    bool until(Clock::time_point deadline, const std::function<bool()> &ready);
    // Sleeps; throws as until() does.
    void pause(std::chrono::milliseconds duration);

    // Plain waiting, for other threads: until done(), called under the mutex; false when the patience is at its end.
    bool sleep(std::chrono::milliseconds patience, const std::function<bool()> &done);

    // This rank has launched `step`. Call it under the mutex.
    void launched(uint64_t step);
    std::optional<uint64_t> lastLaunched();
    // Who of `members` is not known to have launched `step`; "" if all have. `what` is this rank's name for the step.
    std::string whoIsMissing(const std::vector<uint32_t> &members, uint64_t step, const std::string &what);
    // What the first rank to give up has reported, if one has.
    std::optional<std::string> failureOfOthers();
    // Tells the other ranks that this one gave up. Never throws.
    void reportFailure(const std::string &text) noexcept;
    // Tells them that this one is going away with averages unfinished. Never throws.
    void reportLeaving() noexcept;
    bool hasLeft(uint32_t rank);

  private:
    void publish();
    void housekeep(); // publish and look for failures, each at most once a second

    const c10::intrusive_ptr<c10d::Store> store_;
    const int rank_;
    std::mutex mutex_;
    std::condition_variable cv_;
    bool stopped_ = false;                 // guarded by mutex_
    std::optional<uint64_t> launched_;     // guarded by mutex_
    std::optional<uint64_t> published_;    // of the averager's thread
    Clock::time_point nextHousekeeping_{}; // of the averager's thread
};

} // namespace dssync
