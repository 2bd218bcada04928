#include "simulate_binding.hpp"

#include "gil.hpp"
#include "plan_handle.hpp"
#include "topology_handle.hpp"

#include <c10/util/Exception.h>
#include <pybind11/stl.h>

#include <array>
#include <exception>
#include <optional>
#include <string>
#include <vector>

namespace dssync {

namespace {

constexpr std::array<const char *, 5> kMethods{"plan", "ring", "leaders", "two-dimensional", "parameter-server"}; // dss_method_t
constexpr std::array<const char *, 3> kLinkKinds{"memory", "nic", "uplink"};                                      // dss_link_kind_t

dss_method_t methodOf(const std::string &name) {
    for (size_t i = 0; i < kMethods.size(); ++i) {
        if (name == kMethods[i]) {
            return static_cast<dss_method_t>(i);
        }
    }
    throw py::value_error("dssync: method must be plan, ring, leaders, two-dimensional or parameter-server, got '" + name + "'");
}

// The core's progress is C: what Python raises in it waits here until the simulation is over.
struct ProgressCall {
    py::object callable;
    std::exception_ptr raised;
};

void tellProgress(void *argument, uint32_t stepsDone) {
    auto &call = *static_cast<ProgressCall *>(argument);
    if (call.raised) {
        return;
    }
    py::gil_scoped_acquire gil;
    try {
        call.callable(stepsDone);
    } catch (...) {
        call.raised = std::current_exception();
    }
}

py::dict simulate(const std::string &method, const PlanHandle *plan, const TopologyHandle &topology, uint64_t modelBytes,
                  uint32_t stepCount, uint64_t seed, double computeS, double computeSigma, double stragglerProbability,
                  double stragglerFactor, py::object progress) {
    dss_simulation_params_t params{};
    params.params_bytes = sizeof(params);
    params.method = methodOf(method);
    params.plan = plan == nullptr ? nullptr : plan->get();
    params.topology = topology.get();
    params.model_bytes = modelBytes;
    params.step_count = stepCount;
    params.seed = seed;
    params.compute_s = computeS;
    params.compute_sigma = computeSigma;
    params.straggler_probability = stragglerProbability;
    params.straggler_factor = stragglerFactor;
    ProgressCall call{std::move(progress), nullptr};
    params.progress = call.callable.is_none() ? nullptr : tellProgress;
    params.progress_argument = &call;
    dss_simulation_t simulation{};
    dss_error_t error{};
    std::vector<double> steps(stepCount);
    dss_status_t status = DSS_OK;
    {
        py::gil_scoped_release released;
        status = dss_simulate(&params, &simulation, steps.data(), &error);
    }
    if (call.raised) {
        std::rethrow_exception(call.raised);
    }
    TORCH_CHECK_VALUE(status == DSS_OK, "dssync: ", error.text);
    py::dict dict;
    dict["total_s"] = simulation.total_s;
    dict["mean_step_s"] = simulation.mean_step_s;
    dict["mean_sync_s"] = simulation.mean_sync_s;
    dict["mean_wait_s"] = simulation.mean_wait_s;
    dict["busiest"] = kLinkKinds[simulation.busiest];
    dict["busiest_index"] = simulation.busiest_index;
    dict["busiest_use"] = simulation.busiest_use;
    dict["step_s"] = std::move(steps);
    return dict;
}

} // namespace

void bindSimulation(py::module_ &m) {
    m.def("simulate", &simulate, py::arg("method"), py::arg("plan").none(true), py::arg("topology"), py::arg("model_bytes"),
          py::arg("step_count"), py::arg("seed") = 0, py::arg("compute_s") = 0.0, py::arg("compute_sigma") = 0.0,
          py::arg("straggler_probability") = 0.0, py::arg("straggler_factor") = 1.0, py::arg("progress") = py::none());
}

} // namespace dssync
