/* SPDX-License-Identifier: MIT
 * Where micro-batches come from: packed documents, or token shards read in order; once or over and over; resumable at
 * any micro-batch. */
#ifndef POE_SRC_FEED_H
#define POE_SRC_FEED_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "src/documents.h"
#include "src/status.h"
#include "src/tokenizer.h"

typedef struct poe_feed poe_feed;

typedef struct poe_feed_settings {
    const char *const *paths; /* all .bin, or all documents; "raw:FILE" is a headerless uint16 .bin */
    int n_paths;
    poe_split split;                /* of .txt */
    const poe_tokenizer *tokenizer; /* borrowed; needed for documents, else may be NULL */
    int vocab_size;                 /* ids must be below it */
    size_t rows, t;                 /* B, T of a micro-batch */
    bool once;                      /* evaluation: stop at the end instead of starting over */
    double first, last;             /* share of the documents used: [first, last) of their number, e.g. 0, 0.9 and 0.9, 1.
                                       Boundary document = ceil(share * count). Shards: always 0, 1 */
    size_t buffer_documents;        /* 0: 1000. How many documents best-fit packing chooses among (once: all of them) */
    size_t batch_documents;         /* 0: 128. How many are added when the buffer runs low (golden packing: 8) */
} poe_feed_settings;

/* POE_BAD_INPUT: said, naming file and place. */
poe_status poe_feed_open(const poe_feed_settings *settings, poe_feed **feed);
void poe_feed_close(poe_feed *feed); /* NULL is legal */

/* The next micro-batch: *rows rows (below B only for the last ones of `once`) of idx (rows,t) and targets (rows,t).
 * POE_END: used up (`once`). */
poe_status poe_feed_next(poe_feed *feed, int32_t *idx, int32_t *targets, size_t *rows);

/* Times the data has been started over. */
int64_t poe_feed_epoch(const poe_feed *feed);
/* Fingerprint of what is read (names of formats, sizes, contents' CRC), so that resuming on other data is noticed. */
uint64_t poe_feed_hash(const poe_feed *feed);
/* Documents (0 for shards) and tokens (0 when unknown without encoding everything) in use. */
size_t poe_feed_documents(const poe_feed *feed);
size_t poe_feed_tokens(const poe_feed *feed);

/* The exact position (order, epoch, packing buffer) as JSON, a new reference (NULL: out of memory, said); and
 * going back to one. POE_BAD_INPUT: it is not one of this data (said, nothing has changed). */
json_t *poe_feed_position(const poe_feed *feed);
poe_status poe_feed_seek(poe_feed *feed, const json_t *position);

#endif
