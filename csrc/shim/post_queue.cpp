#include "post_queue.hpp"

#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>

namespace dssync {

namespace {
void runQuietly(const PostQueue::Task &task, bool dropped) {
    try {
        task(dropped);
    } catch (...) { // its work knows
    }
}
} // namespace

struct PostQueue::State {
    std::mutex mutex;
    std::condition_variable cv;
    std::deque<Task> tasks;
    bool running = false; // a task taken from the queue: what comes later must not overtake it
    bool started = false;
    bool closed = false;
};

PostQueue::PostQueue() : state_(std::make_shared<State>()) {}

PostQueue::~PostQueue() {
    std::deque<Task> left;
    {
        std::lock_guard<std::mutex> lock(state_->mutex);
        state_->closed = true;
        state_->cv.notify_all();
        left.swap(state_->tasks);
    }
    for (const auto &task : left) {
        runQuietly(task, /*dropped=*/true);
    }
}

void PostQueue::runOrQueue(bool mustWait, Task task) {
    {
        std::lock_guard<std::mutex> lock(state_->mutex);
        if (mustWait || state_->running || !state_->tasks.empty()) {
            state_->tasks.push_back(std::move(task));
            state_->cv.notify_all();
            if (!std::exchange(state_->started, true)) {
                std::thread([state = state_] { run(state); }).detach();
            }
            return;
        }
    }
    task(/*dropped=*/false);
}

void PostQueue::run(const std::shared_ptr<State> &state) {
    std::unique_lock<std::mutex> lock(state->mutex);
    while (true) {
        state->cv.wait(lock, [&] { return state->closed || !state->tasks.empty(); });
        if (state->closed) {
            return;
        }
        auto task = std::move(state->tasks.front());
        state->tasks.pop_front();
        state->running = true;
        lock.unlock();
        runQuietly(task, /*dropped=*/false);
        task = nullptr;
        lock.lock();
        state->running = false;
    }
}

} // namespace dssync
