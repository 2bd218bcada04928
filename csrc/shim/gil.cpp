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

namespace {
int forget(void *object) {
    Py_DECREF(static_cast<PyObject *>(object));
    return 0;
}
} // namespace

PythonCallback::~PythonCallback() {
    auto *object = callable_.release().ptr();
    if (object == nullptr || !pythonAlive()) {
        return; // the interpreter is going, and the object with it
    }
    if (PyGILState_Check() != 0) {
        Py_DECREF(object);
    } else {
        // Not by taking the GIL: a thread that waits for it when finalisation begins is ended by force, which aborts C++.
        Py_AddPendingCall(forget, object);
    }
}

} // namespace dssync
