/*
 * post_queue.hpp: posts calls to the inner backend in the order in which they were made.
 *
 * A call on device tensors can be posted only when its copies to the host are done; waiting for that on the caller's thread would
 * stall the device. Such calls, and all that come after them, go through a thread of this queue: ranks match calls by their order,
 * so nothing may overtake. Without device tensors there is no thread and no detour.
 */
#pragma once

#include <functional>
#include <memory>

namespace dssync {

class PostQueue {
  public:
    PostQueue();
    ~PostQueue(); // tasks that have not run are run with dropped = true
    PostQueue(const PostQueue &) = delete;
    PostQueue &operator=(const PostQueue &) = delete;

    using Task = std::function<void(bool dropped)>;

    // Runs `task` now, on this thread, if it need not wait and nothing is queued. Else queues it; what a queued
    // task throws is dropped: it has told its work.
    void runOrQueue(bool mustWait, Task task);

  private:
    struct State;
    static void run(const std::shared_ptr<State> &state);

    const std::shared_ptr<State> state_; // outlives this object while its thread waits for a device
};

} // namespace dssync
