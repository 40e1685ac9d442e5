/* SPDX-License-Identifier: MIT
 * Loss and local backward pass of a stage (spec 2). Throughout, stage->dx is the gradient of the residual stream,
 * stage->dx0 what has come to x0 so far. Local tensors: n = b*t rows. */
#include <assert.h>
#include <math.h>

#include "stages/stage.h"
#include "stages/stage_impl.h"

/* dx (n,in) = dy (n,out) W, or += */
static void product_dx(poe_stage *stage, float *dx, const float *dy, const float *w, size_t in, size_t out,
                       bool accumulate)
{
    stage->backend->ops->matmul_dx(stage->backend, dx, in, dy, out, w, stage->b * stage->t, in, out, accumulate);
}

/* dW (out,in) += dy (n,out)^T x (n,in) */
static void product_dw(poe_stage *stage, float *dw, const float *dy, const float *x, size_t in, size_t out)
{
    stage->backend->ops->matmul_dw(stage->backend, dw, dy, out, x, in, stage->b * stage->t, in, out);
}

static void mlp_backward(poe_stage *stage, stage_layer *layer)
{
    const poe_ops *ops = stage->backend->ops;
    poe_backend *be = stage->backend;
    const layer_kept *kept = &layer->kept;
    size_t n = stage->b * stage->t, c = (size_t)stage->model->config.n_embd, inner = stage->model->mlp_dim;
    float *wide = stage->wide;
    ops->relu2_forward(be, wide, kept->f, n * inner); /* cheaper to compute again than to keep */
    product_dw(stage, layer->g.mlp_proj, stage->dx, wide, inner, c);
    product_dx(stage, wide, stage->dx, layer->w.mlp_proj, inner, c, false);
    ops->relu2_backward(be, wide, wide, kept->f, n * inner);
    product_dw(stage, layer->g.fc, wide, kept->u_mlp, c, inner);
    product_dx(stage, stage->du, wide, layer->w.fc, c, inner, false);
    ops->norm_backward(be, stage->dx, stage->du, kept->u_mlp, kept->rinv_mlp, n, c);
}

/* From stage->dx to the gradients of q, k, v before rotary. */
static void attention_core_backward(poe_stage *stage, stage_layer *layer)
{
    const poe_ops *ops = stage->backend->ops;
    poe_backend *be = stage->backend;
    const layer_kept *kept = &layer->kept;
    poe_attention_shape shape = attention_shape(stage, layer);
    size_t b = shape.b, t = shape.t, hs = shape.head_size, c = (size_t)stage->model->config.n_embd;
    float *dy = stage->du;
    product_dw(stage, layer->g.proj, stage->dx, kept->y, c, c);
    product_dx(stage, dy, stage->dx, layer->w.proj, c, c, false);
    ops->attention_backward(be, stage->dq, stage->dk, stage->dv, dy, kept->y, kept->lse, kept->q, kept->k, kept->v,
                            &shape);
    ops->rotary_backward(be, stage->dq, stage->dq, kept->q, kept->rinv_q, stage->cos, stage->sin, b, t, shape.n_head,
                         hs);
    ops->rotary_backward(be, stage->dk, stage->dk, kept->k, kept->rinv_k, stage->cos, stage->sin, b, t, shape.n_kv_head,
                         hs);
}

static void attention_backward(poe_stage *stage, int i)
{
    const poe_ops *ops = stage->backend->ops;
    poe_backend *be = stage->backend;
    stage_layer *layer = &stage->layers[i];
    const layer_kept *kept = &layer->kept;
    const layer_tensors *w = &layer->w, *g = &layer->g;
    const poe_model *model = stage->model;
    size_t n = stage->b * stage->t, c = (size_t)model->config.n_embd, kv = model->kv_dim;
    attention_core_backward(stage, layer);
    if (!keeps_norms(stage))
        poe_stage_mix(stage, i, stage->du);
    product_dw(stage, g->q, stage->dq, kept->u_attn, c, c);
    product_dw(stage, g->k, stage->dk, kept->u_attn, c, kv);
    product_dw(stage, g->v, stage->dv, kept->u_attn, c, kv);
    product_dx(stage, stage->du, stage->dq, w->q, c, c, false);
    product_dx(stage, stage->du, stage->dk, w->k, c, kv, true);
    product_dx(stage, stage->du, stage->dv, w->v, c, kv, true);
    if (w->gate)
        ops->value_embed_backward(be, stage->du, g->gate, g->value_embed, stage->dv, kept->gate, kept->u_attn,
                                  stage->idx, w->gate, w->value_embed, n, c, (size_t)model->config.n_kv_head,
                                  model->head_size);
    ops->norm_backward(be, stage->dx, stage->du, kept->u_attn, kept->rinv_attn, n, c);
}

/* Loss, and its gradient at the last layer's output. */
static double head_backward(poe_stage *stage, const int32_t *targets, int n_micro)
{
    const poe_ops *ops = stage->backend->ops;
    poe_backend *be = stage->backend;
    const poe_model *model = stage->model;
    size_t n = stage->b * stage->t, c = (size_t)model->config.n_embd;
    double weight = pow(model->config.n_stages, model->config.alpha - 1); /* 1 for bp, which has one stage */
    double loss;
    ops->head_loss(be, &loss, stage->du, stage->g.head, stage->u, head_weights(stage), targets,
                   (float)(weight / n_micro), n, c, (size_t)model->config.vocab_size, model->vocab_padded);
    ops->fill(be, stage->dx, 0, n * c);
    ops->norm_backward(be, stage->dx, stage->du, stage->u, stage->rinv, n, c);
    if (stage->mid >= 0) {
        ops->fill(be, stage->dmid, 0, n * c);
        ops->backout_backward(be, stage->dmid, stage->d_backout, stage->dx, stage->layers[stage->mid].kept.x,
                              stage->backout, n, c);
    }
    return loss;
}

static void layers_backward(poe_stage *stage)
{
    const poe_ops *ops = stage->backend->ops;
    size_t n = stage->b * stage->t, c = (size_t)stage->model->config.n_embd;
    ops->fill(stage->backend, stage->dx0, 0, n * c);
    for (int i = stage->n_layers - 1; i >= 0; i--) {
        stage_layer *layer = &stage->layers[i];
        if (i == stage->mid)
            ops->add(stage->backend, stage->dx, stage->dmid, n * c);
        if (!keeps_blocks(stage) && i < stage->n_layers - 1) /* the last layer's is still there */
            poe_stage_run_layer(stage, i);
        mlp_backward(stage, layer);
        attention_backward(stage, i);
        bool detached = i == 0 && stage->h_in;
        ops->mix_backward(stage->backend, detached ? NULL : stage->dx, stage->dx0, layer->g.resid, layer->g.x0,
                          stage->dx, layer_input(stage, i), stage->x0, layer->w.resid, layer->w.x0, n, c);
    }
    if (!stage->h_in) /* stage 0's stream starts from x0 */
        ops->add(stage->backend, stage->dx0, stage->dx, n * c);
}

static void embed_backward(poe_stage *stage)
{
    const poe_ops *ops = stage->backend->ops;
    size_t b = stage->b, t = stage->t, c = (size_t)stage->model->config.n_embd;
    float *de = stage->du;
    if (!keeps_norms(stage))
        poe_stage_embed(stage);
    ops->smear_backward(stage->backend, de, stage->g.smear_gate, stage->g.smear_lambda, stage->dx0, stage->e,
                        stage->sig, stage->w.smear_gate, stage->w.smear_lambda, b, t, c);
    ops->embed_backward(stage->backend, stage->g.wte, de, stage->e, stage->rinv_e, stage->idx, b * t, c);
}

poe_status poe_stage_backward(poe_stage *stage, int slot, const int32_t *targets, int n_micro,
                              const poe_crossing *d_out, const poe_crossing *d_in, double *loss)
{
    assert(stage->settings.training && stage->idx && slot == 0 && !d_out && !d_in);
    *loss = head_backward(stage, targets, n_micro);
    if (!isfinite(*loss))
        return POE_NUMERIC;
    layers_backward(stage);
    embed_backward(stage);
    return POE_OK;
}
