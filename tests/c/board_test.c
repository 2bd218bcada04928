/* The board alone: who may write where, and what a reader takes for a board. */
#define _GNU_SOURCE /* memfd_create */
#include "check.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "board.h"

#define READERS 3u

/* An owner, and a reader's mapping of the same memory. */
static void open_pair(dss_board_t **owner, dss_board_t **reader) {
    CHECK_STATUS(dss_board_create(owner, NULL), DSS_OK);
    CHECK_STATUS(dss_board_open(dss_board_memfd(*owner), reader, NULL), DSS_OK);
}

static void what_is_written_can_be_read(void) {
    dss_board_t *owner = NULL;
    dss_board_t *reader = NULL;
    open_pair(&owner, &reader);
    for (uint32_t i = 0; i < DSS_BOARD_SLOTS; i++) {
        const int slot = dss_board_take(owner, 1);
        CHECK(slot >= 0 && (uint32_t)slot < DSS_BOARD_SLOTS);
        memset(dss_board_slot(owner, (uint32_t)slot), slot + 1, DSS_BOARD_SLOT_BYTES);
    }
    for (uint32_t slot = 0; slot < DSS_BOARD_SLOTS; slot++) { /* no two overlap, and none is in the counts */
        const uint8_t *bytes = dss_board_slot(reader, slot);
        CHECK_EQUAL(bytes[0], slot + 1);
        CHECK_EQUAL(bytes[DSS_BOARD_SLOT_BYTES - 1], slot + 1);
    }
    dss_board_destroy(reader);
    dss_board_destroy(owner);
}

static void a_slot_is_free_when_all_have_read_it(void) {
    dss_board_t *owner = NULL;
    dss_board_t *reader = NULL;
    open_pair(&owner, &reader);
    uint32_t seen = 0;
    for (uint32_t i = 0; i < DSS_BOARD_SLOTS; i++)
        seen |= 1u << dss_board_take(owner, READERS);
    CHECK_EQUAL(seen, UINT32_MAX); /* each once */
    CHECK_EQUAL(dss_board_take(owner, READERS), -1);
    for (uint32_t i = 1; i < READERS; i++) {
        dss_board_give(reader, 7);
        CHECK_EQUAL(dss_board_take(owner, READERS), -1);
    }
    dss_board_give(reader, 7);
    CHECK_EQUAL(dss_board_take(owner, READERS), 7);
    CHECK_EQUAL(dss_board_take(owner, READERS), -1);
    dss_board_destroy(reader);
    dss_board_destroy(owner);
}

static void other_memory_is_refused(void) {
    const off_t right = 4096 + (off_t)(DSS_BOARD_SLOTS * DSS_BOARD_SLOT_BYTES);
    const int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
    static const char *const texts[] = {"no sealed", "no sealed", "another size", "another size"};
    for (int i = 0; i < 4; i++) { /* without seals; one that may be cut short; too short; too long */
        dss_board_t *board = NULL;
        dss_error_t error = {0};
        const int memfd = memfd_create("board_test", MFD_ALLOW_SEALING | MFD_CLOEXEC);
        CHECK(memfd >= 0);
        CHECK_EQUAL(ftruncate(memfd, i == 2 ? right - 1 : i == 3 ? right + 1 : right), 0);
        if (i > 0)
            CHECK_EQUAL(fcntl(memfd, F_ADD_SEALS, i == 1 ? F_SEAL_GROW : seals), 0);
        CHECK_STATUS(dss_board_open(memfd, &board, &error), DSS_ERR_CORRUPT);
        CHECK_CONTAINS(error.text, texts[i]);
        CHECK(!board);
        close(memfd);
    }
    dss_board_t *board = NULL;
    CHECK_STATUS(dss_board_open(STDIN_FILENO, &board, NULL), DSS_ERR_CORRUPT); /* no memfd at all */
}

int main(void) {
    RUN(what_is_written_can_be_read);
    RUN(a_slot_is_free_when_all_have_read_it);
    RUN(other_memory_is_refused);
    return 0;
}
