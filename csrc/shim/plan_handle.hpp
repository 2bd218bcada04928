/* plan_handle.hpp: a plan of the C core, owned; its failures as exceptions that carry the core's text. */
#pragma once

#include "dssync.h"
#include "topology_handle.hpp"

#include <memory>
#include <string>
#include <vector>

namespace dssync {

// In place of a round's number: the group of all ranks.
constexpr uint32_t kExactRound = UINT32_MAX;
constexpr uint32_t kRackRound = UINT32_MAX - 1; // the group of all ranks of the own rack
constexpr uint32_t kMeanStep = UINT32_MAX;

struct LinkBytes {
    std::vector<double> nics;    // of each host
    std::vector<double> uplinks; // of each rack
};

class PlanHandle {
  public:
    static PlanHandle create(const dss_plan_params_t &params);
    static PlanHandle createExplicit(uint32_t worldSize, const std::vector<std::vector<std::vector<uint32_t>>> &rounds,
                                     uint64_t seed);
    static PlanHandle deserialize(const std::string &bytes);
    std::string serialize() const;

    const dss_plan_t *get() const {
        return plan_.get();
    }
    uint32_t worldSize() const {
        return dss_plan_world_size(get());
    }
    uint32_t period() const {
        return dss_plan_period(get());
    }
    // The members, ascending, of the group that holds `rank` in `round`, which may be kExactRound.
    std::vector<uint32_t> racks() const; // of each rank
    std::vector<uint32_t> groupOfRank(uint32_t round, uint32_t rank) const;
    std::vector<std::vector<uint32_t>> groups(uint32_t round) const;
    double contraction() const;
    dss_cost_t cost(const TopologyHandle &topology, uint64_t modelBytes, double computeSeconds) const;
    LinkBytes linkBytes(const TopologyHandle &topology, uint64_t modelBytes, uint32_t round) const; // kMeanStep: of a mean step

  private:
    explicit PlanHandle(dss_plan_t *plan) : plan_(plan, dss_plan_destroy) {}

    std::shared_ptr<const dss_plan_t> plan_;
};

} // namespace dssync
