/*
 * board.h: results that several processes of one host read and one writes, once.
 *
 * Who has reduced a shard would copy it into the ring of each other rank. On its board, a sealed memfd that all of them map, it is
 * copied once, and the rings carry only where it lies. A slot is free again when all who were told have read it: they count it
 * down. The key choice: nobody ever waits for the board. Without a free slot, or where it cannot be shown, values go through the
 * rings. A reader may write anything there at any time: slots and sizes come in frames and are checked, a count that makes no sense
 * costs the owner a slot, or lets it write where somebody still reads, who then has wrong values, as any rank can give to any
 * other. No locks: owner and readers call under their engines', and meet in the slots' atomic counts.
 */
#ifndef DSS_BOARD_H
#define DSS_BOARD_H

#include <stddef.h>
#include <stdint.h>

#include "status.h"

#define DSS_BOARD_SLOT_BYTES ((size_t)64 << 10)
#define DSS_BOARD_SLOTS 32u

typedef struct dss_board dss_board_t; /* one process's mapping */

/* DSS_ERR_SYSTEM if the system has no sealed memfd for us. */
dss_status_t dss_board_create(dss_board_t **board_p, dss_error_t *error_p);
/* Maps what a peer showed; `memfd` stays the caller's. DSS_ERR_CORRUPT if it is not sealed, or of another size. */
dss_status_t dss_board_open(int memfd, dss_board_t **board_p, dss_error_t *error_p);
void dss_board_destroy(dss_board_t *board); /* NULL is allowed */

int dss_board_memfd(const dss_board_t *board); /* of one that was created: to be sent to readers, the board's to close */
uint8_t *dss_board_slot(const dss_board_t *board, uint32_t slot);
/* A free slot, from now on to be read by so many; -1 if there is none. */
int dss_board_take(dss_board_t *board, uint32_t readers);
/* One of them has read it, or is not going to. */
void dss_board_give(dss_board_t *board, uint32_t slot);

#endif
