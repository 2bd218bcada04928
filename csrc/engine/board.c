#define _GNU_SOURCE /* memfd_create */

#include "board.h"

#include <errno.h>
#include <fcntl.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "descriptors.h"

#define SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
#define SLOTS_AT ((size_t)4096) /* the counts are before them */
#define BOARD_BYTES (SLOTS_AT + DSS_BOARD_SLOTS * DSS_BOARD_SLOT_BYTES)

typedef struct count {
    alignas(128) _Atomic uint32_t readers; /* who have not read the slot yet */
} count_t;

_Static_assert(DSS_BOARD_SLOTS * sizeof(count_t) <= SLOTS_AT, "the counts are one page");

struct dss_board {
    uint8_t *mapping; /* counts, then slots; owned */
    int memfd;        /* of the owner; -1 of readers */
    uint32_t next;    /* where to look for a free slot */
};

static count_t *count_of(const dss_board_t *board, uint32_t slot) {
    return (count_t *)(void *)board->mapping + slot;
}

static dss_status_t board_map(int memfd, dss_board_t **board_p, dss_error_t *error_p) {
    dss_board_t *board = calloc(1, sizeof *board);
    if (!board)
        return dss_fail(error_p, DSS_ERR_NO_MEMORY, "no memory for a board");
    board->memfd = -1;
    board->mapping = mmap(NULL, BOARD_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
    if (board->mapping == MAP_FAILED) {
        free(board);
        return dss_fail(error_p, DSS_ERR_SYSTEM, "a board of %zu bytes cannot be mapped: %s", BOARD_BYTES, strerror(errno));
    }
    *board_p = board;
    return DSS_OK;
}

dss_status_t dss_board_create(dss_board_t **board_p, dss_error_t *error_p) {
    dss_descriptor_begin();
    const int memfd = dss_descriptor_end(memfd_create("dssync board", MFD_ALLOW_SEALING | MFD_CLOEXEC));
    if (memfd < 0)
        return dss_fail(error_p, DSS_ERR_SYSTEM, "memfd_create: %s", strerror(errno));
    dss_status_t status = DSS_OK;
    if (ftruncate(memfd, (off_t)BOARD_BYTES) || fcntl(memfd, F_ADD_SEALS, SEALS))
        status =
            dss_fail(error_p, DSS_ERR_SYSTEM, "a board of %zu bytes cannot be made and sealed: %s", BOARD_BYTES, strerror(errno));
    else
        status = board_map(memfd, board_p, error_p);
    if (status == DSS_OK)
        (*board_p)->memfd = memfd;
    else
        dss_descriptor_close(memfd);
    return status;
}

dss_status_t dss_board_open(int memfd, dss_board_t **board_p, dss_error_t *error_p) {
    struct stat status;
    const int seals = fcntl(memfd, F_GET_SEALS);
    if (seals < 0 || (seals & SEALS) != SEALS) /* cut short under us, it would be a fatal signal to touch it */
        return dss_fail(error_p, DSS_ERR_CORRUPT, "the peer's board is no sealed shared memory");
    if (fstat(memfd, &status) || status.st_size != (off_t)BOARD_BYTES)
        return dss_fail(error_p, DSS_ERR_CORRUPT, "the peer's board has another size than %zu bytes", BOARD_BYTES);
    return board_map(memfd, board_p, error_p);
}

void dss_board_destroy(dss_board_t *board) {
    if (!board)
        return;
    (void)munmap(board->mapping, BOARD_BYTES);
    if (board->memfd >= 0)
        dss_descriptor_close(board->memfd);
    free(board);
}

int dss_board_memfd(const dss_board_t *board) {
    return board->memfd;
}

uint8_t *dss_board_slot(const dss_board_t *board, uint32_t slot) {
    return board->mapping + SLOTS_AT + slot * DSS_BOARD_SLOT_BYTES;
}

int dss_board_take(dss_board_t *board, uint32_t readers) {
    for (uint32_t i = 0; i < DSS_BOARD_SLOTS; i++) {
        const uint32_t slot = (board->next + i) % DSS_BOARD_SLOTS;
        if (atomic_load(&count_of(board, slot)->readers) != 0)
            continue;
        atomic_store(&count_of(board, slot)->readers, readers);
        board->next = slot + 1;
        return (int)slot;
    }
    return -1;
}

void dss_board_give(dss_board_t *board, uint32_t slot) {
    (void)atomic_fetch_sub(&count_of(board, slot)->readers, 1);
}
