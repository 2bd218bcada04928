#include "check.h"

#include "status.h"

static void every_status_has_a_text_of_its_own(void) {
    for (int a = DSS_OK; a >= DSS_ERR_CORRUPT; a--) {
        CHECK_FOR(strcmp(dss_status_string((dss_status_t)a), "unknown status") != 0, "status %d", a);
        for (int b = a - 1; b >= DSS_ERR_CORRUPT; b--)
            CHECK_FOR(strcmp(dss_status_string((dss_status_t)a), dss_status_string((dss_status_t)b)) != 0, "%d and %d", a, b);
    }
    CHECK(strcmp(dss_status_string((dss_status_t)99), "unknown status") == 0);
}

static void a_failure_fills_the_error_and_returns_its_status(void) {
    dss_error_t error = {DSS_OK, ""};
    CHECK_STATUS(dss_fail(&error, DSS_ERR_CORRUPT, "rank %u of %s", 3u, "host"), DSS_ERR_CORRUPT);
    CHECK_STATUS(error.status, DSS_ERR_CORRUPT);
    CHECK_FOR(strcmp(error.text, "rank 3 of host") == 0, "%s", error.text);
    CHECK_STATUS(dss_fail(NULL, DSS_ERR_IMPOSSIBLE, "unheard"), DSS_ERR_IMPOSSIBLE);
}

static void a_text_too_long_is_cut_and_ended(void) {
    struct {
        dss_error_t error;
        unsigned char guard[16];
    } box;
    char text[2000];
    memset(&box, 0x5a, sizeof box);
    memset(text, 'x', sizeof text);
    text[sizeof text - 1] = 0;
    dss_fail(&box.error, DSS_ERR_CORRUPT, "%s", text);
    CHECK_EQUAL(strlen(box.error.text), sizeof box.error.text - 1);
    for (size_t i = 0; i < sizeof box.guard; i++)
        CHECK_EQUAL(box.guard[i], 0x5a);
}

int main(void) {
    RUN(every_status_has_a_text_of_its_own);
    RUN(a_failure_fills_the_error_and_returns_its_status);
    RUN(a_text_too_long_is_cut_and_ended);
}
