/* bindings.cpp: the extension module dssync_pg._C; its types and their meaning are in dssync_pg/_C.pyi. */
#include "gate.hpp"
#include "gloo_averager.hpp"
#include "native_averager.hpp"
#include "plan_handle.hpp"
#include "process_group.hpp"
#include "simulate_binding.hpp"
#include "topology_handle.hpp"

#include <c10/util/StringUtil.h>
#include <pybind11/chrono.h>
#include <pybind11/stl.h>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <optional>
#include <tuple>
#include <variant>

namespace dssync {

namespace {

constexpr Operation kAverage{"average", "dssync:average", c10d::OpType::ALLREDUCE};

const std::vector<std::pair<const char *, dss_plan_kind_t>> kPlanKinds{
    {"auto", DSS_PLAN_AUTO},       {"grid", DSS_PLAN_GRID},       {"random", DSS_PLAN_RANDOM}, {"exact", DSS_PLAN_EXACT},
    {"leaders", DSS_PLAN_LEADERS}, {"striped", DSS_PLAN_STRIPED}, {"hybrid", DSS_PLAN_HYBRID}, {"explicit", DSS_PLAN_EXPLICIT}};

dss_plan_kind_t kindOf(const std::string &name) {
    for (const auto &[known, kind] : kPlanKinds) {
        if (name == known && kind != DSS_PLAN_EXPLICIT) {
            return kind;
        }
    }
    throw py::value_error("dssync: plan must be auto, grid, random, exact, leaders, striped or hybrid, got '" + name + "'");
}

const char *nameOf(dss_plan_kind_t kind) {
    for (const auto &[name, known] : kPlanKinds) {
        if (kind == known) {
            return name;
        }
    }
    return "unknown";
}

void averageTensors(const std::vector<at::Tensor> &sources, const at::Tensor &target) {
    const auto dtype = coreDtype(target.scalar_type());
    std::vector<const void *> pointers;
    for (const auto &source : sources) {
        TORCH_CHECK_VALUE(dtype.has_value() && source.scalar_type() == target.scalar_type() && source.numel() == target.numel() &&
                              source.is_cpu() && target.is_cpu() && source.is_contiguous() && target.is_contiguous(),
                          "dssync: average() needs contiguous CPU tensors of one floating dtype and one size");
        pointers.push_back(source.const_data_ptr());
    }
    const auto status =
        dss_average(*dtype, pointers.data(), pointers.size(), target.mutable_data_ptr(), static_cast<size_t>(target.numel()));
    TORCH_CHECK_VALUE(status == DSS_OK, "dssync: average(): ", dss_status_string(status));
}

// (round, tensors), and perhaps how it crosses.
using BoundPart = std::variant<std::pair<uint32_t, Tensors>, std::tuple<uint32_t, Tensors, Crossing>>;

py::dict statsOf(const Averager &averager) {
    const auto stats = averager.stats();
    py::dict dict;
    dict["launches"] = stats.launches;
    dict["bytes_sent"] = stats.bytesSent;
    dict["seconds_waiting"] = stats.secondsWaiting;
    dict["groups_formed"] = stats.groupsFormed;
    dict["groups_cached"] = stats.groupsCached;
    dict["last_step"] = stats.lastStep;
    dict["error"] = stats.error;
    return dict;
}

py::dict engineStats(const Engine &engine) {
    const auto stats = engine.stats();
    py::dict dict;
    dict["bytes_sent"] = stats.bytes_sent;
    dict["bytes_received"] = stats.bytes_received;
    dict["operations"] = stats.operations_done;
    dict["shm_peers"] = stats.shared_memory_peers;
    dict["tcp_peers"] = stats.tcp_peers;
    dict["unix_peers"] = stats.unix_peers;
    dict["lost_peers"] = stats.lost_peers;
    return dict;
}

std::shared_ptr<const PythonCallback> callback(py::object callable) {
    return std::make_shared<const PythonCallback>(std::move(callable));
}

py::dict costOf(const PlanHandle &plan, const TopologyHandle &topology, uint64_t modelBytes, double computeSeconds) {
    static const char *const links[] = {"memory", "nic", "uplink"};
    const auto cost = plan.cost(topology, modelBytes, computeSeconds);
    py::dict dict;
    dict["sync_s"] = cost.sync_s;
    dict["bound_s"] = cost.bound_s;
    dict["foreground_s"] = cost.foreground_s;
    dict["background_s"] = cost.background_s;
    dict["busiest"] = links[cost.busiest];
    dict["busiest_index"] = cost.busiest_index;
    dict["busiest_bytes"] = cost.busiest_bytes;
    dict["sent_bytes"] = cost.sent_bytes;
    dict["contraction"] = cost.contraction;
    dict["longest_wait_steps"] = cost.longest_wait_steps;
    return dict;
}

std::pair<std::vector<double>, std::vector<double>> linkBytesOf(const PlanHandle &plan, const TopologyHandle &topology,
                                                                uint64_t modelBytes, std::optional<uint32_t> round) {
    auto bytes = plan.linkBytes(topology, modelBytes, round.value_or(kMeanStep));
    return {std::move(bytes.nics), std::move(bytes.uplinks)};
}

void bindCore(py::module_ &m) {
    py::class_<PlanHandle>(m, "Plan")
        .def_static(
            "create",
            [](const std::string &kind, uint32_t worldSize, uint32_t groupSize, uint32_t maxPeriod, uint64_t seed,
               const TopologyHandle *topology, uint64_t modelBytes, double computeSeconds, std::optional<uint32_t> delay) {
                const dss_plan_params_t params{sizeof(params),
                                               kindOf(kind),
                                               worldSize,
                                               groupSize,
                                               maxPeriod,
                                               seed,
                                               topology != nullptr ? topology->get() : nullptr,
                                               modelBytes,
                                               computeSeconds,
                                               delay.value_or(DSS_DELAY_AUTO)};
                return PlanHandle::create(params);
            },
            py::arg("kind"), py::arg("world_size"), py::arg("group_size") = 0, py::arg("max_period") = 0, py::arg("seed") = 0,
            py::arg("topology") = nullptr, py::arg("model_bytes") = 0, py::arg("compute_s") = 0.0, py::arg("delay") = std::nullopt,
            py::call_guard<py::gil_scoped_release>())
        .def_static("explicit", &PlanHandle::createExplicit, py::arg("world_size"), py::arg("rounds"), py::arg("seed") = 0)
        .def_static(
            "deserialize", [](const py::bytes &data) { return PlanHandle::deserialize(data); }, py::arg("data"))
        .def("serialize", [](const PlanHandle &plan) { return py::bytes(plan.serialize()); })
        .def_property_readonly("kind", [](const PlanHandle &plan) { return nameOf(dss_plan_kind(plan.get())); })
        .def_property_readonly("world_size", &PlanHandle::worldSize)
        .def_property_readonly("period", &PlanHandle::period)
        .def_property_readonly("max_group_size", [](const PlanHandle &plan) { return dss_plan_max_group_size(plan.get()); })
        .def_property_readonly("seed", [](const PlanHandle &plan) { return dss_plan_seed(plan.get()); })
        .def_property_readonly("stripe_count", [](const PlanHandle &plan) { return dss_plan_stripe_count(plan.get()); })
        .def_property_readonly("delay", [](const PlanHandle &plan) { return dss_plan_delay(plan.get()); })
        .def_property_readonly("rack_count", [](const PlanHandle &plan) { return dss_plan_rack_count(plan.get()); })
        .def(
            "is_crossing", [](const PlanHandle &plan, uint32_t round) { return dss_plan_is_crossing(plan.get(), round) != 0; },
            py::arg("round"))
        .def(
            "keeps_values", [](const PlanHandle &plan, uint32_t round) { return dss_plan_keeps_values(plan.get(), round) != 0; },
            py::arg("round"))
        .def(
            "rack_of", [](const PlanHandle &plan, uint32_t rank) { return dss_plan_rack_of(plan.get(), rank); }, py::arg("rank"))
        .def("longest_wait", [](const PlanHandle &plan) { return dss_plan_longest_wait(plan.get()); })
        .def("cost", &costOf, py::arg("topology"), py::arg("model_bytes"), py::arg("compute_s") = 0.0)
        .def("link_bytes", &linkBytesOf, py::arg("topology"), py::arg("model_bytes"), py::arg("round") = std::nullopt)
        .def_property_readonly("hash", [](const PlanHandle &plan) { return dss_plan_hash(plan.get()); })
        .def("groups", &PlanHandle::groups, py::arg("round"))
        .def("group_of_rank", &PlanHandle::groupOfRank, py::arg("round"), py::arg("rank"))
        .def(
            "round_at",
            [](const PlanHandle &plan, uint64_t step, uint32_t stripe) { return dss_plan_round_at(plan.get(), step, stripe); },
            py::arg("step"), py::arg("stripe"))
        .def(
            "round_of_call", [](const PlanHandle &plan, uint64_t call) { return dss_plan_round_of_call(plan.get(), call); },
            py::arg("call"))
        .def("contraction", &PlanHandle::contraction, py::call_guard<py::gil_scoped_release>());
    m.def("stripe_count", &dss_stripe_count, py::arg("total_bytes"), py::arg("period"), py::arg("min_stripe_bytes"));
    m.def("stripe_begin", &dss_stripe_begin, py::arg("element_count"), py::arg("stripe_count"), py::arg("stripe"));
    m.def(
        "hash64",
        [](const py::bytes &data, uint64_t basis) {
            const auto bytes = static_cast<std::string_view>(data);
            return dss_hash(bytes.data(), bytes.size(), basis);
        },
        py::arg("data"), py::arg("basis") = 0);
    m.def("average", &averageTensors, py::arg("sources"), py::arg("target"), py::call_guard<py::gil_scoped_release>());
}

void bindTopology(py::module_ &m) {
    py::class_<TopologyHandle>(m, "Topology")
        .def(py::init<const std::vector<uint32_t> &, const std::vector<uint32_t> &, const std::vector<LinkPair> &,
                      const std::vector<LinkPair> &, const LinkPair &>(),
             py::arg("hosts"), py::arg("rack_of"), py::arg("nics"), py::arg("uplinks"), py::arg("memory"))
        .def_property_readonly("world_size", [](const TopologyHandle &topology) { return dss_topology_world_size(topology.get()); })
        .def_property_readonly("host_count", [](const TopologyHandle &topology) { return dss_topology_host_count(topology.get()); })
        .def_property_readonly("rack_count", [](const TopologyHandle &topology) { return dss_topology_rack_count(topology.get()); })
        .def_property_readonly("hosts", &TopologyHandle::hostOf)
        .def_property_readonly("rack_of", &TopologyHandle::rackOf)
        .def_property_readonly("nics", &TopologyHandle::nics)
        .def_property_readonly("uplinks", &TopologyHandle::uplinks)
        .def_property_readonly("memory", [](const TopologyHandle &topology) { return pairOf(dss_topology_memory(topology.get())); })
        .def("rack", &TopologyHandle::rack, py::arg("rack"));
}

void bindShim(py::module_ &m) {
    py::class_<LaunchGate, std::shared_ptr<LaunchGate>>(m, "LaunchGate")
        .def(py::init<py::object>(), py::arg("callback"))
        .def_property("armed", &LaunchGate::armed, &LaunchGate::setArmed)
        .def_property("exact_depth", &LaunchGate::exactDepth, &LaunchGate::setExactDepth);

    py::class_<Engine, std::shared_ptr<Engine>>(m, "Engine")
        .def(py::init([](int rank, int size, std::string transport, std::string interfaces, std::string reach,
                         c10::intrusive_ptr<c10d::Store> store, const py::object &allgather) {
                 return std::make_shared<Engine>(
                     EngineOptions{rank, size, std::move(transport), std::move(interfaces), std::move(reach), std::move(store)},
                     allgather);
             }),
             py::arg("rank"), py::arg("size"), py::arg("transport"), py::arg("interfaces"), py::arg("reach"), py::arg("store"),
             py::arg("allgather"))
        .def_property_readonly("hosts", &Engine::hosts)
        .def("average", &Engine::average, py::arg("tensor"), py::arg("members"), py::arg("sequence"), py::arg("timeout"),
             py::call_guard<py::gil_scoped_release>())
        .def("set_racks", &Engine::setRacks, py::arg("rack_of"))
        .def("abort", &Engine::abort, py::arg("reason"), py::call_guard<py::gil_scoped_release>())
        .def("transfers", &Engine::transfers)
        .def("stats", &engineStats);

    py::enum_<Crossing>(m, "Crossing")
        .value("AWAITED", Crossing::Awaited)
        .value("DELAYED", Crossing::Delayed)
        .value("POSITIVE", Crossing::Positive)
        .value("MOMENTS", Crossing::Moments);
    py::class_<Averager, std::shared_ptr<Averager>>(m, "Averager")
        .def(
            "launch",
            [](Averager &averager, uint64_t step, uint64_t layout, const std::vector<BoundPart> &parts, std::string what,
               bool willWait) -> c10::intrusive_ptr<c10d::Work> {
                std::vector<Part> all;
                for (const auto &part : parts) {
                    all.push_back(std::visit([](const auto &fields) { return std::make_from_tuple<Part>(fields); }, part));
                }
                py::gil_scoped_release released;
                return averager.launch(kAverage, step, layout, std::move(all), std::move(what), willWait);
            },
            py::arg("step"), py::arg("layout"), py::arg("parts"), py::arg("what"), py::arg("will_wait") = false)
        .def("settle", &Averager::settle, py::arg("step"), py::arg("discard") = false, py::call_guard<py::gil_scoped_release>())
        .def("shutdown", &Averager::shutdown, py::arg("abort") = false, py::call_guard<py::gil_scoped_release>())
        .def("set_timeout", &Averager::setTimeout, py::arg("timeout"))
        .def("stats", &statsOf);

    py::class_<GlooAverager, Averager, std::shared_ptr<GlooAverager>>(m, "GlooAverager")
        .def(py::init([](std::string name, c10::intrusive_ptr<c10d::Store> store, int rank, PlanHandle plan, py::object makeGroup,
                         std::chrono::milliseconds timeout, size_t bucketBytes, size_t maxGroups) {
                 return std::make_shared<GlooAverager>(GlooAveragerOptions{std::move(name), std::move(store), rank, std::move(plan),
                                                                           callback(std::move(makeGroup)), timeout, bucketBytes,
                                                                           maxGroups});
             }),
             py::arg("name"), py::arg("store"), py::arg("rank"), py::arg("plan"), py::arg("make_group"), py::arg("timeout"),
             py::arg("bucket_bytes") = size_t{25} << 20, py::arg("max_groups") = 16);

    py::class_<NativeAverager, Averager, std::shared_ptr<NativeAverager>>(m, "NativeAverager")
        .def(py::init<std::string, std::shared_ptr<Engine>, PlanHandle, std::chrono::milliseconds>(), py::arg("name"),
             py::arg("engine"), py::arg("plan"), py::arg("timeout"));

    py::class_<ProcessGroupDssync, c10d::Backend, c10::intrusive_ptr<ProcessGroupDssync>>(m, "ProcessGroupDssync")
        .def(py::init([](int rank, int size, BackendPtr inner, std::shared_ptr<Engine> engine, std::shared_ptr<LaunchGate> gate,
                         std::shared_ptr<Averager> averager, int64_t minBytes, py::object onFirstAverage, py::object onShutdown,
                         std::string label, std::chrono::milliseconds timeout) {
                 return c10::make_intrusive<ProcessGroupDssync>(
                     rank, size,
                     ProcessGroupOptions{std::move(inner), std::move(engine), std::move(gate), std::move(averager), minBytes,
                                         callback(std::move(onFirstAverage)), callback(std::move(onShutdown)), std::move(label),
                                         timeout});
             }),
             py::arg("rank"), py::arg("size"), py::arg("inner"), py::arg("engine"), py::arg("gate"), py::arg("averager"),
             py::arg("min_bytes"), py::arg("on_first_average"), py::arg("on_shutdown"), py::arg("label"), py::arg("timeout"))
        .def_property_readonly("averager", &ProcessGroupDssync::averager)
        .def_property_readonly("inner", &ProcessGroupDssync::inner)
        .def("abandon", &ProcessGroupDssync::abandon, py::call_guard<py::gil_scoped_release>());
}

} // namespace

} // namespace dssync

PYBIND11_MODULE(_C, m) {
    py::module_::import("torch"); // registers Backend, Store and Work
    m.attr("EXACT_ROUND") = dssync::kExactRound;
    m.attr("RACK_ROUND") = dssync::kRackRound;
    m.attr("TORCH_VERSION") = c10::str(TORCH_VERSION_MAJOR, ".", TORCH_VERSION_MINOR, ".", TORCH_VERSION_PATCH);
    dssync::bindTopology(m);
    dssync::bindCore(m);
    dssync::bindSimulation(m);
    dssync::bindShim(m);
}
