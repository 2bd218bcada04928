#include "plan_handle.hpp"

#include <c10/util/Exception.h>

#include <numeric>

namespace dssync {

namespace {
void check(dss_status_t status, const char *text) {
    TORCH_CHECK_VALUE(status == DSS_OK, "dssync: ", text[0] != '\0' ? text : dss_status_string(status));
}
} // namespace

PlanHandle PlanHandle::create(dss_plan_kind_t kind, uint32_t worldSize, uint32_t groupSize, uint32_t maxPeriod, uint64_t seed) {
    const dss_plan_params_t params{sizeof(params), kind, worldSize, groupSize, maxPeriod, seed};
    dss_plan_t *plan = nullptr;
    dss_error_t error{};
    check(dss_plan_create(&params, &plan, &error), error.text);
    return PlanHandle(plan);
}

PlanHandle PlanHandle::createExplicit(uint32_t worldSize, const std::vector<std::vector<std::vector<uint32_t>>> &rounds,
                                      uint64_t seed) {
    const uint32_t unset = worldSize; // no group has this number: the core refuses a rank left out
    std::vector<uint32_t> groupOf(static_cast<size_t>(worldSize) * rounds.size(), unset);
    for (size_t round = 0; round < rounds.size(); ++round) {
        for (size_t group = 0; group < rounds[round].size(); ++group) {
            for (const uint32_t rank : rounds[round][group]) {
                TORCH_CHECK_VALUE(rank < worldSize, "dssync: round ", round, " names rank ", rank, " of a world of ", worldSize);
                auto &slot = groupOf[round * worldSize + rank];
                TORCH_CHECK_VALUE(slot == unset, "dssync: rank ", rank, " stands in two groups of round ", round);
                slot = static_cast<uint32_t>(group);
            }
        }
        for (uint32_t rank = 0; rank < worldSize; ++rank) {
            TORCH_CHECK_VALUE(groupOf[round * worldSize + rank] != unset, "dssync: rank ", rank, " stands in no group of round ",
                              round);
        }
    }
    dss_plan_t *plan = nullptr;
    dss_error_t error{};
    check(dss_plan_create_explicit(worldSize, static_cast<uint32_t>(rounds.size()), groupOf.data(), seed, &plan, &error),
          error.text);
    return PlanHandle(plan);
}

PlanHandle PlanHandle::deserialize(const std::string &bytes) {
    dss_plan_t *plan = nullptr;
    dss_error_t error{};
    check(dss_plan_deserialize(bytes.data(), bytes.size(), &plan, &error), error.text);
    return PlanHandle(plan);
}

std::string PlanHandle::serialize() const {
    size_t needed = 0;
    check(dss_plan_serialize(get(), nullptr, 0, &needed), "");
    std::string bytes(needed, '\0');
    check(dss_plan_serialize(get(), bytes.data(), bytes.size(), &needed), "");
    return bytes;
}

std::vector<uint32_t> PlanHandle::groupOfRank(uint32_t round, uint32_t rank) const {
    if (round == kExactRound) {
        std::vector<uint32_t> all(worldSize());
        std::iota(all.begin(), all.end(), 0u);
        return all;
    }
    const uint32_t *members = nullptr;
    uint32_t count = 0;
    const auto status = dss_plan_group_of_rank(get(), round, rank, &members, &count);
    TORCH_CHECK_VALUE(status == DSS_OK, "dssync: no group of rank ", rank, " in round ", round, ": the plan has ", worldSize(),
                      " ranks and ", period(), " rounds");
    return {members, members + count};
}

std::vector<std::vector<uint32_t>> PlanHandle::groups(uint32_t round) const {
    TORCH_CHECK_VALUE(round < period(), "dssync: no round ", round, " in a plan of ", period(), " rounds");
    std::vector<std::vector<uint32_t>> groups;
    for (uint32_t group = 0; group < dss_plan_group_count(get(), round); ++group) {
        const uint32_t *members = nullptr;
        uint32_t count = 0;
        check(dss_plan_group(get(), round, group, &members, &count), "");
        groups.emplace_back(members, members + count);
    }
    return groups;
}

double PlanHandle::contraction() const {
    double rho = 0;
    check(dss_plan_contraction(get(), &rho), "");
    return rho;
}

} // namespace dssync
