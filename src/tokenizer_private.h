/* SPDX-License-Identifier: MIT
 * What training, the file format and encoding know of a tokenizer. Made by poe_tokenizer_create(), filled with its
 * tokens and merges, then closed by poe_tokenizer_complete(). */
#ifndef POE_SRC_TOKENIZER_PRIVATE_H
#define POE_SRC_TOKENIZER_PRIVATE_H

#include "src/pair_map.h"
#include "src/splitter.h"
#include "src/tokenizer.h"

/* Of the tokenizers that we train, as nanochat has them. */
extern const char poe_split_expression[];
extern const char *const poe_special_names[POE_SPECIAL_TOKENS]; /* <|bos|> first */

typedef struct poe_token {
    char *bytes; /* NULL: not set yet; NUL-terminated */
    size_t length;
    bool special; /* `bytes` is its name */
} poe_token;

typedef struct poe_merge {
    int32_t left, right, result; /* ids */
} poe_merge;

struct poe_tokenizer {
    char *expression;
    poe_pattern *pattern;
    poe_token *tokens;
    int size;
    int bos;
    int32_t byte_ids[256];
    poe_merge *merges; /* in the order in which they are applied */
    size_t n_merges;
    poe_pair_map ranks; /* pair of ids -> index of its merge */
};

/* Room for `size` tokens and `n_merges` merges, all of them to be set. `owner` names the tokenizer in messages. */
poe_status poe_tokenizer_create(const char *expression, int size, size_t n_merges, const char *owner,
                                poe_tokenizer **tokenizer);
poe_status poe_tokenizer_set(poe_tokenizer *tokenizer, int id, const char *bytes, size_t length, bool special);
/* POE_BAD_INPUT, said: a byte without a token, no <|bos|>, a merge given twice. */
poe_status poe_tokenizer_complete(poe_tokenizer *tokenizer, const char *owner);

/* poe_tokenizer_read() from memory; `path` is for messages. */
poe_status poe_tokenizer_parse(const char *path, const char *data, size_t size, poe_tokenizer **tokenizer);

/* FNV-1a, continuing from `hash`; POE_HASH_START to start. */
#define POE_HASH_START UINT64_C(0xcbf29ce484222325)
static inline uint64_t poe_hash_bytes(uint64_t hash, const void *data, size_t bytes) {
    const unsigned char *p = data;
    for (size_t i = 0; i < bytes; i++)
        hash = (hash ^ p[i]) * UINT64_C(0x100000001b3);
    return hash;
}

#endif
