/* SPDX-License-Identifier: MIT
 * Room in an area of the board. What is in use is remembered in memory of the process that hands it out: nothing in the
 * area itself can be left half done. Blocks come from the lowest address that has room, so that the same memory serves
 * again and again; of what is free, more than `keep` bytes are never held on to. */
#ifndef POE_COMM_AGENT_SPACE_H
#define POE_COMM_AGENT_SPACE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "src/status.h"

typedef struct poe_space_gap poe_space_gap;

typedef struct poe_space {
    unsigned char *area;
    uint64_t keep;
    uint64_t top;   /* what lies above has not been touched, or was given back */
    uint64_t stale; /* free bytes that may still take memory */
    poe_space_gap *gaps, *latest, *spare;
    size_t n_blocks, n_gaps;
} poe_space;

/* The area (POE_BOARD_AREA) is borrowed, from `from` on. POE_FAILED: out of memory, not said. */
poe_status poe_space_init(poe_space *space, unsigned char *area, uint64_t from, uint64_t keep);
void poe_space_finish(poe_space *space);
/* A block of `bytes`, which may be 0, aligned to 64. False: there is no room, or no memory to remember it in. */
bool poe_space_take(poe_space *space, uint64_t bytes, uint64_t *offset);
/* `bytes` as it was taken. Never fails. */
void poe_space_give(poe_space *space, uint64_t offset, uint64_t bytes);

#endif
