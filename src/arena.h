/* SPDX-License-Identifier: MIT
 * One block of memory, sized before it is allocated and handed out in pieces that are never given back singly. */
#ifndef POE_SRC_ARENA_H
#define POE_SRC_ARENA_H

#include <stddef.h>

#include "src/status.h"

enum { POE_ALIGN = 64 }; /* bytes: a cache line, and the widest vector register */

typedef struct poe_arena {
    const char *name; /* borrowed; for messages */
    char *base;
    size_t size; /* bytes */
    size_t used; /* bytes */
} poe_arena;

/* `bytes` rounded up to what a piece takes in an arena. */
size_t poe_arena_round(size_t bytes);

/* Zeroed memory of `bytes` bytes (0 is legal), on huge pages where the system has them. POE_FAILED: said. */
poe_status poe_arena_create(poe_arena *arena, const char *name, size_t bytes);
void poe_arena_destroy(poe_arena *arena);

/* The next `bytes` bytes, aligned to POE_ALIGN. Asking for more than is left is our bug: it aborts. */
void *poe_arena_take(poe_arena *arena, size_t bytes);

#endif
