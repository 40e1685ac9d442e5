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

typedef struct shared_tensors {
    float *wte, *head, *smear_gate, *smear_lambda;
} shared_tensors;

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

typedef struct stage_layer {
    const poe_layer_shape *shape;
    layer_tensors w, g;
    layer_kept kept;
} stage_layer;

struct poe_stage {
    const poe_model *model;
    poe_backend *backend;
    poe_stage_settings settings;
    stage_region regions[REGION_COUNT];
    tensor_set own, shared;

    int n_layers, mid; /* mid: the layer whose output backout subtracts, -1: none */
    stage_layer *layers;
    shared_tensors w, g;
    float *own_head; /* (Vp,C) under ps, else NULL */
    float *head_sum; /* (Vp,C) under ps: shared head + own head */
    bool head_sum_stale;
    float *backout, *d_backout;

    float *cos, *sin;             /* (T,HS/2) */
    float *e, *rinv_e, *sig, *x0; /* (N,C), (N), (N), (N,C); for e see keeps_norms() */
    float *u, *rinv;              /* (N,C), (N) the head's input */
    float *wide;                  /* (N, max(mlp,C)) scratch */
    float *dx, *dx0, *du, *dmid;  /* (N,C); dmid only with backout */
    float *dq, *dk, *dv;          /* (N,C), (N,NKV*HS), (N,NKV*HS) */

    /* the last forward's micro-batch, borrowed */
    size_t b, t;
    const int32_t *idx;
    const float *h_in; // may be NULL
};

/* Else the normalised embedding and attention's inputs are made in the scratch `wide`, again in backward. */
static inline bool keeps_norms(const poe_stage *stage)
{
    return stage->settings.training && stage->settings.recompute < POE_RECOMPUTE_NORMS;
}

/* Else all layers use layer 0's memory for all but their outputs, and backward runs their forward again. */
static inline bool keeps_blocks(const poe_stage *stage)
{
    return stage->settings.training && stage->settings.recompute < POE_RECOMPUTE_BLOCK;
}

/* The input of layer i (counted within the stage). */
static inline const float *layer_input(const poe_stage *stage, int i)
{
    if (i > 0)
        return stage->layers[i - 1].kept.x;
    return stage->h_in ? stage->h_in : stage->x0;
}

/* The head that this stage's logits come from. */
static inline const float *head_weights(const poe_stage *stage)
{
    return stage->own_head ? stage->head_sum : stage->w.head;
}

static inline poe_attention_shape attention_shape(const poe_stage *stage, const stage_layer *layer)
{
    return (poe_attention_shape){.b = stage->b,
                                 .t = stage->t,
                                 .n_head = (size_t)stage->model->config.n_head,
                                 .n_kv_head = (size_t)stage->model->config.n_kv_head,
                                 .head_size = stage->model->head_size,
                                 .window = (size_t)layer->shape->window};
}

/* e = norm(wte[idx]) */
void poe_stage_embed(poe_stage *stage);
/* Layer i's input of attention, from its input: x, and u_attn = norm(x). */
void poe_stage_mix(poe_stage *stage, int i, float *x);
/* Forward of layer i as far as backward needs it: all but the mlp's last product, which x still lacks then. */
void poe_stage_run_layer(poe_stage *stage, int i);

#endif
