#include "gate.hpp"

#include <torch/csrc/autograd/graph_task.h>

namespace dssync {

namespace {
thread_local bool insideCallback = false; // launching an average may itself run collectives on this thread
constexpr int kNoGraphTask = -1;

struct InsideCallback {
    InsideCallback() {
        insideCallback = true;
    }
    ~InsideCallback() {
        insideCallback = false;
    }
};
} // namespace

void LaunchGate::callBack(const char *operation) const {
    if (insideCallback || torch::autograd::get_current_graph_task_id() != kNoGraphTask || !pythonAlive()) {
        return;
    }
    InsideCallback inside;
    callback_(operation);
}

} // namespace dssync
