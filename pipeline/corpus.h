/* SPDX-License-Identifier: MIT
 * The data of a run: read by the rank of stage 0 alone, or by every replica; what others must know is broadcast. */
#ifndef POE_PIPELINE_CORPUS_H
#define POE_PIPELINE_CORPUS_H

#include <stdbool.h>
#include <stdint.h>

#include "comm/comm.h"
#include "src/feed.h"
#include "src/options.h"
#include "src/tokenizer.h"

typedef struct poe_corpus {
    /* known to every rank */
    int vocab_size;
    bool has_tokenizer;   /* false: token shards alone; evaluation is in nats per token */
    int32_t *token_bytes; /* (vocab_size): bytes of each token, 0 for special ones; all 1 without a tokenizer */
    int32_t n_eval;       /* micro-batches of an evaluation; 0: there is no held-out text */
    int32_t *eval_rows;   /* (n_eval): rows of each */
    bool reads; /* rank 0, or every replica */
    /* those who read */
    poe_tokenizer *tokenizer;
    bool trained; /* the tokenizer was trained from the data just now */
    poe_feed *train, *eval;
    uint64_t train_hash; /* poe_feed_hash() of train */
    json_t *eval_start;
} poe_corpus;

/* Collective. `everywhere`: every rank reads the data, else rank 0 alone. Tokenizer: read from --tokenizer, or `stored` when that is not NULL (a resumed run's own), or trained
 * from --data. POE_BAD_INPUT on every rank, said once. */
poe_status poe_corpus_open_tokenizer(poe_corpus *corpus, poe_comm *comm, const poe_options *options, const char *stored,
                                     bool everywhere);

/* Collective, after the vocabulary is known. Opens the training data unless `evaluation_only`, and what is evaluated. */
poe_status poe_corpus_open_feeds(poe_corpus *corpus, poe_comm *comm, const poe_options *options, bool evaluation_only);

void poe_corpus_close(poe_corpus *corpus);

#endif
