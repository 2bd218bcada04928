/*
 * reaper.hpp: taking inner backends down.
 *
 * Gloo's destructor joins threads that stay blocked until the time-out while a call is pending, and Gloo has no abort. An idle
 * backend is destroyed in place, a busy one by a detached thread that nobody waits for.
 */
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <vector>

namespace dssync {

using BackendPtr = c10::intrusive_ptr<c10d::Backend>;

void destroyBackends(std::vector<BackendPtr> backends, bool busy);

} // namespace dssync
