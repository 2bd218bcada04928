/* topology_handle.hpp: a topology of the C core, owned and shared; its failures as ValueError with the core's text. */
#pragma once

#include "dssync.h"

#include <memory>
#include <utility>
#include <vector>

namespace dssync {

using LinkPair = std::pair<double, double>; // bytes a second, seconds of latency: as Python gives and takes a dss_link_t

inline LinkPair pairOf(const dss_link_t &link) {
    return {link.bytes_per_s, link.latency_s};
}

class TopologyHandle {
  public:
    TopologyHandle(const std::vector<uint32_t> &hostOf, const std::vector<uint32_t> &rackOf, const std::vector<LinkPair> &nics,
                   const std::vector<LinkPair> &uplinks, const LinkPair &memory);

    const dss_topology_t *get() const {
        return topology_.get();
    }
    std::vector<uint32_t> hostOf() const; // of each rank
    std::vector<uint32_t> rackOf() const; // of each host
    std::vector<LinkPair> nics() const;
    std::vector<LinkPair> uplinks() const;
    std::vector<uint32_t> rack(uint32_t rack) const; // its ranks, ascending

  private:
    std::shared_ptr<const dss_topology_t> topology_;
};

} // namespace dssync
