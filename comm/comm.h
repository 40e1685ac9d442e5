/* SPDX-License-Identifier: MIT
 * Talking between ranks. A poe_comm is one rank's end: it owns a transport (inproc, mpi, fabric; table in transport.h) and one
 * helper thread, which alone touches the network, so that transfers go on while the rank computes and nobody spins.
 * Three things are built on it: links (ordered, credited, checked streams from one rank to another), reduces (the sum
 * of the shared gradients along a chain of ranks, in fixed order), and small collective calls along a tree. Nothing here
 * knows what a layer is.
 *
 * Waiting: every call that waits sleeps, and fails with POE_PEER_LOST, said, when the rank it waits for has given no
 * sign of life for `deadline` seconds (ranks that talk to each other exchange heartbeats): the sentence names both
 * ranks, the link, step and micro-batch, what was waited for and since when. A peer that is alive but slow gets a line
 * every `patience` seconds. Threads: all calls of one poe_comm come from one thread, except where stated. */
#ifndef POE_COMM_COMM_H
#define POE_COMM_COMM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "comm/wire.h"
#include "src/status.h"

typedef struct poe_comm poe_comm;
typedef struct poe_link poe_link;
typedef struct poe_reduce poe_reduce;

typedef struct poe_comm_settings {
    double deadline; /* seconds without a sign of life; 0: 120 */
    double patience; /* seconds between lines about a slow peer; 0: 30 */
    double heartbeat; /* seconds between signs of life; 0: min(1, deadline / 4) */
} poe_comm_settings;

int poe_comm_rank(const poe_comm *comm);
int poe_comm_size(const poe_comm *comm);
int poe_comm_host_ranks(const poe_comm *comm); /* ranks of this job on this rank's host, itself included */
const char *poe_comm_transport(const poe_comm *comm); /* "inproc", "mpi", "fabric" */
const char *poe_comm_emulated(const poe_comm *comm); /* lines that say how the network is emulated; NULL: it is real */
/* Of a stage process that an agent looks after (comm/agent/board.h); NULL: there is none. */
struct poe_board *poe_comm_board(const poe_comm *comm);
/* Applies from now on (the deadline is a flag, known only after the start). NULL: the defaults. */
void poe_comm_configure(poe_comm *comm, const poe_comm_settings *settings);
/* Stops the helper thread and frees everything; collective with the other ranks when `orderly` (outstanding sends are
 * completed), within a fraction of a second otherwise. Ranks that wait for this one are told, and give up. NULL is
 * legal. Links and reduces must be closed before. */
void poe_comm_destroy(poe_comm *comm, bool orderly);

/* --- small collective calls: every rank of the job, in the same order ------------------------------------------------ */
poe_status poe_comm_barrier(poe_comm *comm, const char *what);
/* `bytes` from rank `root` to everyone. */
poe_status poe_comm_broadcast(poe_comm *comm, int root, void *data, size_t bytes);
/* The same when only `root` knows how many they are: the others get a copy, which is the caller's to free (also on failure;
 * NULL: none). POE_FAILED on every rank when one is out of memory, said. */
poe_status poe_comm_share(poe_comm *comm, int root, void **data, size_t *bytes);
/* `bytes` of every rank, in rank order, at everyone: all (size * bytes). */
poe_status poe_comm_gather(poe_comm *comm, const void *mine, void *all, size_t bytes);
/* Agrees on an outcome: everyone returns the status of the lowest rank that failed, and that rank alone prints the
 * error it holds (poe_log_hold()); the others drop theirs. POE_OK when nobody failed. */
poe_status poe_comm_agree(poe_comm *comm, poe_status mine);

/* --- links -------------------------------------------------------------------------------------------------------------- */
/* What a message is; both the header that travels and what a receiver expects. */
typedef struct poe_message {
    uint32_t kind;      /* the caller's own enumeration */
    uint32_t flags;     /* the caller's; not checked */
    int64_t step;
    int32_t micro;      /* micro-batch within the step */
    int32_t stage;      /* sender's stage */
    uint32_t shape[4];  /* e.g. B, T, C, 0 */
    uint64_t data_hash; /* not checked by the link: the pipeline does */
    uint64_t bytes;     /* of payload */
} poe_message;

typedef struct poe_link_settings {
    const char *name;  /* "activations 0->1": for messages; copied */
    int peer;          /* the other rank */
    int channel;       /* 0..15, the same at both ends; one link per (direction, pair, channel), ever */
    bool outgoing;
    size_t max_bytes;  /* of a payload */
    int window;        /* credits: messages that may be under way and unreleased, >= 1, the same at both ends */
    uint64_t run;      /* identifies the run: messages of another one are refused */
} poe_link_settings;

/* All memory of a link is allocated here. POE_FAILED: said. */
poe_status poe_link_open(poe_comm *comm, const poe_link_settings *settings, poe_link **link);
/* Waits until what was sent has left. NULL is legal. */
void poe_link_close(poe_link *link);

/* Sender: waits for a credit and gives the payload to fill (max_bytes, 64-byte aligned); then poe_link_send() hands
 * it over and returns at once. `message` says what is waited for, should the wait be long. */
poe_status poe_link_acquire(poe_link *link, const poe_message *message, void **payload);
poe_status poe_link_send(poe_link *link, const poe_message *message);

/* Receiver: waits for the next message, checks that it is the expected one (magic, version, run, kind, step, micro,
 * stage, shape, bytes) and its CRC-32C, and lends its payload until poe_link_release(), which returns the credit.
 * `got` (may be NULL): the header as received. A message that is not the expected one: POE_PEER_LOST, said. Messages
 * are lent and released in order; up to `window` may be lent at a time. */
poe_status poe_link_receive(poe_link *link, const poe_message *expected, poe_message *got, void **payload);
void poe_link_release(poe_link *link);
/* Sends, and receives, a payload that is the caller's: message->bytes are copied into, and out of, the link's memory. */
poe_status poe_link_send_copy(poe_link *link, const poe_message *message, const void *payload);
poe_status poe_link_receive_copy(poe_link *link, const poe_message *expected, void *payload);
/* True when poe_link_acquire() (of an outgoing link), or poe_link_receive(), would not wait. */
bool poe_link_ready(const poe_link *link);

/* --- the shared sum -------------------------------------------------------------------------------------------------------- */
typedef struct poe_reduce_settings {
    const char *name;   /* copied */
    const int *ranks;   /* the chain, in the order of addition; contains this rank; copied */
    int n_ranks;
    int channel;        /* 0..15, not used by a link between the same ranks */
    size_t count;       /* floats of a vector */
    size_t width;       /* floats of a row, divides count: rows of nothing but +0 need not travel; 0: all travels */
    poe_wire wire;      /* fp32, or bf16: partial sums and totals are rounded wherever they travel */
    size_t chunk;       /* floats per message, made whole rows; 0: 262144 */
    int slots;          /* vectors that may be under way at once, >= 1 */
    uint64_t run;
} poe_reduce_settings;

poe_status poe_reduce_open(poe_comm *comm, const poe_reduce_settings *settings, poe_reduce **reduce);
/* Waits until totals have been passed on, unless vectors are under way: then it gives them up. NULL is legal. */
void poe_reduce_close(poe_reduce *reduce);
/* Starts summing `own` (count floats) for `step`: partial sums go down the chain, each rank adds its own (partial + own,
 * in chain order), the total comes back up and is written to `total`, which may be `own`. Both are 64-byte aligned and
 * borrowed until poe_reduce_end(). Returns at once. At most `slots` vectors are begun and not ended. Every rank gets
 * the same bits; those are the same whether zero rows travel or not. A chain of one rank rounds nothing. */
poe_status poe_reduce_begin(poe_reduce *reduce, int64_t step, const float *own, float *total);
/* Waits until the total of the oldest begun vector, which must be that of `step`, is there, and this rank has passed it
 * on, so that the memory is the caller's again. */
poe_status poe_reduce_end(poe_reduce *reduce, int64_t step);

/* --- going on in another process ------------------------------------------------------------------------------------------ */
/* Where links, sums and collective calls stand between two calls of the rank; plain memory. */
enum { POE_COMM_PARTS = 128 };
typedef struct poe_part_state {
    int32_t kind, peer, channel, unused;
    uint64_t counts[3]; /* the part's own */
} poe_part_state;
typedef struct poe_comm_state {
    int32_t n_parts;
    poe_part_state parts[POE_COMM_PARTS];
} poe_comm_state;

struct poe_traffic;
/* Stops the helper thread, once what was handed over can no longer be lost with this process, and says where everything
 * stands: `traffic` (size, POE_CHANNELS) counts the messages of every channel (comm/agent/board.h). Until poe_comm_resume()
 * nothing moves, and vectors under way in a sum keep their contents. The transport must have settled(). */
poe_status poe_comm_pause(poe_comm *comm, poe_comm_state *state, struct poe_traffic *traffic);
void poe_comm_resume(poe_comm *comm);
/* Before links and sums are opened: they, and collective calls after the journal, go on from there; both are copied.
 * Vectors that were under way in a sum must be begun again, with the contents they had, before anything else is asked of
 * it. */
poe_status poe_comm_restore(poe_comm *comm, const poe_comm_state *state, const struct poe_traffic *traffic);

/* From now on the outcome of every collective call is written to `journal` (of another process's memory, so that it
 * survives) and *bytes counted up; or, with `replay`, taken from there instead of from the other ranks. Until
 * poe_comm_journal(comm, NULL, ...). */
void poe_comm_journal(poe_comm *comm, unsigned char *journal, _Atomic uint64_t *bytes, bool replay);
/* True when the next collective call was already completed by a process before this one: then what is done beside it is
 * done, and not to be done again. */
bool poe_comm_replays(const poe_comm *comm);
/* Brackets a part of the journal that is not to be repeated, collective calls and all: false when it is replayed. Its
 * results are to be remembered after the end: what this rank has found out, and might find otherwise a second time. */
bool poe_comm_begin_once(poe_comm *comm);
void poe_comm_end_once(poe_comm *comm);
void poe_comm_remember(poe_comm *comm, void *value, size_t bytes);

/* --- watching -------------------------------------------------------------------------------------------------------------- */
typedef struct poe_comm_stats {
    double receive_wait, credit_wait, shared_wait, collective_wait; /* seconds that the rank's thread slept in each */
    double transfer;      /* seconds during which at least one send was under way */
    double transfer_busy; /* of these, seconds in which the rank's thread was not waiting in a call of this module */
    uint64_t bytes_sent, bytes_received, messages_sent, messages_received;
    uint64_t shared_sent, shared_dense; /* bytes of sums that were sent, and what all of their rows in fp32 would be */
} poe_comm_stats;
void poe_comm_get_stats(poe_comm *comm, poe_comm_stats *stats); /* totals since the start */

typedef enum poe_wait_kind { POE_WAIT_RECEIVE, POE_WAIT_CREDIT, POE_WAIT_SHARED, POE_WAIT_COLLECTIVE } poe_wait_kind;

/* Called in the rank's own thread, which is the one that waits and sends: after each sleep (`channel`: of the link, for
 * POE_WAIT_RECEIVE and POE_WAIT_CREDIT), when a link's message is handed over, and when one is lent. NULL: not told. */
typedef struct poe_comm_observer {
    void *context;
    void (*waited)(void *context, poe_wait_kind kind, int peer, int channel, double from, double to);
    void (*sent)(void *context, int peer, int channel, const poe_message *message);
    void (*received)(void *context, int peer, int channel, const poe_message *message);
} poe_comm_observer;
/* Copied; NULL: nobody observes. */
void poe_comm_observe(poe_comm *comm, const poe_comm_observer *observer);

/* What the rank is doing, for its neighbours' and the user's eyes ("forward, step 12, micro-batch 3"): cheap, copied
 * into heartbeats. Static text only; a negative step or micro-batch is left out. */
void poe_comm_doing(poe_comm *comm, const char *what, int64_t step, int micro);

/* From any thread or signal handler: the helper thread prints one line that says what this rank waits for and since
 * when, or what it is doing. */
void poe_comm_request_report(poe_comm *comm);
/* From any thread or signal handler: asks rank 0 to stop; the wish travels along the chain with the heartbeats, at
 * once. poe_comm_stop_wanted() on rank 0 is true from then on. */
void poe_comm_request_stop(poe_comm *comm);
bool poe_comm_stop_wanted(const poe_comm *comm); /* any thread */

#endif
