#include "gloo_averager.hpp"

#include "text.hpp"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <c10/util/StringUtil.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>

#include <deque>
#include <sstream>
#include <thread>

namespace dssync {

namespace {

constexpr size_t kBucketsInFlight = 3;               // one filling, one on the wire, one emptying
constexpr int64_t kHeaderMagic = 0x6473733100000001; // "dss1", version 1

enum HeaderField : size_t { kMagic, kStep, kLayout, kShapes, kElements, kBytes, kTensors, kDtype, kHeaderSize };
constexpr int64_t kMixedDtypes = -1;

struct Launch {
    uint64_t step;
    uint64_t layout;
    std::vector<Part> parts;
    std::string what;
    c10::intrusive_ptr<WorkDssync> work;
    std::shared_ptr<const SideStreams> streams;
};

// A call on an inner group that the averager's thread waits for.
struct InnerCall {
    bool done = false; // both guarded by the watch's mutex
    std::exception_ptr error;
};

// The part of a launch that one group averages.
struct GroupRun {
    uint32_t round;
    Group group{};
    Tensors tensors{}; // the caller's
    Tensors host{};    // what is averaged: the same, or contiguous copies on the host
    at::Tensor header{};
    at::Tensor headers{};
    std::shared_ptr<InnerCall> headerCall{};
};

// A bucket on the wire.
struct Flight {
    GroupRun *run;
    Bucket bucket;
    bool last; // of its run
    at::Tensor staging;
    std::shared_ptr<InnerCall> call;
};

int64_t dtypeCode(const Tensors &tensors) {
    if (tensors.empty()) {
        return kMixedDtypes;
    }
    const auto first = tensors.front().scalar_type();
    const bool same = std::all_of(tensors.begin(), tensors.end(), [&](const auto &t) { return t.scalar_type() == first; });
    return same ? static_cast<int64_t>(first) : kMixedDtypes;
}

at::Tensor makeHeader(const Launch &launch, const Tensors &tensors) {
    auto header = at::empty({kHeaderSize}, at::kLong);
    auto *fields = header.mutable_data_ptr<int64_t>();
    uint64_t shapes = 0;
    int64_t elements = 0;
    int64_t bytes = 0;
    for (const auto &tensor : tensors) {
        const int64_t shape[] = {static_cast<int64_t>(tensor.scalar_type()), tensor.numel()};
        shapes = dss_hash(shape, sizeof(shape), shapes);
        elements += tensor.numel();
        bytes += tensor.numel() * static_cast<int64_t>(tensor.element_size());
    }
    fields[kMagic] = kHeaderMagic;
    fields[kStep] = static_cast<int64_t>(launch.step);
    fields[kLayout] = static_cast<int64_t>(launch.layout);
    fields[kShapes] = static_cast<int64_t>(shapes);
    fields[kElements] = elements;
    fields[kBytes] = bytes;
    fields[kTensors] = static_cast<int64_t>(tensors.size());
    fields[kDtype] = dtypeCode(tensors);
    return header;
}

std::string describeHeader(const int64_t *fields, bool withHashes) {
    if (fields[kMagic] != kHeaderMagic) {
        return "something that is no average of this version of dssync";
    }
    std::ostringstream out;
    out << "step " << fields[kStep] << ", " << fields[kElements] << " x "
        << (fields[kDtype] == kMixedDtypes ? "mixed dtypes" : dtypeName(static_cast<at::ScalarType>(fields[kDtype]))) << " in "
        << fields[kTensors] << (fields[kTensors] == 1 ? " tensor" : " tensors");
    if (withHashes) {
        out << ", layout " << std::hex << static_cast<uint64_t>(fields[kLayout] ^ fields[kShapes]);
    }
    return out.str();
}

// The members of a group do not average the same thing; the text says all there is to say.
struct Mismatch : std::runtime_error {
    using std::runtime_error::runtime_error;
};

} // namespace

// What the thread needs to live on its own.
class AveragerThread : public std::enable_shared_from_this<AveragerThread> {
  public:
    explicit AveragerThread(GlooAveragerOptions options)
        : options_(std::move(options)), store_(c10::make_intrusive<c10d::PrefixStore>("dssync/" + options_.name, options_.store)),
          timeout_(options_.timeout), watch_(store_, options_.rank),
          groups_(store_, static_cast<uint32_t>(options_.rank), options_.plan, options_.makeGroup, options_.maxGroups, watch_),
          label_(std::make_shared<GroupLabel>(
              GroupLabel{options_.rank, static_cast<int>(options_.plan.worldSize()), "averages of " + options_.name})) {
        TORCH_CHECK_VALUE(options_.rank >= 0 && static_cast<uint32_t>(options_.rank) < options_.plan.worldSize(), "dssync: rank ",
                          options_.rank, " is not in the plan's world of ", options_.plan.worldSize());
        TORCH_CHECK_VALUE(options_.maxGroups > 0 && options_.bucketBytes > 0,
                          "dssync: max_groups and bucket_bytes must be above 0");
    }

    bool hasEndedWithin(std::chrono::milliseconds patience);
    void start() {
        thread_ = std::thread([self = shared_from_this()] { self->run(); });
    }

    c10::intrusive_ptr<WorkDssync> launch(const Operation &operation, uint64_t step, uint64_t layout, std::vector<Part> parts,
                                          std::string what);
    void shutdown(bool abort);

    const GlooAveragerOptions options_;
    void setTimeout(std::chrono::milliseconds timeout) {
        std::lock_guard<std::mutex> lock(watch_.mutex());
        timeout_ = timeout;
    }
    AveragerStats stats() {
        std::lock_guard<std::mutex> lock(watch_.mutex());
        return stats_;
    }

  private:
    void run();
    bool next(); // waits for a launch; false: there will be none
    void end(const std::exception_ptr &error);
    void average();
    void begin(GroupRun &run);
    void compareHeaders(GroupRun &run);
    void transfer(GroupRun &run, GroupRun *next);
    void post(GroupRun &run, Bucket bucket, bool last);
    void drain(size_t keep);
    void finish(GroupRun &run) const;
    std::shared_ptr<InnerCall> follow(c10::intrusive_ptr<c10d::Work> work);
    void await(const std::shared_ptr<InnerCall> &call);
    void enter(const char *phase, const GroupRun &run);
    void waited(Clock::time_point since);
    std::exception_ptr describe(const std::exception_ptr &error);
    std::string whoIsMissing(const std::string &text) noexcept;
    std::chrono::milliseconds timeout();

    const c10::intrusive_ptr<c10d::Store> store_;
    std::chrono::milliseconds timeout_; // guarded by the watch's mutex
    Watch watch_;
    GroupCache groups_;
    const std::shared_ptr<const GroupLabel> label_;
    const std::shared_ptr<std::atomic<int64_t>> pending_ = std::make_shared<std::atomic<int64_t>>(0);
    std::mutex joinMutex_; // one shutdown at a time
    std::thread thread_;

    // guarded by the watch's mutex
    std::deque<Launch> queue_;
    std::exception_ptr error_; // sticks
    bool closed_ = false;
    bool aborted_ = false;
    bool ended_ = false;
    AveragerStats stats_;

    // of the averager's thread
    StagingPool pool_;
    std::deque<Flight> flights_;
    std::optional<Launch> current_;
    std::atomic<size_t> callsInFlight_{0}; // on inner groups
    std::string phase_;                    // of current_, for errors: "header of the group [0, 1] of round 2"
    std::vector<uint32_t> members_;        // who takes part in it
};

std::chrono::milliseconds AveragerThread::timeout() {
    std::lock_guard<std::mutex> lock(watch_.mutex());
    return timeout_;
}

c10::intrusive_ptr<WorkDssync> AveragerThread::launch(const Operation &operation, uint64_t step, uint64_t layout,
                                                      std::vector<Part> parts, std::string what) {
    const auto all = checkParts(options_.plan, parts, what);
    std::exception_ptr error;
    auto streams = std::make_shared<const SideStreams>(all);
    auto work = c10::make_intrusive<WorkDssync>(operation, label_, step, std::vector<Tensors>{all}, all, streams, pending_);
    {
        std::lock_guard<std::mutex> lock(watch_.mutex());
        error = closed_ && !error_ ? averagerShutDown(what) : error_;
        if (!error) {
            watch_.launched(step);
            ++stats_.launches;
            stats_.lastStep = step;
            queue_.push_back({step, layout, std::move(parts), std::move(what), work, std::move(streams)});
            watch_.notify();
            return work;
        }
    }
    work->complete(error);
    std::rethrow_exception(error);
}

void AveragerThread::run() {
    std::exception_ptr error;
    try {
        while (next()) {
            average();
            current_->work->complete();
            current_.reset();
        }
    } catch (const Watch::Stopped &) {
        // end() says so
    } catch (...) {
        error = describe(std::current_exception());
    }
    end(error);
}

bool AveragerThread::next() {
    std::unique_lock<std::mutex> lock(watch_.mutex());
    if (!watch_.idle(lock, [this] { return !queue_.empty() || closed_; }) || queue_.empty()) {
        return false;
    }
    current_ = std::move(queue_.front());
    queue_.pop_front();
    return true;
}

void AveragerThread::end(const std::exception_ptr &error) {
    std::deque<Launch> left;
    bool abandoned = false;
    {
        std::lock_guard<std::mutex> lock(watch_.mutex());
        closed_ = true;
        error_ = error;
        if (error) {
            stats_.error = exceptionText(error);
        }
        left.swap(queue_);
        abandoned = aborted_;
    }
    if (error) {
        watch_.reportFailure(exceptionText(error));
    } else if (abandoned || current_) {
        watch_.reportLeaving();
    }
    // Before the works complete: their callbacks may take long, and peers blocked in a transfer wake when connections close.
    destroyBackends(groups_.takeAll(), /*busy=*/callsInFlight_ > 0);
    flights_.clear();
    if (current_) {
        current_->work->complete(error ? error : averagerShutDown(current_->what));
        current_.reset();
    }
    for (auto &launch : left) {
        launch.work->complete(error ? error : averagerShutDown(launch.what));
    }
    std::lock_guard<std::mutex> lock(watch_.mutex());
    ended_ = true;
    watch_.notify();
}

void AveragerThread::average() {
    std::vector<GroupRun> runs;
    for (auto &part : joinRounds(current_->parts)) {
        runs.emplace_back(GroupRun{part.round}).tensors = std::move(part.tensors);
    }
    if (!runs.empty()) {
        begin(runs.front());
    }
    for (size_t i = 0; i < runs.size(); ++i) {
        transfer(runs[i], i + 1 < runs.size() ? &runs[i + 1] : nullptr);
    }
    drain(0);
    destroyBackends(groups_.takeForgotten(), /*busy=*/false);
}

void AveragerThread::begin(GroupRun &run) {
    members_ = options_.plan.groupOfRank(run.round, static_cast<uint32_t>(options_.rank));
    phase_ = "forming " + Group{run.round, members_, nullptr}.describe();
    const auto start = Clock::now();
    run.group = groups_.get(run.round, timeout(), current_->step, current_->what);
    waited(start);
    if (!run.group.inner) {
        return;
    }
    at::AutoDispatchBelowADInplaceOrView raw; // no autograd, no version counters
    for (const auto &tensor : run.tensors) {
        run.host.push_back(tensor.is_cpu() ? tensor.contiguous() : current_->streams->toHost(tensor, /*copy=*/true));
    }
    run.header = makeHeader(*current_, run.host);
    run.headers = at::empty({static_cast<int64_t>(run.group.members.size() * kHeaderSize)}, at::kLong);
    c10d::AllgatherOptions options;
    options.timeout = timeout();
    run.headerCall = follow(run.group.inner->_allgather_base(run.headers, run.header, options));
}

void AveragerThread::compareHeaders(GroupRun &run) {
    enter("header of ", run);
    await(run.headerCall);
    const auto *mine = run.header.const_data_ptr<int64_t>();
    const auto *all = run.headers.const_data_ptr<int64_t>();
    const size_t count = run.group.members.size();
    bool same = true;
    bool visiblySame = true; // in what people see: step, elements, dtype, tensors
    for (size_t i = 0; i < count; ++i) {
        const auto *theirs = all + i * kHeaderSize;
        same = same && std::equal(mine, mine + kHeaderSize, theirs);
        visiblySame = visiblySame && describeHeader(mine, false) == describeHeader(theirs, false);
    }
    if (same) {
        return;
    }
    std::ostringstream out;
    out << "the ranks do not average the same thing:";
    for (size_t i = 0; i < count; ++i) {
        out << (i == 0 ? " rank " : "; rank ") << run.group.members[i] << " averages "
            << describeHeader(all + i * kHeaderSize, visiblySame);
    }
    out << ". Nothing was averaged. Every rank must launch the same averages, of the same tensors, in the same order.";
    throw Mismatch(out.str());
}

void AveragerThread::transfer(GroupRun &run, GroupRun *next) {
    std::vector<Bucket> buckets;
    if (run.group.inner) {
        compareHeaders(run);
        current_->streams->synchronize(); // the copies to the host
        buckets = cutIntoBuckets(run.host, options_.bucketBytes);
    }
    for (size_t i = 0; i < buckets.size(); ++i) {
        post(run, std::move(buckets[i]), i + 1 == buckets.size());
        if (i == 0 && next != nullptr) {
            begin(*next); // its header travels beside this payload
        }
    }
    if (buckets.empty() && next != nullptr) {
        begin(*next);
    }
}

void AveragerThread::post(GroupRun &run, Bucket bucket, bool last) {
    drain(kBucketsInFlight - 1);
    enter("transfer in ", run);
    auto staging = pool_.take(bucket);
    widenInto(bucket, run.host, staging);
    const auto members = static_cast<double>(run.group.members.size());
    {
        std::lock_guard<std::mutex> lock(watch_.mutex());
        stats_.bytesSent += static_cast<uint64_t>(2 * (members - 1) / members * static_cast<double>(bucket.bytes()));
    }
    c10d::AllreduceOptions options;
    options.timeout = timeout();
    Tensors wire{staging};
    flights_.push_back({&run, std::move(bucket), last, staging, follow(run.group.inner->allreduce(wire, options))});
}

void AveragerThread::drain(size_t keep) {
    while (flights_.size() > keep) {
        auto &flight = flights_.front();
        enter("transfer in ", *flight.run);
        await(flight.call);
        narrowFrom(flight.bucket, flight.staging, 1.0 / static_cast<double>(flight.run->group.members.size()), flight.run->host);
        if (flight.last) {
            finish(*flight.run);
        }
        pool_.give(flight.staging);
        flights_.pop_front();
    }
}

void AveragerThread::finish(GroupRun &run) const {
    at::AutoDispatchBelowADInplaceOrView raw;
    for (size_t i = 0; i < run.tensors.size(); ++i) {
        if (!run.tensors[i].is_cpu()) {
            current_->streams->toDevice(run.host[i], run.tensors[i]);
        } else if (!run.host[i].is_same(run.tensors[i])) {
            run.tensors[i].copy_(run.host[i]);
        }
    }
    run.host.clear();
}

std::shared_ptr<InnerCall> AveragerThread::follow(c10::intrusive_ptr<c10d::Work> work) {
    auto call = std::make_shared<InnerCall>();
    ++callsInFlight_;
    work->getFuture()->addCallback([self = shared_from_this(), call, work](c10::ivalue::Future &future) {
        std::lock_guard<std::mutex> lock(self->watch_.mutex());
        --self->callsInFlight_;
        call->done = true;
        call->error = future.exception_ptr();
        self->watch_.notify();
    });
    return call;
}

void AveragerThread::await(const std::shared_ptr<InnerCall> &call) {
    const auto start = Clock::now();
    const auto patience = timeout();
    const bool done = watch_.until(start + patience, [&] { return call->done; });
    waited(start);
    TORCH_CHECK_WITH(DistBackendError, done, "timed out after ", describeSeconds(patience));
    if (call->error) {
        std::rethrow_exception(call->error);
    }
}

void AveragerThread::enter(const char *phase, const GroupRun &run) {
    phase_ = phase + run.group.describe();
    members_ = run.group.members;
}

void AveragerThread::waited(Clock::time_point since) {
    std::lock_guard<std::mutex> lock(watch_.mutex());
    stats_.secondsWaiting += std::chrono::duration<double>(Clock::now() - since).count();
    stats_.groupsFormed = groups_.formedCount();
    stats_.groupsCached = groups_.size();
}

std::exception_ptr AveragerThread::describe(const std::exception_ptr &error) {
    std::ostringstream out;
    out << "dssync: " << current_->what << " failed on rank " << label_->rank << " of " << label_->size << ", phase " << phase_
        << ": ";
    try {
        std::rethrow_exception(error);
    } catch (const Mismatch &e) {
        out << e.what();
    } catch (...) {
        const auto text = exceptionText(error);
        const auto missing = whoIsMissing(text);
        out << asSentence(text + (missing.empty() ? "" : ": ") + missing) << adviceFor(text);
    }
    return std::make_exception_ptr(C10_BUILD_ERROR(DistBackendError, out.str()));
}

std::string AveragerThread::whoIsMissing(const std::string &text) noexcept {
    if (!isTimeout(text) || text.find("has not launched") != std::string::npos) {
        return "";
    }
    try {
        const auto missing = watch_.whoIsMissing(members_, current_->step, current_->what);
        return !missing.empty() ? missing
                                : watch_.failureOfOthers().value_or(
                                      "all of them have launched it: one waits for another rank, or a connection is stuck");
    } catch (...) { // the store may be what failed
        return "";
    }
}

void AveragerThread::shutdown(bool abort) {
    GilReleased released;
    std::lock_guard<std::mutex> one(joinMutex_);
    {
        std::lock_guard<std::mutex> lock(watch_.mutex());
        closed_ = true;
        aborted_ = aborted_ || abort;
        watch_.notify();
    }
    const auto toFinish = abort ? std::chrono::milliseconds(0) : kShutdownPatience * 3 / 4;
    if (!hasEndedWithin(toFinish)) {
        watch_.stop();
    }
    const bool ended = hasEndedWithin(kShutdownPatience - toFinish);
    if (thread_.joinable()) {
        // A thread stuck in an inner backend is left behind: it owns all it needs, and touches Python no more.
        ended &&thread_.get_id() != std::this_thread::get_id() ? thread_.join() : thread_.detach();
    }
}

bool AveragerThread::hasEndedWithin(std::chrono::milliseconds patience) {
    return watch_.sleep(patience, [this] { return ended_; });
}

GlooAverager::GlooAverager(GlooAveragerOptions options) : thread_(std::make_shared<AveragerThread>(std::move(options))) {
    thread_->start();
}

GlooAverager::~GlooAverager() {
    thread_->shutdown(/*abort=*/true);
}

c10::intrusive_ptr<WorkDssync> GlooAverager::launch(const Operation &operation, uint64_t step, uint64_t layout,
                                                    std::vector<Part> parts, std::string what, bool /*willWait*/) {
    return thread_->launch(operation, step, layout, std::move(parts), std::move(what));
}

void GlooAverager::shutdown(bool abort) {
    thread_->shutdown(abort);
}

void GlooAverager::setTimeout(std::chrono::milliseconds timeout) {
    thread_->setTimeout(timeout);
}

const PlanHandle &GlooAverager::plan() const {
    return thread_->options_.plan;
}

AveragerStats GlooAverager::stats() const {
    return thread_->stats();
}

} // namespace dssync
