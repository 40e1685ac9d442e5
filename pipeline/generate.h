/* SPDX-License-Identifier: MIT
 * Text from a model, one token at a time through the chain of stages. The whole context is computed anew for every
 * token. */
#ifndef POE_PIPELINE_GENERATE_H
#define POE_PIPELINE_GENERATE_H

#include <stdint.h>

#include "pipeline/evaluate.h"

typedef struct poe_sampling {
    int first, last;    /* stages whose predictions are combined: first == last is one stage alone, 0..j a prefix */
    int max_tokens;
    double temperature; /* 0: always the most probable token */
    int top_k;          /* 0: all */
    uint64_t seed;
} poe_sampling;

/* Called on rank 0 with each new token. */
typedef void (*poe_emit)(void *arg, int32_t token);
/* Writes the token's bytes to standard output; `tokenizer`: a const poe_tokenizer. */
void poe_emit_text(void *tokenizer, int32_t token);

/* Collective over ranks 0..last of the evaluator's comm, which must be all of them. `prompt` (n_prompt tokens, <|bos|>
 * first; n_prompt >= 1) counts on rank 0 alone. Ends after max_tokens or at the next <|bos|>. */
poe_status poe_generate(poe_evaluator *evaluator, const poe_sampling *sampling, const int32_t *prompt, int32_t n_prompt,
                        int32_t bos, poe_emit emit, void *arg);

/* The next token from log-probabilities lp (v), which are overwritten. `uniform`: a number in [0, 1). */
int32_t poe_sample(float *lp, size_t v, double temperature, int top_k, double uniform);

#endif
