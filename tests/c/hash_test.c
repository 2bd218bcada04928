#include "check.h"

/* From the FNV authors' published test vectors. */
static void published_vectors(void) {
    CHECK_EQUAL(dss_hash("", 0, 0), 0xcbf29ce484222325u);
    CHECK_EQUAL(dss_hash("a", 1, 0), 0xaf63dc4c8601ec8cu);
    CHECK_EQUAL(dss_hash("foobar", 6, 0), 0x85944171f73967e8u);
}

static void pieces_chain_to_the_whole(void) {
    const char text[] = "divide and shuffle";
    for (size_t cut = 1; cut < sizeof text; cut++)
        CHECK_EQUAL(dss_hash(text + cut, sizeof text - cut, dss_hash(text, cut, 0)), dss_hash(text, sizeof text, 0));
}

int main(void) {
    RUN(published_vectors);
    RUN(pieces_chain_to_the_whole);
}
