/*
 * engine.hpp: the native engine of one process group, owned, and calls on it as torch's works see them.
 *
 * Translation only: tensors become arrays, statuses become exceptions. A call completes on whichever thread drives the engine,
 * often the one that waits for it. The first failure of a group is put into the store; every later one quotes it.
 */
#pragma once

#include "gil.hpp"
#include "work.hpp"

#include "dssync_engine.h"

#include <torch/csrc/distributed/c10d/Store.hpp>

#include <sys/types.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace dssync {

class Engine;

struct EngineOptions {
    int rank;
    int size;
    std::string transport;                 // auto, shm, tcp
    std::string interfaces;                // "": the one from which `reach` is reached
    std::string reach;                     // "": this host only
    c10::intrusive_ptr<c10d::Store> store; // a connection of its own, for failures
};

// The engine's number of a dtype, if it takes it; the integers too, and bools as bytes.
std::optional<dss_dtype_t> engineDtype(at::ScalarType dtype);
// ofBools: what gives the same truth values, and only 0 and 1.
std::optional<dss_reduction_t> engineReduction(const c10d::ReduceOp &op, bool ofBools);

// What is reduced together: contiguous host tensors of one dtype, seen as one flat vector.
struct EngineOperation {
    dss_operation_kind_t kind;
    dss_reduction_t reduction;
    dss_key_t key;
    std::vector<uint32_t> members;
    Tensors tensors;
    uint64_t layout;
};

// An exchange between racks that goes on while training does, see dss_operation_correct().
class DelayedCrossing {
  public:
    DelayedCrossing(std::shared_ptr<Engine> engine, dss_operation_t *operation);
    ~DelayedCrossing();
    DelayedCrossing(const DelayedCrossing &) = delete;
    DelayedCrossing &operator=(const DelayedCrossing &) = delete;
    // Waits for the correction and adds it to contiguous host tensors of as many elements in all. Throws if there will be none.
    void correct(const Tensors &tensors) const;
    bool isOverWithin(std::chrono::milliseconds patience) const; // kNoTimeout: until it is

  private:
    const std::shared_ptr<Engine> engine_;
    dss_operation_t *const operation_;
};

class Engine : public std::enable_shared_from_this<Engine> {
  public:
    // Collective. allgather: Python's (bytes) -> list of every rank's bytes; called while this constructs, under the lock.
    Engine(const EngineOptions &options, const py::object &allgather);
    ~Engine();
    Engine(const Engine &) = delete;
    Engine &operator=(const Engine &) = delete;

    using Done = std::function<void(const std::exception_ptr &error)>;
    // Posts all operations; `done` is called once, when all are. Gives back how to work on them until they are or the time is up.
    std::function<void(std::chrono::milliseconds)> post(const std::vector<EngineOperation> &operations, const std::string &what,
                                                        std::chrono::milliseconds timeout, bool willWait, Done done);
    // Reads the tensors at once.
    std::shared_ptr<const DelayedCrossing> cross(const EngineOperation &operation, const std::string &what,
                                                 std::chrono::milliseconds timeout);
    // The mean over the members, in place, for measurements; blocks. The same sequence number on all members, and never again.
    void average(const at::Tensor &tensor, const std::vector<uint32_t> &members, uint64_t sequence,
                 std::chrono::milliseconds timeout);
    void setRacks(const std::vector<uint32_t> &rackOf);
    bool hasRacks(const std::vector<uint32_t> &rackOf) const; // whether setRacks() has put the same ranks together
    void closeChannel(uint64_t channel, const std::string &reason);
    // Fails what is under way. When this returns the callbacks are over (except the one that this is called from), so that no
    // thread drops tensors or wants Python's lock while the interpreter ends; it waits for them a few seconds at most.
    void abort(const std::string &reason);

    uint32_t rank() const {
        return dss_engine_rank(engine_);
    }
    uint32_t size() const {
        return dss_engine_world_size(engine_);
    }
    std::vector<uint32_t> hosts() const; // the lowest rank on the host of each rank
    dss_engine_stats_t stats() const;
    // By rank: payload received and the nanoseconds in which it came.
    std::pair<std::vector<uint64_t>, std::vector<uint64_t>> transfers() const;
    // The text of an error with what failed first in this group, if that was something else. Never throws; bounded in time.
    std::string withFirstFailure(const std::string &text) const;

  private:
    dss_engine_t *engine_ = nullptr;
    std::vector<uint32_t> rackOf_;                                                                 // empty: not known
    const std::shared_ptr<std::atomic<size_t>> posted_ = std::make_shared<std::atomic<size_t>>(0); // whose callbacks are not over
    const pid_t process_;                                                                          // a child has no such threads
    const c10::intrusive_ptr<c10d::Store> store_;
    const std::shared_ptr<std::atomic<bool>> storeIsSilent_ = std::make_shared<std::atomic<bool>>(false); // it did not answer
};

} // namespace dssync
