/*
 * status.h: how a failing call says what was wrong.
 *
 * The function that decides that something is an error fills the caller's dss_error_t there and then, with the values at hand;
 * callers above only pass the status on. So a text is written once, by whoever knows most, and nothing is logged from the core.
 * The price is a text buffer of half a kilobyte in the caller's frame. No locks: an error belongs to one call.
 */
#ifndef DSS_STATUS_H
#define DSS_STATUS_H

#include "dssync.h"

#if defined(__GNUC__)
#define DSS_PRINTF(format_index, first_index) __attribute__((format(printf, format_index, first_index)))
#else
#define DSS_PRINTF(format_index, first_index)
#endif

/* Fills *error_p (may be NULL) and returns `status`, so that a check reads `return dss_fail(...)`. */
dss_status_t dss_fail(dss_error_t *error_p, dss_status_t status, const char *format, ...) DSS_PRINTF(3, 4);

#endif
