/*
 * group_cache.hpp: the inner groups that averages run on, made when first needed, bounded in number.
 *
 * Making one costs 7 to 26 ms and some threads, so they are kept. The key is the round: every rank goes through the same sequence
 * of rounds (ranks alone in their group included), so caches that forget as a function of that sequence forget alike on all ranks,
 * and no member ever waits on a group that another has dropped. What is forgotten is the entry used last: rounds come in cycles,
 * and of a cycle longer than the cache this keeps most, where forgetting the entry unused for longest would keep nothing.
 *
 * Members first meet in the store, so that an error can name who has not come; only then do they connect. Used by one thread.
 */
#pragma once

#include "gil.hpp"
#include "plan_handle.hpp"
#include "reaper.hpp"
#include "watch.hpp"

#include <map>

namespace dssync {

struct Group {
    uint32_t round;
    std::vector<uint32_t> members; // ascending
    BackendPtr inner;              // null in a group of one

    std::string describe() const; // "the group [0, 1] of round 2"
};

class GroupCache {
  public:
    GroupCache(c10::intrusive_ptr<c10d::Store> store, uint32_t rank, PlanHandle plan,
               std::shared_ptr<const PythonCallback> makeGroup, size_t maxGroups, Watch &watch);

    // This rank's group of the round; forms it if needed. `step` and `what` are for the error that names who is missing.
    Group get(uint32_t round, std::chrono::milliseconds timeout, uint64_t step, const std::string &what);

    // All inner backends, the forgotten ones too; the cache is empty afterwards.
    std::vector<BackendPtr> takeAll();
    // The forgotten ones: safe to destroy once no call runs on them.
    std::vector<BackendPtr> takeForgotten();
    size_t formedCount() const {
        return formedCount_;
    }
    size_t size() const;

  private:
    struct Entry {
        Group group;
        uint64_t lastUse;
    };

    struct Patience {
        std::chrono::milliseconds total;
        Clock::time_point deadline;
    };

    void forgetOne();
    BackendPtr form(const Group &group, uint64_t generation, std::chrono::milliseconds timeout, uint64_t step,
                    const std::string &what);
    void meet(const Group &group, const std::string &prefix, const Patience &patience, uint64_t step, const std::string &what);
    void waitFor(const std::string &decision, const Group &group, const std::string &prefix, const Patience &patience,
                 uint64_t step, const std::string &what);

    const c10::intrusive_ptr<c10d::Store> store_;
    const uint32_t rank_;
    const PlanHandle plan_;
    const std::shared_ptr<const PythonCallback> makeGroup_;
    const size_t maxGroups_;
    Watch &watch_;
    std::map<uint32_t, Entry> entries_;        // by round
    std::map<uint32_t, uint64_t> generations_; // how often each round was entered: equal on all ranks
    std::vector<BackendPtr> forgotten_;
    uint64_t uses_ = 0;
    size_t formedCount_ = 0;
};

} // namespace dssync
