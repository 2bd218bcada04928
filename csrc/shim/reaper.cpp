#include "reaper.hpp"

#include "gil.hpp"

#include <thread>

namespace dssync {

void destroyBackends(std::vector<BackendPtr> backends, bool busy) {
    GilReleased released;
    if (!busy) {
        backends.clear();
        return;
    }
    for (auto &backend : backends) { // one thread each: a blocked one must not keep the connections of the others open
        std::thread([doomed = std::move(backend)]() mutable { doomed.reset(); }).detach();
    }
}

} // namespace dssync
