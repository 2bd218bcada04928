#include "status.h"

#include <stdarg.h>
#include <stdio.h>

const char *dss_status_string(dss_status_t status) {
    switch (status) {
    case DSS_OK:
        return "ok";
    case DSS_ERR_INVALID_ARGUMENT:
        return "invalid argument";
    case DSS_ERR_NO_MEMORY:
        return "out of memory";
    case DSS_ERR_IMPOSSIBLE:
        return "no such plan exists";
    case DSS_ERR_DISCONNECTED:
        return "plan never mixes all ranks";
    case DSS_ERR_NOT_A_PARTITION:
        return "round is not a partition of the ranks";
    case DSS_ERR_CORRUPT:
        return "bytes are damaged or of another version";
    case DSS_ERR_TIMED_OUT:
        return "timed out";
    case DSS_ERR_MISMATCH:
        return "the ranks did not call the same thing";
    case DSS_ERR_PEER_LOST:
        return "a peer is gone";
    case DSS_ERR_FAILED:
        return "failed before";
    case DSS_ERR_STRANGER:
        return "not a rank of this job";
    case DSS_ERR_SYSTEM:
        return "the operating system refused";
    case DSS_ERR_SHUT_DOWN:
        return "shut down";
    }
    return "unknown status";
}

dss_status_t dss_fail(dss_error_t *error_p, dss_status_t status, const char *format, ...) {
    if (error_p) {
        va_list arguments;
        va_start(arguments, format);
        error_p->status = status;
        (void)vsnprintf(error_p->text, sizeof error_p->text, format, arguments);
        va_end(arguments);
    }
    return status;
}
