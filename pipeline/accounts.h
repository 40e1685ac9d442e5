/* SPDX-License-Identifier: MIT
 * Where a rank's time goes. From poe_accounts_start() on, every moment of the rank's own thread belongs to exactly one
 * account; what comm's calls slept in between is taken out of the account at hand and counted as the wait that it was.
 * Evaluation is outside: its time is in no account and in no step. Inside a checkpoint nothing is told apart.
 *
 * The accounts of a step run from the end of the step before to its own end, so a checkpoint counts for the step that
 * follows it. What comes after the last step (sums that are still on their way, evaluation, the last checkpoint) is in
 * no step. */
#ifndef POE_PIPELINE_ACCOUNTS_H
#define POE_PIPELINE_ACCOUNTS_H

#include <jansson.h>
#include <stdint.h>

#include "comm/comm.h"
#include "pipeline/image.h"

typedef enum poe_account {
    POE_ACCOUNT_FORWARD,
    POE_ACCOUNT_BACKWARD,   /* the loss too */
    POE_ACCOUNT_OPTIMIZER,
    POE_ACCOUNT_RECEIVE,    /* waits: for a message */
    POE_ACCOUNT_CREDIT,     /* ... for room at the receiver */
    POE_ACCOUNT_SHARED,     /* ... for the shared gradients' sum */
    POE_ACCOUNT_TURN,       /* ... for the turn on a processor that several ranks share (--schedule interleaved) */
    POE_ACCOUNT_SEND,       /* filling messages and handing them over */
    POE_ACCOUNT_DATA,       /* reading tokens, checking received ones */
    POE_ACCOUNT_CHECKPOINT,
    POE_ACCOUNT_OTHER,      /* the rest; under --emulate-compute what sleeping took too long */
    POE_ACCOUNT_COUNT,
    POE_ACCOUNT_OUTSIDE = POE_ACCOUNT_COUNT, /* evaluation: not accounted */
} poe_account;
const char *poe_account_name(poe_account account); /* "forward", ..., "other"; "evaluation" */

/* Seconds in each account; `wall` is measured by itself, not added up. */
typedef struct poe_account_times {
    double seconds[POE_ACCOUNT_COUNT], wall;
} poe_account_times;

/* {"forward": seconds, ..., "other": seconds, "wall": seconds}. New reference. */
json_t *poe_account_json(const poe_account_times *times);
/* Forward, backward and optimizer: the time in which a rank does what it is there for. */
double poe_account_busy(const poe_account_times *times);
/* A step's seconds without the checkpoint before it. */
double poe_account_step_seconds(const poe_account_times *times);
void poe_account_add(poe_account_times *sum, const poe_account_times *times);

enum { POE_ACCOUNT_CHANNELS = 16 };

struct poe_trace;

typedef struct poe_accounts {
    poe_comm *comm;          /* borrowed */
    struct poe_trace *trace; /* borrowed; NULL: none */
    poe_account current;
    int64_t step;
    int micro;
    double since;                /* time up to here is accounted */
    double opened, outside;      /* the step at hand: when it began, what of it was evaluation */
    poe_account_times times;     /* of the step at hand */
    poe_account_times total;     /* of the steps that were closed */
    double started, first_forward; /* clock; 0: not yet */
    double receive_wait[POE_ACCOUNT_CHANNELS]; /* the receive waits by channel of the link */
    int receive_peer[POE_ACCOUNT_CHANNELS];    /* and from whom */
} poe_accounts;

/* Begins with POE_ACCOUNT_OTHER; observes `comm` until poe_accounts_stop(). `accounts` stays where it is. All that is
 * accounted and every message of a link is recorded in `trace` (may be NULL). */
void poe_accounts_start(poe_accounts *accounts, poe_comm *comm, struct poe_trace *trace);
void poe_accounts_stop(poe_accounts *accounts);

/* From now on (`at`: from then on, not before the last call) time counts as `account`; for the rank's neighbours
 * poe_comm_doing() says so too. A negative micro-batch is none. */
void poe_account_enter(poe_accounts *accounts, poe_account account, int64_t step, int micro);
void poe_account_enter_at(poe_accounts *accounts, poe_account account, int64_t step, int micro, double at);

/* For snapshots, between two steps: the totals. Time that was lost since then is in no account. */
void poe_accounts_image(poe_accounts *accounts, poe_image *image);

/* Ends the step: its accounts; adds them to the total. Goes on with POE_ACCOUNT_OTHER. */
void poe_accounts_close_step(poe_accounts *accounts, poe_account_times *times);
/* Seconds from the start to the first forward: how long the pipe took to fill up to this rank. */
double poe_accounts_fill(const poe_accounts *accounts);

#endif
