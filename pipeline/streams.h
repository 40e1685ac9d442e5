/* SPDX-License-Identifier: MIT
 * The messages between stages, on comm's links: along the table of edges micro-batches (tokens, targets, what crosses
 * the boundary) and partial aggregates of an evaluation; against it, where an objective has them, the gradients of what
 * crossed; and from each rank to the next one reports (losses and accounts of time ride forward). What crosses, and its
 * gradients, travel in the run's wire format: the sender computes on with its own values, the receiver with those that
 * came through. */
#ifndef POE_PIPELINE_STREAMS_H
#define POE_PIPELINE_STREAMS_H

#include <stdbool.h>
#include <stdint.h>

#include "comm/comm.h"
#include "pipeline/accounts.h"
#include "pipeline/edges.h"
#include "pipeline/layout.h"
#include "src/arena.h"
#include "stages/stage.h"

/* One per (direction, pair of ranks); the shared sums of wte, head and smear take POE_CHANNEL_SHARED and its kin. */
typedef enum poe_channel {
    POE_CHANNEL_BATCH,
    POE_CHANNEL_AGGREGATE,
    POE_CHANNEL_REPORT,
    POE_CHANNEL_SHARED,
    POE_CHANNEL_EXPORT,
    POE_CHANNEL_GRADIENT,
    POE_CHANNEL_REPLICAS,
    POE_CHANNEL_CLOCK,
    POE_CHANNEL_TRACE,
    POE_CHANNEL_SHARED_HEAD,
    POE_CHANNEL_SHARED_SMEAR,
    POE_CHANNEL_COPY,
    POE_CHANNEL_TURN,
} poe_channel;

const char *poe_channel_name(poe_channel channel); /* what it carries: "activations", ... */
/* One end of the link of `channel` between this rank and `peer`, named after both: see poe_link_open(). */
poe_status poe_channel_open(poe_comm *comm, int peer, poe_channel channel, bool outgoing, size_t max_bytes, int window,
                            uint64_t run, poe_link **link);

typedef enum poe_kind {
    POE_KIND_TRAIN = 1,
    POE_KIND_EVALUATE,
    POE_KIND_GENERATE,
    POE_KIND_AGGREGATE,
    POE_KIND_REPORT,
    POE_KIND_TENSOR,
    POE_KIND_GRADIENT,
    POE_KIND_REPLICAS,
    POE_KIND_CLOCK,
    POE_KIND_TRACE,
    POE_KIND_COPY,
    POE_KIND_TURN,
} poe_kind;

/* Of poe_message.flags: stop after this step; a stage before could not work on this micro-batch, and no later one can;
 * epochs done above. */
enum { POE_FLAG_STOP = 1, POE_FLAG_ABSENT = 2, POE_EPOCH_SHIFT = 8 };

/* One micro-batch at one stage: where its tokens, targets and input are, and its place in the run. */
typedef struct poe_batch {
    poe_kind kind;
    int64_t step;
    int micro;
    size_t rows, t;
    uint32_t flags;
    uint64_t data_hash; /* running, this micro-batch included */
    int32_t *idx, *targets; /* (rows, t) */
    poe_crossing in;        /* (rows, t, C) each: the stage's input; all NULL at the stage that reads the data */
} poe_batch;

typedef struct poe_streams {
    const poe_model *model;
    int rank, stage, source; /* source: the stage that feeds this one, -1 for none */
    size_t rows, t, channels; /* B, T, C: the largest micro-batch */
    size_t aggregate_floats;
    poe_link *batch_in, *aggregate_in, *gradient_out; /* NULL at the first stage */
    int n_targets;
    int targets[POE_MAX_STAGES];
    void *payloads[POE_MAX_STAGES]; /* of the micro-batch that is being made */
    void *gradient_payload;         /* of the gradient that is being made */
    poe_link *batch_out[POE_MAX_STAGES], *aggregate_out[POE_MAX_STAGES];
    poe_link *gradient_in;    /* from the one stage that this one feeds; NULL where none come back */
    poe_link *report_in, *report_out; /* NULL at the first rank, at the last one */
    poe_arena arena;          /* the first stage's tokens */
    int slots;
    poe_wire wire;            /* how what crosses travels; fp32: it is read and written in the messages themselves */
    int32_t *own_tokens;      /* (slots, 2, rows * t, padded) */
    char *values[4];          /* else as floats, by direction (streams.c); of the input `slots` in a ring */
    int64_t received;         /* micro-batches so far */
    uint64_t saved;           /* bytes that the messages sent so far would have more in fp32 */
    float *aggregate;         /* running sums of the chunk at hand */
} poe_streams;

typedef struct poe_streams_settings {
    const poe_edges *edges;   /* borrowed during the call */
    const poe_layout *layout; /* likewise: slots, windows */
    int stage;
    size_t rows;              /* B */
    bool training;            /* else no gradients come back, and one micro-batch is kept */
    size_t aggregate_floats;  /* largest chunk of an evaluation */
    int reports;              /* that may be under way */
    poe_wire wire;            /* of what crosses, and of its gradients */
    uint64_t run;
} poe_streams_settings;

/* `model` is borrowed. */
poe_status poe_streams_open(poe_streams *streams, poe_comm *comm, const poe_model *model,
                            const poe_streams_settings *settings);
void poe_streams_close(poe_streams *streams);

/* Bytes of all buffers for micro-batches and gradients that the stage's links hold, and of what they are decoded to. */
size_t poe_streams_memory(const poe_model *model, const poe_streams_settings *settings);

/* Sets batch->idx and targets to slot `slot`'s memory at the stage that reads the data, and its input to none. */
void poe_streams_own_tokens(const poe_streams *streams, int slot, poe_batch *batch);

/* The next micro-batch from the stage before; batch has kind, step, micro, rows and t as expected. Lent until
 * poe_streams_release_batch(); batches are released in order. */
poe_status poe_streams_receive_batch(poe_streams *streams, poe_batch *batch);
void poe_streams_release_batch(poe_streams *streams);

/* Where this stage's output goes: into the message to the next stage, which a credit allows (waits), or nowhere (all
 * NULL). With POE_FLAG_ABSENT it is zeros already. */
poe_status poe_streams_output(poe_streams *streams, const poe_batch *batch, poe_crossing *out);
/* Sends the batch with that output to every stage that this one feeds. */
poe_status poe_streams_send_batch(poe_streams *streams, const poe_batch *batch);

/* The gradients for what `batch` put out, lent until poe_streams_release_gradient(); all NULL where none come back. */
poe_status poe_streams_receive_gradient(poe_streams *streams, const poe_batch *batch, poe_crossing *d_out);
void poe_streams_release_gradient(poe_streams *streams);
/* Where the gradients for the batch's input go: into the message to the stage before, which a credit allows (waits), or
 * nowhere (all NULL); and sends it. */
poe_status poe_streams_input_gradient(poe_streams *streams, const poe_batch *batch, poe_crossing *d_in);
poe_status poe_streams_send_gradient(poe_streams *streams, const poe_batch *batch);

/* For the calls of a stage: NULL when nothing crosses. */
static inline const poe_crossing *poe_crossing_or_null(const poe_crossing *crossing)
{
    return crossing->h ? crossing : NULL;
}

/* Running sums (n, v) of an evaluation's chunk: received into streams->aggregate (zeros at the first stage that has
 * any), and sent on. */
poe_status poe_streams_receive_aggregate(poe_streams *streams, int64_t step, int chunk, size_t n, size_t v);
poe_status poe_streams_send_aggregate(poe_streams *streams, int64_t step, int chunk, size_t n, size_t v);

/* What a rank has to say of a step. */
typedef struct poe_step_report {
    double loss;
    poe_account_times times;
} poe_step_report;

/* The reports of a step: one per rank before this one when received; one more when sent. */
poe_status poe_streams_receive_report(poe_streams *streams, int64_t step, poe_step_report *reports);
poe_status poe_streams_send_report(poe_streams *streams, int64_t step, const poe_step_report *reports);
/* True when neither of these two would wait. */
bool poe_streams_report_ready(const poe_streams *streams);

#endif
