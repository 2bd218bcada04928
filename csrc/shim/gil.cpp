#include "gil.hpp"

namespace dssync {

bool pythonAlive() {
#if PY_VERSION_HEX >= 0x030D0000
    return Py_IsInitialized() != 0 && Py_IsFinalizing() == 0;
#else
    return Py_IsInitialized() != 0 && _Py_IsFinalizing() == 0;
#endif
}

GilReleased::GilReleased() {
    if (Py_IsInitialized() != 0 && PyGILState_Check() != 0) {
        released_.emplace();
    }
}

PythonCallback::~PythonCallback() {
    if (pythonAlive()) {
        py::gil_scoped_acquire gil;
        callable_ = py::object();
    } else {
        callable_.release();
    }
}

} // namespace dssync
