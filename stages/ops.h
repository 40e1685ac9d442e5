/* SPDX-License-Identifier: MIT
 * The table of operations of a backend: everything a stage computes, on the backend's own memory. One row of tables
 * per backend (cpu/ today, cuda/ beside it later). Conventions: outputs first, then what backward needs, inputs,
 * weights, sizes. N = b*t rows of activations. Matrices are row-major (rows, cols); weights are (out, in),
 * y = x W^T. Backward operations add to gradients (d...) unless said otherwise. Inputs are const. All results are
 * independent of the number of threads: bit for bit. */
#ifndef POE_STAGES_OPS_H
#define POE_STAGES_OPS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "src/status.h"
#include "src/team.h"

typedef struct poe_ops poe_ops;

/* A backend that is ready to compute: the table and its own context (team, scratch). Every backend's struct starts
 * with this one. Not thread-safe: one thread drives a backend; each rank has its own. */
typedef struct poe_backend {
    const poe_ops *ops;
} poe_backend;

typedef struct poe_attention_shape {
    size_t b, t, n_head, n_kv_head, head_size;
    size_t window; /* position t sees s with 0 <= t - s <= window */
} poe_attention_shape;

typedef struct poe_adamw_step {
    float lr, beta1, beta2, eps, weight_decay;
    int64_t t; /* this is update number t >= 1 */
} poe_adamw_step;

typedef struct poe_muon_step {
    float lr;           /* already with schedule and batch scaling; sqrt(max(1, rows/cols)) is applied inside */
    float momentum;
    float weight_decay;
} poe_muon_step;

struct poe_ops {
    const char *name; /* "cpu" */

    /* --- memory ------------------------------------------------------------------------------------------------ */
    /* Zeroed memory of the backend; NULL when there is none. On a host backend, plain pointers. */
    void *(*memory_allocate)(poe_backend *be, const char *what, size_t bytes);
    void (*memory_free)(poe_backend *be, void *memory, size_t bytes);
    void (*fill)(poe_backend *be, float *x, float value, size_t n);
    void (*copy)(poe_backend *be, float *y, const float *x, size_t n);
    void (*add)(poe_backend *be, float *y, const float *x, size_t n);                  /* y += x */
    void (*sum)(poe_backend *be, float *y, const float *a, const float *b, size_t n);  /* y = a + b */
    bool (*finite)(poe_backend *be, const float *x, size_t n);                         /* no NaN, no Inf */

    /* --- products ---------------------------------------------------------------------------------------------- */
    /* y (n,out) = x (n,in) W^T, or += when `accumulate`. W (out,in). ldy, ldx: floats from row to row. */
    void (*matmul)(poe_backend *be, float *y, size_t ldy, const float *x, size_t ldx, const float *w, size_t n,
                   size_t in, size_t out, bool accumulate);
    /* dx (n,in) = dy (n,out) W, or += when `accumulate`. */
    void (*matmul_dx)(poe_backend *be, float *dx, size_t lddx, const float *dy, size_t lddy, const float *w, size_t n,
                      size_t in, size_t out, bool accumulate);
    /* dw (out,in) += dy (n,out)^T x (n,in). */
    void (*matmul_dw)(poe_backend *be, float *dw, const float *dy, size_t lddy, const float *x, size_t ldx, size_t n,
                      size_t in, size_t out);

    /* --- embedding --------------------------------------------------------------------------------------------- */
    /* e (n,c) = norm(wte[idx]); rinv (n): 1 / sqrt(mean(x^2) + eps) of each row. */
    void (*embed_forward)(poe_backend *be, float *e, float *rinv, const int32_t *idx, const float *wte, size_t n,
                          size_t c, float eps);
    /* dwte[idx] += backward of de through the norm; rows that share a token are added in row order. */
    void (*embed_backward)(poe_backend *be, float *dwte, const float *de, const float *e, const float *rinv,
                           const int32_t *idx, size_t n, size_t c);
    /* x0 (b,t,c): x0_t = e_t + lambda * sigmoid(gate . e_t[:24]) * e_{t-1} for t >= 1, x0_0 = e_0.
     * sig (b,t): the sigmoids (unused at t = 0). gate (24), lambda (1). */
    void (*smear_forward)(poe_backend *be, float *x0, float *sig, const float *e, const float *gate,
                          const float *lambda, size_t b, size_t t, size_t c);
    /* de (b,t,c) is written, not added to; dgate (24), dlambda (1) are added to. */
    void (*smear_backward)(poe_backend *be, float *de, float *dgate, float *dlambda, const float *dx0, const float *e,
                           const float *sig, const float *gate, const float *lambda, size_t b, size_t t, size_t c);

    /* --- residual stream ---------------------------------------------------------------------------------------- */
    /* y = *a * x + *b * x0; y may be x. (n,c) */
    void (*mix_forward)(poe_backend *be, float *y, const float *x, const float *x0, const float *a, const float *b,
                        size_t n, size_t c);
    /* dx = *a * dy (written; may be dy; NULL: nobody wants it), dx0 += *b * dy, da += sum(dy * x), db += sum(dy * x0). */
    void (*mix_backward)(poe_backend *be, float *dx, float *dx0, float *da, float *db, const float *dy, const float *x,
                         const float *x0, const float *a, const float *b, size_t n, size_t c);
    /* u = x * rinv, rinv (n) = 1 / sqrt(mean(x^2) + eps). */
    void (*norm_forward)(poe_backend *be, float *u, float *rinv, const float *x, size_t n, size_t c, float eps);
    /* dx += rinv * (du - u * mean(du * u)). */
    void (*norm_backward)(poe_backend *be, float *dx, const float *du, const float *u, const float *rinv, size_t n,
                          size_t c);
    /* h = x - *lambda * mid (bp with backout), and dmid -= *lambda * dh, dlambda -= sum(dh * mid). */
    void (*backout_forward)(poe_backend *be, float *h, const float *x, const float *mid, const float *lambda, size_t n,
                            size_t c);
    void (*backout_backward)(poe_backend *be, float *dmid, float *dlambda, const float *dh, const float *mid,
                             const float *lambda, size_t n, size_t c);

    /* --- attention ---------------------------------------------------------------------------------------------- */
    /* v (n, n_kv_head*hs) += gate * ve[idx]; gate (n, n_kv_head) = 3 sigmoid(u[:12] W^T), W (n_kv_head, 12),
     * ve (vp, n_kv_head*hs). */
    void (*value_embed_forward)(poe_backend *be, float *v, float *gate, const float *u, const int32_t *idx,
                                const float *w, const float *ve, size_t n, size_t c, size_t n_kv_head, size_t hs);
    /* du[:12] +=, dw +=, dve[idx] += in row order, from dv. */
    void (*value_embed_backward)(poe_backend *be, float *du, float *dw, float *dve, const float *dv, const float *gate,
                                 const float *u, const int32_t *idx, const float *w, const float *ve, size_t n,
                                 size_t c, size_t n_kv_head, size_t hs);
    /* y = 1.2 norm(rotate(x)) per head, in place allowed; rinv (n, heads). Halves (x1, x2) ->
     * (x1 cos + x2 sin, x2 cos - x1 sin); cos, sin (T, hs/2). Row r has position r % t. */
    void (*rotary_forward)(poe_backend *be, float *y, float *rinv, const float *x, const float *cos, const float *sin,
                           size_t b, size_t t, size_t heads, size_t hs, float eps);
    /* dx (written; may be dy, or y) from dy and the saved y. */
    void (*rotary_backward)(poe_backend *be, float *dx, const float *dy, const float *y, const float *rinv,
                            const float *cos, const float *sin, size_t b, size_t t, size_t heads, size_t hs);
    /* y (b,t,n_head*hs) = softmax(q k^T / sqrt(hs)) v, causal, windowed; query head h reads key head
     * h / (n_head / n_kv_head). lse (b,n_head,t): log of the sum of the exponentials, for backward. Blocks outside
     * the window are never computed; no t x t matrix is stored for more than one head per thread. */
    void (*attention_forward)(poe_backend *be, float *y, float *lse, const float *q, const float *k, const float *v,
                              const poe_attention_shape *shape);
    /* dq, dk, dv are written, not added to. */
    void (*attention_backward)(poe_backend *be, float *dq, float *dk, float *dv, const float *dy, const float *y,
                               const float *lse, const float *q, const float *k, const float *v,
                               const poe_attention_shape *shape);

    /* --- mlp ---------------------------------------------------------------------------------------------------- */
    /* a = relu(f)^2 ; df = da * 2 relu(f) (may be written over da). */
    void (*relu2_forward)(poe_backend *be, float *a, const float *f, size_t n);
    void (*relu2_backward)(poe_backend *be, float *df, const float *da, const float *f, size_t n);

    /* --- head --------------------------------------------------------------------------------------------------- */
    /* Head, softcap z = 15 tanh(./15), softmax, cross-entropy and both gradients in one pass over chunks of rows, so
     * that logits never exist in full. u (n,c): normalised h. w (vp,c); only the first v rows count. targets (n),
     * negative: ignored. *loss: mean nats over counted rows. du (n,c) is written, dw (vp,c) added to: gradients of
     * scale * loss. du and dw NULL: the loss only. */
    void (*head_loss)(poe_backend *be, double *loss, float *du, float *dw, const float *u, const float *w,
                      const int32_t *targets, float scale, size_t n, size_t c, size_t v, size_t vp);
    /* z (n,v) = 15 tanh((u w^T) / 15), for n up to `logit_rows`. */
    void (*head_logits)(poe_backend *be, float *z, const float *u, const float *w, size_t n, size_t c, size_t v);

    /* --- optimiser ---------------------------------------------------------------------------------------------- */
    /* Bias-corrected AdamW, decoupled decay first (spec 3). */
    void (*adamw)(poe_backend *be, float *w, float *m, float *v, const float *g, size_t n, const poe_adamw_step *step);
    /* Muon with Polar Express, NorMuon and cautious decay (spec 3) on one matrix. m (rows,cols); second: rows floats
     * if rows >= cols, else cols. */
    void (*muon)(poe_backend *be, float *w, float *m, float *second, const float *g, size_t rows, size_t cols,
                 const poe_muon_step *step);
};

/* What a backend must know to size its scratch memory: the largest of everything it will see. */
typedef struct poe_backend_limits {
    size_t rows;        /* b*t */
    size_t t, c, head_size, n_head, n_kv_head, mlp_dim, vocab_padded;
    bool training; /* false: no gradients, no optimiser */
    bool bf16;     /* the operands of all matrix products are rounded to bf16; sums and everything else stay fp32 */
} poe_backend_limits;

#endif
