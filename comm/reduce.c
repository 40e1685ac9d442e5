/* SPDX-License-Identifier: MIT
 * The shared sum. Chunks are numbered through all vectors and handled strictly in that order. Going down, a rank adds
 * its own to the partial sum that came in and sends the result on from the same buffer; the last rank turns it round as
 * the total; going up, the buffer is decoded and sent on unchanged, so that all ranks hold the same bits. A chunk is a
 * frame and a payload on the channel beside it: the payload is the chunk in its wire format or, when that is less, only
 * the rows that are not +0 throughout, and then their numbers. Receives are posted ahead only as far as buffers are
 * free: the transport holds the sender back, and needs no credits. */
#include <assert.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "comm/comm_impl.h"
#include "src/clock.h"
#include "src/crc32c.h"

enum { DEPTH = 4, ALIGNMENT = 64, DEFAULT_CHUNK = 262144 };

enum { WHOLE, SOME_ROWS }; /* kind of a message; of the second, shape[2] counts the rows */

/* Chunk q lives in buffer q % DEPTH: its frame and its payload. */
typedef struct chunk_ring {
    unsigned char *buffers;                        /* (DEPTH, stride) */
    poe_operation *frame_operations, *operations;  /* (DEPTH) each; the latter of payloads */
    poe_message messages[DEPTH];                   /* as received, or made */
    bool sending[DEPTH];
    uint64_t posted, framed, taken; /* chunks whose receive was posted, whose frame was read, that were handled */
} chunk_ring;

struct poe_reduce {
    poe_part part;
    char name[64];
    int place, n_ranks; /* in the chain */
    int previous, next; /* ranks; -1 at the ends */
    int channel;
    size_t count, chunk, chunks, stride;
    size_t width; /* floats of a row; 0: no rows */
    poe_wire wire;
    int slots;
    uint64_t run;
    atomic_int awaited; /* the rank that must act next */

    int64_t *steps;    /* (slots) of vector v in v % slots */
    const float **own; /* (slots) */
    float **totals;    /* (slots) */
    _Atomic uint64_t begun;    /* vectors, by the rank's thread */
    _Atomic uint64_t finished; /* vectors, by the helper thread */
    uint64_t ended;            /* the rank's thread's */
    chunk_ring down, up;             /* the helper thread's, as is the rest */
    float *sum;     /* (chunk) a partial sum, where a message cannot hold it */
    uint32_t *rows; /* (chunk / width) those of a chunk that travel */
};

static poe_reduce *reduce_of(poe_part *part)
{
    return (poe_reduce *)part;
}

static unsigned char *frame_at(const poe_reduce *r, const chunk_ring *ring, uint64_t q)
{
    return ring->buffers + (q % DEPTH) * r->stride;
}

static void *payload_at(const poe_reduce *r, const chunk_ring *ring, uint64_t q)
{
    return frame_at(r, ring, q) + POE_FRAME_BYTES;
}

static size_t chunk_length(const poe_reduce *r, uint64_t q)
{
    size_t first = (size_t)(q % r->chunks) * r->chunk;
    return r->count - first < r->chunk ? r->count - first : r->chunk;
}

static const float *own_chunk(const poe_reduce *r, uint64_t q)
{
    return r->own[q / r->chunks % (uint64_t)r->slots] + (size_t)(q % r->chunks) * r->chunk;
}

static float *total_chunk(const poe_reduce *r, uint64_t q)
{
    return r->totals[q / r->chunks % (uint64_t)r->slots] + (size_t)(q % r->chunks) * r->chunk;
}

static size_t whole_bytes(const poe_reduce *r, uint64_t q)
{
    return poe_wire_bytes(r->wire, 1, chunk_length(r, q));
}

/* Their values, padded to whole words. */
static size_t row_values_bytes(const poe_reduce *r, size_t rows)
{
    return (poe_wire_bytes(r->wire, rows, r->width) + 3) / 4 * 4;
}

static size_t rows_bytes(const poe_reduce *r, size_t rows)
{
    return row_values_bytes(r, rows) + rows * sizeof(uint32_t);
}

/* What chunk q's message says of it, but for its kind, number of rows and length. */
static poe_message message_of(const poe_reduce *r, uint64_t q)
{
    return (poe_message){.step = r->steps[q / r->chunks % (uint64_t)r->slots],
                         .micro = (int32_t)(q % r->chunks),
                         .shape = {(uint32_t)r->wire, (uint32_t)r->width, 0, 0},
                         .data_hash = r->count};
}

/* --- transfers ---------------------------------------------------------------------------------------------------- */
static void post(poe_reduce *r, chunk_ring *ring, int peer)
{
    uint64_t q = ring->posted++;
    poe_part_receive(&r->part, peer, r->channel, frame_at(r, ring, q), POE_FRAME_BYTES,
                     &ring->frame_operations[q % DEPTH]);
}

/* Seals the message in buffer q and sends it. */
static void send_on(poe_reduce *r, chunk_ring *ring, uint64_t q, int peer)
{
    poe_frame frame = {.type = POE_FRAME_CHUNK, .run = r->run, .message = ring->messages[q % DEPTH]};
    size_t bytes = (size_t)frame.message.bytes;
    frame.payload_crc = poe_crc32c(0, payload_at(r, ring, q), bytes);
    poe_frame_encode(&frame, frame_at(r, ring, q));
    ring->sending[q % DEPTH] = true;
    r->part.sending++;
    r->part.comm->tally.shared_sent += bytes;
    r->part.comm->tally.shared_dense += chunk_length(r, q) * sizeof(float);
    poe_part_send(&r->part, peer, r->channel, frame_at(r, ring, q), POE_FRAME_BYTES,
                  &ring->frame_operations[q % DEPTH]);
    if (bytes)
        poe_part_send(&r->part, peer, r->channel + POE_CHANNEL_PAYLOAD, payload_at(r, ring, q), bytes,
                      &ring->operations[q % DEPTH]);
}

static bool is_done(poe_reduce *r, const chunk_ring *ring, uint64_t q)
{
    return poe_part_done(&r->part, &ring->frame_operations[q % DEPTH]) &&
           poe_part_done(&r->part, &ring->operations[q % DEPTH]);
}

static bool collect_sent(poe_reduce *r, chunk_ring *ring)
{
    bool moved = false;
    for (uint64_t i = 0; i < DEPTH; i++)
        if (ring->sending[i] && is_done(r, ring, i)) {
            ring->sending[i] = false;
            r->part.sending--;
            moved = true;
        }
    return moved;
}

/* Receives are posted in the order of chunks: a buffer that is free early waits for its turn. */
static void post_free(poe_reduce *r, chunk_ring *ring, int peer)
{
    while (ring->posted < ring->taken + DEPTH && !ring->sending[ring->posted % DEPTH])
        post(r, ring, peer);
}

static void refuse(poe_reduce *r, uint64_t q, int peer, const char *why)
{
    poe_comm_lose(r->part.comm, "sum of %s: rank %d expects chunk %zu of vector %" PRIu64
                  " and refuses what came from rank %d: %s",
                  r->name, poe_comm_rank(r->part.comm), (size_t)(q % r->chunks), q / r->chunks, peer, why);
}

/* Its payload may come before this rank has begun the vector: of the frame only the length is believed until then. */
static bool read_frame(poe_reduce *r, chunk_ring *ring, int peer)
{
    uint64_t q = ring->framed;
    if (q == ring->posted || !poe_part_done(&r->part, &ring->frame_operations[q % DEPTH]))
        return false;
    poe_frame got;
    char why[POE_WHY_BYTES];
    bool whole = poe_frame_decode(frame_at(r, ring, q), &got, why);
    if (whole && got.message.bytes > whole_bytes(r, q)) {
        snprintf(why, sizeof(why), "its length is %" PRIu64 ", expected at most %zu", got.message.bytes,
                 whole_bytes(r, q));
        whole = false;
    }
    if (!whole) {
        refuse(r, q, peer, why);
        return false;
    }
    if (got.message.bytes)
        poe_part_receive(&r->part, peer, r->channel + POE_CHANNEL_PAYLOAD, payload_at(r, ring, q),
                         (size_t)got.message.bytes, &ring->operations[q % DEPTH]);
    ring->messages[q % DEPTH] = got.message;
    ring->framed++;
    return true;
}

static bool has_arrived(poe_reduce *r, const chunk_ring *ring)
{
    return ring->taken < ring->framed && poe_part_done(&r->part, &ring->operations[ring->taken % DEPTH]);
}

/* Row numbers rise, and stay within the chunk. */
static bool rows_in_order(const uint32_t *rows, size_t n, size_t most)
{
    for (size_t i = 0; i < n; i++)
        if (rows[i] >= most || (i > 0 && rows[i] <= rows[i - 1]))
            return false;
    return true;
}

static const uint32_t *rows_at(const poe_reduce *r, const chunk_ring *ring, uint64_t q)
{
    size_t rows = ring->messages[q % DEPTH].shape[2];
    return (const uint32_t *)(const void *)((const char *)payload_at(r, ring, q) + row_values_bytes(r, rows));
}

/* What only the sender knows, its kind and number of rows, must fit the rest. */
static bool is_expected(poe_reduce *r, const chunk_ring *ring, uint64_t q, char why[POE_WHY_BYTES])
{
    poe_frame got, expected = {.type = POE_FRAME_CHUNK, .run = r->run, .message = message_of(r, q)};
    poe_message *e = &expected.message;
    if (!poe_frame_decode(frame_at(r, ring, q), &got, why))
        return false;
    size_t rows = got.message.shape[2], most = r->width ? chunk_length(r, q) / r->width : 0;
    bool sparse = r->width && got.message.kind == SOME_ROWS && rows <= most;
    e->kind = sparse ? SOME_ROWS : WHOLE;
    e->shape[2] = sparse ? (uint32_t)rows : 0;
    e->bytes = sparse ? rows_bytes(r, rows) : whole_bytes(r, q);
    if (!poe_frame_matches(&got, &expected, why))
        return false;
    if (got.message.data_hash != r->count) {
        snprintf(why, POE_WHY_BYTES, "its vector has %" PRIu64 " numbers, expected %zu", got.message.data_hash,
                 r->count);
        return false;
    }
    if (!poe_frame_payload_whole(&got, payload_at(r, ring, q), why))
        return false;
    if (!sparse || rows_in_order(rows_at(r, ring, q), rows, most))
        return true;
    snprintf(why, POE_WHY_BYTES, "its rows are not in order");
    return false;
}

static bool check_chunk(poe_reduce *r, const chunk_ring *ring, int peer)
{
    char why[POE_WHY_BYTES];
    poe_watch_heard(r->part.comm, peer, poe_now());
    if (is_expected(r, ring, ring->taken, why))
        return true;
    refuse(r, ring->taken, peer, why);
    return false;
}

/* --- what a chunk is made of ---------------------------------------------------------------------------------------- */
static bool is_zero(const float *row, size_t n)
{
    uint32_t bits, any = 0;
    for (size_t i = 0; i < n; i++) {
        memcpy(&bits, &row[i], sizeof(bits));
        any |= bits;
    }
    return any == 0;
}

/* Fills r->rows; -0 is not +0. */
static size_t find_rows(poe_reduce *r, const float *values, size_t rows)
{
    size_t n = 0;
    for (size_t i = 0; i < rows; i++) {
        const float *row = values + i * r->width;
        if (row[0] != 0 || !is_zero(row, r->width))
            r->rows[n++] = (uint32_t)i;
    }
    return n;
}

/* Rows move forward only, by whole rows: `values` may be the payload itself. */
static void pack_rows(poe_reduce *r, void *payload, const float *values, size_t rows)
{
    for (size_t i = 0; i < rows; i++) {
        char *to = (char *)payload + poe_wire_bytes(r->wire, i, r->width);
        const float *from = values + r->rows[i] * r->width;
        if ((const void *)to != from)
            poe_wire_encode(r->wire, to, from, 1, r->width);
    }
    size_t used = poe_wire_bytes(r->wire, rows, r->width), padded = row_values_bytes(r, rows);
    memset((char *)payload + used, 0, padded - used);
    memcpy((char *)payload + padded, r->rows, rows * sizeof(uint32_t));
}

/* Makes `values` (of the chunk's length; under fp32 they may be in the payload's place already) chunk q's message. */
static void encode(poe_reduce *r, chunk_ring *ring, uint64_t q, const float *values)
{
    poe_message *message = &ring->messages[q % DEPTH];
    void *payload = payload_at(r, ring, q);
    size_t n = chunk_length(r, q), rows = r->width ? find_rows(r, values, n / r->width) : 0;
    *message = message_of(r, q);
    message->bytes = whole_bytes(r, q);
    if (r->width && rows_bytes(r, rows) < message->bytes) {
        pack_rows(r, payload, values, rows);
        message->kind = SOME_ROWS;
        message->shape[2] = (uint32_t)rows;
        message->bytes = rows_bytes(r, rows);
    } else if (values != payload) {
        poe_wire_encode(r->wire, payload, values, 1, n);
    }
}

static void decode(const poe_reduce *r, const chunk_ring *ring, uint64_t q, float *values)
{
    const poe_message *message = &ring->messages[q % DEPTH];
    const char *payload = payload_at(r, ring, q);
    size_t n = chunk_length(r, q);
    if (message->kind == WHOLE) {
        poe_wire_decode(r->wire, values, payload, 1, n);
        return;
    }
    const uint32_t *rows = rows_at(r, ring, q);
    memset(values, 0, n * sizeof(float));
    for (size_t i = 0; i < message->shape[2]; i++)
        poe_wire_decode(r->wire, values + rows[i] * r->width, payload + poe_wire_bytes(r->wire, i, r->width), 1,
                        r->width);
}

static void add(float *restrict sum, const float *restrict own, size_t n)
{
    for (size_t i = 0; i < n; i++)
        sum[i] += own[i];
}

/* The partial sum in buffer q and this rank's own. A whole chunk of floats is added to where it is. */
static void add_own(poe_reduce *r, chunk_ring *ring, uint64_t q)
{
    bool in_place = r->wire == POE_WIRE_FP32 && ring->messages[q % DEPTH].kind == WHOLE;
    float *sum = in_place ? payload_at(r, ring, q) : r->sum;
    if (!in_place)
        decode(r, ring, q, sum);
    add(sum, own_chunk(r, q), chunk_length(r, q));
    encode(r, ring, q, sum);
}

/* --- advancing ---------------------------------------------------------------------------------------------------- */
static bool is_begun(const poe_reduce *r, uint64_t q)
{
    return q / r->chunks < atomic_load(&r->begun);
}

static void finish_chunk(poe_reduce *r, uint64_t q)
{
    if ((q + 1) % r->chunks == 0)
        atomic_fetch_add(&r->finished, 1);
}

/* The first rank's partial sums are its own values. */
static bool feed(poe_reduce *r)
{
    uint64_t q = r->down.taken;
    if (!is_begun(r, q) || r->down.sending[q % DEPTH])
        return false;
    encode(r, &r->down, q, own_chunk(r, q));
    send_on(r, &r->down, q, r->next);
    r->down.taken++;
    return true;
}

static bool take_partial(poe_reduce *r)
{
    uint64_t q = r->down.taken;
    if (!is_begun(r, q) || !has_arrived(r, &r->down) || !check_chunk(r, &r->down, r->previous))
        return false;
    add_own(r, &r->down, q);
    r->down.taken++;
    if (r->next >= 0) {
        send_on(r, &r->down, q, r->next);
        return true;
    }
    send_on(r, &r->down, q, r->previous);
    decode(r, &r->down, q, total_chunk(r, q)); /* as everyone else does */
    finish_chunk(r, q);
    return true;
}

static bool take_total(poe_reduce *r)
{
    uint64_t q = r->up.taken;
    if (!is_begun(r, q) || !has_arrived(r, &r->up) || !check_chunk(r, &r->up, r->next))
        return false;
    r->up.taken++;
    if (r->previous >= 0)
        send_on(r, &r->up, q, r->previous);
    decode(r, &r->up, q, total_chunk(r, q));
    finish_chunk(r, q);
    return true;
}

/* One chunk at a time, so that the transport is looked after in between. */
static bool advance(poe_part *part)
{
    poe_reduce *r = reduce_of(part);
    bool moved = collect_sent(r, &r->down) | collect_sent(r, &r->up);
    if (r->previous >= 0) {
        post_free(r, &r->down, r->previous);
        moved |= read_frame(r, &r->down, r->previous);
    }
    if (r->next >= 0) {
        post_free(r, &r->up, r->next);
        moved |= read_frame(r, &r->up, r->next);
    }
    moved |= r->previous >= 0 ? take_partial(r) : feed(r);
    if (r->next >= 0)
        moved |= take_total(r);
    bool above = r->previous >= 0 && r->down.taken < (atomic_load(&r->finished) + 1) * r->chunks;
    atomic_store(&r->awaited, above ? r->previous : r->next);
    return moved;
}

/* --- going on in another process ---------------------------------------------------------------------------------- */
static void take_out(const poe_reduce *r, const chunk_ring *ring, int peer, poe_traffic *traffic)
{
    poe_traffic_of(traffic, peer, r->channel)->received -= ring->posted - ring->taken;
    for (uint64_t q = ring->taken; q < ring->framed; q++)
        if (ring->messages[q % DEPTH].bytes)
            poe_traffic_of(traffic, peer, r->channel + POE_CHANNEL_PAYLOAD)->received--;
}

static void stand(const poe_part *part, poe_part_state *state, poe_traffic *traffic)
{
    const poe_reduce *r = (const poe_reduce *)part;
    *state = (poe_part_state){.kind = POE_PART_REDUCE,
                              .peer = -1,
                              .channel = r->channel,
                              .counts = {r->ended, r->down.taken, r->up.taken}};
    if (r->previous >= 0)
        take_out(r, &r->down, r->previous, traffic);
    if (r->next >= 0)
        take_out(r, &r->up, r->next, traffic);
}

static void resume(poe_reduce *r)
{
    const poe_part_state *state = poe_part_restored(r->part.comm, POE_PART_REDUCE, -1, r->channel);
    if (!state)
        return;
    r->begun = r->ended = state->counts[0];
    r->down.posted = r->down.framed = r->down.taken = state->counts[1];
    r->up.posted = r->up.framed = r->up.taken = state->counts[2];
    r->finished = (r->next >= 0 ? r->up.taken : r->down.taken) / r->chunks;
}

/* --- opening and closing ------------------------------------------------------------------------------------------ */
static void free_reduce(poe_reduce *r)
{
    free(r->rows);
    free(r->sum);
    free(r->up.buffers);
    free(r->down.buffers);
    free(r->totals);
    free(r->own);
    free(r->steps);
    free(r->part.operations);
    free(r);
}

static size_t aligned(size_t bytes)
{
    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static bool allocate(poe_reduce *r)
{
    poe_operation *operations = calloc(4 * DEPTH, sizeof(*operations));
    r->part.n_operations = 4 * DEPTH;
    r->part.operations = operations;
    r->steps = calloc((size_t)r->slots, sizeof(*r->steps));
    r->own = calloc((size_t)r->slots, sizeof(*r->own));
    r->totals = calloc((size_t)r->slots, sizeof(*r->totals));
    r->stride = aligned(POE_FRAME_BYTES + poe_wire_bytes(r->wire, 1, r->chunk));
    r->down.buffers = aligned_alloc(ALIGNMENT, DEPTH * r->stride);
    r->up.buffers = aligned_alloc(ALIGNMENT, DEPTH * r->stride);
    r->sum = aligned_alloc(ALIGNMENT, aligned(r->chunk * sizeof(float)));
    r->rows = calloc(r->width ? r->chunk / r->width : 1, sizeof(*r->rows));
    if (!operations || !r->steps || !r->own || !r->totals || !r->down.buffers || !r->up.buffers || !r->sum || !r->rows)
        return false;
    r->down.frame_operations = operations;
    r->down.operations = operations + DEPTH;
    r->up.frame_operations = operations + 2 * DEPTH;
    r->up.operations = operations + 3 * DEPTH;
    return true;
}

/* Whole rows, at least one. */
static size_t chunk_of(const poe_reduce_settings *settings)
{
    size_t chunk = settings->chunk ? settings->chunk : DEFAULT_CHUNK, width = settings->width;
    if (width)
        chunk = chunk > width ? chunk / width * width : width;
    return chunk < settings->count ? chunk : settings->count;
}

poe_status poe_reduce_open(poe_comm *comm, const poe_reduce_settings *settings, poe_reduce **reduce)
{
    assert(settings->count > 0 && settings->slots >= 1 && settings->channel >= 0 && settings->channel < 16);
    assert(!settings->width || settings->count % settings->width == 0);
    if (poe_comm_lost(comm))
        return POE_PEER_LOST;
    poe_reduce *r = calloc(1, sizeof(*r));
    if (r) {
        r->count = settings->count;
        r->width = settings->width;
        r->wire = settings->wire;
        r->chunk = chunk_of(settings);
        r->chunks = (r->count + r->chunk - 1) / r->chunk;
        r->slots = settings->slots;
    }
    if (!r || !allocate(r)) {
        poe_error("out of memory for the sum of %s", settings->name);
        if (r)
            free_reduce(r);
        return POE_FAILED;
    }
    snprintf(r->name, sizeof(r->name), "%s", settings->name);
    r->n_ranks = settings->n_ranks;
    while (settings->ranks[r->place] != poe_comm_rank(comm))
        r->place++;
    assert(r->place < r->n_ranks);
    r->previous = r->place > 0 ? settings->ranks[r->place - 1] : -1;
    r->next = r->place + 1 < r->n_ranks ? settings->ranks[r->place + 1] : -1;
    r->awaited = r->previous >= 0 ? r->previous : r->next;
    r->channel = settings->channel;
    r->run = settings->run;
    r->part.comm = comm;
    r->part.advance = advance;
    r->part.stand = stand;
    resume(r);
    if (r->previous >= 0)
        poe_watch_add(comm, r->previous);
    if (r->next >= 0)
        poe_watch_add(comm, r->next);
    if (r->n_ranks > 1)
        poe_part_attach(&r->part);
    *reduce = r;
    return POE_OK;
}

static bool has_sent(const poe_part *part)
{
    return atomic_load(&part->sending) == 0;
}

void poe_reduce_close(poe_reduce *reduce)
{
    if (!reduce)
        return;
    /* Who leaves with sums under way has failed, and waits for nobody. */
    if (reduce->begun == reduce->ended && !has_sent(&reduce->part)) {
        poe_wait wait = {.peer = &reduce->awaited, .account = &reduce->part.comm->stats.shared_wait};
        snprintf(wait.text, sizeof(wait.text), "the last sum of %s to be taken", reduce->name);
        poe_part_wait(&reduce->part, &wait, has_sent);
    }
    if (reduce->n_ranks == 1 || poe_part_detach(&reduce->part))
        free_reduce(reduce);
}

/* --- the rank's thread -------------------------------------------------------------------------------------------- */
poe_status poe_reduce_begin(poe_reduce *reduce, int64_t step, const float *own, float *total)
{
    uint64_t begun = reduce->begun;
    assert(begun - reduce->ended < (uint64_t)reduce->slots);
    if (poe_comm_lost(reduce->part.comm))
        return POE_PEER_LOST;
    reduce->steps[begun % (uint64_t)reduce->slots] = step;
    reduce->own[begun % (uint64_t)reduce->slots] = own;
    reduce->totals[begun % (uint64_t)reduce->slots] = total;
    if (reduce->n_ranks == 1 && total != own)
        memcpy(total, own, reduce->count * sizeof(float));
    atomic_fetch_add(&reduce->begun, 1);
    if (reduce->n_ranks == 1)
        atomic_fetch_add(&reduce->finished, 1);
    else
        poe_comm_wake(reduce->part.comm);
    return POE_OK;
}

static bool has_total(const poe_part *part)
{
    const poe_reduce *r = (const poe_reduce *)part;
    return r->ended < atomic_load(&r->finished);
}

poe_status poe_reduce_end(poe_reduce *reduce, int64_t step)
{
    poe_comm *comm = reduce->part.comm;
    assert(reduce->ended < reduce->begun && reduce->steps[reduce->ended % (uint64_t)reduce->slots] == step);
    if (poe_comm_lost(comm))
        return POE_PEER_LOST;
    if (!has_total(&reduce->part)) {
        poe_wait wait = {.peer = &reduce->awaited, .account = &comm->stats.shared_wait};
        snprintf(wait.text, sizeof(wait.text), "step %" PRId64 " of the sum of %s", step, reduce->name);
        poe_status status = poe_part_wait(&reduce->part, &wait, has_total);
        if (status != POE_OK)
            return status;
    }
    reduce->ended++;
    return POE_OK;
}
