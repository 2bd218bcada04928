#include "engine.hpp"

#include "buckets.hpp"
#include "text.hpp"

#include <c10/util/Logging.h>
#include <map>

#include <unistd.h>

#include <future>
#include <thread>

namespace dssync {

namespace {

constexpr std::chrono::seconds kStorePatience{1};
constexpr std::chrono::seconds kCallbackPatience{2};
constexpr const char *kFirstFailure = "first_failure";

thread_local bool insideDone = false;

uint64_t nanoseconds(std::chrono::milliseconds duration) {
    return duration.count() < 0 ? UINT64_MAX : static_cast<uint64_t>(duration.count()) * 1000000u;
}

dss_transport_t transportOf(const std::string &name) {
    if (name == "shm") {
        return DSS_TRANSPORT_SHM;
    }
    TORCH_CHECK_VALUE(name == "auto" || name == "tcp", "dssync: transport must be auto, shm or tcp, got ", name);
    return name == "tcp" ? DSS_TRANSPORT_TCP : DSS_TRANSPORT_AUTO;
}

dss_status_t gather(void *argument, const void *mine, size_t bytesEach, void *all, dss_error_t *error) {
    try {
        const auto &allgather = *static_cast<const py::object *>(argument);
        const auto answers = allgather(py::bytes(static_cast<const char *>(mine), bytesEach)).cast<std::vector<std::string>>();
        for (size_t i = 0; i < answers.size(); ++i) {
            TORCH_CHECK(answers[i].size() == bytesEach, "dssync: rank ", i, " sent ", answers[i].size(), " bytes, not ", bytesEach);
            memcpy(static_cast<char *>(all) + i * bytesEach, answers[i].data(), bytesEach);
        }
        return DSS_OK;
    } catch (const std::exception &e) {
        error->status = DSS_ERR_SYSTEM;
        snprintf(error->text, sizeof(error->text), "%s", e.what());
        return DSS_ERR_SYSTEM;
    }
}

void logLine(void * /*argument*/, const char *text) {
    LOG(WARNING) << "dssync: " << text;
}

// The operations of one work.
class Call {
  public:
    Call(std::shared_ptr<Engine> engine, size_t count, Tensors tensors, Engine::Done done)
        : engine_(std::move(engine)), tensors_(std::move(tensors)), done_(std::move(done)), left_(count) {}
    ~Call() {
        for (auto *operation : operations_) {
            dss_operation_release(operation);
        }
    }

    void add(dss_operation_t *operation) {
        operations_.push_back(operation);
    }
    void finishOne(dss_status_t status, const char *text) {
        if (status != DSS_OK) {
            std::lock_guard<std::mutex> lock(mutex_);
            if (!error_) {
                std::string whole = asSentence(std::string("dssync: ") + text) + adviceFor(text);
                if (status != DSS_ERR_SHUT_DOWN) {
                    whole = engine_->withFirstFailure(whole);
                }
                error_ = std::make_exception_ptr(C10_BUILD_ERROR(DistBackendError, whole));
            }
        }
        if (left_.fetch_sub(1) == 1) {
            const auto done = std::move(done_);
            done(error_);
        }
    }
    void wait(std::chrono::milliseconds timeout) const {
        const auto deadline = std::chrono::steady_clock::now() + timeout;
        for (auto *operation : operations_) {
            auto left = timeout;
            if (timeout.count() >= 0 && operation != operations_.front()) {
                left = std::max(std::chrono::milliseconds(0),
                                std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now()));
            }
            dss_operation_wait(operation, timeout == kNoTimeout ? UINT64_MAX : nanoseconds(left));
        }
    }

  private:
    const std::shared_ptr<Engine> engine_;
    const Tensors tensors_; // alive while their values travel
    Engine::Done done_;
    std::atomic<size_t> left_;
    std::mutex mutex_;
    std::exception_ptr error_;                  // the first; guarded by mutex_ until the last operation is done
    std::vector<dss_operation_t *> operations_; // complete before the call is handed out
};

// What the engine's callback gets.
struct Posted {
    std::shared_ptr<Call> call;
    std::shared_ptr<std::atomic<size_t>> count; // outlives the engine
};

void operationDone(void *argument, dss_status_t status, const char *text) {
    std::unique_ptr<Posted> posted(static_cast<Posted *>(argument));
    const auto count = posted->count;
    const bool before = std::exchange(insideDone, true);
    posted->call->finishOne(status, text);
    posted.reset(); // perhaps the last to hold the engine
    insideDone = before;
    --*count;
}

std::vector<dss_segment_t> segmentsOf(const Tensors &tensors) {
    std::vector<dss_segment_t> segments;
    for (const auto &tensor : tensors) {
        segments.push_back({tensor.data_ptr(), static_cast<size_t>(tensor.numel())});
    }
    return segments;
}

// All but the callback; points into what it is made of.
dss_operation_params_t paramsOf(const EngineOperation &operation, const std::vector<dss_segment_t> &segments,
                                const std::string &what, std::chrono::milliseconds timeout) {
    dss_operation_params_t params{};
    params.params_bytes = sizeof(params);
    params.kind = operation.kind;
    params.dtype = operation.tensors.empty() ? DSS_UINT8 : *engineDtype(operation.tensors.front().scalar_type());
    params.reduction = operation.reduction;
    params.key = operation.key;
    params.members = operation.members.data();
    params.member_count = static_cast<uint32_t>(operation.members.size());
    params.segments = segments.data();
    params.segment_count = segments.size();
    params.layout = operation.layout;
    params.timeout_ns = nanoseconds(timeout);
    params.what = what.c_str();
    return params;
}

} // namespace

std::optional<dss_dtype_t> engineDtype(at::ScalarType dtype) {
    switch (dtype) {
    case at::kChar:
        return DSS_INT8;
    case at::kByte:
    case at::kBool: // a byte, 0 or 1; see engineReduction()
        return DSS_UINT8;
    case at::kInt:
        return DSS_INT32;
    case at::kLong:
        return DSS_INT64;
    default:
        return coreDtype(dtype);
    }
}

std::optional<dss_reduction_t> engineReduction(const c10d::ReduceOp &op, bool ofBools) {
    switch (op.op_) {
    case c10d::ReduceOp::SUM:
        return ofBools ? DSS_MAX : DSS_SUM; // True and True are not to become 2
    case c10d::ReduceOp::PRODUCT:
        return ofBools ? DSS_MIN : DSS_PRODUCT;
    case c10d::ReduceOp::MIN:
        return DSS_MIN;
    case c10d::ReduceOp::MAX:
        return DSS_MAX;
    case c10d::ReduceOp::BAND:
        return ofBools ? DSS_MIN : DSS_BAND;
    case c10d::ReduceOp::BOR:
        return ofBools ? DSS_MAX : DSS_BOR;
    case c10d::ReduceOp::BXOR:
        return DSS_BXOR;
    default:
        return std::nullopt;
    }
}

Engine::Engine(const EngineOptions &options, const py::object &allgather) : process_(getpid()), store_(options.store) {
    dss_engine_params_t params{};
    params.params_bytes = sizeof(params);
    params.rank = static_cast<uint32_t>(options.rank);
    params.world_size = static_cast<uint32_t>(options.size);
    params.transport = transportOf(options.transport);
    params.interfaces = options.interfaces.empty() ? nullptr : options.interfaces.c_str();
    params.reach = options.reach.empty() ? nullptr : options.reach.c_str();
    params.oob = {gather, const_cast<py::object *>(&allgather)};
    params.log = logLine;
    dss_error_t error{};
    TORCH_CHECK_WITH(DistBackendError, dss_engine_create(&params, &engine_, &error) == DSS_OK, error.text);
}

Engine::~Engine() {
    if (engine_ == nullptr) {
        return;
    }
    if (insideDone) { // on a thread that the engine must join, perhaps
        std::thread([engine = engine_] { dss_engine_destroy(engine); }).detach();
        return;
    }
    GilReleased released;
    dss_engine_destroy(engine_);
}

std::function<void(std::chrono::milliseconds)> Engine::post(const std::vector<EngineOperation> &operations, const std::string &what,
                                                            std::chrono::milliseconds timeout, bool willWait, Done done) {
    Tensors tensors;
    for (const auto &operation : operations) {
        tensors.insert(tensors.end(), operation.tensors.begin(), operation.tensors.end());
    }
    // One more than there are: `done` must not be called while the rest is being posted.
    auto call = std::make_shared<Call>(shared_from_this(), operations.size() + 1, std::move(tensors), std::move(done));
    for (const auto &operation : operations) {
        const auto segments = segmentsOf(operation.tensors);
        auto params = paramsOf(operation, segments, what, timeout);
        params.will_wait = willWait ? 1 : 0;
        params.done = operationDone;
        auto argument = std::make_unique<Posted>(Posted{call, posted_});
        params.argument = argument.get();
        dss_error_t error{};
        dss_operation_t *posted = nullptr;
        ++*posted_;
        const auto status = dss_engine_post(engine_, &params, &posted, &error);
        if (status == DSS_OK) {
            (void)argument.release(); // operationDone's
            call->add(posted);
        } else {
            --*posted_;
            call->finishOne(status, (what + ": " + error.text).c_str());
        }
    }
    call->finishOne(DSS_OK, nullptr);
    return [call](std::chrono::milliseconds patience) { call->wait(patience); };
}

std::shared_ptr<const DelayedCrossing> Engine::cross(const EngineOperation &operation, const std::string &what,
                                                     std::chrono::milliseconds timeout) {
    std::vector<dss_segment_t> segments = segmentsOf(operation.tensors);
    auto params = paramsOf(operation, segments, what, timeout);
    params.done = [](void *, dss_status_t, const char *) {}; // whoever waits asks for the result
    dss_error_t error{};
    dss_operation_t *posted = nullptr;
    TORCH_CHECK_WITH(DistBackendError, dss_engine_post(engine_, &params, &posted, &error) == DSS_OK, "dssync: ", what, ": ",
                     error.text);
    return std::make_shared<const DelayedCrossing>(shared_from_this(), posted);
}

void Engine::average(const at::Tensor &tensor, const std::vector<uint32_t> &members, uint64_t sequence,
                     std::chrono::milliseconds timeout) {
    TORCH_CHECK_VALUE(tensor.is_cpu() && tensor.is_contiguous() && coreDtype(tensor.scalar_type()).has_value(),
                      "dssync: average() needs a contiguous CPU tensor of a floating dtype");
    auto promise = std::make_shared<std::promise<void>>();
    auto done = promise->get_future();
    const EngineOperation operation{
        DSS_OPERATION_AVERAGE, DSS_SUM, {dss_hash("probe", 5, 0), sequence, 0, 0}, members, {tensor}, 0};
    const auto drive =
        post({operation}, c10::str("measurement ", sequence), timeout, /*willWait=*/true,
             [promise](const std::exception_ptr &error) { error ? promise->set_exception(error) : promise->set_value(); });
    drive(kNoTimeout);
    done.get();
}

DelayedCrossing::DelayedCrossing(std::shared_ptr<Engine> engine, dss_operation_t *operation)
    : engine_(std::move(engine)), operation_(operation) {}

DelayedCrossing::~DelayedCrossing() {
    dss_operation_release(operation_);
}

bool DelayedCrossing::isOverWithin(std::chrono::milliseconds patience) const {
    const auto nanoseconds = std::chrono::duration_cast<std::chrono::nanoseconds>(patience).count();
    return dss_operation_wait(operation_, patience == kNoTimeout ? UINT64_MAX : static_cast<uint64_t>(nanoseconds));
}

void DelayedCrossing::correct(const Tensors &tensors) const {
    const auto segments = segmentsOf(tensors);
    dss_error_t error{};
    (void)dss_operation_wait(operation_, UINT64_MAX); // it has a time-out of its own
    if (dss_operation_correct(operation_, segments.data(), segments.size(), &error) != DSS_OK) {
        const std::string whole = asSentence(std::string("dssync: ") + error.text) + adviceFor(error.text);
        C10_THROW_ERROR(DistBackendError, error.status == DSS_ERR_SHUT_DOWN ? whole : engine_->withFirstFailure(whole));
    }
}

void Engine::setRacks(const std::vector<uint32_t> &rackOf) {
    dss_error_t error{};
    TORCH_CHECK_VALUE(rackOf.size() == size(), "dssync: racks of ", rackOf.size(), " ranks for an engine of ", size());
    TORCH_CHECK_VALUE(dss_engine_set_racks(engine_, rackOf.data(), &error) == DSS_OK, "dssync: ", error.text);
    rackOf_ = rackOf;
}

bool Engine::hasRacks(const std::vector<uint32_t> &rackOf) const {
    std::map<uint32_t, uint32_t> theirs;
    std::map<uint32_t, uint32_t> ours;
    for (size_t rank = 0; rank < rackOf.size() && rackOf.size() == rackOf_.size(); ++rank) { // by other numbers, perhaps
        const bool same = theirs.emplace(rackOf_[rank], rackOf[rank]).first->second == rackOf[rank] &&
                          ours.emplace(rackOf[rank], rackOf_[rank]).first->second == rackOf_[rank];
        if (!same) {
            return false;
        }
    }
    return rackOf.size() == rackOf_.size();
}

void Engine::closeChannel(uint64_t channel, const std::string &reason) {
    dss_engine_close_channel(engine_, channel, reason.c_str());
}

void Engine::abort(const std::string &reason) {
    dss_engine_abort(engine_, reason.c_str());
    const auto until = std::chrono::steady_clock::now() + kCallbackPatience;
    while (*posted_ > 0 && !insideDone && getpid() == process_ && std::chrono::steady_clock::now() < until) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
}

std::vector<uint32_t> Engine::hosts() const {
    std::vector<uint32_t> hosts;
    for (uint32_t i = 0; i < size(); ++i) {
        hosts.push_back(dss_engine_host_of(engine_, i));
    }
    return hosts;
}

dss_engine_stats_t Engine::stats() const {
    dss_engine_stats_t stats{};
    dss_engine_stats(engine_, &stats);
    return stats;
}

std::pair<std::vector<uint64_t>, std::vector<uint64_t>> Engine::transfers() const {
    std::pair<std::vector<uint64_t>, std::vector<uint64_t>> found{std::vector<uint64_t>(size()), std::vector<uint64_t>(size())};
    dss_engine_transfers(engine_, found.first.data(), found.second.data());
    return found;
}

std::string Engine::withFirstFailure(const std::string &text) const {
    if (!store_ || *storeIsSilent_) {
        return text;
    }
    // On a thread of its own: the store may be what failed, and an error must not wait for it.
    auto promise = std::make_shared<std::promise<std::string>>();
    auto answer = promise->get_future();
    std::thread([store = store_, silent = storeIsSilent_, text, promise] {
        try {
            const bool isFirst =
                store->compareSet(kFirstFailure, std::vector<uint8_t>(), std::vector<uint8_t>(text.begin(), text.end())).empty();
            promise->set_value(isFirst ? text : store->get_to_str(kFirstFailure));
            *silent = false;
        } catch (...) {
            promise->set_value(text);
        }
    }).detach();
    if (answer.wait_for(kStorePatience) != std::future_status::ready) {
        *storeIsSilent_ = true; // many calls may fail one after another: only the first waits; until an answer comes after all
        return text;
    }
    const auto first = answer.get();
    if (first == text || text.find(first.substr(std::min<size_t>(first.size(), 8), 60)) != std::string::npos) {
        return text; // it is the first, or quotes it
    }
    return text + " The first failure of this group was: " + first;
}

} // namespace dssync
