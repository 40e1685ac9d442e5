/* SPDX-License-Identifier: MIT
 * A binary heap whose top is the smallest item, by `major`, then `minor`. The caller owns the memory and sees to its
 * size. Users leave stale items in it and recognise them when they come up. */
#ifndef POE_SRC_MIN_HEAP_H
#define POE_SRC_MIN_HEAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct poe_heap_item {
    uint64_t major;
    uint64_t minor;
} poe_heap_item;

typedef struct poe_min_heap {
    poe_heap_item *items;
    size_t count;
} poe_min_heap;

static inline bool poe_heap_before(poe_heap_item a, poe_heap_item b) {
    return a.major != b.major ? a.major < b.major : a.minor < b.minor;
}

static inline void poe_heap_push(poe_min_heap *heap, poe_heap_item item) {
    size_t i = heap->count++;
    for (; i > 0 && poe_heap_before(item, heap->items[(i - 1) / 2]); i = (i - 1) / 2)
        heap->items[i] = heap->items[(i - 1) / 2];
    heap->items[i] = item;
}

/* The smallest item of a heap that is not empty. */
static inline poe_heap_item poe_heap_pop(poe_min_heap *heap) {
    poe_heap_item top = heap->items[0], last = heap->items[--heap->count];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < heap->count; i = child) {
        if (child + 1 < heap->count && poe_heap_before(heap->items[child + 1], heap->items[child]))
            child++;
        if (!poe_heap_before(heap->items[child], last))
            break;
        heap->items[i] = heap->items[child];
    }
    heap->items[i] = last;
    return top;
}

#endif
