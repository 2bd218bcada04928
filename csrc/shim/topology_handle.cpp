#include "topology_handle.hpp"

#include <c10/util/Exception.h>

#include <limits>

namespace dssync {

namespace {

uint32_t countOf(size_t count, const char *what) {
    TORCH_CHECK_VALUE(count <= std::numeric_limits<uint32_t>::max(), "dssync: a topology of ", count, " ", what);
    return static_cast<uint32_t>(count);
}

std::vector<dss_link_t> linksOf(const std::vector<LinkPair> &pairs) {
    std::vector<dss_link_t> links;
    links.reserve(pairs.size());
    for (const auto &[bytesPerSecond, latency] : pairs) {
        links.push_back({bytesPerSecond, latency});
    }
    return links;
}

template <typename Value, typename Get> std::vector<Value> listOf(uint32_t count, const dss_topology_t *topology, Get get) {
    std::vector<Value> values(count);
    for (uint32_t i = 0; i < count; ++i) {
        values[i] = get(topology, i);
    }
    return values;
}

} // namespace

TopologyHandle::TopologyHandle(const std::vector<uint32_t> &hostOf, const std::vector<uint32_t> &rackOf,
                               const std::vector<LinkPair> &nics, const std::vector<LinkPair> &uplinks, const LinkPair &memory) {
    TORCH_CHECK_VALUE(nics.size() == rackOf.size(), "dssync: ", nics.size(), " NICs for ", rackOf.size(), " hosts");
    const auto nicLinks = linksOf(nics);
    const auto uplinkLinks = linksOf(uplinks);
    dss_topology_params_t params{};
    params.params_bytes = sizeof(params);
    params.world_size = countOf(hostOf.size(), "ranks");
    params.host_count = countOf(rackOf.size(), "hosts");
    params.rack_count = countOf(uplinks.size(), "racks");
    params.host_of = hostOf.data();
    params.rack_of = rackOf.data();
    params.nics = nicLinks.data();
    params.uplinks = uplinkLinks.data();
    params.memory = {memory.first, memory.second};
    dss_topology_t *topology = nullptr;
    dss_error_t error{};
    TORCH_CHECK_VALUE(dss_topology_create(&params, &topology, &error) == DSS_OK, "dssync: ", error.text);
    topology_.reset(topology, dss_topology_destroy);
}

std::vector<uint32_t> TopologyHandle::hostOf() const {
    return listOf<uint32_t>(dss_topology_world_size(get()), get(), dss_topology_host_of);
}

std::vector<uint32_t> TopologyHandle::rackOf() const {
    return listOf<uint32_t>(dss_topology_host_count(get()), get(), dss_topology_rack_of_host);
}

std::vector<LinkPair> TopologyHandle::nics() const {
    return listOf<LinkPair>(dss_topology_host_count(get()), get(),
                            [](const dss_topology_t *topology, uint32_t host) { return pairOf(dss_topology_nic(topology, host)); });
}

std::vector<LinkPair> TopologyHandle::uplinks() const {
    return listOf<LinkPair>(dss_topology_rack_count(get()), get(), [](const dss_topology_t *topology, uint32_t rack) {
        return pairOf(dss_topology_uplink(topology, rack));
    });
}

std::vector<uint32_t> TopologyHandle::rack(uint32_t rack) const {
    const uint32_t *members = nullptr;
    uint32_t count = 0;
    TORCH_CHECK_VALUE(dss_topology_rack(get(), rack, &members, &count) == DSS_OK, "dssync: no rack ", rack, " in a topology of ",
                      dss_topology_rack_count(get()), " racks");
    return {members, members + count};
}

} // namespace dssync
