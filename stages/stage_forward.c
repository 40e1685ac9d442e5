/* SPDX-License-Identifier: MIT
 * Forward pass of a stage (spec 1), and logits. Local tensors: n = b*t rows. */
#include <assert.h>

#include "stages/stage.h"
#include "stages/stage_impl.h"

/* y (n,out) = x (n,in) W^T, or += */
static void product(poe_stage *stage, float *y, const float *x, const float *w, size_t in, size_t out, bool accumulate)
{
    stage->backend->ops->matmul(stage->backend, y, out, x, in, w, rows_at_hand(stage), in, out, accumulate);
}

void poe_stage_embed(poe_stage *stage)
{
    const stage_slot *slot = stage->slot;
    stage->backend->ops->embed_forward(stage->backend, slot->e, slot->rinv_e, slot->idx, stage->w.wte,
                                       rows_at_hand(stage), (size_t)stage->model->config.n_embd,
                                       (float)stage->model->config.norm_eps);
}

/* x0 = smear(e) */
static void smear(poe_stage *stage)
{
    const stage_slot *slot = stage->slot;
    stage->backend->ops->smear_forward(stage->backend, slot->x0, slot->sig, slot->e, stage->w.smear_gate,
                                       stage->w.smear_lambda, slot->b, slot->t, (size_t)stage->model->config.n_embd);
}

void poe_stage_mix(poe_stage *stage, int i, float *x)
{
    const poe_ops *ops = stage->backend->ops;
    const layer_tensors *w = &stage->layers[i].w;
    const stage_slot *slot = stage->slot;
    size_t n = rows_at_hand(stage), c = (size_t)stage->model->config.n_embd;
    ops->mix_forward(stage->backend, x, layer_input(slot, i), stream_start(slot), w->resid, w->x0, n, c);
    ops->norm_forward(stage->backend, slot->kept[i].u_attn, slot->kept[i].rinv_attn, x, n, c,
                      (float)stage->model->config.norm_eps);
}

/* x += attn(u_attn) */
static void attention(poe_stage *stage, const stage_layer *layer, const layer_kept *kept)
{
    const poe_ops *ops = stage->backend->ops;
    poe_backend *be = stage->backend;
    const layer_tensors *w = &layer->w;
    poe_attention_shape shape = attention_shape(stage, layer);
    size_t b = shape.b, t = shape.t, n = b * t, hs = shape.head_size;
    size_t c = (size_t)stage->model->config.n_embd, kv = stage->model->kv_dim;
    float eps = (float)stage->model->config.norm_eps;

    product(stage, kept->q, kept->u_attn, w->q, c, c, false);
    product(stage, kept->k, kept->u_attn, w->k, c, kv, false);
    product(stage, kept->v, kept->u_attn, w->v, c, kv, false);
    if (w->gate)
        ops->value_embed_forward(be, kept->v, kept->gate, kept->u_attn, stage->slot->idx, w->gate, w->value_embed, n, c,
                                 shape.n_kv_head, hs);
    ops->rotary_forward(be, kept->q, kept->rinv_q, kept->q, stage->cos, stage->sin, b, t, shape.n_head, hs, eps);
    ops->rotary_forward(be, kept->k, kept->rinv_k, kept->k, stage->cos, stage->sin, b, t, shape.n_kv_head, hs, eps);
    ops->attention_forward(be, kept->y, kept->lse, kept->q, kept->k, kept->v, &shape);
    product(stage, kept->x, kept->y, w->proj, c, c, true);
}

void poe_stage_run_layer(poe_stage *stage, int i)
{
    const stage_layer *layer = &stage->layers[i];
    const layer_kept *kept = &stage->slot->kept[i];
    size_t n = rows_at_hand(stage), c = (size_t)stage->model->config.n_embd;
    poe_stage_mix(stage, i, kept->x);
    attention(stage, layer, kept);
    stage->backend->ops->norm_forward(stage->backend, kept->u_mlp, kept->rinv_mlp, kept->x, n, c,
                                      (float)stage->model->config.norm_eps);
    product(stage, kept->f, kept->u_mlp, layer->w.fc, c, stage->model->mlp_dim, false);
}

/* x += relu(f)^2 W^T */
static void finish_layer(poe_stage *stage, int i)
{
    const layer_kept *kept = &stage->slot->kept[i];
    size_t c = (size_t)stage->model->config.n_embd, inner = stage->model->mlp_dim;
    stage->backend->ops->relu2_forward(stage->backend, stage->wide, kept->f, rows_at_hand(stage) * inner);
    product(stage, kept->x, stage->wide, stage->layers[i].w.mlp_proj, inner, c, true);
}

/* u = norm(h), h the last layer's output, less backout */
static void finish(poe_stage *stage)
{
    const poe_ops *ops = stage->backend->ops;
    const stage_slot *slot = stage->slot;
    size_t n = rows_at_hand(stage), c = (size_t)stage->model->config.n_embd;
    const float *h = layer_input(slot, stage->n_layers);
    if (stage->backs_out) {
        ops->backout_forward(stage->backend, stage->wide, h, mid_output(stage), stage->w.backout, n, c);
        h = stage->wide;
    }
    ops->norm_forward(stage->backend, slot->u, slot->rinv, h, n, c, (float)stage->model->config.norm_eps);
}

/* The sum is made when it is wanted: the shared head's update may come as late as that. */
const float *poe_stage_head_weights(poe_stage *stage)
{
    if (!stage->own_head)
        return stage->w.head;
    if (stage->head_sum_stale)
        stage->backend->ops->sum(stage->backend, stage->head_sum, stage->w.head, stage->own_head,
                                 stage->model->vocab_padded * (size_t)stage->model->config.n_embd);
    stage->head_sum_stale = false;
    return stage->head_sum;
}

/* Every member of `out` that is there. */
static void put_out(poe_stage *stage, const poe_crossing *out)
{
    const poe_ops *ops = stage->backend->ops;
    const stage_slot *slot = stage->slot;
    size_t floats = rows_at_hand(stage) * (size_t)stage->model->config.n_embd;
    if (out->h)
        ops->copy(stage->backend, out->h, layer_input(slot, stage->n_layers), floats);
    if (out->x0)
        ops->copy(stage->backend, out->x0, stream_start(slot), floats);
    if (out->mid)
        ops->copy(stage->backend, out->mid, mid_output(stage), floats);
}

void poe_stage_forward(poe_stage *stage, int slot, size_t b, size_t t, const int32_t *idx, const poe_crossing *in,
                       const poe_crossing *out)
{
    assert(slot >= 0 && slot < stage->settings.slots);
    assert(b <= stage->settings.rows && t <= (size_t)stage->model->config.sequence_len);
    assert(crossing_fits(stage->model, stage->settings.stage - 1, in));
    stage->slot = &stage->slots[slot];
    stage->slot->b = b;
    stage->slot->t = t;
    stage->slot->idx = idx;
    stage->slot->in = in ? *in : (poe_crossing){0};
    if (stage->has_wte) {
        poe_stage_embed(stage);
        smear(stage);
    }
    for (int i = 0; i < stage->n_layers; i++) {
        poe_stage_run_layer(stage, i);
        finish_layer(stage, i);
    }
    if (stage->has_head)
        finish(stage);
    stage->in_block = stage->slot;
    if (out)
        put_out(stage, out);
}

size_t poe_stage_logit_rows(const poe_stage *stage)
{
    enum { LOGITS = 1 << 21 }; /* 8 MiB: no buffer of anyone's grows with B T V */
    size_t rows = stage->settings.rows * (size_t)stage->model->config.sequence_len;
    size_t most = LOGITS / stage->model->vocab_padded;
    return most < 1 ? 1 : most < rows ? most : rows;
}

void poe_stage_logits(poe_stage *stage, size_t first, size_t n, float *z)
{
    size_t c = (size_t)stage->model->config.n_embd;
    assert(stage->has_head && first + n <= rows_at_hand(stage) && n <= poe_stage_logit_rows(stage));
    stage->backend->ops->head_logits(stage->backend, z, stage->slot->u + first * c, poe_stage_head_weights(stage), n,
                                     c, (size_t)stage->model->config.vocab_size);
}
