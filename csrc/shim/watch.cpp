#include "watch.hpp"

#include <c10/util/StringUtil.h>

#include <sstream>

namespace dssync {

namespace {
constexpr std::chrono::seconds kHousekeepingPeriod{1};
constexpr const char *kFailedKey = "failed";

std::string progressKey(uint32_t rank) {
    return "launched/" + std::to_string(rank);
}

std::string leftKey(uint32_t rank) {
    return "left/" + std::to_string(rank);
}
} // namespace

void Watch::stop() {
    std::lock_guard<std::mutex> lock(mutex_);
    stopped_ = true;
    cv_.notify_all();
}

bool Watch::idle(std::unique_lock<std::mutex> &lock, const std::function<bool()> &ready) {
    auto wake = [&] { return stopped_ || ready(); };
    while (published_ != launched_) {
        if (cv_.wait_for(lock, kHousekeepingPeriod, wake)) {
            return !stopped_;
        }
        lock.unlock();
        publish();
        lock.lock();
    }
    cv_.wait(lock, wake);
    return !stopped_;
}

bool Watch::until(Clock::time_point deadline, const std::function<bool()> &ready) {
    nextHousekeeping_ = Clock::now() + kHousekeepingPeriod;
    std::unique_lock<std::mutex> lock(mutex_);
    auto wake = [&] { return stopped_ || ready(); };
    while (!cv_.wait_until(lock, std::min(deadline, nextHousekeeping_), wake)) {
        if (Clock::now() >= deadline) {
            return false;
        }
        lock.unlock();
        housekeep();
        lock.lock();
    }
    if (stopped_) {
        throw Stopped{};
    }
    return true;
}

void Watch::pause(std::chrono::milliseconds duration) {
    {
        std::unique_lock<std::mutex> lock(mutex_);
        if (cv_.wait_for(lock, duration, [this] { return stopped_; })) {
            throw Stopped{};
        }
    }
    housekeep();
}

bool Watch::sleep(std::chrono::milliseconds patience, const std::function<bool()> &done) {
    std::unique_lock<std::mutex> lock(mutex_);
    return cv_.wait_for(lock, patience, done);
}

void Watch::launched(uint64_t step) {
    launched_ = step;
}

std::optional<uint64_t> Watch::lastLaunched() {
    std::lock_guard<std::mutex> lock(mutex_);
    return launched_;
}

void Watch::housekeep() {
    const auto now = Clock::now();
    if (now < nextHousekeeping_) {
        return;
    }
    nextHousekeeping_ = now + kHousekeepingPeriod;
    publish();
    if (const auto failure = failureOfOthers()) {
        throw std::runtime_error(*failure);
    }
}

void Watch::publish() {
    const auto step = lastLaunched();
    if (step != published_) {
        published_ = step; // also when the store is gone: whoever needs it will say so
        try {
            store_->set(progressKey(static_cast<uint32_t>(rank_)), std::to_string(*step));
        } catch (const std::exception &) {
        }
    }
}

std::optional<std::string> Watch::failureOfOthers() {
    return store_->check({kFailedKey}) ? std::optional(store_->get_to_str(kFailedKey)) : std::nullopt;
}

std::string Watch::whoIsMissing(const std::vector<uint32_t> &members, uint64_t step, const std::string &what) {
    std::vector<std::string> missing;
    for (const uint32_t member : members) {
        if (member == static_cast<uint32_t>(rank_)) {
            continue;
        }
        const auto key = progressKey(member);
        if (!store_->check({key})) {
            missing.push_back(c10::str("rank ", member, " has not launched ", what, " (nothing is known of it yet)"));
        } else if (const auto last = std::stoull(store_->get_to_str(key)); last < step) {
            missing.push_back(c10::str("rank ", member, " has not launched ", what, " (its last known step is ", last, ")"));
        }
    }
    return c10::Join("; ", missing);
}

void Watch::reportFailure(const std::string &text) noexcept {
    try {
        if (!store_->check({kFailedKey})) {
            store_->set(kFailedKey, c10::str("rank ", rank_, " gave up: ", text));
        }
    } catch (...) { // the store may be what failed
    }
}

void Watch::reportLeaving() noexcept {
    try {
        store_->set(leftKey(static_cast<uint32_t>(rank_)), "1");
    } catch (...) {
    }
}

bool Watch::hasLeft(uint32_t rank) {
    return store_->check({leftKey(rank)});
}

} // namespace dssync
