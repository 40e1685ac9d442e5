/* SPDX-License-Identifier: MIT
 * Evaluation (spec 4): bits per byte and top-1 accuracy of every stage alone, every prefix's aggregate, and thereby the
 * full aggregate, in one pass of the held-out text down the chain. Running sums of log-probabilities ride forward in
 * chunks of rows, so that no rank ever holds the logits of a batch. */
#ifndef POE_PIPELINE_EVALUATE_H
#define POE_PIPELINE_EVALUATE_H

#include <jansson.h>
#include <stdint.h>

#include "comm/comm.h"
#include "pipeline/corpus.h"
#include "pipeline/streams.h"
#include "stages/stage.h"

/* How stages are combined: log_softmax of the mean of their log-probabilities; of the sum of their logits; or the mean
 * of log-probabilities as it is, unnormalised (what the original's evaluation scores). */
typedef enum poe_aggregate { POE_AGGREGATE_MEAN, POE_AGGREGATE_SUM, POE_AGGREGATE_MEAN_RAW } poe_aggregate;
poe_aggregate poe_aggregate_parse(const char *text); /* "mean" | "sum" | "mean-raw", checked before */

typedef struct poe_score {
    double nats;  /* summed over targets that count; NAN: a stage could not work */
    int64_t right; /* whose most probable token was the target */
} poe_score;

typedef struct poe_evaluation {
    int n_stages; /* that predict */
    poe_score stage[POE_MAX_STAGES], prefix[POE_MAX_STAGES]; /* the last prefix is the full aggregate */
    int64_t targets, bytes; /* that count: targets whose token has bytes */
} poe_evaluation;

/* Everything that an evaluation needs; all borrowed. */
typedef struct poe_evaluator {
    poe_comm *comm;
    poe_stage *stage;
    poe_streams *streams;
    poe_corpus *corpus;
    int first_head, heads; /* stages that predict: so many, from this one on */
    bool absent;           /* this stage cannot work: it has no scores, nor has any behind it */
    bool replicated;       /* every rank has the whole model, and takes its part of the micro-batches */
    poe_aggregate aggregate;
    float *z, *lp;   /* (chunk rows, V) each */
    size_t chunk;    /* rows of a chunk */
    /* After each micro-batch, while `next` says where the evaluation goes on; NULL: nothing is done. */
    poe_status (*between)(void *context, int64_t step);
    void *context;
    struct {
        int32_t micro, chunk; /* micro-batches and chunks done of the evaluation under way; 0: none is */
    } next;
} poe_evaluator;

/* Rows of a chunk for a vocabulary: a few MiB of log-probabilities. */
size_t poe_evaluate_chunk_rows(const poe_stage *stage);

/* Collective. `step`: updates done, for the messages' headers. The result is the same on every rank. Goes on from
 * evaluator->next, in whose place the result is then what it was there. */
poe_status poe_evaluate(poe_evaluator *evaluator, int64_t step, poe_evaluation *result);

/* Adds stage `stage_index`'s logits z (n,v) to the running sums (n,v); lp (n,v) receives its log-probabilities. */
void poe_aggregate_add(poe_aggregate how, float *sums, float *lp, const float *z, size_t n, size_t v);
/* The aggregate's log-probabilities out (n,v) of `n_stages` stages' running sums; out may be sums. */
void poe_aggregate_finish(poe_aggregate how, float *out, const float *sums, int n_stages, size_t n, size_t v);

double poe_evaluation_bpb(const poe_evaluation *e, const poe_score *score);
double poe_evaluation_nats(const poe_evaluation *e, const poe_score *score); /* per token */
double poe_evaluation_accuracy(const poe_evaluation *e, const poe_score *score);

/* The line of metrics.jsonl: bpb (or, without a tokenizer, nats) and accuracy, each {stage: [], prefix: [], aggregate}. */
json_t *poe_evaluation_json(const poe_evaluation *e, int64_t step, bool has_tokenizer);

#endif
