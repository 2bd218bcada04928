/* simulate_binding.hpp: dssync_pg._C.simulate, the simulator of the C core. */
#pragma once

#include <pybind11/pybind11.h>

namespace dssync {

// After the plans and topologies that it takes.
void bindSimulation(pybind11::module_ &m);

} // namespace dssync
