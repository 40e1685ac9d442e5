/* SPDX-License-Identifier: MIT */
#include "src/arena.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "src/log.h"

size_t poe_arena_round(size_t bytes)
{
    return (bytes + POE_ALIGN - 1) / POE_ALIGN * POE_ALIGN;
}

poe_status poe_arena_create(poe_arena *arena, const char *name, size_t bytes)
{
    char *base = NULL;
    if (bytes) {
        base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base == MAP_FAILED) {
            poe_error("cannot allocate %.1f MiB for %s: %s", (double)bytes / 0x1p20, name, strerror(errno));
            return POE_FAILED;
        }
        madvise(base, bytes, MADV_HUGEPAGE); /* advice: a system without huge pages runs as well, only slower */
    }
    *arena = (poe_arena){.name = name, .base = base, .size = bytes};
    return POE_OK;
}

void poe_arena_destroy(poe_arena *arena)
{
    if (arena->base)
        munmap(arena->base, arena->size);
    *arena = (poe_arena){0};
}

void *poe_arena_take(poe_arena *arena, size_t bytes)
{
    size_t rounded = poe_arena_round(bytes);
    if (rounded > arena->size - arena->used) {
        poe_error("internal error: %s needs %zu bytes more than its size of %zu", arena->name, rounded, arena->size);
        abort();
    }
    void *piece = arena->base + arena->used;
    arena->used += rounded;
    return piece;
}
