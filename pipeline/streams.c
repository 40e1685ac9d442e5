/* SPDX-License-Identifier: MIT */
#include "pipeline/streams.h"

#include <assert.h>
#include <stdio.h>
#include <string.h>

enum { AGGREGATE_WINDOW = 2, USE_WINDOW = 4 };

/* Which of the three cross from `stage` to the next one. */
typedef struct members {
    bool x0, mid;
} members;

static members members_of(const poe_model *model, int stage)
{
    return (members){poe_model_crosses_x0(model, stage), poe_model_crosses_mid(model, stage)};
}

static int count_of(members m)
{
    return 1 + m.x0 + m.mid;
}

const char *poe_channel_name(poe_channel channel)
{
    static const char *const names[] = {[POE_CHANNEL_BATCH] = "activations",
                                        [POE_CHANNEL_AGGREGATE] = "aggregates",
                                        [POE_CHANNEL_REPORT] = "reports",
                                        [POE_CHANNEL_SHARED] = "gradients of the embedding",
                                        [POE_CHANNEL_EXPORT] = "export",
                                        [POE_CHANNEL_GRADIENT] = "gradients",
                                        [POE_CHANNEL_REPLICAS] = "replicas' gradients",
                                        [POE_CHANNEL_CLOCK] = "clock",
                                        [POE_CHANNEL_TRACE] = "trace",
                                        [POE_CHANNEL_SHARED_HEAD] = "gradients of the head",
                                        [POE_CHANNEL_SHARED_SMEAR] = "gradients of smear",
                                        [POE_CHANNEL_COPY] = "copies of a checkpoint",
                                        [POE_CHANNEL_TURN] = "the turn"};
    return names[channel];
}

static size_t token_bytes(size_t rows, size_t t)
{
    return poe_arena_round(rows * t * sizeof(int32_t));
}

/* A member is a tensor (rows * t, C). */
static size_t member_bytes(poe_wire wire, const poe_model *model, size_t rows, size_t t)
{
    return poe_arena_round(poe_wire_bytes(wire, rows * t, (size_t)model->config.n_embd));
}

/* A message's payload: idx, targets and what crosses, or of a gradient that alone; each padded to POE_ALIGN. */
static size_t crossing_bytes(poe_wire wire, const poe_model *model, int stage, size_t rows, size_t t)
{
    return (size_t)count_of(members_of(model, stage)) * member_bytes(wire, model, rows, t);
}

static size_t batch_bytes(poe_wire wire, const poe_model *model, int stage, size_t rows, size_t t)
{
    return 2 * token_bytes(rows, t) + crossing_bytes(wire, model, stage, rows, t);
}

/* The members' values, one behind the other. `stage`: whose output it is. */
static poe_crossing place_crossing(const poe_streams *s, int stage, const poe_batch *batch, char *values)
{
    members m = members_of(s->model, stage);
    size_t bytes = member_bytes(POE_WIRE_FP32, s->model, batch->rows, batch->t);
    poe_crossing c = {.h = (float *)(void *)values};
    if (m.x0)
        c.x0 = (float *)(void *)(values += bytes);
    if (m.mid)
        c.mid = (float *)(void *)(values += bytes);
    return c;
}

/* --- wire formats ----------------------------------------------------------------------------------------------- */

/* What is not fp32 is decoded to, or encoded from, memory beside the messages. */
enum { INPUT, OUTPUT, INPUT_GRADIENT, OUTPUT_GRADIENT };

/* Bytes of that memory for one micro-batch over the edge that starts at `from`. */
static size_t value_bytes(poe_wire wire, const poe_model *model, int from, size_t rows, size_t t)
{
    return wire == POE_WIRE_FP32 ? 0 : crossing_bytes(POE_WIRE_FP32, model, from, rows, t);
}

/* Where the values are that travel at `encoded`. A micro-batch that is lent keeps its place until it is released. */
static poe_crossing place_values(const poe_streams *s, int direction, int from, const poe_batch *batch, char *encoded)
{
    if (s->wire == POE_WIRE_FP32)
        return place_crossing(s, from, batch, encoded);
    size_t i = direction == INPUT ? (size_t)(s->received % s->slots) : 0;
    char *values = s->values[direction] + i * value_bytes(s->wire, s->model, from, s->rows, s->t);
    return place_crossing(s, from, batch, values);
}

static void convert(const poe_streams *s, const poe_crossing *c, const poe_batch *batch, char *encoded, bool encode)
{
    float *const values[] = {c->h, c->x0, c->mid};
    size_t n = batch->rows * batch->t;
    for (int i = 0; s->wire != POE_WIRE_FP32 && i < 3; i++) {
        if (!values[i])
            continue;
        if (encode)
            poe_wire_encode(s->wire, encoded, values[i], n, s->channels);
        else
            poe_wire_decode(s->wire, values[i], encoded, n, s->channels);
        encoded += member_bytes(s->wire, s->model, batch->rows, batch->t);
    }
}

static poe_crossing decode_crossing(const poe_streams *s, int direction, int from, const poe_batch *batch,
                                    char *encoded)
{
    poe_crossing values = place_values(s, direction, from, batch, encoded);
    convert(s, &values, batch, encoded, false);
    return values;
}

/* Into a message to `n_messages` ranks. */
static void encode_crossing(poe_streams *s, int direction, int from, const poe_batch *batch, char *encoded,
                            int n_messages)
{
    poe_crossing values = place_values(s, direction, from, batch, encoded);
    convert(s, &values, batch, encoded, true);
    s->saved += (uint64_t)n_messages * (crossing_bytes(POE_WIRE_FP32, s->model, from, batch->rows, batch->t) -
                                        crossing_bytes(s->wire, s->model, from, batch->rows, batch->t));
}

/* --- memory ----------------------------------------------------------------------------------------------------- */

/* Whether gradients come back along the edges of this run. */
static bool goes_back(const poe_streams_settings *settings)
{
    return settings->training && poe_schedule_chained(settings->layout->order.schedule);
}

/* Of the links from stage `from` on. What is not trained on is not kept. */
static int window_of(const poe_streams_settings *settings, int from)
{
    return settings->training ? poe_layout_window(settings->layout, from) : USE_WINDOW;
}

static size_t edge_memory(const poe_model *model, const poe_streams_settings *settings, int from)
{
    size_t t = (size_t)model->config.sequence_len, window = (size_t)window_of(settings, from);
    size_t bytes = batch_bytes(settings->wire, model, from, settings->rows, t);
    if (goes_back(settings))
        bytes += crossing_bytes(settings->wire, model, from, settings->rows, t);
    return window * bytes;
}

static int slots_of(const poe_streams_settings *settings)
{
    return settings->training ? poe_layout_slots(settings->layout, settings->stage) : 1;
}

/* Memory beside the messages in each direction. */
static void size_values(const poe_model *model, const poe_streams_settings *settings, size_t bytes[4])
{
    int targets[POE_MAX_STAGES], source = poe_edges_source(settings->edges, settings->stage);
    bool feeds = poe_edges_targets(settings->edges, settings->stage, targets) > 0, back = goes_back(settings);
    size_t t = (size_t)model->config.sequence_len;
    size_t in = source < 0 ? 0 : value_bytes(settings->wire, model, source, settings->rows, t);
    size_t out = feeds ? value_bytes(settings->wire, model, settings->stage, settings->rows, t) : 0;
    bytes[INPUT] = in * (size_t)slots_of(settings);
    bytes[OUTPUT] = out;
    bytes[INPUT_GRADIENT] = back ? in : 0;
    bytes[OUTPUT_GRADIENT] = back ? out : 0;
}

size_t poe_streams_memory(const poe_model *model, const poe_streams_settings *settings)
{
    int targets[POE_MAX_STAGES], source = poe_edges_source(settings->edges, settings->stage);
    size_t out = (size_t)poe_edges_targets(settings->edges, settings->stage, targets), values[4];
    size_t bytes = source >= 0 ? edge_memory(model, settings, source) : 0;
    size_values(model, settings, values);
    for (int i = 0; i < 4; i++)
        bytes += values[i];
    return bytes + (out ? out * edge_memory(model, settings, settings->stage) : 0);
}

poe_status poe_channel_open(poe_comm *comm, int peer, poe_channel channel, bool outgoing, size_t max_bytes, int window,
                            uint64_t run, poe_link **link)
{
    char name[64];
    int self = poe_comm_rank(comm);
    snprintf(name, sizeof(name), "%s %d->%d", poe_channel_name(channel), outgoing ? self : peer,
             outgoing ? peer : self);
    poe_link_settings settings = {.name = name,
                                  .peer = peer,
                                  .channel = (int)channel,
                                  .outgoing = outgoing,
                                  .max_bytes = max_bytes,
                                  .window = window,
                                  .run = run};
    return poe_link_open(comm, &settings, link);
}

/* Under bp the last stage alone has predictions, so there is nothing to sum. */
static bool aggregates(const poe_model *model)
{
    return model->config.objective != POE_OBJECTIVE_BP;
}

/* The links of one edge, seen from one of its ends. */
static poe_status open_edge(const poe_streams *s, poe_comm *comm, const poe_streams_settings *settings, int peer,
                            bool outgoing, poe_link **batch, poe_link **aggregate, poe_link **gradient)
{
    int from = outgoing ? s->stage : peer, window = window_of(settings, from);
    uint64_t run = settings->run;
    poe_status status = poe_channel_open(comm, peer, POE_CHANNEL_BATCH, outgoing,
                                         batch_bytes(s->wire, s->model, from, s->rows, s->t), window, run, batch);
    if (status == POE_OK && s->aggregate_floats && aggregates(s->model))
        status = poe_channel_open(comm, peer, POE_CHANNEL_AGGREGATE, outgoing, s->aggregate_floats * sizeof(float),
                                  AGGREGATE_WINDOW, run, aggregate);
    if (status == POE_OK && goes_back(settings))
        status = poe_channel_open(comm, peer, POE_CHANNEL_GRADIENT, !outgoing,
                                  crossing_bytes(s->wire, s->model, from, s->rows, s->t), window, run, gradient);
    return status;
}

static poe_status take_memory(poe_streams *s, const poe_streams_settings *settings)
{
    size_t tokens = s->source < 0 ? (size_t)s->slots * 2 * token_bytes(s->rows, s->t) : 0, values[4], all = 0;
    size_t aggregate = s->aggregate_floats * sizeof(float);
    size_values(s->model, settings, values);
    for (int i = 0; i < 4; i++)
        all += values[i];
    poe_status status =
        poe_arena_create(&s->arena, "micro-batches", poe_arena_round(tokens) + poe_arena_round(aggregate) + all);
    if (status != POE_OK)
        return status;
    for (int i = 0; i < 4; i++)
        s->values[i] = values[i] ? poe_arena_take(&s->arena, values[i]) : NULL;
    s->own_tokens = tokens ? poe_arena_take(&s->arena, tokens) : NULL;
    s->aggregate = aggregate ? poe_arena_take(&s->arena, aggregate) : NULL;
    return POE_OK;
}

static poe_status open_edges(poe_streams *s, poe_comm *comm, const poe_streams_settings *settings)
{
    poe_status status = POE_OK;
    assert(s->n_targets <= 1 || !goes_back(settings));
    if (s->source >= 0)
        status = open_edge(s, comm, settings, s->source, false, &s->batch_in, &s->aggregate_in, &s->gradient_out);
    for (int i = 0; status == POE_OK && i < s->n_targets; i++)
        status =
            open_edge(s, comm, settings, s->targets[i], true, &s->batch_out[i], &s->aggregate_out[i], &s->gradient_in);
    return status;
}

static poe_status open_reports(poe_streams *s, poe_comm *comm, const poe_streams_settings *settings)
{
    size_t bytes = POE_MAX_STAGES * sizeof(poe_step_report);
    poe_status status = POE_OK;
    if (s->rank > 0)
        status = poe_channel_open(comm, s->rank - 1, POE_CHANNEL_REPORT, false, bytes, settings->reports, settings->run,
                                  &s->report_in);
    if (status == POE_OK && s->rank + 1 < poe_comm_size(comm))
        status = poe_channel_open(comm, s->rank + 1, POE_CHANNEL_REPORT, true, bytes, settings->reports, settings->run,
                                  &s->report_out);
    return status;
}

poe_status poe_streams_open(poe_streams *s, poe_comm *comm, const poe_model *model,
                            const poe_streams_settings *settings)
{
    *s = (poe_streams){.model = model,
                       .rank = poe_comm_rank(comm),
                       .stage = settings->stage,
                       .rows = settings->rows,
                       .t = (size_t)model->config.sequence_len,
                       .channels = (size_t)model->config.n_embd,
                       .aggregate_floats = settings->aggregate_floats,
                       .slots = slots_of(settings),
                       .wire = settings->wire};
    s->source = poe_edges_source(settings->edges, s->stage);
    s->n_targets = poe_edges_targets(settings->edges, s->stage, s->targets);
    poe_status status = take_memory(s, settings);
    if (status == POE_OK)
        status = open_edges(s, comm, settings);
    if (status == POE_OK)
        status = open_reports(s, comm, settings);
    if (status != POE_OK)
        poe_streams_close(s);
    return status;
}

void poe_streams_close(poe_streams *s)
{
    poe_link_close(s->batch_in);
    poe_link_close(s->aggregate_in);
    poe_link_close(s->report_in);
    poe_link_close(s->gradient_out);
    for (int i = 0; i < s->n_targets; i++) {
        poe_link_close(s->batch_out[i]);
        poe_link_close(s->aggregate_out[i]);
    }
    poe_link_close(s->gradient_in);
    poe_link_close(s->report_out);
    poe_arena_destroy(&s->arena);
    *s = (poe_streams){0};
}

/* --- micro-batches forward -------------------------------------------------------------------------------------- */

void poe_streams_own_tokens(const poe_streams *s, int slot, poe_batch *batch)
{
    size_t stride = token_bytes(s->rows, s->t) / sizeof(int32_t);
    batch->idx = s->own_tokens + 2 * stride * (size_t)slot;
    batch->targets = batch->idx + stride;
    batch->in = (poe_crossing){0};
}

/* What crosses at `boundary`, and in which format. */
static uint32_t wire_shape(const poe_streams *s, int boundary)
{
    return (uint32_t)count_of(members_of(s->model, boundary)) | (uint32_t)s->wire << 8;
}

static poe_message batch_message(const poe_streams *s, const poe_batch *batch, int sender)
{
    return (poe_message){
        .kind = batch->kind,
        .flags = batch->flags,
        .step = batch->step,
        .micro = batch->micro,
        .stage = sender,
        .shape = {(uint32_t)batch->rows, (uint32_t)batch->t, (uint32_t)s->channels, wire_shape(s, sender)},
        .data_hash = batch->data_hash,
        .bytes = batch_bytes(s->wire, s->model, sender, batch->rows, batch->t)};
}

poe_status poe_streams_receive_batch(poe_streams *s, poe_batch *batch)
{
    poe_message expected = batch_message(s, batch, s->source), got;
    void *payload;
    poe_status status = poe_link_receive(s->batch_in, &expected, &got, &payload);
    if (status != POE_OK)
        return status;
    size_t tokens = token_bytes(batch->rows, batch->t);
    batch->idx = payload;
    batch->targets = (int32_t *)(void *)((char *)payload + tokens);
    batch->in = decode_crossing(s, INPUT, s->source, batch, (char *)payload + 2 * tokens);
    s->received++;
    batch->flags = got.flags;
    batch->data_hash = got.data_hash;
    return POE_OK;
}

void poe_streams_release_batch(poe_streams *s)
{
    if (s->batch_in)
        poe_link_release(s->batch_in);
}

static void clear_crossing(const poe_crossing *c, size_t floats)
{
    float *const values[] = {c->h, c->x0, c->mid};
    for (int i = 0; i < 3; i++)
        if (values[i])
            memset(values[i], 0, floats * sizeof(float));
}

poe_status poe_streams_output(poe_streams *s, const poe_batch *batch, poe_crossing *out)
{
    poe_message message = batch_message(s, batch, s->stage);
    for (int i = 0; i < s->n_targets; i++) {
        poe_status status = poe_link_acquire(s->batch_out[i], &message, &s->payloads[i]);
        if (status != POE_OK)
            return status;
    }
    *out = (poe_crossing){0};
    if (!s->n_targets)
        return POE_OK;
    char *payload = s->payloads[0];
    size_t tokens = batch->rows * batch->t * sizeof(int32_t), padded = token_bytes(batch->rows, batch->t);
    memcpy(payload, batch->idx, tokens);
    memcpy(payload + padded, batch->targets, tokens);
    *out = place_values(s, OUTPUT, s->stage, batch, payload + 2 * padded);
    if (batch->flags & POE_FLAG_ABSENT)
        clear_crossing(out, batch->rows * batch->t * s->channels);
    return POE_OK;
}

poe_status poe_streams_send_batch(poe_streams *s, const poe_batch *batch)
{
    poe_message message = batch_message(s, batch, s->stage);
    if (s->n_targets)
        encode_crossing(s, OUTPUT, s->stage, batch, (char *)s->payloads[0] + 2 * token_bytes(batch->rows, batch->t),
                        s->n_targets);
    for (int i = 1; i < s->n_targets; i++)
        memcpy(s->payloads[i], s->payloads[0], message.bytes);
    for (int i = 0; i < s->n_targets; i++) {
        poe_status status = poe_link_send(s->batch_out[i], &message);
        if (status != POE_OK)
            return status;
    }
    return POE_OK;
}

/* --- gradients back --------------------------------------------------------------------------------------------- */

/* Of what crossed from `boundary` to the next stage. */
static poe_message gradient_message(const poe_streams *s, const poe_batch *batch, int boundary, int sender)
{
    return (poe_message){
        .kind = POE_KIND_GRADIENT,
        .step = batch->step,
        .micro = batch->micro,
        .stage = sender,
        .shape = {(uint32_t)batch->rows, (uint32_t)batch->t, (uint32_t)s->channels, wire_shape(s, boundary)},
        .data_hash = batch->data_hash,
        .bytes = crossing_bytes(s->wire, s->model, boundary, batch->rows, batch->t)};
}

poe_status poe_streams_receive_gradient(poe_streams *s, const poe_batch *batch, poe_crossing *d_out)
{
    *d_out = (poe_crossing){0};
    if (!s->gradient_in)
        return POE_OK;
    poe_message expected = gradient_message(s, batch, s->stage, s->targets[0]);
    void *payload;
    poe_status status = poe_link_receive(s->gradient_in, &expected, NULL, &payload);
    if (status == POE_OK)
        *d_out = decode_crossing(s, OUTPUT_GRADIENT, s->stage, batch, payload);
    return status;
}

void poe_streams_release_gradient(poe_streams *s)
{
    if (s->gradient_in)
        poe_link_release(s->gradient_in);
}

poe_status poe_streams_input_gradient(poe_streams *s, const poe_batch *batch, poe_crossing *d_in)
{
    *d_in = (poe_crossing){0};
    if (!s->gradient_out)
        return POE_OK;
    poe_message message = gradient_message(s, batch, s->source, s->stage);
    poe_status status = poe_link_acquire(s->gradient_out, &message, &s->gradient_payload);
    if (status == POE_OK)
        *d_in = place_values(s, INPUT_GRADIENT, s->source, batch, s->gradient_payload);
    return status;
}

poe_status poe_streams_send_gradient(poe_streams *s, const poe_batch *batch)
{
    if (!s->gradient_out)
        return POE_OK;
    poe_message message = gradient_message(s, batch, s->source, s->stage);
    encode_crossing(s, INPUT_GRADIENT, s->source, batch, s->gradient_payload, 1);
    return poe_link_send(s->gradient_out, &message);
}

/* --- aggregates and reports ------------------------------------------------------------------------------------- */

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
    return poe_link_receive_copy(s->aggregate_in, &expected, s->aggregate);
}

poe_status poe_streams_send_aggregate(poe_streams *s, int64_t step, int chunk, size_t n, size_t v)
{
    poe_message message = aggregate_message(step, chunk, s->stage, n, v);
    poe_status status = POE_OK;
    for (int i = 0; status == POE_OK && i < s->n_targets && s->aggregate_out[i]; i++)
        status = poe_link_send_copy(s->aggregate_out[i], &message, s->aggregate);
    return status;
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
    poe_message expected = report_message(step, s->rank - 1);
    return poe_link_receive_copy(s->report_in, &expected, reports);
}

poe_status poe_streams_send_report(poe_streams *s, int64_t step, const poe_step_report *reports)
{
    poe_message message = report_message(step, s->rank);
    return s->report_out ? poe_link_send_copy(s->report_out, &message, reports) : POE_OK;
}

bool poe_streams_report_ready(const poe_streams *s)
{
    return (!s->report_in || poe_link_ready(s->report_in)) && (!s->report_out || poe_link_ready(s->report_out));
}
