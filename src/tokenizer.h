/* SPDX-License-Identifier: MIT
 * Byte-level BPE with nanochat's split pattern and 9 special tokens. Texts are UTF-8; a token is a sequence of bytes.
 * Ids: 0..255 the bytes in order (id = byte value), then merges in the order they were learned, last the special tokens. A finished tokenizer is read-only and may
 * be shared by threads, each encoding with its own poe_encoder. */
#ifndef POE_SRC_TOKENIZER_H
#define POE_SRC_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "src/status.h"

typedef struct poe_tokenizer poe_tokenizer;
typedef struct poe_encoder poe_encoder;

enum { POE_SPECIAL_TOKENS = 9, POE_VOCAB_MIN = 256 + POE_SPECIAL_TOKENS };

/* A source of texts: gives the next one (borrowed until the next call) or POE_END; any other code stops the caller. */
typedef poe_status (*poe_text_source)(void *arg, const char **text, size_t *bytes);

/* Learns vocab_size - 256 - 9 merges, fewer when the text has no more pairs. POE_BAD_INPUT: vocab_size below
 * POE_VOCAB_MIN or above 65536, or text that is not UTF-8. The caller owns the result. */
poe_status poe_tokenizer_train(poe_text_source source, void *arg, int vocab_size, poe_tokenizer **tokenizer);

/* Hugging Face tokenizer.json. Reading accepts any byte-level BPE with <|bos|>, with ids in any order and a split pattern
 * of its own; POE_BAD_INPUT names the file and what is wrong with it. Writing goes through a temporary file. */
poe_status poe_tokenizer_read(const char *path, poe_tokenizer **tokenizer);
poe_status poe_tokenizer_write(const poe_tokenizer *tokenizer, const char *path);
void poe_tokenizer_destroy(poe_tokenizer *tokenizer); /* NULL is legal */

int poe_tokenizer_size(const poe_tokenizer *tokenizer); /* ids are below it */
int poe_tokenizer_bos(const poe_tokenizer *tokenizer);
/* The bytes of a token; a special token's length is 0 here, and its name comes from poe_tokenizer_special(). */
const char *poe_tokenizer_bytes(const poe_tokenizer *tokenizer, int id, size_t *length);
const char *poe_tokenizer_special(const poe_tokenizer *tokenizer, int id); /* NULL when it is an ordinary token */
/* Fingerprint of all that decides ids: checkpoints compare it. */
uint64_t poe_tokenizer_hash(const poe_tokenizer *tokenizer);

poe_status poe_encoder_create(const poe_tokenizer *tokenizer, poe_encoder **encoder); /* borrows the tokenizer */
void poe_encoder_destroy(poe_encoder *encoder);
/* Ids of `text`, without <|bos|>; names of special tokens inside it are plain text. *ids belongs to the encoder and
 * lasts until its next call. POE_BAD_INPUT when it is not UTF-8: *bad_byte (may be NULL) is the offset; not said. */
poe_status poe_encoder_encode(poe_encoder *encoder, const char *text, size_t bytes, const int32_t **ids, size_t *count,
                              size_t *bad_byte);

#endif
