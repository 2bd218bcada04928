#include "group_cache.hpp"

#include "text.hpp"

#include <c10/util/StringUtil.h>
#include <pybind11/chrono.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>

namespace dssync {

namespace {
constexpr std::chrono::milliseconds kFirstPause{1};
constexpr std::chrono::milliseconds kLongestPause{50};
// Connecting cannot be interrupted, and all members have come by then. Later calls bring time-outs of their own.
constexpr std::chrono::milliseconds kLongestConnect{60000};
constexpr std::chrono::seconds kRollCallPeriod{1}; // naming who is absent costs a round trip a member
constexpr const char *kGo = "go";

std::string readyKey(const std::string &prefix, uint32_t rank) {
    return c10::str(prefix, "ready/", rank);
}
} // namespace

std::string Group::describe() const {
    return c10::str("the group ", describeRanks(members), " of ",
                    round == kExactRound  ? "all ranks"
                    : round == kRackRound ? "a rack"
                                          : c10::str("round ", round));
}

GroupCache::GroupCache(c10::intrusive_ptr<c10d::Store> store, uint32_t rank, PlanHandle plan,
                       std::shared_ptr<const PythonCallback> makeGroup, size_t maxGroups, Watch &watch)
    : store_(std::move(store)), rank_(rank), plan_(std::move(plan)), makeGroup_(std::move(makeGroup)), maxGroups_(maxGroups),
      watch_(watch) {}

Group GroupCache::get(uint32_t round, std::chrono::milliseconds timeout, uint64_t step, const std::string &what) {
    auto found = entries_.find(round);
    if (found == entries_.end()) {
        if (entries_.size() >= maxGroups_) {
            forgetOne();
        }
        Group group{round, plan_.groupOfRank(round, rank_), nullptr};
        const uint64_t generation = generations_[round]++;
        if (group.members.size() > 1) {
            group.inner = form(group, generation, timeout, step, what);
            ++formedCount_;
        }
        found = entries_.emplace(round, Entry{std::move(group), 0}).first;
    }
    found->second.lastUse = ++uses_;
    return found->second.group;
}

void GroupCache::forgetOne() {
    auto last = std::max_element(entries_.begin(), entries_.end(),
                                 [](const auto &a, const auto &b) { return a.second.lastUse < b.second.lastUse; });
    if (last->second.group.inner) {
        forgotten_.push_back(std::move(last->second.group.inner));
    }
    entries_.erase(last);
}

BackendPtr GroupCache::form(const Group &group, uint64_t generation, std::chrono::milliseconds timeout, uint64_t step,
                            const std::string &what) {
    const Patience patience{timeout, Clock::now() + timeout};
    // The groups of a round are a partition: its lowest member names one.
    const auto prefix = c10::str("group/", group.round, "/", group.members.front(), "/", generation, "/");
    meet(group, prefix, patience, step, what);
    const auto mine = std::find(group.members.begin(), group.members.end(), rank_) - group.members.begin();
    c10::intrusive_ptr<c10d::Store> store = c10::make_intrusive<c10d::PrefixStore>(prefix + "inner", store_);
    if (!pythonAlive()) {
        throw Watch::Stopped{};
    }
    try {
        return makeGroup_->call<BackendPtr>(store, static_cast<int>(mine), static_cast<int>(group.members.size()),
                                            std::min(timeout, kLongestConnect));
    } catch (const py::error_already_set &e) {
        py::gil_scoped_acquire gil; // for its text and its end
        throw std::runtime_error(e.what());
    }
}

// Connecting cannot be interrupted, so members must agree whether to: the first to write the decision decides. The last to come
// writes "go"; one that gives up before writes why.
void GroupCache::meet(const Group &group, const std::string &prefix, const Patience &patience, uint64_t step,
                      const std::string &what) {
    const auto decision = prefix + "decision";
    auto decide = [&](const std::string &value) { return store_->compareSet(decision, "", value); };
    store_->set(readyKey(prefix, rank_), "1");
    if (store_->add(prefix + "arrived", 1) == static_cast<int64_t>(group.members.size())) {
        decide(kGo);
    }
    try {
        waitFor(decision, group, prefix, patience, step, what);
    } catch (const Watch::Stopped &) {
        decide(c10::str("rank ", rank_, " was shut down"));
        throw;
    } catch (const std::exception &) {
        const auto why = exceptionText(std::current_exception());
        if (decide(c10::str("rank ", rank_, " gave up: ", why)) != kGo) {
            throw;
        } // else the others connect by now: come along, what is wrong will be met again
    }
    const auto decided = store_->get_to_str(decision);
    TORCH_CHECK_WITH(DistBackendError, decided == kGo, decided);
}

void GroupCache::waitFor(const std::string &decision, const Group &group, const std::string &prefix, const Patience &patience,
                         uint64_t step, const std::string &what) {
    auto pause = kFirstPause;
    auto nextRollCall = Clock::now() + kRollCallPeriod;
    while (!store_->check({decision})) {
        watch_.pause(pause);
        pause = std::min(2 * pause, kLongestPause);
        const auto now = Clock::now();
        if (now < nextRollCall && now < patience.deadline) {
            continue;
        }
        nextRollCall = now + kRollCallPeriod;
        std::vector<uint32_t> absent;
        for (const uint32_t member : group.members) {
            if (!store_->check({readyKey(prefix, member)})) {
                absent.push_back(member);
                TORCH_CHECK_WITH(DistBackendError, !watch_.hasLeft(member), "rank ", member,
                                 " has left: its process group was shut down or its process ended");
            }
        }
        if (now >= patience.deadline) {
            const auto missing = watch_.whoIsMissing(absent, step, what);
            C10_THROW_ERROR(DistBackendError,
                            c10::str("timed out after ", describeSeconds(patience.total), ": ",
                                     missing.empty() ? c10::str("ranks ", describeRanks(absent), " did not come") : missing));
        }
    }
}

std::vector<BackendPtr> GroupCache::takeForgotten() {
    return std::exchange(forgotten_, {});
}

std::vector<BackendPtr> GroupCache::takeAll() {
    auto all = takeForgotten();
    for (auto &[round, entry] : entries_) {
        if (entry.group.inner) {
            all.push_back(std::move(entry.group.inner));
        }
    }
    entries_.clear();
    return all;
}

size_t GroupCache::size() const {
    return static_cast<size_t>(
        std::count_if(entries_.begin(), entries_.end(), [](const auto &e) { return e.second.group.inner != nullptr; }));
}

} // namespace dssync
