/*
 * check.h: the whole test harness.
 *
 * A test program is one file of static functions and one RUN list. A failed check prints where, what and the values, and ends the
 * program at once, since what follows a broken state tells nothing. A watchdog ends a hang and names the test that hung. Passed
 * tests print a line `ok program.test`, which core-test counts. Include this first: it asks for the POSIX clock and alarm.
 */
#ifndef DSS_CHECK_H
#define DSS_CHECK_H

#ifndef _GNU_SOURCE /* a test may have asked for more */
#define _POSIX_C_SOURCE 200809L
#endif

#include <inttypes.h>
#include <math.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "dssync.h"

#define CHECK_WATCHDOG_SECONDS 300u /* the sanitized programs on a busy machine included */

#define CHECK_FAIL(...)                                                                                                            \
    do {                                                                                                                           \
        fprintf(stderr, "%s:%d: ", __FILE__, __LINE__);                                                                            \
        fprintf(stderr, __VA_ARGS__);                                                                                              \
        fputc('\n', stderr);                                                                                                       \
        exit(1);                                                                                                                   \
    } while (0)

#define CHECK(condition)                                                                                                           \
    do {                                                                                                                           \
        if (!(condition))                                                                                                          \
            CHECK_FAIL("not so: %s", #condition);                                                                                  \
    } while (0)

/* The same, saying with a format and its values for what it does not hold. */
#define CHECK_FOR(condition, ...)                                                                                                  \
    do {                                                                                                                           \
        if (!(condition)) {                                                                                                        \
            fprintf(stderr, "%s:%d: not so: %s, for ", __FILE__, __LINE__, #condition);                                            \
            fprintf(stderr, __VA_ARGS__);                                                                                          \
            fputc('\n', stderr);                                                                                                   \
            exit(1);                                                                                                               \
        }                                                                                                                          \
    } while (0)

#define CHECK_EQUAL(actual, expected)                                                                                              \
    do {                                                                                                                           \
        const uint64_t check_actual = (uint64_t)(actual);                                                                          \
        const uint64_t check_expected = (uint64_t)(expected);                                                                      \
        if (check_actual != check_expected)                                                                                        \
            CHECK_FAIL("%s is %" PRIu64 ", expected %" PRIu64 " (%s)", #actual, check_actual, check_expected, #expected);          \
    } while (0)

#define CHECK_NEAR(actual, expected, tolerance)                                                                                    \
    do {                                                                                                                           \
        const double check_actual = (actual);                                                                                      \
        const double check_expected = (expected);                                                                                  \
        if (!(fabs(check_actual - check_expected) <= (tolerance)))                                                                 \
            CHECK_FAIL("%s is %.17g, expected %.17g within %g", #actual, check_actual, check_expected, (double)(tolerance));       \
    } while (0)

#define CHECK_STATUS(actual, expected)                                                                                             \
    do {                                                                                                                           \
        const dss_status_t check_actual = (actual);                                                                                \
        const dss_status_t check_expected = (expected);                                                                            \
        if (check_actual != check_expected)                                                                                        \
            CHECK_FAIL("%s is '%s', expected '%s'", #actual, dss_status_string(check_actual), dss_status_string(check_expected));  \
    } while (0)

#define CHECK_CONTAINS(text, part)                                                                                                 \
    do {                                                                                                                           \
        if (!strstr((text), (part)))                                                                                               \
            CHECK_FAIL("\"%s\" does not contain \"%s\"", (text), (part));                                                          \
    } while (0)

static const char *volatile check_running = "nothing";

static void check_hung(int signal_number) {
    static const char text[] = "watchdog: hung in ";
    (void)signal_number;
    if (write(STDERR_FILENO, text, sizeof text - 1) < 0 || write(STDERR_FILENO, check_running, strlen(check_running)) < 0)
        _exit(3);
    _exit(2);
}

static inline void check_begin(const char *name) {
    check_running = name;
    signal(SIGALRM, check_hung);
    alarm(CHECK_WATCHDOG_SECONDS);
}

/* `path` is the test's source: tests/c/plan_test.c prints as plan_test. */
static inline void check_passed(const char *path, const char *name) {
    const char *file = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
    printf("ok %.*s.%s\n", (int)strcspn(file, "."), file, name);
    fflush(stdout);
}

#define RUN(test)                                                                                                                  \
    do {                                                                                                                           \
        check_begin(#test);                                                                                                        \
        test();                                                                                                                    \
        check_passed(__FILE__, #test);                                                                                             \
    } while (0)

/* Chance for tests, unrelated to the library's own: xorshift64*. */
static inline uint64_t check_random(uint64_t *state) {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 2685821657736338717u;
}

static inline uint32_t check_random_below(uint64_t *state, uint32_t bound) {
    return (uint32_t)((check_random(state) >> 32) % bound);
}

/* Seconds of this process on a processor: unlike the clock on the wall, other load moves them little. */
static inline double check_cpu_seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

#endif
