/* SPDX-License-Identifier: MIT
 * The shared sum. Chunks are numbered through all vectors and handled strictly in that order. Going down, a rank adds
 * its own to the partial sum in the buffer it came in and sends that buffer on; the last rank turns it round as the
 * total; going up, the buffer is copied out and sent on unchanged, so that all ranks hold the same bits. Receives are
 * posted ahead only as far as buffers are free: the transport holds the sender back, and needs no credits. */
#include <assert.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "comm/comm_impl.h"
#include "src/clock.h"
#include "src/crc32c.h"

enum { DEPTH = 4, ALIGNMENT = 64, DEFAULT_CHUNK = 262144 };

/* Chunk q lives in buffer q % DEPTH: a frame and its floats. */
typedef struct chunk_ring {
    unsigned char *buffers;    /* (DEPTH, stride) */
    poe_operation *operations; /* (DEPTH) */
    bool sending[DEPTH];
    uint64_t posted, taken;    /* chunks whose receive was posted, chunks handled */
} chunk_ring;

struct poe_reduce {
    poe_part part;
    char name[64];
    int place, n_ranks; /* in the chain */
    int previous, next; /* ranks; -1 at the ends */
    int channel;
    size_t count, chunk, chunks, stride;
    int slots;
    uint64_t run;
    atomic_int awaited; /* the rank that must act next */

    int64_t *steps;  /* (slots) of vector v in v % slots */
    float **values;  /* (slots) */
    _Atomic uint64_t begun;    /* vectors, by the rank's thread */
    _Atomic uint64_t finished; /* vectors, by the helper thread */
    uint64_t ended;            /* the rank's thread's */
    chunk_ring down, up;             /* the helper thread's */
};

static poe_reduce *reduce_of(poe_part *part)
{
    return (poe_reduce *)part;
}

static unsigned char *buffer_of(const poe_reduce *r, const chunk_ring *ring, uint64_t q)
{
    return ring->buffers + (q % DEPTH) * r->stride;
}

static float *floats_of(const poe_reduce *r, const chunk_ring *ring, uint64_t q)
{
    return (float *)(void *)(buffer_of(r, ring, q) + POE_FRAME_BYTES);
}

static size_t chunk_length(const poe_reduce *r, uint64_t q)
{
    size_t first = (size_t)(q % r->chunks) * r->chunk;
    return r->count - first < r->chunk ? r->count - first : r->chunk;
}

static float *own_chunk(const poe_reduce *r, uint64_t q)
{
    return r->values[q / r->chunks % (uint64_t)r->slots] + (size_t)(q % r->chunks) * r->chunk;
}

static poe_frame frame_of(const poe_reduce *r, uint64_t q)
{
    return (poe_frame){.type = POE_FRAME_CHUNK,
                       .run = r->run,
                       .message = {.step = r->steps[q / r->chunks % (uint64_t)r->slots],
                                   .micro = (int32_t)(q % r->chunks),
                                   .data_hash = r->count,
                                   .bytes = chunk_length(r, q) * sizeof(float)}};
}

static void post(poe_reduce *r, chunk_ring *ring, int peer)
{
    uint64_t q = ring->posted++;
    poe_part_receive(&r->part, peer, r->channel, buffer_of(r, ring, q),
                     POE_FRAME_BYTES + chunk_length(r, q) * sizeof(float), &ring->operations[q % DEPTH]);
}

static void send_on(poe_reduce *r, chunk_ring *ring, uint64_t q, int peer)
{
    ring->sending[q % DEPTH] = true;
    r->part.sending++;
    poe_part_send(&r->part, peer, r->channel, buffer_of(r, ring, q),
                  POE_FRAME_BYTES + chunk_length(r, q) * sizeof(float), &ring->operations[q % DEPTH]);
}

static bool collect_sent(poe_reduce *r, chunk_ring *ring)
{
    bool moved = false;
    for (int i = 0; i < DEPTH; i++)
        if (ring->sending[i] && poe_part_done(&r->part, &ring->operations[i])) {
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

static bool has_arrived(poe_reduce *r, const chunk_ring *ring)
{
    return ring->taken < ring->posted && poe_part_done(&r->part, &ring->operations[ring->taken % DEPTH]);
}

static bool check_chunk(poe_reduce *r, const chunk_ring *ring, int peer)
{
    uint64_t q = ring->taken;
    poe_frame got, expected = frame_of(r, q);
    char why[POE_WHY_BYTES];
    poe_watch_heard(r->part.comm, peer, poe_now());
    if (poe_frame_decode(buffer_of(r, ring, q), &got, why) && poe_frame_matches(&got, &expected, why)) {
        if (got.message.data_hash == r->count && poe_frame_payload_whole(&got, floats_of(r, ring, q), why))
            return true;
        if (got.message.data_hash != r->count)
            snprintf(why, sizeof(why), "its vector has %" PRIu64 " numbers, expected %zu", got.message.data_hash,
                     r->count);
    }
    poe_comm_lose(r->part.comm, "sum of %s: rank %d expects chunk %zu of step %" PRId64
                  " and refuses what came from rank %d: %s",
                  r->name, poe_comm_rank(r->part.comm), (size_t)(q % r->chunks), expected.message.step, peer, why);
    return false;
}

static void add(float *restrict sum, const float *restrict own, size_t n)
{
    for (size_t i = 0; i < n; i++)
        sum[i] += own[i];
}

static void seal(poe_reduce *r, chunk_ring *ring, uint64_t q)
{
    poe_frame frame = frame_of(r, q);
    frame.payload_crc = poe_crc32c(0, floats_of(r, ring, q), (size_t)frame.message.bytes);
    poe_frame_encode(&frame, buffer_of(r, ring, q));
}

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
    memcpy(floats_of(r, &r->down, q), own_chunk(r, q), chunk_length(r, q) * sizeof(float));
    seal(r, &r->down, q);
    send_on(r, &r->down, q, r->next);
    r->down.taken++;
    return true;
}

static bool take_partial(poe_reduce *r)
{
    uint64_t q = r->down.taken;
    if (!is_begun(r, q) || !has_arrived(r, &r->down) || !check_chunk(r, &r->down, r->previous))
        return false;
    add(floats_of(r, &r->down, q), own_chunk(r, q), chunk_length(r, q));
    seal(r, &r->down, q);
    r->down.taken++;
    if (r->next >= 0) {
        send_on(r, &r->down, q, r->next);
        return true;
    }
    memcpy(own_chunk(r, q), floats_of(r, &r->down, q), chunk_length(r, q) * sizeof(float));
    send_on(r, &r->down, q, r->previous);
    finish_chunk(r, q);
    return true;
}

static bool take_total(poe_reduce *r)
{
    uint64_t q = r->up.taken;
    if (!is_begun(r, q) || !has_arrived(r, &r->up) || !check_chunk(r, &r->up, r->next))
        return false;
    memcpy(own_chunk(r, q), floats_of(r, &r->up, q), chunk_length(r, q) * sizeof(float));
    r->up.taken++;
    if (r->previous >= 0)
        send_on(r, &r->up, q, r->previous);
    finish_chunk(r, q);
    return true;
}

/* One chunk at a time, so that the transport is looked after in between. */
static bool advance(poe_part *part)
{
    poe_reduce *r = reduce_of(part);
    bool moved = collect_sent(r, &r->down) | collect_sent(r, &r->up);
    if (r->previous >= 0)
        post_free(r, &r->down, r->previous);
    if (r->next >= 0)
        post_free(r, &r->up, r->next);
    moved |= r->previous >= 0 ? take_partial(r) : feed(r);
    if (r->next >= 0)
        moved |= take_total(r);
    bool above = r->previous >= 0 && r->down.taken < (atomic_load(&r->finished) + 1) * r->chunks;
    atomic_store(&r->awaited, above ? r->previous : r->next);
    return moved;
}

/* --- opening and closing ------------------------------------------------------------------------------------------ */
static void free_reduce(poe_reduce *r)
{
    free(r->up.buffers);
    free(r->down.buffers);
    free(r->values);
    free(r->steps);
    free(r->part.operations);
    free(r);
}

static bool allocate(poe_reduce *r)
{
    r->part.n_operations = 2 * DEPTH;
    r->part.operations = calloc(2 * DEPTH, sizeof(*r->part.operations));
    r->steps = calloc((size_t)r->slots, sizeof(*r->steps));
    r->values = calloc((size_t)r->slots, sizeof(*r->values));
    r->stride = (POE_FRAME_BYTES + r->chunk * sizeof(float) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    r->down.buffers = aligned_alloc(ALIGNMENT, DEPTH * r->stride);
    r->up.buffers = aligned_alloc(ALIGNMENT, DEPTH * r->stride);
    r->down.operations = r->part.operations;
    r->up.operations = r->part.operations + DEPTH;
    return r->part.operations && r->steps && r->values && r->down.buffers && r->up.buffers;
}

poe_status poe_reduce_open(poe_comm *comm, const poe_reduce_settings *settings, poe_reduce **reduce)
{
    assert(settings->count > 0 && settings->slots >= 1 && settings->channel >= 0 && settings->channel < 16);
    if (poe_comm_lost(comm))
        return POE_PEER_LOST;
    poe_reduce *r = calloc(1, sizeof(*r));
    if (r) {
        r->count = settings->count;
        r->chunk = settings->chunk ? settings->chunk : DEFAULT_CHUNK;
        if (r->chunk > r->count)
            r->chunk = r->count;
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
poe_status poe_reduce_begin(poe_reduce *reduce, int64_t step, float *values)
{
    uint64_t begun = reduce->begun;
    assert(begun - reduce->ended < (uint64_t)reduce->slots);
    if (poe_comm_lost(reduce->part.comm))
        return POE_PEER_LOST;
    reduce->steps[begun % (uint64_t)reduce->slots] = step;
    reduce->values[begun % (uint64_t)reduce->slots] = values;
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
