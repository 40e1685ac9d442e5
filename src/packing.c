/* SPDX-License-Identifier: MIT
 * Documents of one length queue in a bucket; the buckets are an array sorted by length. N tokens in the buffer have at
 * most sqrt(2 N) different lengths, and the short ones, which go first, are at its end: shifting it stays cheap. */
#include "src/packing.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "src/log.h"

typedef struct bucket {
    size_t length;
    size_t first, last; /* slots, oldest and newest */
} bucket;

typedef struct node {
    size_t after_in_bucket; /* or in the list of free slots */
    size_t before, after;   /* in order of age */
} node;

struct poe_packer {
    node *nodes;     /* by slot */
    bucket *buckets; /* by length, descending */
    size_t capacity, n_buckets, count;
    size_t free_slot; /* the first of a list */
    size_t oldest, newest;
};

poe_status poe_packer_create(size_t capacity, poe_packer **packer)
{
    poe_packer *created = calloc(1, sizeof(*created));
    if (created) {
        created->capacity = capacity;
        created->nodes = calloc(capacity + 1, sizeof(*created->nodes));
        created->buckets = calloc(capacity + 1, sizeof(*created->buckets));
    }
    if (!created || !created->nodes || !created->buckets) {
        poe_packer_destroy(created);
        poe_error("out of memory: a packing buffer for %zu documents", capacity);
        return POE_FAILED;
    }
    poe_packer_clear(created);
    *packer = created;
    return POE_OK;
}

void poe_packer_destroy(poe_packer *packer)
{
    if (!packer)
        return;
    free(packer->nodes);
    free(packer->buckets);
    free(packer);
}

void poe_packer_clear(poe_packer *packer)
{
    for (size_t i = 0; i < packer->capacity; i++)
        packer->nodes[i].after_in_bucket = i + 1 < packer->capacity ? i + 1 : POE_NO_SLOT;
    packer->free_slot = packer->capacity ? 0 : POE_NO_SLOT;
    packer->oldest = packer->newest = POE_NO_SLOT;
    packer->n_buckets = packer->count = 0;
}

size_t poe_packer_count(const poe_packer *packer)
{
    return packer->count;
}

/* Number of buckets whose length is above `length`. */
static size_t buckets_above(const poe_packer *packer, size_t length)
{
    size_t low = 0, high = packer->n_buckets;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (packer->buckets[middle].length > length)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

size_t poe_packer_add(poe_packer *packer, size_t length)
{
    size_t slot = packer->free_slot;
    assert(slot != POE_NO_SLOT);
    packer->free_slot = packer->nodes[slot].after_in_bucket;
    packer->nodes[slot] = (node){POE_NO_SLOT, packer->newest, POE_NO_SLOT};
    if (packer->newest == POE_NO_SLOT)
        packer->oldest = slot;
    else
        packer->nodes[packer->newest].after = slot;
    packer->newest = slot;
    packer->count++;

    size_t place = buckets_above(packer, length);
    if (place < packer->n_buckets && packer->buckets[place].length == length) {
        bucket *same = &packer->buckets[place];
        packer->nodes[same->last].after_in_bucket = slot;
        same->last = slot;
    } else {
        bucket *fresh = &packer->buckets[place];
        memmove(fresh + 1, fresh, (packer->n_buckets - place) * sizeof(*fresh));
        *fresh = (bucket){length, slot, slot};
        packer->n_buckets++;
    }
    return slot;
}

size_t poe_packer_take(poe_packer *packer, size_t room)
{
    if (!packer->count)
        return POE_NO_SLOT;
    size_t place = buckets_above(packer, room);
    bucket *chosen = &packer->buckets[place < packer->n_buckets ? place : packer->n_buckets - 1];
    size_t slot = chosen->first;
    node *taken = &packer->nodes[slot];
    chosen->first = taken->after_in_bucket;
    if (chosen->first == POE_NO_SLOT) {
        packer->n_buckets--;
        memmove(chosen, chosen + 1, (size_t)(packer->buckets + packer->n_buckets - chosen) * sizeof(*chosen));
    }

    *(taken->before == POE_NO_SLOT ? &packer->oldest : &packer->nodes[taken->before].after) = taken->after;
    *(taken->after == POE_NO_SLOT ? &packer->newest : &packer->nodes[taken->after].before) = taken->before;
    taken->after_in_bucket = packer->free_slot;
    packer->free_slot = slot;
    packer->count--;
    return slot;
}

size_t poe_packer_next(const poe_packer *packer, size_t slot)
{
    return slot == POE_NO_SLOT ? packer->oldest : packer->nodes[slot].after;
}
