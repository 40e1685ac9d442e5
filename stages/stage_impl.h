/* SPDX-License-Identifier: MIT
 * What a stage is made of; private to the stage*.c files. */
#ifndef POE_STAGES_STAGE_IMPL_H
#define POE_STAGES_STAGE_IMPL_H

#include "stages/stage.h"

/* One block of the backend's memory. While `base` is NULL, taking from it only counts: so the layout that is
 * allocated is the layout that was announced. */
typedef struct stage_region {
    char *base;
    size_t size, used; /* bytes */
} stage_region;

enum { PARAMETERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, REGION_COUNT };

/* Tensors of one table and everything that is kept beside their values. */
typedef struct tensor_set {
    poe_tensor_table table;
    float *values;
    float *gradients; /* NULL unless training */
    float **state;    /* per row: the optimiser's first part, the second right behind it; NULL where untrained */
    int64_t updates;
} tensor_set;

/* Where a layer's tensors are, in the values or in the gradients. */
typedef struct layer_tensors {
    float *q, *k, *v, *proj, *fc, *mlp_proj;
    float *gate, *value_embed; /* NULL where the layer has no value embedding */
    float *resid, *x0;
} layer_tensors;

/* Those of no layer, shared or own (model.h); NULL where this stage has none of that name, or has no use for it. */
typedef struct model_tensors {
    float *wte, *head, *smear_gate, *smear_lambda, *backout;
} model_tensors;

/* What backward needs of a layer's forward; N rows. Layers whose values are made again, or not wanted any more, use the
 * same memory. */
typedef struct layer_kept {
    float *x;                  /* (N,C) the layer's output */
    float *u_attn, *rinv_attn; /* (N,C), (N) normalised input of attention; see keeps_norms() */
    float *q, *rinv_q, *k, *rinv_k,
        *v;                  /* (N,C), (N,NH), (N,NKV*HS), (N,NKV), (N,NKV*HS) after rotary, value embedding */
    float *gate;             /* (N,NKV) */
    float *y, *lse;          /* (N,C), (N,NH) attention's output */
    float *u_mlp, *rinv_mlp; /* (N,C), (N) normalised input of the mlp */
    float *f;                /* (N,mlp) before the activation */
} layer_kept;

/* Gradients of the outputs of a layer's products: with what layer_kept has, all that the weights' gradients need. A
 * whole backward pass uses each at once, so all layers share one memory; a split one keeps them for its second part. */
typedef struct layer_owed {
    float *mlp, *f;   /* (N,C) of the mlp's output, (N,mlp) */
    float *attn;      /* (N,C) of attention's output */
    float *q, *k, *v; /* (N,C), (N,NKV*HS), (N,NKV*HS) before rotary and value embedding */
} layer_owed;

/* One micro-batch: where it is, and what is kept of it. */
typedef struct stage_slot {
    size_t b, t;
    const int32_t *idx;
    poe_crossing in;              /* members NULL: not from a previous stage */
    float *e, *rinv_e, *sig, *x0; /* (N,C), (N), (N), (N,C), where wte is; for e see keeps_norms() */
    float *u, *rinv;              /* (N,C), (N) the head's input, where a head is */
    layer_kept *kept;             /* one for each layer */
    layer_owed *owed;             /* likewise */
} stage_slot;

typedef struct stage_layer {
    const poe_layer_shape *shape;
    layer_tensors w, g;
} stage_layer;

struct poe_stage {
    const poe_model *model;
    poe_backend *backend;
    poe_stage_settings settings;
    stage_region regions[REGION_COUNT];
    tensor_set own, shared;

    int n_layers, mid;                 /* mid: the layer whose output backout subtracts, -1: not here */
    bool has_wte, has_head, backs_out; /* backs_out: the last stage, under bp with backout */
    stage_layer *layers;
    model_tensors w, g;
    int own_head_row; /* in the own table, where there is an own head; -1: none */
    float *own_head;  /* (Vp,C), or NULL */
    float *head_sum;  /* (Vp,C) with an own head: lm_head + own head */
    bool head_sum_stale;
    void (*head_done)(void *arg); /* poe_stage_on_head_gradient(); NULL: nobody */
    void *head_done_arg;

    float *cos, *sin;            /* (T,HS/2) */
    float *wide;                 /* (N, max(mlp,C)) scratch */
    float *dx, *du, *dx0, *dmid; /* (N,C); dx0 where wte is, dmid where backout's layer is that backs out too */
    float *dq, *dk, *dv;         /* (N,C), (N,NKV*HS), (N,NKV*HS) */
    layer_kept block;            /* memory of all layers of all slots, unless keeps_blocks(); without x and u_attn */

    stage_slot *slots, *slot; /* slot: the one at hand, after a forward pass that forward's */
    layer_kept *all_kept;     /* what the slots' records point into */
    layer_owed *all_owed;
    const stage_slot *in_block; // may be NULL; unless keeps_blocks(): the slot whose last layer is still in `block`
};

/* Else the normalised embedding and attention's inputs are made in the scratch `wide`, again in backward. */
static inline bool keeps_norms(const poe_stage *stage)
{
    return stage->settings.training && stage->settings.recompute < POE_RECOMPUTE_NORMS;
}

/* Else all layers use one memory for all but their outputs, and backward runs their forward again. */
static inline bool keeps_blocks(const poe_stage *stage)
{
    return stage->settings.training && stage->settings.recompute < POE_RECOMPUTE_BLOCK;
}

/* Whether `crossing` has what crosses boundary `boundary`, and nothing else. */
static inline bool crossing_fits(const poe_model *model, int boundary, const poe_crossing *crossing)
{
    if (boundary < 0 || !crossing)
        return boundary < 0 && !crossing;
    return crossing->h && !crossing->x0 == !poe_model_crosses_x0(model, boundary) &&
           !crossing->mid == !poe_model_crosses_mid(model, boundary);
}

/* Whether what comes back and what is to go back are what crosses this stage's boundaries; under poe nothing does. */
static inline bool gradients_fit(const poe_stage *stage, const poe_crossing *d_out, const poe_crossing *d_in)
{
    const poe_model *model = stage->model;
    int k = stage->settings.stage, last = model->config.n_stages - 1;
    if (model->config.objective == POE_OBJECTIVE_POE)
        return !d_out && !d_in;
    return crossing_fits(model, k - 1, d_in) && (k == last ? !d_out : crossing_fits(model, k, d_out));
}

/* The own head has no gradient of its own: it is the stage's part of lm_head's. It stands last in the table. */
static inline size_t own_gradient_floats(const poe_stage *stage)
{
    const poe_tensor_table *own = &stage->own.table;
    return stage->own_head_row >= 0 ? own->rows[stage->own_head_row].offset : own->floats;
}

/* Rows of the micro-batch at hand. */
static inline size_t rows_at_hand(const poe_stage *stage)
{
    return stage->slot->b * stage->slot->t;
}

/* What every layer mixes in. */
static inline const float *stream_start(const stage_slot *slot)
{
    return slot->in.x0 ? slot->in.x0 : slot->x0;
}

/* The input of layer i (counted within the stage). */
static inline const float *layer_input(const stage_slot *slot, int i)
{
    if (i > 0)
        return slot->kept[i - 1].x;
    return slot->in.h ? slot->in.h : slot->x0;
}

/* What backout subtracts. */
static inline const float *mid_output(const poe_stage *stage)
{
    return stage->mid >= 0 ? stage->slot->kept[stage->mid].x : stage->slot->in.mid;
}

static inline poe_attention_shape attention_shape(const poe_stage *stage, const stage_layer *layer)
{
    return (poe_attention_shape){.b = stage->slot->b,
                                 .t = stage->slot->t,
                                 .n_head = (size_t)stage->model->config.n_head,
                                 .n_kv_head = (size_t)stage->model->config.n_kv_head,
                                 .head_size = stage->model->head_size,
                                 .window = (size_t)layer->shape->window};
}

/* The head (Vp,C) that this stage's logits come from. */
const float *poe_stage_head_weights(poe_stage *stage);
/* e = norm(wte[idx]) */
void poe_stage_embed(poe_stage *stage);
/* Layer i's input of attention, from its input: x, and u_attn = norm(x). */
void poe_stage_mix(poe_stage *stage, int i, float *x);
/* Forward of layer i as far as backward needs it: all but the mlp's last product, which x still lacks then. */
void poe_stage_run_layer(poe_stage *stage, int i);

#endif
