/* SPDX-License-Identifier: MIT
 * Small collective calls. The ranks are a binary tree with rank 0 at its root, so that a call takes some 2 log2(size)
 * transfers one after the other, which the helper thread carries out. Every transfer names the call it belongs to, so
 * that ranks that are in different calls find out. */
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

/* The ranks first..end-1: the first one and all below it in the tree. */
typedef struct branch {
    int first, end;
} branch;

struct poe_chain {
    poe_part part;
    int parent; /* -1: none */
    branch own, children[2];
    int n_children;
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

/* --- the journal ------------------------------------------------------------------------------------------------------ */
void poe_comm_journal(poe_comm *comm, unsigned char *journal, _Atomic uint64_t *bytes, bool replay)
{
    if (comm->journal.replay && !journal)
        poe_chain_restore(comm);
    comm->journal = (poe_journal){.at = journal, .bytes = bytes, .replay = replay};
}

bool poe_comm_replays(const poe_comm *comm)
{
    const poe_board *board = poe_comm_board(comm);
    return comm->journal.replay || (board && comm->chain->calls < atomic_load(&board->calls));
}

/* Writes it down, or reads it. */
void poe_comm_remember(poe_comm *comm, void *value, size_t bytes)
{
    poe_journal *j = &comm->journal;
    if (!j->at || !bytes)
        return;
    if (j->replay) {
        assert(j->read + bytes <= atomic_load(j->bytes));
        memcpy(value, j->at + j->read, bytes);
        j->read += bytes;
    } else {
        memcpy(j->at + atomic_load(j->bytes), value, bytes);
        atomic_fetch_add(j->bytes, bytes);
    }
}

/* A bracket begins with where it ends. */
bool poe_comm_begin_once(poe_comm *comm)
{
    poe_journal *j = &comm->journal;
    uint64_t end = 0;
    j->once = j->at ? atomic_load(j->bytes) : 0;
    poe_comm_remember(comm, &end, sizeof(end));
    if (!j->replay)
        return true;
    j->read = end;
    return false;
}

void poe_comm_end_once(poe_comm *comm)
{
    poe_journal *j = &comm->journal;
    uint64_t end = j->at ? atomic_load(j->bytes) : 0;
    if (j->at && !j->replay)
        memcpy(j->at + j->once, &end, sizeof(end));
}

/* The call is over, for a process after this one too. */
static void complete(poe_comm *comm, void *outcome, size_t bytes)
{
    poe_board *board = poe_comm_board(comm);
    poe_comm_remember(comm, outcome, bytes);
    if (board && comm->chain->calls > atomic_load(&board->calls))
        atomic_store(&board->calls, comm->chain->calls);
}

void poe_chain_restore(poe_comm *comm)
{
    const poe_part_state *state = poe_part_restored(comm, POE_PART_CHAIN, -1, 0);
    if (state)
        comm->chain->calls = (int64_t)state->counts[0];
}

static void stand(const poe_part *part, poe_part_state *state, poe_traffic *traffic)
{
    const poe_chain *chain = (const poe_chain *)part;
    (void)traffic; /* a call takes in all that it asks for */
    *state = (poe_part_state){.kind = POE_PART_CHAIN, .peer = -1, .counts = {(uint64_t)chain->calls}};
}

/* --- the calls -------------------------------------------------------------------------------------------------------- */
static bool holds(branch b, int rank)
{
    return b.first <= rank && rank < b.end;
}

/* The values of a branch within those of all ranks, `bytes` each. */
static poe_status transfer_branch(poe_chain *chain, call_kind kind, bool sending, int peer, branch b, void *all, size_t bytes)
{
    unsigned char *data = all;
    return transfer(chain, kind, sending, peer, bytes ? data + (size_t)b.first * bytes : data,
                    (size_t)(b.end - b.first) * bytes);
}

/* Towards the root each rank adds its own to what is below it; the root has all, and all goes back. */
static poe_status gather(poe_comm *comm, call_kind kind, const char *name, const void *mine, void *all, size_t bytes)
{
    poe_chain *chain = comm->chain;
    branch whole = {0, poe_comm_size(comm)};
    poe_status status = atomic_load(&comm->status);
    chain->calls++;
    chain->name = name;
    if (comm->journal.replay) {
        poe_comm_remember(comm, all, (size_t)whole.end * bytes);
        return status;
    }
    for (int i = 0; status == POE_OK && i < chain->n_children; i++)
        status = transfer_branch(chain, kind, false, chain->children[i].first, chain->children[i], all, bytes);
    if (bytes)
        memcpy((unsigned char *)all + (size_t)poe_comm_rank(comm) * bytes, mine, bytes);
    if (status == POE_OK && chain->parent >= 0)
        status = transfer_branch(chain, kind, true, chain->parent, chain->own, all, bytes);
    if (status == POE_OK && chain->parent >= 0)
        status = transfer_branch(chain, kind, false, chain->parent, whole, all, bytes);
    for (int i = 0; status == POE_OK && i < chain->n_children; i++)
        status = transfer_branch(chain, kind, true, chain->children[i].first, whole, all, bytes);
    if (status == POE_OK)
        complete(comm, all, (size_t)whole.end * bytes);
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

/* From `root` towards rank 0, and from every rank on that way to the others below it. Those have nothing to send towards
 * the root of the tree and do so all the same: every call begins in that direction, lest two ranks that are in different
 * ones should wait for each other. */
poe_status poe_comm_broadcast(poe_comm *comm, int root, void *data, size_t bytes)
{
    poe_chain *chain = comm->chain;
    bool above = holds(chain->own, root);
    poe_status status = atomic_load(&comm->status);
    chain->calls++;
    chain->name = "a broadcast";
    if (comm->journal.replay) {
        poe_comm_remember(comm, data, bytes);
        return status;
    }
    for (int i = 0; status == POE_OK && i < chain->n_children; i++)
        status = transfer(chain, BROADCAST, false, chain->children[i].first, data,
                          holds(chain->children[i], root) ? bytes : 0);
    if (status == POE_OK && chain->parent >= 0)
        status = transfer(chain, BROADCAST, true, chain->parent, data, above ? bytes : 0);
    if (status == POE_OK && chain->parent >= 0 && !above)
        status = transfer(chain, BROADCAST, false, chain->parent, data, bytes);
    for (int i = 0; status == POE_OK && i < chain->n_children; i++)
        if (!holds(chain->children[i], root))
            status = transfer(chain, BROADCAST, true, chain->children[i].first, data, bytes);
    if (status == POE_OK)
        complete(comm, data, bytes);
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

poe_status poe_comm_share(poe_comm *comm, int root, void **data, size_t *bytes)
{
    bool gets = poe_comm_rank(comm) != root;
    poe_status status = poe_comm_broadcast(comm, root, bytes, sizeof(*bytes));
    if (status != POE_OK)
        return status;
    poe_log_hold();
    if (gets && !(*data = malloc(*bytes ? *bytes : 1))) {
        poe_error("out of memory for %zu bytes from rank %d", *bytes, root);
        status = POE_FAILED;
    }
    status = poe_comm_agree(comm, status);
    poe_log_settle(true);
    return status == POE_OK ? poe_comm_broadcast(comm, root, *data, *bytes) : status;
}

/* Finds the rank in the tree: below the first rank of a branch are the two halves of the others. */
static void take_place(poe_chain *chain, int rank, int size)
{
    branch b = {0, size};
    chain->parent = -1;
    for (;;) {
        branch half = {b.first + 1, b.first + 1 + (b.end - b.first) / 2}, other = {half.end, b.end};
        if (b.first == rank) {
            chain->own = b;
            for (int i = 0; i < 2; i++)
                if ((i ? other : half).first < (i ? other : half).end)
                    chain->children[chain->n_children++] = i ? other : half;
            return;
        }
        chain->parent = b.first;
        b = holds(half, rank) ? half : other;
    }
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
    chain->part = (poe_part){
        .comm = comm, .advance = advance, .operations = chain->operations, .n_operations = 2, .stand = stand};
    comm->chain = chain;
    take_place(chain, poe_comm_rank(comm), poe_comm_size(comm));
    if (chain->parent >= 0)
        poe_watch_add(comm, chain->parent);
    for (int i = 0; i < chain->n_children; i++)
        poe_watch_add(comm, chain->children[i].first);
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
