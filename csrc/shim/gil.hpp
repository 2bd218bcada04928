/*
 * gil.hpp: Python's global lock, as the shim's threads meet it.
 *
 * Two rules hold everywhere in the shim: whatever may block does so without the lock (a thread that joins Gloo's threads while it
 * holds the lock hangs when one of them wants it), and no thread touches Python once the interpreter is being taken down.
 */
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <utility>

namespace py = pybind11;

namespace dssync {

// True while Python objects may be touched: the interpreter runs and is not being taken down.
bool pythonAlive();

// Gives the lock up for a scope, where this thread holds it.
class GilReleased {
  public:
    GilReleased();

  private:
    std::optional<py::gil_scoped_release> released_;
};

// A Python callable owned by C++: called from any thread, dropped under the lock, leaked when Python is gone.
class PythonCallback {
  public:
    explicit PythonCallback(py::object callable) : callable_(std::move(callable)) {}
    PythonCallback(const PythonCallback &) = delete;
    PythonCallback &operator=(const PythonCallback &) = delete;
    ~PythonCallback();

    // Takes the lock, calls, and converts the result while the lock is held. Python's exceptions pass through.
    template <typename Result, typename... Args> Result call(Args &&...args) const {
        py::gil_scoped_acquire gil;
        return py::cast<Result>(callable_(std::forward<Args>(args)...));
    }

    template <typename... Args> void operator()(Args &&...args) const {
        py::gil_scoped_acquire gil;
        callable_(std::forward<Args>(args)...);
    }

  private:
    py::object callable_;
};

} // namespace dssync
