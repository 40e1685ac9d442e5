/* SPDX-License-Identifier: MIT
 * What was written where into a file, so that it can be read back from the disk and compared. */
#ifndef POE_SRC_PIECES_H
#define POE_SRC_PIECES_H

#include <stddef.h>
#include <stdint.h>

#include "src/status.h"

typedef struct poe_piece {
    uint64_t begin, end; /* bytes within the file */
    uint32_t crc;
} poe_piece;

/* Zero to start; the caller frees `at`. */
typedef struct poe_pieces {
    poe_piece *at;
    size_t count, room;
} poe_pieces;

/* POE_FAILED, said: out of memory. */
poe_status poe_pieces_add(poe_pieces *pieces, uint64_t begin, const void *data, size_t bytes);

/* Syncs the open file, reads every piece from the disk and compares. Leaves the pieces sorted by place. `path`: for
 * messages. POE_FAILED: said. */
poe_status poe_pieces_check(poe_pieces *pieces, int fd, const char *path);

#endif
