/* SPDX-License-Identifier: MIT
 * What a schedule should take, in theory: its dependency graph solved as a simulation of events, and the closed forms
 * where there are any. The graph is the executor's: a forward needs its input and a credit for its output, messages
 * queue for a link's bandwidth and then take its latency, the shared sum goes down the chain and up in chunks, and the
 * rule of --sync says which total a step waits for. Not in it: reading data, losses that ride forward (they are never
 * later than the activations behind them), the processor's own work on messages, evaluations, checkpoints.
 * Seconds and bytes throughout; letters as everywhere: P ranks, M micro-batches, t = forward + backward. */
#ifndef POE_PIPELINE_THEORY_H
#define POE_PIPELINE_THEORY_H

#include <stdbool.h>
#include <stdint.h>

#include "pipeline/schedule.h"
#include "src/status.h"

enum {
    POE_THEORY_RANKS = 128,
    POE_THEORY_CHUNK = 1 << 20, /* bytes of a sum's message, as in comm/reduce.c */
};

/* One rank's computing times. The halves are used by the schedules that split, `backward` by the others. */
typedef struct poe_theory_rank {
    double forward, backward, backward_input, backward_weight; /* of one micro-batch */
    double update_own, update_shared;                          /* of one update */
} poe_theory_rank;

/* One direction between two neighbours. */
typedef struct poe_theory_link {
    double latency;   /* one way: half the round trip */
    double bandwidth; /* bytes per second; 0: as much as wanted */
    double jitter;    /* by which a message may be later: no part of the graph, but what streams is chosen for it */
} poe_theory_link;

typedef struct poe_theory_job {
    poe_order order; /* ranks that share a processor compute one at a time, in its order, and pass that on in no time */
    int n_steps; /* of the run */
    int settled; /* the steady state is taken from steps settled..n_steps-1; see poe_theory_horizon() */
    poe_theory_rank ranks[POE_THEORY_RANKS];
    poe_theory_link down[POE_THEORY_RANKS]; /* [k]: from rank k to k + 1; of the last rank to rank 0 (ddp's ring) */
    poe_theory_link up[POE_THEORY_RANKS];   /* [k]: from rank k + 1 to k; of the last: from rank 0 to it */
    double forward_bytes, backward_bytes;   /* of one message */
    int window;   /* credits of a link in each direction; 0: never short. An input is given back with its micro-batch's
                   * last task, a gradient with the backward pass that it starts, one of ddp's ring once added */
    bool shares;  /* gradients are summed over the ranks: the shared parameters' (all of them under ddp) */
    double shared_bytes, shared_chunk; /* of one sum and of one of its messages; chunk 0: POE_THEORY_CHUNK */
    int delay, every;   /* --sync stale:D, every:N; both 0: exact */
    bool own_first;     /* the own update comes before the sum begins (per-stage heads); else it runs meanwhile */
} poe_theory_job;

typedef struct poe_theory_result {
    double wall;       /* until the last rank has applied its last total */
    double fill;       /* until the last rank has its first input */
    double step;       /* steady state: seconds per step of the rank that takes longest */
    double idle;       /* steady state: 1 - busy / (P/V step), over all ranks */
    double whole_idle; /* the same of the whole run: 1 - busy / (P/V wall) */
    double busy[POE_THEORY_RANKS]; /* steady state: seconds per step that each rank computes; its idle share is
                                    * 1 - busy / step */
} poe_theory_result;

/* Sets n_steps and settled such that what is measured in between is periodic: several turns of the rule. */
void poe_theory_horizon(poe_theory_job *job);

/* Solves the graph: O(P M n_steps log P). POE_FAILED: out of memory (said). */
poe_status poe_theory_solve(const poe_theory_job *job, poe_theory_result *result);

/* The steady step by formula. False where none is valid: unequal ranks or links, finite bandwidth, a short window, or
 * fewer micro-batches than the formula wants. With RTT = 2 latency and u the updates that nothing hides:
 *   poe, exact     M t + (P-1)(f + RTT) + u         poe, nothing shared  M t + u
 *   poe, stale:D   the greater of M t + u and (that of exact + D u) / (D+1), with M -> (D+1) M
 *   gpipe          M t + (P-1)(t + RTT) + u
 *   1f1b           M t + (P-1) t + u                at RTT 0
 *   zb-h1          M t + (P-1) f + u                at RTT 0, three equal parts, M >= P
 *   zb-h2          M t + u                          at RTT 0, three equal parts, M >= 2P - 1
 *   interleaved    V (M t + u) + (P/V-1) t          at RTT 0, M a multiple of P/V
 *   ddp            (M/P) t + (P-1) RTT + u          M a multiple of P */
bool poe_theory_closed_form(const poe_theory_job *job, double *step);

/* Smallest D for which stale:D never stalls: (P-1)(f + RTT) + transfer <= D (M t + u), by the slowest rank and with all
 * messages as late as can be; transfer: what the sum's bytes take beside latencies. */
int poe_theory_smallest_delay(const poe_theory_job *job);
/* Smallest window with which no rank of poe ever waits for a credit under the rule of `job`, with all messages as late
 * as can be. POE_FAILED: out of memory (said). */
poe_status poe_theory_smallest_window(const poe_theory_job *job, int *window);

#endif
