/* SPDX-License-Identifier: MIT
 * Loss and backward pass of a stage (spec 2), whole or in two parts. Throughout, stage->dx is the gradient of the
 * residual stream. Local tensors: n = b*t rows. */
#include <assert.h>
#include <math.h>

#include "stages/stage.h"
#include "stages/stage_impl.h"

/* One backward pass. */
typedef struct pass {
    poe_stage *stage;
    const poe_crossing *d_out, *d_in; // may be NULL
    float *dx0;                       /* (N,C) what has come to x0 so far */
    const float *dmid;                /* (N,C) what backout sends to the output of stage->mid; NULL: nothing */
    bool split;                       /* the products of the weights' gradients come later */
} pass;

/* dx (n,in) = dy (n,out) W, or += */
static void product_dx(poe_stage *stage, float *dx, const float *dy, const float *w, size_t in, size_t out,
                       bool accumulate)
{
    stage->backend->ops->matmul_dx(stage->backend, dx, in, dy, out, w, rows_at_hand(stage), in, out, accumulate);
}

/* dW (out,in) += dy (n,out)^T x (n,in) */
static void product_dw(poe_stage *stage, float *dw, const float *dy, const float *x, size_t in, size_t out)
{
    stage->backend->ops->matmul_dw(stage->backend, dw, dy, out, x, in, rows_at_hand(stage), in, out);
}

/* --- gradients of the weights, from what is owed ----------------------------------------------------------------- */

static void mlp_proj_weights(poe_stage *stage, int i)
{
    size_t c = (size_t)stage->model->config.n_embd, inner = stage->model->mlp_dim;
    /* cheaper to compute again than to keep */
    stage->backend->ops->relu2_forward(stage->backend, stage->wide, stage->slot->kept[i].f,
                                       rows_at_hand(stage) * inner);
    product_dw(stage, stage->layers[i].g.mlp_proj, stage->slot->owed[i].mlp, stage->wide, inner, c);
}

static void fc_weights(poe_stage *stage, int i)
{
    product_dw(stage, stage->layers[i].g.fc, stage->slot->owed[i].f, stage->slot->kept[i].u_mlp,
               (size_t)stage->model->config.n_embd, stage->model->mlp_dim);
}

static void proj_weights(poe_stage *stage, int i)
{
    size_t c = (size_t)stage->model->config.n_embd;
    product_dw(stage, stage->layers[i].g.proj, stage->slot->owed[i].attn, stage->slot->kept[i].y, c, c);
}

static void qkv_weights(poe_stage *stage, int i)
{
    size_t c = (size_t)stage->model->config.n_embd, kv = stage->model->kv_dim;
    const layer_owed *owed = &stage->slot->owed[i];
    const layer_tensors *g = &stage->layers[i].g;
    const float *u = stage->slot->kept[i].u_attn;
    product_dw(stage, g->q, owed->q, u, c, c);
    product_dw(stage, g->k, owed->k, u, c, kv);
    product_dw(stage, g->v, owed->v, u, c, kv);
}

/* --- layers ------------------------------------------------------------------------------------------------------ */

/* A gradient (N,width) as it is now, where it is owed: a whole pass uses it at once, where it is. */
static void owe(poe_stage *stage, float *owed, const float *gradient, size_t width)
{
    if (owed != gradient)
        stage->backend->ops->copy(stage->backend, owed, gradient, rows_at_hand(stage) * width);
}

static void mlp_backward(const pass *p, int i)
{
    poe_stage *stage = p->stage;
    const poe_ops *ops = stage->backend->ops;
    poe_backend *be = stage->backend;
    const layer_kept *kept = &stage->slot->kept[i];
    const layer_tensors *w = &stage->layers[i].w;
    size_t n = rows_at_hand(stage), c = (size_t)stage->model->config.n_embd, inner = stage->model->mlp_dim;
    float *df = stage->slot->owed[i].f;
    owe(stage, stage->slot->owed[i].mlp, stage->dx, c);
    if (!p->split)
        mlp_proj_weights(stage, i);
    product_dx(stage, df, stage->dx, w->mlp_proj, inner, c, false);
    ops->relu2_backward(be, df, df, kept->f, n * inner);
    if (!p->split)
        fc_weights(stage, i);
    product_dx(stage, stage->du, df, w->fc, c, inner, false);
    ops->norm_backward(be, stage->dx, stage->du, kept->u_mlp, kept->rinv_mlp, n, c);
}

/* From stage->dx to the gradients of q, k, v before rotary. */
static void attention_core_backward(const pass *p, int i)
{
    poe_stage *stage = p->stage;
    const poe_ops *ops = stage->backend->ops;
    poe_backend *be = stage->backend;
    const layer_kept *kept = &stage->slot->kept[i];
    const layer_owed *owed = &stage->slot->owed[i];
    poe_attention_shape shape = attention_shape(stage, &stage->layers[i]);
    size_t b = shape.b, t = shape.t, hs = shape.head_size, c = (size_t)stage->model->config.n_embd;
    float *dy = stage->du;
    owe(stage, owed->attn, stage->dx, c);
    if (!p->split)
        proj_weights(stage, i);
    product_dx(stage, dy, stage->dx, stage->layers[i].w.proj, c, c, false);
    ops->attention_backward(be, stage->dq, stage->dk, stage->dv, dy, kept->y, kept->lse, kept->q, kept->k, kept->v,
                            &shape);
    ops->rotary_backward(be, owed->q, stage->dq, kept->q, kept->rinv_q, stage->cos, stage->sin, b, t, shape.n_head, hs);
    ops->rotary_backward(be, owed->k, stage->dk, kept->k, kept->rinv_k, stage->cos, stage->sin, b, t, shape.n_kv_head,
                         hs);
    owe(stage, owed->v, stage->dv, stage->model->kv_dim);
}

static void attention_backward(const pass *p, int i)
{
    poe_stage *stage = p->stage;
    const poe_ops *ops = stage->backend->ops;
    poe_backend *be = stage->backend;
    const layer_kept *kept = &stage->slot->kept[i];
    const layer_owed *owed = &stage->slot->owed[i];
    const layer_tensors *w = &stage->layers[i].w, *g = &stage->layers[i].g;
    const poe_model *model = stage->model;
    size_t n = rows_at_hand(stage), c = (size_t)model->config.n_embd, kv = model->kv_dim;
    attention_core_backward(p, i);
    if (!keeps_norms(stage))
        poe_stage_mix(stage, i, stage->du);
    if (!p->split)
        qkv_weights(stage, i);
    product_dx(stage, stage->du, owed->q, w->q, c, c, false);
    product_dx(stage, stage->du, owed->k, w->k, c, kv, true);
    product_dx(stage, stage->du, owed->v, w->v, c, kv, true);
    if (w->gate)
        ops->value_embed_backward(be, stage->du, g->gate, g->value_embed, owed->v, kept->gate, kept->u_attn,
                                  stage->slot->idx, w->gate, w->value_embed, n, c, (size_t)model->config.n_kv_head,
                                  model->head_size);
    ops->norm_backward(be, stage->dx, stage->du, kept->u_attn, kept->rinv_attn, n, c);
}

/* Where the gradient of layer i's input goes; NULL: nowhere. */
static float *input_gradient(const pass *p, int i)
{
    if (i > 0 || p->stage->settings.stage == 0)
        return p->stage->dx;
    return p->d_in ? p->d_in->h : NULL;
}

static void layers_backward(const pass *p)
{
    poe_stage *stage = p->stage;
    const poe_ops *ops = stage->backend->ops;
    size_t n = rows_at_hand(stage), c = (size_t)stage->model->config.n_embd;
    for (int i = stage->n_layers - 1; i >= 0; i--) {
        stage_layer *layer = &stage->layers[i];
        if (i == stage->mid)
            ops->add(stage->backend, stage->dx, p->dmid, n * c);
        bool still_there = i == stage->n_layers - 1 && stage->in_block == stage->slot;
        if (!keeps_blocks(stage) && !still_there)
            poe_stage_run_layer(stage, i);
        mlp_backward(p, i);
        attention_backward(p, i);
        ops->mix_backward(stage->backend, input_gradient(p, i), p->dx0, layer->g.resid, layer->g.x0, stage->dx,
                          layer_input(stage->slot, i), stream_start(stage->slot), layer->w.resid, layer->w.x0, n, c);
    }
    stage->in_block = NULL;
}

/* --- ends -------------------------------------------------------------------------------------------------------- */

static double loss_weight(const poe_model *model)
{
    bool bp = model->config.objective == POE_OBJECTIVE_BP;
    return bp ? 1 : pow(model->config.n_stages, model->config.alpha - 1);
}

/* Loss, and its gradient at the last layer's output, added to dx. */
static double head_backward(const pass *p, const int32_t *targets, int n_micro)
{
    poe_stage *stage = p->stage;
    const poe_ops *ops = stage->backend->ops;
    poe_backend *be = stage->backend;
    const poe_model *model = stage->model;
    const stage_slot *slot = stage->slot;
    size_t n = rows_at_hand(stage), c = (size_t)model->config.n_embd;
    double loss;
    ops->head_loss(be, &loss, stage->du, stage->g.head, slot->u, poe_stage_head_weights(stage), targets,
                   (float)(loss_weight(model) / n_micro), n, c, (size_t)model->config.vocab_size, model->vocab_padded);
    ops->norm_backward(be, stage->dx, stage->du, slot->u, slot->rinv, n, c);
    return loss;
}

/* What has come to `gradient` from the stages after this one: `from`, or nothing yet. */
static void begin_gradient(poe_stage *stage, float *gradient, const float *from)
{
    size_t floats = rows_at_hand(stage) * (size_t)stage->model->config.n_embd;
    if (from)
        stage->backend->ops->copy(stage->backend, gradient, from, floats);
    else
        stage->backend->ops->fill(stage->backend, gradient, 0, floats);
}

/* Sums start from what the next stage sends, so that they are added up as in one stage. */
static pass begin_pass(poe_stage *stage, const poe_crossing *d_out, const poe_crossing *d_in, bool split)
{
    pass p = {.stage = stage, .d_out = d_out, .d_in = d_in, .split = split};
    p.dx0 = d_in ? d_in->x0 : stage->dx0;
    begin_gradient(stage, stage->dx, d_out ? d_out->h : NULL);
    begin_gradient(stage, p.dx0, d_out ? d_out->x0 : NULL);
    return p;
}

/* Backout's gradients: made on the last stage, passed on by those in between, used by the one with stage->mid. */
static void backout_backward(pass *p)
{
    poe_stage *stage = p->stage;
    float *dmid = p->d_in && p->d_in->mid ? p->d_in->mid : stage->dmid;
    if (stage->backs_out) {
        begin_gradient(stage, dmid, NULL);
        stage->backend->ops->backout_backward(stage->backend, dmid, stage->g.backout, stage->dx, mid_output(stage),
                                              stage->w.backout, rows_at_hand(stage),
                                              (size_t)stage->model->config.n_embd);
        p->dmid = dmid;
    } else if (stage->mid >= 0) {
        p->dmid = p->d_out->mid;
    } else if (p->d_in && p->d_in->mid) {
        begin_gradient(stage, dmid, p->d_out->mid);
    }
}

static void embed_backward(const pass *p)
{
    poe_stage *stage = p->stage;
    const poe_ops *ops = stage->backend->ops;
    const stage_slot *slot = stage->slot;
    size_t c = (size_t)stage->model->config.n_embd;
    float *de = stage->du;
    if (stage->settings.stage == 0) /* whose stream starts from x0 */
        ops->add(stage->backend, p->dx0, stage->dx, rows_at_hand(stage) * c);
    if (!keeps_norms(stage))
        poe_stage_embed(stage);
    ops->smear_backward(stage->backend, de, stage->g.smear_gate, stage->g.smear_lambda, p->dx0, slot->e, slot->sig,
                        stage->w.smear_gate, stage->w.smear_lambda, slot->b, slot->t, c);
    ops->embed_backward(stage->backend, stage->g.wte, de, slot->e, slot->rinv_e, slot->idx, rows_at_hand(stage), c);
}

static poe_status backward(poe_stage *stage, int slot, const int32_t *targets, int n_micro, const poe_crossing *d_out,
                           const poe_crossing *d_in, bool split, double *loss)
{
    assert(stage->settings.training && slot >= 0 && slot < stage->settings.slots && stage->slots[slot].idx);
    assert(gradients_fit(stage, d_out, d_in));
    stage->slot = &stage->slots[slot];
    pass p = begin_pass(stage, d_out, d_in, split);
    *loss = stage->has_head ? head_backward(&p, targets, n_micro) : 0;
    if (!isfinite(*loss))
        return POE_NUMERIC;
    if (stage->has_head && stage->head_done)
        stage->head_done(stage->head_done_arg);
    backout_backward(&p);
    layers_backward(&p);
    if (stage->has_wte)
        embed_backward(&p);
    return POE_OK;
}

poe_status poe_stage_backward(poe_stage *stage, int slot, const int32_t *targets, int n_micro,
                              const poe_crossing *d_out, const poe_crossing *d_in, double *loss)
{
    return backward(stage, slot, targets, n_micro, d_out, d_in, false, loss);
}

poe_status poe_stage_backward_input(poe_stage *stage, int slot, const int32_t *targets, int n_micro,
                                    const poe_crossing *d_out, const poe_crossing *d_in, double *loss)
{
    assert(stage->settings.split);
    return backward(stage, slot, targets, n_micro, d_out, d_in, true, loss);
}

void poe_stage_backward_weight(poe_stage *stage, int slot)
{
    assert(stage->settings.split && slot >= 0 && slot < stage->settings.slots);
    stage->slot = &stage->slots[slot];
    for (int i = stage->n_layers - 1; i >= 0; i--) {
        mlp_proj_weights(stage, i);
        fc_weights(stage, i);
        proj_weights(stage, i);
        qkv_weights(stage, i);
    }
}
