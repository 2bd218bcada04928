#include "text.hpp"

#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cctype>
#include <sstream>

namespace py = pybind11;

namespace dssync {

std::string dtypeName(at::ScalarType dtype) {
    return std::string(c10::getDtypeNames(dtype).first);
}

std::string describeTensors(const std::vector<at::Tensor> &tensors) {
    if (tensors.empty() || !tensors.front().defined()) {
        return "";
    }
    std::ostringstream out;
    if (tensors.size() > 1) {
        out << tensors.size() << " tensors, first ";
    }
    out << dtypeName(tensors.front().scalar_type()) << tensors.front().sizes();
    return out.str();
}

std::string describeRanks(const std::vector<uint32_t> &ranks) {
    std::ostringstream out;
    out << '[';
    for (size_t i = 0; i < ranks.size(); ++i) {
        out << (i == 0 ? "" : ", ") << ranks[i];
    }
    out << ']';
    return out.str();
}

std::string describeSeconds(std::chrono::milliseconds duration) {
    std::ostringstream out;
    out << static_cast<double>(duration.count()) / 1000.0 << " s";
    return out.str();
}

std::string exceptionText(const std::exception_ptr &error) {
    try {
        std::rethrow_exception(error);
    } catch (const c10::Error &e) {
        return e.what_without_backtrace();
    } catch (const std::exception &e) {
        return e.what();
    } catch (...) {
        return "an exception that is no std::exception";
    }
}

namespace {
bool saysOneOf(const std::string &text, std::initializer_list<const char *> phrases) {
    std::string lower(text);
    std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char c) { return std::tolower(c); });
    return std::any_of(phrases.begin(), phrases.end(), [&](const char *p) { return lower.find(p) != std::string::npos; });
}
} // namespace

bool isTimeout(const std::string &text) {
    return saysOneOf(text, {"timed out", "timeout"});
}

std::string asSentence(const std::string &text) {
    return text.empty() || text.back() == '.' ? text : text + '.';
}

std::string adviceFor(const std::string &text) {
    if (isTimeout(text)) {
        return " Look for a rank that stopped, failed or took another branch; the timeout of the process group (`timeout=`) says "
               "how long to wait.";
    }
    if (saysOneOf(text, {"closed by peer", "connection reset", "connection refused", "broken pipe"})) {
        return " A peer ended or lost its connection: the first error in its log says why.";
    }
    return "";
}

namespace {
template <typename E> std::exception_ptr make(const std::string &text) {
    return std::make_exception_ptr(E({__func__, __FILE__, static_cast<uint32_t>(__LINE__)}, text));
}
} // namespace

std::exception_ptr withText(const std::exception_ptr &error, const std::string &text) {
    try {
        std::rethrow_exception(error);
    } catch (const py::error_already_set &) {
        return error; // a Python exception keeps its type and its traceback
    } catch (const c10::OutOfMemoryError &) {
        return error;
    } catch (const c10::DistNetworkError &) {
        return make<c10::DistNetworkError>(text);
    } catch (const c10::DistStoreError &) {
        return make<c10::DistStoreError>(text);
    } catch (const c10::DistBackendError &) {
        return make<c10::DistBackendError>(text);
    } catch (const c10::DistError &) {
        return make<c10::DistError>(text);
    } catch (const c10::IndexError &) {
        return make<c10::IndexError>(text);
    } catch (const c10::ValueError &) {
        return make<c10::ValueError>(text);
    } catch (const c10::TypeError &) {
        return make<c10::TypeError>(text);
    } catch (const c10::NotImplementedError &) {
        return make<c10::NotImplementedError>(text);
    } catch (const c10::Error &) {
        return make<c10::Error>(text);
    } catch (...) {
        return std::make_exception_ptr(std::runtime_error(text));
    }
}

} // namespace dssync
