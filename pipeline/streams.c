/* SPDX-License-Identifier: MIT */
#include "pipeline/streams.h"

#include <stdio.h>
#include <string.h>

enum { BATCH_WINDOW = 4, AGGREGATE_WINDOW = 2 };

const char *poe_channel_name(poe_channel channel)
{
    static const char *const names[] = {[POE_CHANNEL_BATCH] = "activations",
                                        [POE_CHANNEL_AGGREGATE] = "aggregates",
                                        [POE_CHANNEL_REPORT] = "reports",
                                        [POE_CHANNEL_SHARED] = "shared gradients",
                                        [POE_CHANNEL_EXPORT] = "weights"};
    return names[channel];
}

static size_t token_bytes(size_t rows, size_t t)
{
    return poe_arena_round(rows * t * sizeof(int32_t));
}

size_t poe_streams_batch_bytes(size_t rows, size_t t, size_t channels)
{
    return 2 * token_bytes(rows, t) + rows * t * channels * sizeof(float);
}

size_t poe_streams_memory(const poe_edges *edges, int stage, size_t rows, size_t t, size_t channels)
{
    int targets[POE_MAX_STAGES];
    size_t links = (size_t)poe_edges_targets(edges, stage, targets) + (poe_edges_source(edges, stage) >= 0);
    return links * BATCH_WINDOW * poe_streams_batch_bytes(rows, t, channels);
}

/* A message's payload: idx, targets, h, each padded to POE_ALIGN. */
static void place_batch(char *payload, poe_batch *batch)
{
    size_t tokens = token_bytes(batch->rows, batch->t);
    batch->idx = (int32_t *)payload;
    batch->targets = (int32_t *)(payload + tokens);
    batch->h = (float *)(payload + 2 * tokens);
}

static poe_status open_link(poe_comm *comm, int peer, poe_channel channel, bool outgoing,
                            size_t max_bytes, int window, uint64_t run, poe_link **link)
{
    char name[64];
    int self = poe_comm_rank(comm);
    snprintf(name, sizeof(name), "%s %d->%d", poe_channel_name(channel), outgoing ? self : peer, outgoing ? peer : self);
    poe_link_settings settings = {.name = name,
                                  .peer = peer,
                                  .channel = (int)channel,
                                  .outgoing = outgoing,
                                  .max_bytes = max_bytes,
                                  .window = window,
                                  .run = run};
    return poe_link_open(comm, &settings, link);
}

/* The three links of one edge, seen from one of its ends. */
static poe_status open_edge(poe_streams *s, poe_comm *comm, int peer, bool outgoing, int reports, uint64_t run,
                            poe_link **batch, poe_link **aggregate, poe_link **report)
{
    size_t batch_bytes = poe_streams_batch_bytes(s->rows, s->t, s->channels);
    poe_status status = open_link(comm, peer, POE_CHANNEL_BATCH, outgoing, batch_bytes, BATCH_WINDOW, run, batch);
    if (status == POE_OK && s->aggregate_floats)
        status = open_link(comm, peer, POE_CHANNEL_AGGREGATE, outgoing,
                           s->aggregate_floats * sizeof(float), AGGREGATE_WINDOW, run, aggregate);
    if (status == POE_OK)
        status = open_link(comm, peer, POE_CHANNEL_REPORT, outgoing,
                           POE_MAX_STAGES * sizeof(poe_step_report), reports, run, report);
    return status;
}

static poe_status take_memory(poe_streams *s)
{
    size_t tokens = 2 * token_bytes(s->rows, s->t);
    size_t output = s->n_targets ? 0 : s->rows * s->t * s->channels * sizeof(float);
    size_t aggregate = s->aggregate_floats * sizeof(float);
    poe_status status = poe_arena_create(&s->arena, "micro-batches",
                                         poe_arena_round(tokens) + poe_arena_round(output) + poe_arena_round(aggregate));
    if (status != POE_OK)
        return status;
    s->own_tokens = poe_arena_take(&s->arena, tokens);
    s->own_output = output ? poe_arena_take(&s->arena, output) : NULL;
    s->aggregate = aggregate ? poe_arena_take(&s->arena, aggregate) : NULL;
    return POE_OK;
}

poe_status poe_streams_open(poe_streams *s, poe_comm *comm, const poe_edges *edges, const poe_model *model, size_t rows,
                            size_t aggregate_floats, int reports, uint64_t run)
{
    *s = (poe_streams){.stage = poe_comm_rank(comm),
                       .rows = rows,
                       .t = (size_t)model->config.sequence_len,
                       .channels = (size_t)model->config.n_embd,
                       .aggregate_floats = aggregate_floats};
    s->source = poe_edges_source(edges, s->stage);
    s->n_targets = poe_edges_targets(edges, s->stage, s->targets);
    poe_status status = take_memory(s);
    if (status == POE_OK && s->source >= 0)
        status = open_edge(s, comm, s->source, false, reports, run, &s->batch_in, &s->aggregate_in, &s->report_in);
    for (int i = 0; status == POE_OK && i < s->n_targets; i++)
        status = open_edge(s, comm, s->targets[i], true, reports, run, &s->batch_out[i], &s->aggregate_out[i],
                           &s->report_out[i]);
    if (status != POE_OK)
        poe_streams_close(s);
    return status;
}

void poe_streams_close(poe_streams *s)
{
    poe_link_close(s->batch_in);
    poe_link_close(s->aggregate_in);
    poe_link_close(s->report_in);
    for (int i = 0; i < s->n_targets; i++) {
        poe_link_close(s->batch_out[i]);
        poe_link_close(s->aggregate_out[i]);
        poe_link_close(s->report_out[i]);
    }
    poe_arena_destroy(&s->arena);
    *s = (poe_streams){0};
}

static poe_message batch_message(const poe_streams *s, const poe_batch *batch, int sender)
{
    return (poe_message){.kind = batch->kind,
                         .flags = batch->flags,
                         .step = batch->step,
                         .micro = batch->micro,
                         .stage = sender,
                         .shape = {(uint32_t)batch->rows, (uint32_t)batch->t, (uint32_t)s->channels, 0},
                         .data_hash = batch->data_hash,
                         .bytes = poe_streams_batch_bytes(batch->rows, batch->t, s->channels)};
}

poe_status poe_streams_receive_batch(poe_streams *s, poe_batch *batch)
{
    poe_message expected = batch_message(s, batch, s->source), got;
    void *payload;
    poe_status status = poe_link_receive(s->batch_in, &expected, &got, &payload);
    if (status != POE_OK)
        return status;
    place_batch(payload, batch);
    batch->flags = got.flags;
    batch->data_hash = got.data_hash;
    return POE_OK;
}

void poe_streams_release_batch(poe_streams *s)
{
    if (s->batch_in)
        poe_link_release(s->batch_in);
}

poe_status poe_streams_output(poe_streams *s, const poe_batch *batch, float **h_out)
{
    poe_message message = batch_message(s, batch, s->stage);
    for (int i = 0; i < s->n_targets; i++) {
        poe_status status = poe_link_acquire(s->batch_out[i], &message, &s->payloads[i]);
        if (status != POE_OK)
            return status;
    }
    if (!s->n_targets) {
        *h_out = s->own_output;
        return POE_OK;
    }
    poe_batch out = *batch;
    place_batch(s->payloads[0], &out);
    size_t tokens = batch->rows * batch->t * sizeof(int32_t);
    memcpy(out.idx, batch->idx, tokens);
    memcpy(out.targets, batch->targets, tokens);
    *h_out = out.h;
    return POE_OK;
}

poe_status poe_streams_send_batch(poe_streams *s, const poe_batch *batch)
{
    poe_message message = batch_message(s, batch, s->stage);
    for (int i = 1; i < s->n_targets; i++)
        memcpy(s->payloads[i], s->payloads[0], message.bytes);
    for (int i = 0; i < s->n_targets; i++) {
        poe_status status = poe_link_send(s->batch_out[i], &message);
        if (status != POE_OK)
            return status;
    }
    return POE_OK;
}

static poe_message aggregate_message(int64_t step, int chunk, int sender, size_t n, size_t v)
{
    return (poe_message){.kind = POE_KIND_AGGREGATE,
                         .step = step,
                         .micro = chunk,
                         .stage = sender,
                         .shape = {(uint32_t)n, (uint32_t)v, 0, 0},
                         .bytes = n * v * sizeof(float)};
}

poe_status poe_streams_receive_aggregate(poe_streams *s, int64_t step, int chunk, size_t n, size_t v)
{
    if (!s->aggregate_in) {
        memset(s->aggregate, 0, n * v * sizeof(float));
        return POE_OK;
    }
    poe_message expected = aggregate_message(step, chunk, s->source, n, v);
    void *payload;
    poe_status status = poe_link_receive(s->aggregate_in, &expected, NULL, &payload);
    if (status != POE_OK)
        return status;
    memcpy(s->aggregate, payload, expected.bytes);
    poe_link_release(s->aggregate_in);
    return POE_OK;
}

/* Copies `data` into a message to every target and sends it. */
static poe_status send_copies(poe_streams *s, poe_link *const *links, const poe_message *message, const void *data)
{
    for (int i = 0; i < s->n_targets; i++) {
        void *payload;
        poe_status status = poe_link_acquire(links[i], message, &payload);
        if (status != POE_OK)
            return status;
        memcpy(payload, data, message->bytes);
        status = poe_link_send(links[i], message);
        if (status != POE_OK)
            return status;
    }
    return POE_OK;
}

poe_status poe_streams_send_aggregate(poe_streams *s, int64_t step, int chunk, size_t n, size_t v)
{
    poe_message message = aggregate_message(step, chunk, s->stage, n, v);
    return send_copies(s, s->aggregate_out, &message, s->aggregate);
}

static poe_message report_message(int64_t step, int sender)
{
    return (poe_message){.kind = POE_KIND_REPORT,
                         .step = step,
                         .stage = sender,
                         .shape = {(uint32_t)sender + 1, 0, 0, 0},
                         .bytes = ((uint64_t)sender + 1) * sizeof(poe_step_report)};
}

poe_status poe_streams_receive_report(poe_streams *s, int64_t step, poe_step_report *reports)
{
    if (!s->report_in)
        return POE_OK;
    poe_message expected = report_message(step, s->source);
    void *payload;
    poe_status status = poe_link_receive(s->report_in, &expected, NULL, &payload);
    if (status != POE_OK)
        return status;
    memcpy(reports, payload, expected.bytes);
    poe_link_release(s->report_in);
    return POE_OK;
}

poe_status poe_streams_send_report(poe_streams *s, int64_t step, const poe_step_report *reports)
{
    poe_message message = report_message(step, s->stage);
    return send_copies(s, s->report_out, &message, reports);
}

bool poe_streams_report_ready(const poe_streams *s)
{
    bool ready = !s->report_in || poe_link_ready(s->report_in);
    for (int i = 0; i < s->n_targets; i++)
        ready &= poe_link_ready(s->report_out[i]);
    return ready;
}
