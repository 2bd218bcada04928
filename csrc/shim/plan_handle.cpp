#include "plan_handle.hpp"

#include <c10/util/Exception.h>

#include <numeric>

namespace dssync {

namespace {
void check(dss_status_t status, const char *text) {
    TORCH_CHECK_VALUE(status == DSS_OK, "dssync: ", text[0] != '\0' ? text : dss_status_string(status));
}
} // namespace

PlanHandle PlanHandle::create(const dss_plan_params_t &params) {
    dss_plan_t *plan = nullptr;
    dss_error_t error{};
    check(dss_plan_create(&params, &plan, &error), error.text);
    return PlanHandle(plan);
}

PlanHandle PlanHandle::createExplicit(uint32_t worldSize, const std::vector<std::vector<std::vector<uint32_t>>> &rounds,
                                      uint64_t seed) {
    std::vector<uint32_t> groupCounts, memberCounts, members;
    for (const auto &groups : rounds) {
        groupCounts.push_back(static_cast<uint32_t>(groups.size()));
        for (const auto &group : groups) {
            memberCounts.push_back(static_cast<uint32_t>(group.size()));
            members.insert(members.end(), group.begin(), group.end());
        }
    }
    const auto roundCount = static_cast<uint32_t>(rounds.size());
    std::vector<uint32_t> groupOf(static_cast<size_t>(worldSize) * roundCount);
    dss_plan_t *plan = nullptr;
    dss_error_t error{};
    members.push_back(0); // an array of none may be NULL, which the core refuses as a mistake of the caller
    memberCounts.push_back(0);
    check(dss_rounds_from_groups(worldSize, roundCount, groupCounts.data(), memberCounts.data(), members.data(), groupOf.data(),
                                 &error),
          error.text);
    check(dss_plan_create_explicit(worldSize, roundCount, groupOf.data(), seed, &plan, &error), error.text);
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

std::vector<uint32_t> PlanHandle::racks() const {
    std::vector<uint32_t> racks;
    for (uint32_t rank = 0; rank < worldSize(); ++rank) {
        racks.push_back(dss_plan_rack_of(get(), rank));
    }
    return racks;
}

std::vector<uint32_t> PlanHandle::groupOfRank(uint32_t round, uint32_t rank) const {
    if (round == kExactRound) {
        std::vector<uint32_t> all(worldSize());
        std::iota(all.begin(), all.end(), 0u);
        return all;
    }
    if (round == kRackRound) {
        std::vector<uint32_t> rack;
        for (uint32_t other = 0; other < worldSize(); ++other) {
            if (dss_plan_rack_of(get(), other) == dss_plan_rack_of(get(), rank)) {
                rack.push_back(other);
            }
        }
        return rack;
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

dss_cost_t PlanHandle::cost(const TopologyHandle &topology, uint64_t modelBytes, double computeSeconds) const {
    dss_cost_t cost{};
    dss_error_t error{};
    check(dss_cost_of_plan(get(), topology.get(), modelBytes, computeSeconds, &cost, &error), error.text);
    return cost;
}

LinkBytes PlanHandle::linkBytes(const TopologyHandle &topology, uint64_t modelBytes, uint32_t round) const {
    LinkBytes bytes{std::vector<double>(dss_topology_host_count(topology.get())),
                    std::vector<double>(dss_topology_rack_count(topology.get()))};
    dss_error_t error{};
    check(dss_cost_link_bytes(get(), topology.get(), modelBytes, round, bytes.nics.data(), bytes.uplinks.data(), &error),
          error.text);
    return bytes;
}

} // namespace dssync
