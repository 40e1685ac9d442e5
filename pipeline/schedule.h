/* SPDX-License-Identifier: MIT
 * Schedules: in which order a rank does the forward and backward passes of a step's micro-batches. Pure lists; who runs
 * them (train.c) and who computes what they cost (theory.c) are elsewhere.
 *   poe    forward, then local loss and backward at once: nothing comes back
 *   gpipe  all forwards, then all backwards
 *   1f1b   as many forwards as there are ranks after this one, then one forward, one backward
 *   zb-h1  1f1b with the backward pass in two halves; the weights' half lags `rank` micro-batches behind
 *   zb-h2  twice the forwards ahead, the weights' half lags 2 `rank`: no bubble inside a step of M >= 2P - 1
 *          (both: Qi et al., Zero Bubble Pipeline Parallelism, arXiv 2401.10241, section 2)
 *   ddp    the whole model on every rank, which takes micro-batches rank, rank + P, ...
 *   interleaved  1f1b over stages of a V-th of the layers: P / V processors with V ranks each, which take turns, so that the
 *          pipe is filled in a V-th of the time (Narayanan et al., Megatron-LM, arXiv 2104.04473, section 2.2)
 * Letters: P ranks, M micro-batches of a step, V ranks of a processor (1 but under interleaved). Within a rank every kind
 * of task runs in the order of micro-batches. */
#ifndef POE_PIPELINE_SCHEDULE_H
#define POE_PIPELINE_SCHEDULE_H

#include <stdbool.h>

typedef enum poe_schedule {
    POE_SCHEDULE_POE,
    POE_SCHEDULE_GPIPE,
    POE_SCHEDULE_1F1B,
    POE_SCHEDULE_ZB_H1,
    POE_SCHEDULE_ZB_H2,
    POE_SCHEDULE_DDP,
    POE_SCHEDULE_INTERLEAVED,
    POE_SCHEDULE_COUNT,
} poe_schedule;

/* The update follows the last task of a step. */
typedef enum poe_task_kind {
    POE_TASK_FORWARD,
    POE_TASK_BACKWARD,        /* whole */
    POE_TASK_BACKWARD_INPUT,  /* its first half: the gradient that goes back */
    POE_TASK_BACKWARD_WEIGHT, /* its second half: the gradients of the parameters */
    POE_TASK_KINDS,
} poe_task_kind;

typedef struct poe_task {
    poe_task_kind kind;
    int micro;
} poe_task;

/* A schedule on its ranks. */
typedef struct poe_order {
    poe_schedule schedule;
    int n_ranks;   /* P */
    int n_virtual; /* V, divides P: ranks r, r + P/V, r + 2 P/V, ... share a processor */
    int n_micro;   /* M */
} poe_order;

/* One step of `rank`; `tasks` has room for 3 M. Returns how many there are (ddp with M < P: none on some ranks). */
int poe_schedule_tasks(const poe_order *order, int rank, poe_task *tasks);

/* Whose turn it is on a processor before and after a rank's task: another rank's, or -1 where the rank itself goes on. */
typedef struct poe_turn {
    int before, after;
} poe_turn;
/* Under interleaved, of each of the rank's tasks, and behind them of its update: `turns` has room for 2 M + 1. A step
 * begins with the processor's first rank and ends with the updates of all of them, in order. */
void poe_schedule_turns(const poe_order *order, int rank, poe_turn *turns);

/* Micro-batches between the start of their forward and the end of their last backward task at once, at most: how many
 * sets of activations `rank` keeps. Links of any window >= 1 are free of deadlock (interleaved: as many as slots); a
 * sender is never held back by credits when its window is its own slots + 1. */
int poe_schedule_slots(const poe_order *order, int rank);

int poe_schedule_processors(const poe_order *order); /* P / V */
bool poe_schedule_chained(poe_schedule schedule);    /* gradients flow back from rank to rank */
bool poe_schedule_splits(poe_schedule schedule);     /* the backward pass comes in two halves */

/* As --schedule has them. */
const char *poe_schedule_name(poe_schedule schedule);
bool poe_schedule_parse(const char *text, poe_schedule *schedule); /* false: no such schedule */

#endif
