/* SPDX-License-Identifier: MIT
 * The free parts are a list, in order of address. Freed blocks mostly follow each other, so that the place of one is
 * looked for from the place of the one before. */
#include "comm/agent/space.h"

#include <stdlib.h>

#include "comm/agent/board.h"

enum { ALIGNMENT = 64, PAGE = 1 << 16 /* a multiple of every page size in use */ };

/* A gap never ends where the next one begins. */
struct poe_space_gap {
    poe_space_gap *next;
    uint64_t from, end;
    uint64_t stale; /* of its bytes, how many may take memory, at most */
};

static uint64_t page_above(uint64_t offset)
{
    return (offset + PAGE - 1) / PAGE * PAGE;
}

/* A block of no bytes has a place of its own, too. */
static uint64_t rounded(uint64_t bytes)
{
    return bytes ? (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT : ALIGNMENT;
}

/* So many blocks leave one gap more at most; with those at hand, giving back needs no memory. */
static bool has_gaps_for(poe_space *space, size_t n_blocks)
{
    while (space->n_gaps < n_blocks + 1) {
        poe_space_gap *gap = malloc(sizeof(*gap));
        if (!gap)
            return false;
        gap->next = space->spare;
        space->spare = gap;
        space->n_gaps++;
    }
    return true;
}

static poe_space_gap *take_spare(poe_space *space)
{
    poe_space_gap *gap = space->spare;
    space->spare = gap->next;
    return gap;
}

static void make_spare(poe_space *space, poe_space_gap *gap)
{
    if (space->latest == gap)
        space->latest = NULL;
    gap->next = space->spare;
    space->spare = gap;
}

poe_status poe_space_init(poe_space *space, unsigned char *area, uint64_t from, uint64_t keep)
{
    *space = (poe_space){.area = area, .keep = keep, .top = from};
    if (!has_gaps_for(space, 0))
        return POE_FAILED;
    space->gaps = take_spare(space);
    *space->gaps = (poe_space_gap){.from = from, .end = POE_BOARD_AREA};
    return POE_OK;
}

static void free_list(poe_space_gap *list)
{
    for (poe_space_gap *next; list; list = next) {
        next = list->next;
        free(list);
    }
}

void poe_space_finish(poe_space *space)
{
    free_list(space->gaps);
    free_list(space->spare);
}

static uint64_t touched(const poe_space *space, const poe_space_gap *gap)
{
    uint64_t end = gap->end < space->top ? gap->end : space->top;
    return end > gap->from ? end - gap->from : 0;
}

bool poe_space_take(poe_space *space, uint64_t bytes, uint64_t *offset)
{
    uint64_t length = rounded(bytes);
    poe_space_gap **at = &space->gaps;
    while (*at && (*at)->end - (*at)->from < length)
        at = &(*at)->next;
    poe_space_gap *gap = *at;
    if (!gap || !has_gaps_for(space, space->n_blocks + 1))
        return false;
    *offset = gap->from;
    gap->from += length;
    if (space->top < gap->from)
        space->top = page_above(gap->from);
    uint64_t most = touched(space, gap);
    if (gap->stale > most) {
        space->stale -= gap->stale - most;
        gap->stale = most;
    }
    if (gap->from == gap->end) {
        *at = gap->next;
        make_spare(space, gap);
    }
    space->n_blocks++;
    return true;
}

static void forget_gaps(poe_space *space)
{
    for (poe_space_gap *gap = space->gaps; gap; gap = gap->next) {
        if (gap->stale)
            poe_board_forget(space->area + gap->from, touched(space, gap));
        gap->stale = 0;
        if (gap->end == POE_BOARD_AREA)
            space->top = page_above(gap->from);
    }
    space->stale = 0;
}

/* The last gap before an address; NULL: there is none. */
static poe_space_gap *gap_before(const poe_space *space, uint64_t offset)
{
    poe_space_gap *before = space->latest && space->latest->from < offset ? space->latest : NULL;
    for (poe_space_gap *gap = before ? before->next : space->gaps; gap && gap->from < offset; gap = gap->next)
        before = gap;
    return before;
}

void poe_space_give(poe_space *space, uint64_t offset, uint64_t bytes)
{
    uint64_t length = rounded(bytes), end = offset + length;
    poe_space_gap *gap = gap_before(space, offset), **next = gap ? &gap->next : &space->gaps, *after = *next;
    if (!gap || gap->end != offset) {
        gap = take_spare(space);
        *gap = (poe_space_gap){.next = after, .from = offset};
        *next = gap;
    }
    gap->end = end;
    gap->stale += length;
    if (after && after->from == end) {
        gap->end = after->end;
        gap->stale += after->stale;
        gap->next = after->next;
        make_spare(space, after);
    }
    space->latest = gap;
    space->stale += length;
    space->n_blocks--;
    if (space->stale > space->keep)
        forget_gaps(space);
}
