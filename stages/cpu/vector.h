/* SPDX-License-Identifier: MIT
 * The vector kernels: everything that is not a matrix product, compiled once per instruction set from vector.c.
 * Each works on one span of an operation, so that spans can be dealt to threads; names and shapes are those of
 * stages/ops.h. Whoever calls them chooses spans that depend on the sizes alone. */
#ifndef POE_STAGES_CPU_VECTOR_H
#define POE_STAGES_CPU_VECTOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Does rows (or floats, or columns) first..last-1 of what `args` describes. `span` counts spans: where a kernel leaves
 * its part of a reduction. */
typedef void poe_span_kernel(const void *args, size_t span, size_t first, size_t last);

/* Floats. The kernels of this group take what they need: fill (y, value), add (y += a), sum (y = a + b),
 * mix (y = alpha a + beta b), relu2 (y = relu(a)^2), relu2_backward (y = a * 2 relu(b)), scale (y *= value),
 * softcap (y = 15 tanh(y / 15)). */
typedef struct poe_flat_args {
    float *y;
    const float *a, *b;
    float alpha, beta, value;
} poe_flat_args;

typedef struct poe_finite_args {
    const float *x;
    bool *bad; /* one per span: written */
} poe_finite_args;

/* Rows. norm_forward reads row idx[r] of x, or r where idx is NULL. */
typedef struct poe_norm_args {
    float *u, *rinv;
    const float *x;
    const int32_t *idx; // may be NULL
    size_t c;
    float eps;
} poe_norm_args;

typedef struct poe_norm_backward_args {
    float *dx;
    const float *du, *u, *rinv;
    size_t c;
} poe_norm_backward_args;

/* embed_mean: rows, mean (n) = mean(de * e). embed_scatter: columns, all n rows in order. */
typedef struct poe_embed_backward_args {
    float *dwte, *mean;
    const float *de, *e, *rinv;
    const int32_t *idx;
    size_t n, c;
} poe_embed_backward_args;

enum { POE_SMEAR_CHANNELS = 24, POE_GATE_CHANNELS = 12 };

typedef struct poe_smear_args {
    float *x0, *sig;
    const float *e, *gate;
    float lambda;
    size_t t, c;
} poe_smear_args;

typedef struct poe_smear_backward_args {
    float *de;
    double *parts; /* (spans, POE_SMEAR_CHANNELS + 1): dgate and dlambda */
    const float *dx0, *e, *sig, *gate;
    float lambda;
    size_t t, c;
} poe_smear_backward_args;

/* Rows; x NULL: no da, dx NULL: no dx. parts (spans, 2): da and db. */
typedef struct poe_mix_backward_args {
    float *dx, *dx0; // dx may be NULL
    double *parts;
    const float *dy, *x, *x0; // x may be NULL
    float a, b;
    size_t c;
} poe_mix_backward_args;

typedef struct poe_value_embed_args {
    float *v, *gate;
    const float *u;
    const int32_t *idx;
    const float *w, *ve;
    size_t c, n_kv_head, hs;
} poe_value_embed_args;

/* value_embed_backward: rows, parts (spans, n_kv_head * POE_GATE_CHANNELS): dw. value_embed_scatter: heads, all n rows
 * in order. */
typedef struct poe_value_embed_backward_args {
    float *du, *dve;
    double *parts;
    const float *dv, *gate, *u;
    const int32_t *idx;
    const float *w, *ve;
    size_t n, c, n_kv_head, hs;
} poe_value_embed_backward_args;

/* Rows, forward: y and rinv from x; backward: dx from dy, y and rinv. */
typedef struct poe_rotary_args {
    float *y, *rinv;
    const float *x, *cos, *sin;
    size_t t, heads, hs;
    float eps;
} poe_rotary_args;

typedef struct poe_rotary_backward_args {
    float *dx;
    const float *dy, *y, *rinv, *cos, *sin;
    size_t t, heads, hs;
} poe_rotary_backward_args;

typedef struct poe_adamw_args {
    float *w, *m, *v;
    const float *g;
    float keep;         /* 1 - lr * weight decay */
    float toward_g;     /* 1 - beta1 */
    float toward_g2;    /* 1 - beta2 */
    float rate;         /* lr / (1 - beta1^t) */
    float v_correction; /* 1 / (1 - beta2^t) */
    float eps;
} poe_adamw_args;

/* Floats. m <- lerp(m, g, toward_g); x = lerp(g, m, momentum); parts (spans): sums of x^2. */
typedef struct poe_momentum_args {
    float *m, *x;
    double *parts;
    const float *g;
    float momentum;
} poe_momentum_args;

/* mean (rows) of x^2 over the columns (kernel over rows), or mean (cols) over the rows (kernel over columns). */
typedef struct poe_square_args {
    float *mean;
    const float *x;
    size_t rows, cols;
} poe_square_args;

/* Rows. x is scaled by scale (rows) if by_row, else by scale (cols), and w -= lr x + lr weight_decay w [x w >= 0]. */
typedef struct poe_muon_update_args {
    float *w;
    const float *x, *scale;
    bool by_row;
    float lr, decay; /* decay: lr * weight decay */
    size_t cols;
} poe_muon_update_args;

/* A block of scores: rows are query positions first_query + r, columns key positions first_key + c. */
typedef struct poe_score_block {
    size_t rows, cols, ld, first_query, first_key, window;
} poe_score_block;

/* A tile of logits: columns are the tokens first_token + c. */
typedef struct poe_logit_tile {
    size_t rows, cols, ld, first_token;
} poe_logit_tile;

typedef struct poe_vector {
    poe_span_kernel *fill, *add, *sum, *mix, *relu2, *relu2_backward, *scale, *softcap, *finite;
    poe_span_kernel *norm, *norm_backward, *embed_mean, *embed_scatter, *smear, *smear_backward, *mix_backward;
    poe_span_kernel *value_embed, *value_embed_backward, *value_embed_scatter, *rotary, *rotary_backward;
    poe_span_kernel *adamw, *momentum, *square_rows, *square_columns, *muon_update;

    /* s <- exp(s - largest of the row) where the row sees the key, 0 elsewhere; inverse (rows): 1 / sum; lse (rows). */
    void (*softmax)(float *s, float *inverse, float *lse, const poe_score_block *block);
    /* y (rows, hs) *= inverse of the row. */
    void (*scale_rows)(float *y, size_t ld, const float *inverse, size_t rows, size_t hs);
    /* s <- p = exp(s - lse), dp <- p * (dp - delta), both 0 where the row does not see the key. */
    void (*softmax_backward)(float *s, float *dp, const float *lse, const float *delta, const poe_score_block *block);
    /* out (rows) = sums of a * b over rows of n. */
    void (*row_dots)(float *out, const float *a, size_t lda, const float *b, size_t ldb, size_t rows, size_t n);

    /* z <- 15 tanh(z / 15); sums (rows) = sums of exp(z). */
    void (*capped_exp)(float *z, float *sums, const poe_logit_tile *tile);
    /* z <- factor * (exp(z) * inverse - [token is the target]) * (1 - (z / 15)^2); inverse, factor, targets (rows). */
    void (*capped_exp_backward)(float *z, const float *inverse, const float *factor, const int32_t *targets,
                                const poe_logit_tile *tile);
} poe_vector;

extern const poe_vector poe_vector_generic;
#if defined(__x86_64__)
extern const poe_vector poe_vector_avx2, poe_vector_avx512;
#endif

#endif
