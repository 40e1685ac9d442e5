/* SPDX-License-Identifier: MIT
 * The messages between stages, on comm's links, one set per edge: micro-batches (tokens, targets, activations),
 * partial aggregates of an evaluation, and reports (losses and accounts of time ride forward). All travel
 * along the table of edges. */
#ifndef POE_PIPELINE_STREAMS_H
#define POE_PIPELINE_STREAMS_H

#include <stdbool.h>
#include <stdint.h>

#include "comm/comm.h"
#include "pipeline/accounts.h"
#include "pipeline/edges.h"
#include "src/arena.h"
#include "stages/model.h"

/* One per (direction, pair of ranks); the shared sum takes POE_CHANNEL_SHARED. */
typedef enum poe_channel {
    POE_CHANNEL_BATCH,
    POE_CHANNEL_AGGREGATE,
    POE_CHANNEL_REPORT,
    POE_CHANNEL_SHARED,
    POE_CHANNEL_EXPORT,
} poe_channel;

const char *poe_channel_name(poe_channel channel); /* what it carries: "activations", ... */

typedef enum poe_kind { POE_KIND_TRAIN = 1, POE_KIND_EVALUATE, POE_KIND_GENERATE, POE_KIND_AGGREGATE, POE_KIND_REPORT, POE_KIND_TENSOR } poe_kind;

enum { POE_FLAG_STOP = 1, POE_EPOCH_SHIFT = 8 }; /* of poe_message.flags: stop after this step; epochs done above */

/* One micro-batch at one stage: where its tokens, targets and input are, and its place in the run. */
typedef struct poe_batch {
    poe_kind kind;
    int64_t step;
    int micro;
    size_t rows, t;
    uint32_t flags;
    uint64_t data_hash; /* running, this micro-batch included */
    int32_t *idx, *targets; /* (rows, t) */
    float *h;               /* (rows, t, C): the stage's input; NULL at the stage that reads the data */
} poe_batch;

typedef struct poe_streams {
    int stage, source; /* source: the stage that feeds this one, -1 for none */
    size_t rows, t, channels; /* B, T, C: the largest micro-batch */
    size_t aggregate_floats;
    poe_link *batch_in, *aggregate_in, *report_in; /* NULL at the first stage */
    int n_targets;
    int targets[POE_MAX_STAGES];
    void *payloads[POE_MAX_STAGES]; /* of the micro-batch that is being made */
    poe_link *batch_out[POE_MAX_STAGES], *aggregate_out[POE_MAX_STAGES], *report_out[POE_MAX_STAGES];
    poe_arena arena;          /* the first stage's tokens, the last one's output */
    int32_t *own_tokens;
    float *own_output;
    float *aggregate;         /* running sums of the chunk at hand */
} poe_streams;

/* `aggregate_floats`: largest chunk of an evaluation (0: none); `reports`: how many reports may be under way. */
poe_status poe_streams_open(poe_streams *streams, poe_comm *comm, const poe_edges *edges, const poe_model *model, size_t rows,
                            size_t aggregate_floats, int reports, uint64_t run);
void poe_streams_close(poe_streams *streams);

/* Bytes of one micro-batch's message; and of all buffers for them that `stage`'s links hold. */
size_t poe_streams_batch_bytes(size_t rows, size_t t, size_t channels);
size_t poe_streams_memory(const poe_edges *edges, int stage, size_t rows, size_t t, size_t channels);

/* The next micro-batch from the stage before; batch has kind, step, micro, rows and t as expected. Lent until
 * poe_streams_release_batch(). */
poe_status poe_streams_receive_batch(poe_streams *streams, poe_batch *batch);
void poe_streams_release_batch(poe_streams *streams);

/* Where this stage's output goes: into the message to the next stage, which a credit allows (waits), or nowhere. */
poe_status poe_streams_output(poe_streams *streams, const poe_batch *batch, float **h_out);
/* Sends the batch with that output to every stage that this one feeds. */
poe_status poe_streams_send_batch(poe_streams *streams, const poe_batch *batch);

/* Running sums (n, v) of an evaluation's chunk: received into streams->aggregate (zeros at the first stage), and sent on. */
poe_status poe_streams_receive_aggregate(poe_streams *streams, int64_t step, int chunk, size_t n, size_t v);
poe_status poe_streams_send_aggregate(poe_streams *streams, int64_t step, int chunk, size_t n, size_t v);

/* What a stage has to say of a step. */
typedef struct poe_step_report {
    double loss;
    poe_account_times times;
} poe_step_report;

/* The reports of a step: one per stage before this one when received; one more when sent. */
poe_status poe_streams_receive_report(poe_streams *streams, int64_t step, poe_step_report *reports);
poe_status poe_streams_send_report(poe_streams *streams, int64_t step, const poe_step_report *reports);
/* True when neither of these two would wait. */
bool poe_streams_report_ready(const poe_streams *streams);

#endif
