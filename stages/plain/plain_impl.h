/* SPDX-License-Identifier: MIT
 * What the files of the reference backend share. */
#ifndef POE_STAGES_PLAIN_PLAIN_IMPL_H
#define POE_STAGES_PLAIN_PLAIN_IMPL_H

#include "stages/ops.h"

typedef struct plain_backend {
    poe_backend head;
    double *scratch; /* as many as the hungriest operation needs: see scratch_doubles() */
} plain_backend;

static inline double *plain_scratch(poe_backend *be)
{
    return ((plain_backend *)be)->scratch;
}

void plain_value_embed_forward(poe_backend *be, float *v, float *gate, const float *u, const int32_t *idx,
                               const float *w, const float *ve, size_t n, size_t c, size_t n_kv_head, size_t hs);
void plain_value_embed_backward(poe_backend *be, float *du, float *dw, float *dve, const float *dv, const float *gate,
                                const float *u, const int32_t *idx, const float *w, const float *ve, size_t n, size_t c,
                                size_t n_kv_head, size_t hs);
void plain_rotary_forward(poe_backend *be, float *y, float *rinv, const float *x, const float *cos, const float *sin,
                          size_t b, size_t t, size_t heads, size_t hs, float eps);
void plain_rotary_backward(poe_backend *be, float *dx, const float *dy, const float *y, const float *rinv,
                           const float *cos, const float *sin, size_t b, size_t t, size_t heads, size_t hs);
void plain_attention_forward(poe_backend *be, float *y, float *lse, const float *q, const float *k, const float *v,
                             const poe_attention_shape *shape);
void plain_attention_backward(poe_backend *be, float *dq, float *dk, float *dv, const float *dy, const float *y,
                              const float *lse, const float *q, const float *k, const float *v,
                              const poe_attention_shape *shape);
void plain_adamw(poe_backend *be, float *w, float *m, float *v, const float *g, size_t n, const poe_adamw_step *step);
void plain_muon(poe_backend *be, float *w, float *m, float *second, const float *g, size_t rows, size_t cols,
                const poe_muon_step *step);

#endif
