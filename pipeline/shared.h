/* SPDX-License-Identifier: MIT
 * The shared parameters' rule (--sync; spec 3): when the gradients of wte, lm_head and smear meet and when their
 * update is applied. exact: at once. stale:D: the sum of step s after the gradients of step s + D. every:N: one
 * update with the mean of N steps' gradients. Every rank holds a replica and applies the same updates. Where nothing is
 * shared (bp) there is no sum, and a step updates the stage's own parameters alone. */
#ifndef POE_PIPELINE_SHARED_H
#define POE_PIPELINE_SHARED_H

#include "comm/comm.h"
#include "pipeline/checkpoint.h"
#include "pipeline/compute.h"
#include "src/arena.h"
#include "stages/stage.h"

typedef struct poe_shared_rule {
    int delay;       /* D; 0: exact */
    int every;       /* N; 0: not every:N */
    int n_steps;     /* of the run: the last one applies what is held */
    poe_stage *stage;
    poe_compute *compute;
    poe_reduce *reduce;
    const poe_model *model;
    const poe_optimizer_config *optimizer;
    size_t floats;
    poe_arena arena;
    float **slots;   /* delay + 1 vectors under stale, a ring by step */
    int64_t oldest;  /* step of the oldest sum that was begun or loaded and is not applied */
    int64_t next;    /* step whose gradients come next */
    int64_t arrived; /* totals of steps below this one are complete */
    int held_steps;
} poe_shared_rule;

typedef struct poe_shared_settings {
    int delay, every, n_steps;
    const int *ranks; /* all ranks of the job, in the order of addition */
    int n_ranks;
    uint64_t run;
} poe_shared_settings;

/* Bytes that poe_shared_open() will allocate. */
size_t poe_shared_bytes(const poe_shared_settings *settings, size_t floats);

/* All pointers are borrowed. The rule starts at step `first` with nothing pending; see poe_shared_restore(). */
poe_status poe_shared_open(poe_shared_rule *rule, poe_comm *comm, poe_compute *compute, const poe_model *model,
                           const poe_optimizer_config *optimizer, const poe_shared_settings *settings, int64_t first);
void poe_shared_close(poe_shared_rule *rule);

/* After the gradients of `step`: updates the stage's own parameters and, as the rule has it, the shared ones. */
poe_status poe_shared_step(poe_shared_rule *rule, int64_t step);
/* After the last step: applies, in order, what is pending. */
poe_status poe_shared_finish(poe_shared_rule *rule);

/* What a checkpoint must hold: waits until every pending total is complete. The pointers stay the rule's. With room
 * for D entries in total_steps and totals. */
poe_status poe_shared_pending(poe_shared_rule *rule, poe_pending *pending);
/* Before loading a checkpoint: where n_totals totals of the steps just before `first` and the held sum are to be put. */
void poe_shared_restore(poe_shared_rule *rule, int n_totals, int held_steps, poe_pending *pending);

#endif
