/* SPDX-License-Identifier: MIT
 * The tokenizer's tables, and encoding. */
#include "src/tokenizer_private.h"

#include <stdlib.h>
#include <string.h>

#include "src/log.h"
#include "src/min_heap.h"

const char poe_split_expression[] = "'(?i:[sdmt]|ll|ve|re)|[^\\r\\n\\p{L}\\p{N}]?+\\p{L}+|\\p{N}{1,2}|"
                                    " ?[^\\s\\p{L}\\p{N}]++[\\r\\n]*|\\s*[\\r\\n]|\\s+(?!\\S)|\\s+";
const char *const poe_special_names[POE_SPECIAL_TOKENS] = {
    "<|bos|>",          "<|user_start|>", "<|user_end|>",     "<|assistant_start|>", "<|assistant_end|>",
    "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>",
};

static poe_status out_of_memory(void) {
    poe_error("out of memory for the tokenizer");
    return POE_FAILED;
}

poe_status poe_tokenizer_create(const char *expression, int size, size_t n_merges, const char *owner,
                                poe_tokenizer **tokenizer) {
    poe_tokenizer *t = calloc(1, sizeof(*t));
    if (!t)
        return out_of_memory();
    t->size = size;
    t->n_merges = n_merges;
    t->expression = strdup(expression);
    t->tokens = calloc((size_t)size, sizeof(*t->tokens));
    t->merges = calloc(n_merges + 1, sizeof(*t->merges));
    poe_status status =
        t->expression && t->tokens && t->merges ? poe_pattern_compile(expression, owner, &t->pattern) : out_of_memory();
    if (status == POE_OK)
        *tokenizer = t;
    else
        poe_tokenizer_destroy(t);
    return status;
}

poe_status poe_tokenizer_set(poe_tokenizer *tokenizer, int id, const char *bytes, size_t length, bool special) {
    char *copy = malloc(length + 1);
    if (!copy)
        return out_of_memory();
    memcpy(copy, bytes, length);
    copy[length] = '\0';
    tokenizer->tokens[id] = (poe_token){copy, length, special};
    return POE_OK;
}

static poe_status index_tokens(poe_tokenizer *t, const char *owner) {
    t->bos = -1;
    memset(t->byte_ids, 0xff, sizeof(t->byte_ids));
    for (int id = 0; id < t->size; id++) {
        const poe_token *token = &t->tokens[id];
        if (token->special && strcmp(token->bytes, poe_special_names[0]) == 0)
            t->bos = id;
        else if (!token->special && token->length == 1)
            t->byte_ids[(unsigned char)token->bytes[0]] = id;
    }
    for (int byte = 0; byte < 256; byte++)
        if (t->byte_ids[byte] < 0) {
            poe_error("%s: the vocabulary has no token for byte %d", owner, byte);
            return POE_BAD_INPUT;
        }
    if (t->bos < 0) {
        poe_error("%s: there is no special token %s", owner, poe_special_names[0]);
        return POE_BAD_INPUT;
    }
    return POE_OK;
}

poe_status poe_tokenizer_complete(poe_tokenizer *tokenizer, const char *owner) {
    poe_status status = index_tokens(tokenizer, owner);
    for (size_t i = 0; i < tokenizer->n_merges && status == POE_OK; i++) {
        const poe_merge *merge = &tokenizer->merges[i];
        uint64_t key = poe_pair_key((uint32_t)merge->left, (uint32_t)merge->right);
        uint32_t other = poe_pair_map_find(&tokenizer->ranks, key);
        if (other != POE_NONE) {
            poe_error("%s: merge %zu repeats merge %u (counted from 0)", owner, i, other);
            status = POE_BAD_INPUT;
        } else if (!poe_pair_map_add(&tokenizer->ranks, key, (uint32_t)i)) {
            status = out_of_memory();
        }
    }
    return status;
}

void poe_tokenizer_destroy(poe_tokenizer *tokenizer) {
    if (!tokenizer)
        return;
    for (int id = 0; tokenizer->tokens && id < tokenizer->size; id++)
        free(tokenizer->tokens[id].bytes);
    poe_pair_map_finish(&tokenizer->ranks);
    poe_pattern_destroy(tokenizer->pattern);
    free(tokenizer->merges);
    free(tokenizer->tokens);
    free(tokenizer->expression);
    free(tokenizer);
}

int poe_tokenizer_size(const poe_tokenizer *tokenizer) {
    return tokenizer->size;
}

int poe_tokenizer_bos(const poe_tokenizer *tokenizer) {
    return tokenizer->bos;
}

const char *poe_tokenizer_bytes(const poe_tokenizer *tokenizer, int id, size_t *length) {
    const poe_token *token = &tokenizer->tokens[id];
    *length = token->special ? 0 : token->length;
    return token->special ? "" : token->bytes;
}

const char *poe_tokenizer_special(const poe_tokenizer *tokenizer, int id) {
    return tokenizer->tokens[id].special ? tokenizer->tokens[id].bytes : NULL;
}

static uint64_t hash_number(uint64_t hash, uint64_t number) {
    unsigned char bytes[8]; /* little-endian everywhere: a checkpoint may move */
    for (int i = 0; i < 8; i++)
        bytes[i] = (unsigned char)(number >> 8 * i);
    return poe_hash_bytes(hash, bytes, sizeof(bytes));
}

uint64_t poe_tokenizer_hash(const poe_tokenizer *tokenizer) {
    uint64_t hash = poe_hash_bytes(POE_HASH_START, tokenizer->expression, strlen(tokenizer->expression) + 1);
    hash = hash_number(hash, (uint64_t)tokenizer->size);
    for (int id = 0; id < tokenizer->size; id++) {
        const poe_token *token = &tokenizer->tokens[id];
        hash = hash_number(hash, (uint64_t)token->length << 1 | token->special);
        hash = poe_hash_bytes(hash, token->bytes, token->length);
    }
    for (size_t i = 0; i < tokenizer->n_merges; i++)
        hash =
            hash_number(hash, poe_pair_key((uint32_t)tokenizer->merges[i].left, (uint32_t)tokenizer->merges[i].right));
    return hash;
}

/* ---- Encoding ---- */

/* Text repeats its words: the ids of short pieces are kept, each in the one slot its hash names. */
enum { CACHE_BITS = 15, CACHED_BYTES = 30, CACHED_IDS = 8 };

typedef struct cached_piece { /* one cache line */
    int32_t ids[CACHED_IDS];
    uint8_t count;
    uint8_t length; /* 0: free slot */
    char bytes[CACHED_BYTES];
} cached_piece;

/* A token within the piece being merged; places are linked, and one is left out when it joins its left neighbour. */
typedef struct place {
    int32_t id;
    uint32_t rank; /* of the merge with the next place; POE_NONE: there is none */
    uint32_t previous, next;
} place;

struct poe_encoder {
    const poe_tokenizer *tokenizer;
    poe_splitter *splitter;
    cached_piece *cache;
    int32_t *ids;
    size_t count, capacity;
    place *places;
    poe_min_heap candidates; /* (rank, place), valid while the place still has that rank */
    size_t piece_capacity;
};

void poe_encoder_destroy(poe_encoder *encoder) {
    if (!encoder)
        return;
    poe_splitter_destroy(encoder->splitter);
    free(encoder->candidates.items);
    free(encoder->places);
    free(encoder->ids);
    free(encoder->cache);
    free(encoder);
}

/* Room for the ids of `bytes` more bytes, and to merge them when they are one piece. */
static poe_status reserve(poe_encoder *e, size_t bytes) {
    if (bytes > e->capacity - e->count) {
        size_t capacity = 2 * e->capacity + bytes;
        int32_t *ids = realloc(e->ids, capacity * sizeof(*ids));
        if (!ids)
            return out_of_memory();
        e->ids = ids;
        e->capacity = capacity;
    }
    if (bytes <= e->piece_capacity)
        return POE_OK;
    if (bytes >= POE_NONE) {
        poe_error("a text has a piece of %zu bytes without a break; 4 GiB are the limit", bytes);
        return POE_FAILED;
    }
    free(e->places);
    free(e->candidates.items);
    e->piece_capacity = bytes + 256;
    e->places = malloc(e->piece_capacity * sizeof(*e->places));
    /* Every neighbourhood of bytes, and two new ones for each merge. */
    e->candidates.items = malloc(3 * e->piece_capacity * sizeof(*e->candidates.items));
    if (e->places && e->candidates.items)
        return POE_OK;
    e->piece_capacity = 0;
    return out_of_memory();
}

poe_status poe_encoder_create(const poe_tokenizer *tokenizer, poe_encoder **encoder) {
    poe_encoder *e = calloc(1, sizeof(*e));
    if (!e)
        return out_of_memory();
    e->tokenizer = tokenizer;
    e->cache = calloc((size_t)1 << CACHE_BITS, sizeof(*e->cache));
    poe_status status = e->cache ? poe_splitter_create(tokenizer->pattern, &e->splitter) : out_of_memory();
    if (status == POE_OK)
        status = reserve(e, CACHED_IDS);
    if (status == POE_OK)
        *encoder = e;
    else
        poe_encoder_destroy(e);
    return status;
}

/* Looks up the merge of place i with its next one. */
static void consider(poe_encoder *e, uint32_t i) {
    place *p = &e->places[i];
    p->rank = POE_NONE;
    if (p->next == POE_NONE)
        return;
    p->rank = poe_pair_map_find(&e->tokenizer->ranks, poe_pair_key((uint32_t)p->id, (uint32_t)e->places[p->next].id));
    if (p->rank != POE_NONE)
        poe_heap_push(&e->candidates, (poe_heap_item){p->rank, i});
}

/* Applies the merge of lowest rank, the leftmost of equals, until there is none. */
static void merge_piece(poe_encoder *e, const char *piece, uint32_t length) {
    place *places = e->places;
    for (uint32_t i = 0; i < length; i++)
        places[i] = (place){e->tokenizer->byte_ids[(unsigned char)piece[i]], POE_NONE, i - 1, i + 1};
    places[length - 1].next = POE_NONE; /* and places[0].previous is 0 - 1 = POE_NONE */
    e->candidates.count = 0;
    for (uint32_t i = 0; i < length; i++)
        consider(e, i);
    while (e->candidates.count) {
        poe_heap_item best = poe_heap_pop(&e->candidates);
        place *left = &places[best.minor];
        if (left->rank != best.major)
            continue;
        place *right = &places[left->next];
        left->id = e->tokenizer->merges[best.major].result;
        left->next = right->next;
        right->rank = POE_NONE;
        if (left->next != POE_NONE)
            places[left->next].previous = (uint32_t)best.minor;
        consider(e, (uint32_t)best.minor);
        if (left->previous != POE_NONE)
            consider(e, left->previous);
    }
    for (uint32_t i = 0; i != POE_NONE; i = places[i].next)
        e->ids[e->count++] = places[i].id;
}

static poe_status encode_piece(poe_encoder *e, const char *piece, size_t length) {
    poe_status status = reserve(e, length > CACHED_IDS ? length : CACHED_IDS);
    if (status != POE_OK)
        return status;
    if (length > CACHED_BYTES) {
        merge_piece(e, piece, (uint32_t)length);
        return POE_OK;
    }
    uint64_t hash = poe_hash_bytes(POE_HASH_START, piece, length);
    cached_piece *cached = &e->cache[(hash ^ hash >> 32) & (((size_t)1 << CACHE_BITS) - 1)];
    if (cached->length == length && memcmp(cached->bytes, piece, length) == 0) {
        memcpy(e->ids + e->count, cached->ids, sizeof(cached->ids)); /* all, which is faster than `count` of them */
        e->count += cached->count;
        return POE_OK;
    }
    size_t start = e->count;
    merge_piece(e, piece, (uint32_t)length);
    if (e->count - start > CACHED_IDS)
        return POE_OK;
    cached->length = (uint8_t)length;
    cached->count = (uint8_t)(e->count - start);
    memcpy(cached->bytes, piece, length);
    memcpy(cached->ids, e->ids + start, cached->count * sizeof(*cached->ids));
    return POE_OK;
}

poe_status poe_encoder_encode(poe_encoder *encoder, const char *text, size_t bytes, const int32_t **ids, size_t *count,
                              size_t *bad_byte) {
    const char *piece;
    size_t length;
    poe_status status;
    encoder->count = 0;
    poe_splitter_start(encoder->splitter, text, bytes);
    while ((status = poe_splitter_next(encoder->splitter, &piece, &length)) == POE_OK)
        if ((status = encode_piece(encoder, piece, length)) != POE_OK)
            return status;
    if (status == POE_BAD_INPUT && bad_byte)
        *bad_byte = length;
    if (status != POE_END)
        return status;
    *ids = encoder->ids;
    *count = encoder->count;
    return POE_OK;
}
