/* SPDX-License-Identifier: MIT
 * Small collective calls. Each is a few transfers between neighbours in the chain 0-1-...-size-1, one after the
 * other, which the helper thread carries out. Every transfer names the call it belongs to, so that ranks that are in
 * different calls find out. */
#include <assert.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "comm/comm_impl.h"
#include "src/clock.h"
#include "src/crc32c.h"

typedef enum call_kind { BARRIER = 1, BROADCAST, GATHER, AGREE, END } call_kind;

typedef enum phase { IDLE, FRAME, PAYLOAD } phase;

struct poe_chain {
    poe_part part;
    poe_operation operations[2]; /* frame, payload */
    int32_t *outcomes;           /* (size) */
    int64_t calls;               /* so far */
    const char *name;            /* of the call under way */

    /* The transfer asked for: the rank's thread's until it raises `asked`, then the helper's until it raises `done`. */
    bool sending;
    atomic_int peer;
    poe_frame frame;
    void *data;
    unsigned char wire[POE_FRAME_BYTES];
    phase phase;
    _Atomic uint64_t asked, done;
};

/* --- the helper thread -------------------------------------------------------------------------------------------- */
static void start(poe_chain *chain)
{
    size_t bytes = (size_t)chain->frame.message.bytes;
    if (!chain->sending) {
        poe_part_receive(&chain->part, chain->peer, POE_CHANNEL_COLLECTIVE, chain->wire, POE_FRAME_BYTES,
                         &chain->operations[0]);
        chain->phase = FRAME;
        return;
    }
    chain->frame.payload_crc = poe_crc32c(0, chain->data, bytes);
    poe_frame_encode(&chain->frame, chain->wire);
    poe_part_send(&chain->part, chain->peer, POE_CHANNEL_COLLECTIVE, chain->wire, POE_FRAME_BYTES,
                  &chain->operations[0]);
    if (bytes)
        poe_part_send(&chain->part, chain->peer, POE_CHANNEL_COLLECTIVE_PAYLOAD, chain->data, bytes,
                      &chain->operations[1]);
    chain->phase = PAYLOAD;
}

static void refuse(poe_chain *chain, const char *why)
{
    int rank = poe_comm_rank(chain->part.comm);
    poe_comm_lose(chain->part.comm, "rank %d is in collective call %" PRId64 " (%s), and refuses what came from rank "
                  "%d: %s", rank, chain->frame.message.step, chain->name, chain->peer, why);
}

/* The receive of the payload is posted once its frame is the expected one. */
static bool read_frame(poe_chain *chain)
{
    poe_frame got;
    char why[POE_WHY_BYTES];
    if (!poe_frame_decode(chain->wire, &got, why) || !poe_frame_matches(&got, &chain->frame, why)) {
        refuse(chain, why);
        return false;
    }
    chain->frame.payload_crc = got.payload_crc;
    if (got.message.bytes)
        poe_part_receive(&chain->part, chain->peer, POE_CHANNEL_COLLECTIVE_PAYLOAD, chain->data,
                         (size_t)got.message.bytes, &chain->operations[1]);
    chain->phase = PAYLOAD;
    return true;
}

static bool finish(poe_chain *chain)
{
    char why[POE_WHY_BYTES];
    if (!chain->sending && !poe_frame_payload_whole(&chain->frame, chain->data, why)) {
        refuse(chain, why);
        return false;
    }
    poe_watch_heard(chain->part.comm, chain->peer, poe_now());
    chain->phase = IDLE;
    atomic_fetch_add(&chain->done, 1);
    return true;
}

static bool advance(poe_part *part)
{
    poe_chain *chain = (poe_chain *)part;
    if (chain->phase == IDLE) {
        if (chain->done == atomic_load(&chain->asked))
            return false;
        start(chain);
        return true;
    }
    if (!poe_part_done(part, &chain->operations[0]))
        return false;
    if (chain->phase == FRAME)
        return read_frame(chain);
    return poe_part_done(part, &chain->operations[1]) && finish(chain);
}

/* --- the rank's thread -------------------------------------------------------------------------------------------- */
static bool is_done(const poe_part *part)
{
    const poe_chain *chain = (const poe_chain *)part;
    return atomic_load(&chain->done) == atomic_load(&chain->asked);
}

static poe_status transfer(poe_chain *chain, call_kind kind, bool sending, int peer, void *data, size_t bytes)
{
    poe_comm *comm = chain->part.comm;
    if (poe_comm_lost(comm))
        return POE_PEER_LOST;
    chain->sending = sending;
    chain->peer = peer;
    chain->data = data;
    chain->frame = (poe_frame){.type = POE_FRAME_COLLECTIVE,
                               .message = {.kind = kind, .step = chain->calls, .bytes = bytes}};
    atomic_fetch_add(&chain->asked, 1);
    poe_comm_wake(comm);
    poe_wait wait = {.peer = &chain->peer, .account = &comm->stats.collective_wait, .end = kind == END};
    snprintf(wait.text, sizeof(wait.text), "%s (collective call %" PRId64 ")", chain->name, chain->calls);
    return poe_part_wait(&chain->part, &wait, is_done);
}

/* Up the chain each rank adds its own; the last one has all, and all goes back down. */
static poe_status gather(poe_comm *comm, call_kind kind, const char *name, const void *mine, void *all, size_t bytes)
{
    poe_chain *chain = comm->chain;
    int rank = poe_comm_rank(comm), size = poe_comm_size(comm);
    size_t before = (size_t)rank * bytes, whole = (size_t)size * bytes;
    poe_status status = atomic_load(&comm->status);
    chain->calls++;
    chain->name = name;
    if (status == POE_OK && rank > 0)
        status = transfer(chain, kind, false, rank - 1, all, before);
    if (bytes)
        memcpy((unsigned char *)all + before, mine, bytes);
    if (status == POE_OK && rank + 1 < size)
        status = transfer(chain, kind, true, rank + 1, all, before + bytes);
    if (status == POE_OK && rank + 1 < size)
        status = transfer(chain, kind, false, rank + 1, all, whole);
    if (status == POE_OK && rank > 0)
        status = transfer(chain, kind, true, rank - 1, all, whole);
    return status;
}

poe_status poe_comm_barrier(poe_comm *comm, const char *what)
{
    return gather(comm, BARRIER, what, NULL, NULL, 0);
}

poe_status poe_comm_gather(poe_comm *comm, const void *mine, void *all, size_t bytes)
{
    return gather(comm, GATHER, "a gathering", mine, all, bytes);
}

poe_status poe_comm_broadcast(poe_comm *comm, int root, void *data, size_t bytes)
{
    poe_chain *chain = comm->chain;
    int rank = poe_comm_rank(comm), size = poe_comm_size(comm);
    poe_status status = atomic_load(&comm->status);
    chain->calls++;
    chain->name = "a broadcast";
    if (status == POE_OK && rank != root)
        status = transfer(chain, BROADCAST, false, rank < root ? rank + 1 : rank - 1, data, bytes);
    if (status == POE_OK && rank <= root && rank > 0)
        status = transfer(chain, BROADCAST, true, rank - 1, data, bytes);
    if (status == POE_OK && rank >= root && rank + 1 < size)
        status = transfer(chain, BROADCAST, true, rank + 1, data, bytes);
    return status;
}

poe_status poe_comm_agree(poe_comm *comm, poe_status mine)
{
    int32_t *outcomes = comm->chain->outcomes, own = mine;
    poe_status status = gather(comm, AGREE, "an agreement", &own, outcomes, sizeof(own));
    if (status != POE_OK) {
        poe_log_settle(true); /* without an agreement everyone speaks for itself */
        return status;
    }
    int speaker = 0;
    while (speaker < poe_comm_size(comm) && outcomes[speaker] == POE_OK)
        speaker++;
    if (speaker == poe_comm_size(comm)) {
        poe_log_drop(); /* who holds errors goes on holding them */
        return POE_OK;
    }
    poe_log_settle(speaker == poe_comm_rank(comm));
    poe_comm_barrier(comm, "a sentence on what failed"); /* nobody ends the job before it is said */
    return (poe_status)outcomes[speaker];
}

poe_status poe_chain_end(poe_comm *comm)
{
    return gather(comm, END, "the end of the job", NULL, NULL, 0);
}

poe_status poe_chain_create(poe_comm *comm)
{
    poe_chain *chain = calloc(1, sizeof(*chain));
    int32_t *outcomes = calloc((size_t)poe_comm_size(comm), sizeof(*outcomes));
    if (!chain || !outcomes) {
        poe_error("out of memory for the connection to the other ranks");
        free(outcomes);
        free(chain);
        return POE_FAILED;
    }
    chain->outcomes = outcomes;
    chain->part = (poe_part){.comm = comm, .advance = advance, .operations = chain->operations, .n_operations = 2};
    comm->chain = chain;
    poe_part_attach(&chain->part);
    return POE_OK;
}

void poe_chain_destroy(poe_comm *comm)
{
    poe_chain *chain = comm->chain;
    comm->chain = NULL;
    if (!chain || !poe_part_detach(&chain->part))
        return;
    free(chain->outcomes);
    free(chain);
}
