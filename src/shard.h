/* SPDX-License-Identifier: MIT
 * Token shards: llm.c's .bin (256 int32 of header: 20240520, 1, count; then uint16 tokens) and headerless uint16. */
#ifndef POE_SRC_SHARD_H
#define POE_SRC_SHARD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "src/status.h"

/* True when `path` names token shards rather than text: NAME.bin, or raw:NAME for a headerless one. */
bool poe_shard_named(const char *path);

typedef struct poe_shard {
    const uint16_t *tokens;
    size_t count;
    void *map;
    size_t map_bytes;
} poe_shard;

/* Maps a shard; `raw`: without a header. POE_BAD_INPUT: said (foreign magic or version, a count that does not match
 * the file's size, truncated, empty). */
poe_status poe_shard_open(const char *path, bool raw, poe_shard *shard);
void poe_shard_close(poe_shard *shard);

/* Writes a shard token by token: to a temporary name, renamed by finish. */
typedef struct poe_shard_writer poe_shard_writer;
poe_status poe_shard_writer_create(const char *path, poe_shard_writer **writer);
poe_status poe_shard_writer_add(poe_shard_writer *writer, const int32_t *tokens, size_t n);
poe_status poe_shard_writer_finish(poe_shard_writer *writer); /* frees it, also on failure */
void poe_shard_writer_discard(poe_shard_writer *writer);

#endif
