/* SPDX-License-Identifier: MIT
 * What the files of comm/ share: the helper thread's parts, how the rank's thread waits for them, how a loss spreads.
 *
 * Two threads: the rank's own, which calls comm.h, and the helper, which alone calls the transport. Each part (link,
 * reduce, chain, watch) is a state machine that the helper advances after every sign of progress. The threads meet in
 * atomic counters, each written by one of them; the lock guards only what the struct below says. */
#ifndef POE_COMM_COMM_IMPL_H
#define POE_COMM_COMM_IMPL_H

#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

#include "comm/agent/board.h"
#include "comm/message.h"
#include "comm/transport.h"
#include "src/log.h"

typedef struct poe_part poe_part;
struct poe_part {
    poe_comm *comm;
    poe_part *next;
    bool (*advance)(poe_part *part); /* in the helper thread; true when something moved */
    poe_operation *operations;       /* all that the part ever starts; done while idle */
    int n_operations;
    atomic_int sending;              /* sends of payload under way, for the account of overlap */
    /* For poe_comm_pause(); each may be NULL. Whether all that the rank's thread has handed over was sent; and, while the
     * helper thread stands still, where the part is: its own counts, and what it has asked for ahead taken out of traffic. */
    bool (*settled)(const poe_part *part);
    void (*stand)(const poe_part *part, poe_part_state *state, poe_traffic *traffic);
};

enum { POE_PART_SENDER = 1, POE_PART_RECEIVER, POE_PART_REDUCE, POE_PART_CHAIN }; /* kinds of a poe_part_state */

typedef enum poe_hold { POE_MOVING, POE_HOLD_WANTED, POE_HELD } poe_hold;

/* The outcomes of collective calls, in the memory of another process (poe_comm_journal()). */
typedef struct poe_journal {
    unsigned char *at; /* NULL: none */
    _Atomic uint64_t *bytes;
    uint64_t read, once; /* once: where the bracket that is being written began */
    bool replay;
} poe_journal;

/* What the rank's thread waits for, for the watch and for people. */
typedef struct poe_wait {
    char text[160];         /* "step 3, micro-batch 1 on link activations 0->1" */
    const atomic_int *peer; /* the rank that must act next */
    double *account;        /* field of stats */
    int channel;            /* of the link */
    bool end;               /* the end of the job: a peer that leaves is no loss */
    double since, said;     /* monotonic; set by poe_part_wait() */
    time_t since_wall;
} poe_wait;

typedef struct poe_watch poe_watch;
typedef struct poe_chain poe_chain;

struct poe_comm {
    poe_transport *transport;
    poe_log *log;
    pthread_t thread;
    bool running;
    poe_watch *watch;
    poe_chain *chain;
    atomic_int status;   /* POE_OK, or POE_PEER_LOST for good */
    atomic_bool blamed;  /* somebody says, or has said, why */
    atomic_bool quit, report, stop;

    pthread_mutex_t lock; /* guards: */
    pthread_cond_t changed;
    poe_comm_settings settings;
    poe_part *attach, *detach; /* requests to the helper thread, NULL when served */
    poe_wait *wait;            /* NULL while the rank's thread does not wait */
    const char *doing;
    int64_t doing_step;
    int doing_micro;
    poe_comm_stats stats;
    double accounted; /* transfer and transfer_busy are right up to here */
    bool sending;
    poe_hold hold;

    poe_comm_state restored; /* the rank's thread's, as are the next two */
    poe_journal journal;
    poe_comm_observer observer; /* the rank's thread's */

    poe_part *parts; /* the helper thread's, as is the rest */
    double due;       /* when it must look again, even if nothing happens */
    poe_comm_stats tally;
    poe_traffic *traffic; /* (size, POE_CHANNELS) operations started */
};

/* --- comm.c ------------------------------------------------------------------------------------------------------- */
static inline bool poe_comm_lost(const poe_comm *comm)
{
    return atomic_load(&comm->status) != POE_OK;
}
/* Says the sentence, unless the comm is lost already, and loses the comm. Either thread, without the lock. */
void poe_comm_lose(poe_comm *comm, const char *format, ...) __attribute__((format(printf, 2, 3)));
void poe_comm_wake(poe_comm *comm);
static inline poe_traffic *poe_traffic_of(poe_traffic *traffic, int peer, int channel)
{
    return &traffic[(size_t)peer * POE_CHANNELS + (size_t)channel];
}
/* Where a part that is opened now stood in the process before this one; NULL: there was none. */
const poe_part_state *poe_part_restored(const poe_comm *comm, int kind, int peer, int channel);

/* Hands a part to the helper thread, takes it back. After detaching nothing is started for it; true when every
 * operation has ended, so that its memory may be freed. */
void poe_part_attach(poe_part *part);
bool poe_part_detach(poe_part *part);
/* Sleeps until ready(part); `wait` has text, peer, account and end. POE_PEER_LOST: said. */
poe_status poe_part_wait(poe_part *part, poe_wait *wait, bool (*ready)(const poe_part *part));

/* For advance(): start an operation; ask whether it is over (a failed one loses the comm). `data` lives till then. */
void poe_part_send(poe_part *part, int peer, int channel, const void *data, size_t bytes, poe_operation *op);
void poe_part_receive(poe_part *part, int peer, int channel, void *data, size_t bytes, poe_operation *op);
bool poe_part_done(poe_part *part, const poe_operation *op);
/* `bytes` of memory, aligned to 64, that messages are sent from, and are not copied once more. NULL: out of memory, not
 * said. Giving back NULL is legal. */
void *poe_comm_allocate(poe_comm *comm, size_t bytes);
void poe_comm_release(poe_comm *comm, void *memory, size_t bytes);

/* --- watch.c ------------------------------------------------------------------------------------------------------ */
typedef enum poe_presence { POE_HERE = 0, POE_LEAVING, POE_GONE } poe_presence;

poe_status poe_watch_create(poe_comm *comm);
void poe_watch_destroy(poe_comm *comm); /* detaches it first */
/* From now on heartbeats are exchanged with `peer`. */
void poe_watch_add(poe_comm *comm, int peer);
/* Helper thread: something came from `peer`, at poe_now(). */
void poe_watch_heard(poe_comm *comm, int peer, double now);
/* Tells all watched peers, and waits a moment for the news to be out when the rank is gone. */
void poe_watch_leave(poe_comm *comm, poe_presence presence);

/* --- collective.c ------------------------------------------------------------------------------------------------- */
poe_status poe_chain_create(poe_comm *comm);
void poe_chain_destroy(poe_comm *comm); /* detaches it first */
/* The last barrier: while it lasts, peers may leave. */
poe_status poe_chain_end(poe_comm *comm);
/* After the journal: calls are counted on from where the process before this one stood. */
void poe_chain_restore(poe_comm *comm);

#endif
