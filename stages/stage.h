/* SPDX-License-Identifier: MIT
 * One stage of the model: its parameters, gradients, optimiser state and activations, and what can be done with them.
 * Knows nothing of ranks and messages. One thread drives a stage; its kernels share a team of threads. */
#ifndef POE_STAGES_STAGE_H
#define POE_STAGES_STAGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "src/status.h"
#include "stages/model.h"
#include "stages/ops.h"
#include "stages/optimizer.h"

typedef struct poe_stage poe_stage;

/* What backward computes again instead of keeping it: memory for time, the results are the same bit for bit. */
typedef enum poe_recompute {
    POE_RECOMPUTE_NONE,
    POE_RECOMPUTE_NORMS, /* what takes element passes only: the normalised embedding and the inputs of attention */
    POE_RECOMPUTE_BLOCK, /* that, and every layer's forward but its last product: only outputs of layers are kept */
    POE_RECOMPUTE_COUNT,
} poe_recompute;
const char *poe_recompute_name(poe_recompute recompute); /* "none", "norms", "block" */

typedef struct poe_stage_settings {
    int stage;               /* 0..K-1 */
    size_t rows;             /* B: the most rows of a micro-batch */
    int slots;               /* micro-batches whose activations are kept at once: 1 or more */
    bool training;           /* false: parameters and forward activations only */
    bool split;              /* training only: backward may come in two parts; needs POE_RECOMPUTE_NONE */
    poe_recompute recompute; /* training only */
} poe_stage_settings;

/* What crosses the boundary between two stages, (b,t,C) each, or its gradients. Under poe h alone. Where gradients flow
 * back, x0 rides with it (wte and smear live on stage 0 alone: poe_model_crosses_x0()), and with backout, from the
 * stage that has layer L/2 on, that layer's output mid (poe_model_crosses_mid()). NULL: does not cross. */
typedef struct poe_crossing {
    float *h, *x0, *mid;
} poe_crossing;

/* Bytes of each arena, computed without allocating any (for the start-up table and --dry-run). The backend's scratch
 * is its own (poe_cpu_scratch_bytes() with poe_stage_limits()). POE_BAD_INPUT: said, settings that exclude each
 * other. */
typedef struct poe_stage_memory {
    uint64_t parameters, gradients, optimizer, activations;
} poe_stage_memory;
poe_status poe_stage_size(const poe_model *model, const poe_stage_settings *settings, poe_stage_memory *memory);

/* The largest of everything that this stage will ask of its backend. */
void poe_stage_limits(const poe_model *model, const poe_stage_settings *settings, poe_backend_limits *limits);

/* `model` and `backend` are borrowed and must outlive the stage. Parameters are zero: initialise or load them. */
poe_status poe_stage_create(const poe_model *model, const poe_stage_settings *settings, poe_backend *backend,
                            poe_stage **stage);
void poe_stage_destroy(poe_stage *stage); /* NULL is legal */

const poe_model *poe_stage_model(const poe_stage *stage);

/* Whether this stage has logits and a loss of its own (poe_model_has_head()). */
bool poe_stage_has_head(const poe_stage *stage);

/* The tensors and where they are. Own: this stage's alone. Shared: its replica of what poe_model_tensors() says is
 * shared, which may be nothing. Gradients are laid out as the values, with one exception: under ps the gradient of
 * lm_head + lm_head_stages.k goes equally to both, is kept once, as lm_head's, and the own gradients end before
 * lm_head_stages.k, which stands last in the own table. */
const poe_tensor_table *poe_stage_own_table(const poe_stage *stage);
const poe_tensor_table *poe_stage_shared_table(const poe_stage *stage);
float *poe_stage_own_values(poe_stage *stage);
float *poe_stage_shared_values(poe_stage *stage);
float *poe_stage_own_gradients(poe_stage *stage);    /* NULL unless training */
float *poe_stage_shared_gradients(poe_stage *stage); /* likewise; this stage's sum over the step's micro-batches */
/* Call after writing parameter values from outside (loading, initialising): refreshes what is derived from them. */
void poe_stage_parameters_changed(poe_stage *stage);

/* Forward of one micro-batch into slot `slot` (0..slots-1): b rows (<= B) of t positions (<= T). idx (b,t) in 0..V-1.
 * `in`: what crosses from the previous stage; NULL on stage 0, which starts from x0. `out`: every member that is not
 * NULL is written, x0 and mid as well where they only pass through; NULL: nobody wants anything. Everything backward
 * needs is kept, or can be made again, until the slot's next forward. Memory is borrowed and must not overlap; idx and
 * what `in` points to must stay until poe_stage_backward() or poe_stage_backward_input() of this slot is done. */
void poe_stage_forward(poe_stage *stage, int slot, size_t b, size_t t, const int32_t *idx, const poe_crossing *in,
                       const poe_crossing *out);

/* Once after the slot's forward: the loss against targets (b,t) (negative: ignored; not read without a head) and the
 * backward pass; gradients of loss * stage weight / n_micro are added to those of the step. Slots must come in the order
 * of their micro-batches: then the bits are those of one slot, and under bp those of one stage. Stage weight:
 * 1 / K^(1 - alpha); 1 for bp. d_out: gradients of what crosses to the next stage, from there; NULL on the last stage.
 * d_in: written, gradients of what crosses from the previous stage; NULL on stage 0. Under poe, where no gradient
 * crosses, both are NULL. *loss: mean nats over targets >= 0, unweighted; 0 without a head. POE_NUMERIC when it is NaN
 * or Inf (not said: the caller knows the step); the gradients are then of no use. */
poe_status poe_stage_backward(poe_stage *stage, int slot, const int32_t *targets, int n_micro,
                              const poe_crossing *d_out, const poe_crossing *d_in, double *loss);

/* The same in two parts, with settings.split: first everything that the previous stage waits for, with the gradients
 * that come with it (head, value embeddings, wte, vectors); then, at any later time, in the order of micro-batches and
 * before the slot's next forward, the products that give the gradients of the layers' matrices. Nothing borrowed is
 * read by the second. Together the same bits as poe_stage_backward(). */
poe_status poe_stage_backward_input(poe_stage *stage, int slot, const int32_t *targets, int n_micro,
                                    const poe_crossing *d_out, const poe_crossing *d_in, double *loss);
void poe_stage_backward_weight(poe_stage *stage, int slot);

/* From now on calls done(arg) in every backward pass as soon as the micro-batch's part of lm_head's gradient is added,
 * before the layers' backward. NULL: no more. */
void poe_stage_on_head_gradient(poe_stage *stage, void (*done)(void *arg), void *arg);

void poe_stage_clear_gradients(poe_stage *stage); /* the own ones, at the start of a step */
void poe_stage_clear_shared_gradients(poe_stage *stage);

/* One update with the accumulated gradients at the given rates: the stage's own tensors (t counts updates), or the
 * shared ones with gradients `sum` (the whole model's, laid out as the shared table). Under ps the own head reads this
 * stage's part of lm_head's gradient: so update_own comes before anything else is written over the shared gradients,
 * and those must be of this one step. */
void poe_stage_update_own(poe_stage *stage, const poe_rates *rates);
void poe_stage_update_shared(poe_stage *stage, const poe_rates *rates, const float *sum);

/* True when every gradient of the stage's own tensors is finite. */
bool poe_stage_gradients_finite(const poe_stage *stage);

/* The shared tensors in parts, as their gradients become final (the head's before the layers' backward) and their new
 * values are wanted (wte and smear by forward, the head by the loss). */
typedef enum poe_shared_part { POE_SHARED_HEAD, POE_SHARED_WTE, POE_SHARED_SMEAR, POE_SHARED_PARTS } poe_shared_part;
/* Where a part is in `table`, the shared one: its rows, which stand together, and its floats. No rows: not shared. */
typedef struct poe_shared_extent {
    size_t first_row, n_rows;
    size_t offset, floats;
} poe_shared_extent;
poe_shared_extent poe_stage_shared_extent(const poe_tensor_table *table, poe_shared_part part);
/* The functions above for a part of the shared tensors; `sum` is the part's alone. All parts of a step are one update:
 * *poe_stage_shared_updates() is the caller's to increment before the first of them. */
void poe_stage_clear_shared_part(poe_stage *stage, poe_shared_part part);
void poe_stage_update_shared_part(poe_stage *stage, poe_shared_part part, const poe_rates *rates, const float *sum);
bool poe_stage_shared_part_finite(const poe_stage *stage, poe_shared_part part);

/* Optimiser state as one flat piece per tensor, for checkpoints: own first or shared. For tensor `row` of the own
 * (shared false) or shared table: Muon has "momentum" (rows, cols) and "second" (rows or cols), AdamW "m", "v".
 * Returns how many parts the tensor has (0 when untrained) and fills name, pointer and floats of part `part`. */
int poe_stage_state(poe_stage *stage, bool shared, size_t row, int part, const char **name, float **values,
                    size_t *floats);
/* Number of updates so far (AdamW's t) of own and shared tensors: read and write. */
int64_t *poe_stage_own_updates(poe_stage *stage);
int64_t *poe_stage_shared_updates(poe_stage *stage);

/* Logits of this stage, which has a head, for the rows first..first+n-1 of the last forward (rows counted over b*t),
 * softcap applied: z (n,V). n <= poe_stage_logit_rows(), which keeps z within 8 MiB or one row. Not after an update:
 * only after a forward with the parameters as they are. */
size_t poe_stage_logit_rows(const poe_stage *stage);
void poe_stage_logits(poe_stage *stage, size_t first, size_t n, float *z);

#endif
