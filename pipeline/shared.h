/* SPDX-License-Identifier: MIT
 * The shared parameters' rule (--sync; spec 3): when the gradients of wte, lm_head and smear meet and when their
 * update is applied. exact: at once. stale:D: the sum of step s after the gradients of step s + D. every:N: one
 * update with the mean of N steps' gradients. Every rank holds a replica and applies the same updates. Where nothing is
 * shared (bp) there is no sum, and a step updates the stage's own parameters alone.
 *
 * The sum is made in parts (stages/stage.h), so that it overlaps with computing: each part's gradients leave as soon as
 * they are final, and its total is waited for only where the new values are used: those of wte and smear before the
 * next forward, those of the head before the next loss. */
#ifndef POE_PIPELINE_SHARED_H
#define POE_PIPELINE_SHARED_H

#include "comm/comm.h"
#include "pipeline/checkpoint.h"
#include "pipeline/compute.h"
#include "pipeline/image.h"
#include "src/arena.h"
#include "stages/stage.h"

typedef struct poe_part_sum {
    poe_shared_extent at; /* in the shared table; no rows: this part is not shared */
    poe_reduce *reduce;
    int64_t left;    /* gradients of steps below this one have left, or are held */
    int64_t arrived; /* totals of steps below this one are complete */
    int64_t applied; /* updates of steps below this one are done */
} poe_part_sum;

typedef struct poe_shared_rule {
    int delay;       /* D; 0: exact */
    int every;       /* N; 0: not every:N */
    int n_steps;     /* of the run: the last one applies what is held */
    struct poe_board *board; /* may be NULL */
    poe_stage *stage;
    poe_compute *compute;
    const poe_model *model;
    const poe_optimizer_config *optimizer;
    size_t floats;
    poe_part_sum parts[POE_SHARED_PARTS];
    poe_arena arena;
    float **slots;     /* delay + 1 vectors under stale, a ring by step; one under every */
    float *head_total; /* exact: where the head's total may not replace its gradients; else NULL */
    int64_t next;      /* step whose gradients come next */
    int64_t due;       /* updates of steps below this one are to be done before the parameters are used */
    int64_t counted;   /* updates of steps below this one are in AdamW's t */
    int64_t departing; /* step whose head gradient may leave from within backward; -1: none */
    poe_status status; /* of that leaving */
    int held_steps;    /* under every: steps in the held sum */
    int mean_of;       /* steps that the sum under way covers */
} poe_shared_rule;

typedef struct poe_shared_settings {
    int delay, every, n_steps;
    const int *ranks; /* all ranks of the job, in the order of addition */
    int n_ranks;
    poe_wire wire;    /* of partial sums and totals: fp32 or bf16 */
    bool sparse;      /* rows of wte whose gradients are zero need not travel */
    uint64_t run;
} poe_shared_settings;

/* Bytes that poe_shared_open() will allocate for a model whose shared tensors are `table`. */
size_t poe_shared_bytes(const poe_shared_settings *settings, const poe_model *model, const poe_tensor_table *table);

/* All pointers are borrowed. The rule starts at step `first` with nothing pending; see poe_shared_restore(). */
poe_status poe_shared_open(poe_shared_rule *rule, poe_comm *comm, poe_compute *compute, const poe_model *model,
                           const poe_optimizer_config *optimizer, const poe_shared_settings *settings, int64_t first);
void poe_shared_close(poe_shared_rule *rule);

/* Before a forward: what it reads of the shared parameters is up to date. */
poe_status poe_shared_before_forward(poe_shared_rule *rule);
/* Before a backward of `step`, which begins with the loss: likewise. In the `last` one of a step the head's gradients
 * are final before it is over, and leave. */
poe_status poe_shared_before_backward(poe_shared_rule *rule, int64_t step, bool last);
/* Before any other use of the shared parameters: all are up to date. */
poe_status poe_shared_settle(poe_shared_rule *rule);

/* After the step's last backward: whether all gradients, own and shared, are finite. */
bool poe_shared_gradients_finite(const poe_shared_rule *rule);
/* After the gradients of `step`: they leave, and the stage's own parameters are updated meanwhile. */
poe_status poe_shared_step(poe_shared_rule *rule, int64_t step);
/* After the last step: applies, in order, what is pending. */
poe_status poe_shared_finish(poe_shared_rule *rule);

/* What a checkpoint must hold: settles, and waits until every pending total is complete. The pointers stay the rule's.
 * With room for D entries in total_steps and totals. */
poe_status poe_shared_pending(poe_shared_rule *rule, poe_pending *pending);
/* For snapshots, after poe_shared_settle(): the sums under way, while comm stands still, and where the rule is. In a
 * process that goes on from one, poe_shared_resume() then begins these sums again. */
void poe_shared_image(poe_shared_rule *rule, poe_image *image);
poe_status poe_shared_resume(poe_shared_rule *rule);
/* Before loading a checkpoint: where n_totals totals of the steps just before `first` and the held sum are to be put. */
void poe_shared_restore(poe_shared_rule *rule, int n_totals, int held_steps, poe_pending *pending);

#endif
