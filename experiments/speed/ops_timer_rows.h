/* SPDX-License-Identifier: MIT
 * The timed operations, for the includer's macro OPERATION(name, group, FLOPs, floats read and written, parameters as
 * in stages/ops.h, arguments...). No include guard: it is a list. */
OPERATION(fill, "elements", 0, n, (poe_backend *be, float *x, float value, size_t n), x, value, n)
OPERATION(copy, "elements", 0, 2 * n, (poe_backend *be, float *y, const float *x, size_t n), y, x, n)
OPERATION(add, "elements", 0, 3 * n, (poe_backend *be, float *y, const float *x, size_t n), y, x, n)
OPERATION(sum, "elements", 0, 3 * n, (poe_backend *be, float *y, const float *a, const float *b, size_t n), y, a, b, n)

OPERATION(matmul, "products", 2 * n * in * out, n * in + in * out + n * out * (accumulate ? 2 : 1),
          (poe_backend *be, float *y, size_t ldy, const float *x, size_t ldx, const float *w, size_t n, size_t in,
           size_t out, bool accumulate),
          y, ldy, x, ldx, w, n, in, out, accumulate)
OPERATION(matmul_dx, "products", 2 * n * in * out, n * out + in * out + n * in * (accumulate ? 2 : 1),
          (poe_backend *be, float *dx, size_t lddx, const float *dy, size_t lddy, const float *w, size_t n, size_t in,
           size_t out, bool accumulate),
          dx, lddx, dy, lddy, w, n, in, out, accumulate)
OPERATION(matmul_dw, "products", 2 * n * in * out, n * out + n * in + 2 * in * out,
          (poe_backend *be, float *dw, const float *dy, size_t lddy, const float *x, size_t ldx, size_t n, size_t in,
           size_t out),
          dw, dy, lddy, x, ldx, n, in, out)

OPERATION(embed_forward, "elements", 0, 2 * n * c,
          (poe_backend *be, float *e, float *rinv, const int32_t *idx, const float *wte, size_t n, size_t c,
           float eps),
          e, rinv, idx, wte, n, c, eps)
OPERATION(embed_backward, "elements", 0, 4 * n * c,
          (poe_backend *be, float *dwte, const float *de, const float *e, const float *rinv, const int32_t *idx,
           size_t n, size_t c),
          dwte, de, e, rinv, idx, n, c)
OPERATION(smear_forward, "elements", 0, 2 * b * t * c,
          (poe_backend *be, float *x0, float *sig, const float *e, const float *gate, const float *lambda, size_t b,
           size_t t, size_t c),
          x0, sig, e, gate, lambda, b, t, c)
OPERATION(smear_backward, "elements", 0, 3 * b * t * c,
          (poe_backend *be, float *de, float *dgate, float *dlambda, const float *dx0, const float *e,
           const float *sig, const float *gate, const float *lambda, size_t b, size_t t, size_t c),
          de, dgate, dlambda, dx0, e, sig, gate, lambda, b, t, c)

OPERATION(mix_forward, "elements", 0, 3 * n * c,
          (poe_backend *be, float *y, const float *x, const float *x0, const float *a, const float *b, size_t n,
           size_t c),
          y, x, x0, a, b, n, c)
OPERATION(mix_backward, "elements", 0, (dx ? 6 : 5) * n * c,
          (poe_backend *be, float *dx, float *dx0, float *da, float *db, const float *dy, const float *x,
           const float *x0, const float *a, const float *b, size_t n, size_t c),
          dx, dx0, da, db, dy, x, x0, a, b, n, c)
OPERATION(norm_forward, "elements", 0, 2 * n * c,
          (poe_backend *be, float *u, float *rinv, const float *x, size_t n, size_t c, float eps),
          u, rinv, x, n, c, eps)
OPERATION(norm_backward, "elements", 0, 4 * n * c,
          (poe_backend *be, float *dx, const float *du, const float *u, const float *rinv, size_t n, size_t c),
          dx, du, u, rinv, n, c)
OPERATION(backout_forward, "elements", 0, 3 * n * c,
          (poe_backend *be, float *h, const float *x, const float *mid, const float *lambda, size_t n, size_t c),
          h, x, mid, lambda, n, c)
OPERATION(backout_backward, "elements", 0, 4 * n * c,
          (poe_backend *be, float *dmid, float *dlambda, const float *dh, const float *mid, const float *lambda,
           size_t n, size_t c),
          dmid, dlambda, dh, mid, lambda, n, c)

OPERATION(value_embed_forward, "elements", 0, 3 * n * n_kv_head * hs,
          (poe_backend *be, float *v, float *gate, const float *u, const int32_t *idx, const float *w,
           const float *ve, size_t n, size_t c, size_t n_kv_head, size_t hs),
          v, gate, u, idx, w, ve, n, c, n_kv_head, hs)
OPERATION(value_embed_backward, "elements", 0, 4 * n * n_kv_head * hs,
          (poe_backend *be, float *du, float *dw, float *dve, const float *dv, const float *gate, const float *u,
           const int32_t *idx, const float *w, const float *ve, size_t n, size_t c, size_t n_kv_head, size_t hs),
          du, dw, dve, dv, gate, u, idx, w, ve, n, c, n_kv_head, hs)
OPERATION(rotary_forward, "elements", 0, 2 * b * t * heads * hs,
          (poe_backend *be, float *y, float *rinv, const float *x, const float *cos, const float *sin, size_t b,
           size_t t, size_t heads, size_t hs, float eps),
          y, rinv, x, cos, sin, b, t, heads, hs, eps)
OPERATION(rotary_backward, "elements", 0, 3 * b * t * heads * hs,
          (poe_backend *be, float *dx, const float *dy, const float *y, const float *rinv, const float *cos,
           const float *sin, size_t b, size_t t, size_t heads, size_t hs),
          dx, dy, y, rinv, cos, sin, b, t, heads, hs)
OPERATION(attention_forward, "attention", 4 * visible(shape), attention_floats(shape, 2, 2),
          (poe_backend *be, float *y, float *lse, const float *q, const float *k, const float *v,
           const poe_attention_shape *shape),
          y, lse, q, k, v, shape)
OPERATION(attention_backward, "attention", 10 * visible(shape), attention_floats(shape, 4, 4),
          (poe_backend *be, float *dq, float *dk, float *dv, const float *dy, const float *y, const float *lse,
           const float *q, const float *k, const float *v, const poe_attention_shape *shape),
          dq, dk, dv, dy, y, lse, q, k, v, shape)

OPERATION(relu2_forward, "elements", 0, 2 * n, (poe_backend *be, float *a, const float *f, size_t n), a, f, n)
OPERATION(relu2_backward, "elements", 0, 3 * n,
          (poe_backend *be, float *df, const float *da, const float *f, size_t n), df, da, f, n)

OPERATION(head_loss, "head", (du ? 6 : 2) * n * c * v, du ? 2 * n * c + 3 * v * c : n * c + v * c,
          (poe_backend *be, double *loss, float *du, float *dw, const float *u, const float *w,
           const int32_t *targets, float scale, size_t n, size_t c, size_t v, size_t vp),
          loss, du, dw, u, w, targets, scale, n, c, v, vp)

OPERATION(adamw, "optimiser", 0, 7 * n,
          (poe_backend *be, float *w, float *m, float *v, const float *g, size_t n, const poe_adamw_step *step),
          w, m, v, g, n, step)
OPERATION(muon, "optimiser", muon_flops(rows, cols), 5 * rows * cols,
          (poe_backend *be, float *w, float *m, float *second, const float *g, size_t rows, size_t cols,
           const poe_muon_step *step),
          w, m, second, g, rows, cols, step)
