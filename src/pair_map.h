/* SPDX-License-Identifier: MIT
 * A map from 64-bit keys (pairs of tokens, hashes) to 32-bit values, by open addressing. Zeroed memory is an empty one.
 * Keys are not removed. */
#ifndef POE_SRC_PAIR_MAP_H
#define POE_SRC_PAIR_MAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define POE_NONE UINT32_MAX /* the value of what is not there */

typedef struct poe_pair_entry {
    uint64_t key;
    uint32_t value; /* POE_NONE: free */
} poe_pair_entry;

typedef struct poe_pair_map {
    poe_pair_entry *entries; /* 2^bits, half of them free at least */
    unsigned bits;
    size_t used;
} poe_pair_map;

static inline uint64_t poe_pair_key(uint32_t left, uint32_t right) {
    return (uint64_t)left << 32 | right;
}

/* The entry of `key`, or the free one where it belongs. */
static inline poe_pair_entry *poe_pair_map_entry(const poe_pair_map *map, uint64_t key) {
    size_t mask = ((size_t)1 << map->bits) - 1;
    size_t i = (size_t)(key * 0x9E3779B97F4A7C15u >> (64 - map->bits)); /* Fibonacci hashing: 2^64 / golden ratio */
    while (map->entries[i].value != POE_NONE && map->entries[i].key != key)
        i = (i + 1) & mask;
    return &map->entries[i];
}

/* POE_NONE when absent. */
static inline uint32_t poe_pair_map_find(const poe_pair_map *map, uint64_t key) {
    return map->entries ? poe_pair_map_entry(map, key)->value : POE_NONE;
}

/* Room for one more key; false when out of memory. */
static inline bool poe_pair_map_reserve(poe_pair_map *map) {
    if (map->entries && map->used < ((size_t)1 << map->bits) / 2)
        return true;
    poe_pair_map larger = {.bits = map->entries ? map->bits + 1 : 10, .used = map->used};
    larger.entries = malloc(sizeof(*larger.entries) << larger.bits);
    if (!larger.entries)
        return false;
    memset(larger.entries, 0xff, sizeof(*larger.entries) << larger.bits);
    for (size_t i = 0; map->entries && i < (size_t)1 << map->bits; i++)
        if (map->entries[i].value != POE_NONE)
            *poe_pair_map_entry(&larger, map->entries[i].key) = map->entries[i];
    free(map->entries);
    *map = larger;
    return true;
}

/* Adds a key that is not there yet; false when out of memory. */
static inline bool poe_pair_map_add(poe_pair_map *map, uint64_t key, uint32_t value) {
    if (!poe_pair_map_reserve(map))
        return false;
    *poe_pair_map_entry(map, key) = (poe_pair_entry){key, value};
    map->used++;
    return true;
}

static inline void poe_pair_map_finish(poe_pair_map *map) {
    free(map->entries);
    *map = (poe_pair_map){0};
}

#endif
