/* SPDX-License-Identifier: MIT
 * Memory, products, embedding, residual stream, mlp and head of the reference backend. */
#include "stages/plain/plain.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "src/log.h"
#include "stages/plain/plain_impl.h"

enum { SMEAR_CHANNELS = 24 };

static double sigmoid(double x)
{
    return 1 / (1 + exp(-x));
}

static double dot(const float *a, const float *b, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += (double)a[i] * b[i];
    return sum;
}

/* --- memory ------------------------------------------------------------------------------------------------------ */

static void *memory_allocate(poe_backend *be, const char *what, size_t bytes)
{
    (void)be, (void)what;
    size_t padded = (bytes + 63) / 64 * 64;
    void *memory = aligned_alloc(64, padded);
    return memory ? memset(memory, 0, padded) : NULL;
}

static void memory_free(poe_backend *be, void *memory, size_t bytes)
{
    (void)be, (void)bytes;
    free(memory);
}

static void fill(poe_backend *be, float *x, float value, size_t n)
{
    (void)be;
    for (size_t i = 0; i < n; i++)
        x[i] = value;
}

static void copy(poe_backend *be, float *y, const float *x, size_t n)
{
    (void)be;
    memcpy(y, x, n * sizeof(*y));
}

static void add(poe_backend *be, float *y, const float *x, size_t n)
{
    (void)be;
    for (size_t i = 0; i < n; i++)
        y[i] += x[i];
}

static void sum(poe_backend *be, float *y, const float *a, const float *b, size_t n)
{
    (void)be;
    for (size_t i = 0; i < n; i++)
        y[i] = a[i] + b[i];
}

static bool all_finite(poe_backend *be, const float *x, size_t n)
{
    (void)be;
    for (size_t i = 0; i < n; i++)
        if (!isfinite(x[i]))
            return false;
    return true;
}

/* --- products ---------------------------------------------------------------------------------------------------- */

static void matmul(poe_backend *be, float *y, size_t ldy, const float *x, size_t ldx, const float *w, size_t n,
                   size_t in, size_t out, bool accumulate)
{
    (void)be;
    for (size_t r = 0; r < n; r++)
        for (size_t o = 0; o < out; o++) {
            double value = dot(x + r * ldx, w + o * in, in);
            y[r * ldy + o] = (float)(accumulate ? y[r * ldy + o] + value : value);
        }
}

static void matmul_dx(poe_backend *be, float *dx, size_t lddx, const float *dy, size_t lddy, const float *w, size_t n,
                      size_t in, size_t out, bool accumulate)
{
    (void)be;
    for (size_t r = 0; r < n; r++)
        for (size_t i = 0; i < in; i++) {
            double value = accumulate ? dx[r * lddx + i] : 0;
            for (size_t o = 0; o < out; o++)
                value += (double)dy[r * lddy + o] * w[o * in + i];
            dx[r * lddx + i] = (float)value;
        }
}

static void matmul_dw(poe_backend *be, float *dw, const float *dy, size_t lddy, const float *x, size_t ldx, size_t n,
                      size_t in, size_t out)
{
    (void)be;
    for (size_t o = 0; o < out; o++)
        for (size_t i = 0; i < in; i++) {
            double value = dw[o * in + i];
            for (size_t r = 0; r < n; r++)
                value += (double)dy[r * lddy + o] * x[r * ldx + i];
            dw[o * in + i] = (float)value;
        }
}

/* --- norm, embedding --------------------------------------------------------------------------------------------- */

static float norm_row(float *u, const float *x, size_t c, float eps)
{
    double rinv = 1 / sqrt(dot(x, x, c) / (double)c + eps);
    for (size_t i = 0; i < c; i++)
        u[i] = (float)(x[i] * rinv);
    return (float)rinv;
}

static void norm_forward(poe_backend *be, float *u, float *rinv, const float *x, size_t n, size_t c, float eps)
{
    (void)be;
    for (size_t r = 0; r < n; r++)
        rinv[r] = norm_row(u + r * c, x + r * c, c, eps);
}

static void norm_row_backward(float *dx, const float *du, const float *u, double rinv, size_t c)
{
    double mean = dot(du, u, c) / (double)c;
    for (size_t i = 0; i < c; i++)
        dx[i] += (float)(rinv * (du[i] - u[i] * mean));
}

static void norm_backward(poe_backend *be, float *dx, const float *du, const float *u, const float *rinv, size_t n,
                          size_t c)
{
    (void)be;
    for (size_t r = 0; r < n; r++)
        norm_row_backward(dx + r * c, du + r * c, u + r * c, rinv[r], c);
}

static void embed_forward(poe_backend *be, float *e, float *rinv, const int32_t *idx, const float *wte, size_t n,
                          size_t c, float eps)
{
    (void)be;
    for (size_t r = 0; r < n; r++)
        rinv[r] = norm_row(e + r * c, wte + (size_t)idx[r] * c, c, eps);
}

static void embed_backward(poe_backend *be, float *dwte, const float *de, const float *e, const float *rinv,
                           const int32_t *idx, size_t n, size_t c)
{
    (void)be;
    for (size_t r = 0; r < n; r++)
        norm_row_backward(dwte + (size_t)idx[r] * c, de + r * c, e + r * c, rinv[r], c);
}

static void smear_forward(poe_backend *be, float *x0, float *sig, const float *e, const float *gate,
                          const float *lambda, size_t b, size_t t, size_t c)
{
    (void)be;
    for (size_t r = 0; r < b * t; r++) {
        bool first = r % t == 0;
        sig[r] = first ? 0 : (float)sigmoid(dot(gate, e + r * c, SMEAR_CHANNELS));
        for (size_t i = 0; i < c; i++)
            x0[r * c + i] =
                first ? e[r * c + i] : (float)(e[r * c + i] + (double)*lambda * sig[r] * e[(r - 1) * c + i]);
    }
}

static void smear_backward(poe_backend *be, float *de, float *dgate, float *dlambda, const float *dx0, const float *e,
                           const float *sig, const float *gate, const float *lambda, size_t b, size_t t, size_t c)
{
    (void)be;
    memcpy(de, dx0, b * t * c * sizeof(*de));
    double sum_lambda = 0, sum_gate[SMEAR_CHANNELS] = {0};
    for (size_t r = 0; r < b * t; r++) {
        if (r % t == 0)
            continue;
        double inner = dot(dx0 + r * c, e + (r - 1) * c, c); /* d loss / d (lambda * sigmoid) */
        double dlogit = inner * *lambda * sig[r] * (1 - sig[r]);
        sum_lambda += inner * sig[r];
        for (size_t i = 0; i < c; i++)
            de[(r - 1) * c + i] += (float)((double)*lambda * sig[r] * dx0[r * c + i]);
        for (size_t i = 0; i < SMEAR_CHANNELS; i++) {
            sum_gate[i] += dlogit * e[r * c + i];
            de[r * c + i] += (float)(dlogit * gate[i]);
        }
    }
    *dlambda += (float)sum_lambda;
    for (size_t i = 0; i < SMEAR_CHANNELS; i++)
        dgate[i] += (float)sum_gate[i];
}

/* --- residual stream --------------------------------------------------------------------------------------------- */

static void mix_forward(poe_backend *be, float *y, const float *x, const float *x0, const float *a, const float *b,
                        size_t n, size_t c)
{
    (void)be;
    for (size_t i = 0; i < n * c; i++)
        y[i] = (float)((double)*a * x[i] + (double)*b * x0[i]);
}

static void mix_backward(poe_backend *be, float *dx, float *dx0, float *da, float *db, const float *dy, const float *x,
                         const float *x0, const float *a, const float *b, size_t n, size_t c)
{
    (void)be;
    *da += (float)dot(dy, x, n * c);
    *db += (float)dot(dy, x0, n * c);
    for (size_t i = 0; i < n * c; i++) {
        double d = dy[i];
        dx0[i] += (float)(*b * d);
        if (dx)
            dx[i] = (float)(*a * d);
    }
}

static void backout_forward(poe_backend *be, float *h, const float *x, const float *mid, const float *lambda, size_t n,
                            size_t c)
{
    (void)be;
    for (size_t i = 0; i < n * c; i++)
        h[i] = (float)(x[i] - (double)*lambda * mid[i]);
}

static void backout_backward(poe_backend *be, float *dmid, float *dlambda, const float *dh, const float *mid,
                             const float *lambda, size_t n, size_t c)
{
    (void)be;
    *dlambda -= (float)dot(dh, mid, n * c);
    for (size_t i = 0; i < n * c; i++)
        dmid[i] -= (float)((double)*lambda * dh[i]);
}

/* --- mlp --------------------------------------------------------------------------------------------------------- */

static void relu2_forward(poe_backend *be, float *a, const float *f, size_t n)
{
    (void)be;
    for (size_t i = 0; i < n; i++)
        a[i] = f[i] > 0 ? f[i] * f[i] : 0;
}

static void relu2_backward(poe_backend *be, float *df, const float *da, const float *f, size_t n)
{
    (void)be;
    for (size_t i = 0; i < n; i++)
        df[i] = f[i] > 0 ? da[i] * 2 * f[i] : 0;
}

/* --- head -------------------------------------------------------------------------------------------------------- */

/* Logits of one row, cap included. */
static void row_logits(double *z, const float *u, const float *w, size_t c, size_t v)
{
    for (size_t j = 0; j < v; j++)
        z[j] = 15 * tanh(dot(u, w + j * c, c) / 15);
}

static double log_sum_exp(const double *z, size_t n)
{
    double most = z[0], sum_exp = 0;
    for (size_t j = 1; j < n; j++)
        most = fmax(most, z[j]);
    for (size_t j = 0; j < n; j++)
        sum_exp += exp(z[j] - most);
    return most + log(sum_exp);
}

static void head_loss(poe_backend *be, double *loss, float *du, float *dw, const float *u, const float *w,
                      const int32_t *targets, float scale, size_t n, size_t c, size_t v, size_t vp)
{
    double *z = plain_scratch(be), total = 0;
    (void)vp;
    size_t counted = 0;
    for (size_t r = 0; r < n; r++)
        counted += targets[r] >= 0;
    if (du)
        memset(du, 0, n * c * sizeof(*du));
    for (size_t r = 0; r < n; r++) {
        if (targets[r] < 0)
            continue;
        row_logits(z, u + r * c, w, c, v);
        double lse = log_sum_exp(z, v);
        total += lse - z[targets[r]];
        for (size_t j = 0; du && j < v; j++) {
            double dz = exp(z[j] - lse) - ((size_t)targets[r] == j);
            dz *= (1 - z[j] / 15 * (z[j] / 15)) * scale / (double)counted; /* through the cap, tanh' = 1 - tanh^2 */
            for (size_t i = 0; i < c; i++) {
                du[r * c + i] += (float)(dz * w[j * c + i]);
                dw[j * c + i] += (float)(dz * u[r * c + i]);
            }
        }
    }
    *loss = counted ? total / (double)counted : 0;
}

static void head_logits(poe_backend *be, float *z, const float *u, const float *w, size_t n, size_t c, size_t v)
{
    double *row = plain_scratch(be);
    for (size_t r = 0; r < n; r++) {
        row_logits(row, u + r * c, w, c, v);
        for (size_t j = 0; j < v; j++)
            z[r * v + j] = (float)row[j];
    }
}

/* --- life -------------------------------------------------------------------------------------------------------- */

static const poe_ops plain_ops = {
    .name = "plain",
    .memory_allocate = memory_allocate,
    .memory_free = memory_free,
    .fill = fill,
    .copy = copy,
    .add = add,
    .sum = sum,
    .finite = all_finite,
    .matmul = matmul,
    .matmul_dx = matmul_dx,
    .matmul_dw = matmul_dw,
    .embed_forward = embed_forward,
    .embed_backward = embed_backward,
    .smear_forward = smear_forward,
    .smear_backward = smear_backward,
    .mix_forward = mix_forward,
    .mix_backward = mix_backward,
    .norm_forward = norm_forward,
    .norm_backward = norm_backward,
    .backout_forward = backout_forward,
    .backout_backward = backout_backward,
    .value_embed_forward = plain_value_embed_forward,
    .value_embed_backward = plain_value_embed_backward,
    .rotary_forward = plain_rotary_forward,
    .rotary_backward = plain_rotary_backward,
    .attention_forward = plain_attention_forward,
    .attention_backward = plain_attention_backward,
    .relu2_forward = relu2_forward,
    .relu2_backward = relu2_backward,
    .head_loss = head_loss,
    .head_logits = head_logits,
    .adamw = plain_adamw,
    .muon = plain_muon,
};

static size_t larger(size_t a, size_t b)
{
    return a > b ? a : b;
}

/* A row of logits; probabilities of one query and sums dk, dv; Muon's X and its copy, and three square matrices. */
static size_t scratch_doubles(const poe_backend_limits *limits)
{
    size_t wide = larger(limits->c, limits->mlp_dim);
    size_t attention = limits->t * (1 + 2 * limits->head_size);
    size_t muon = limits->training ? 2 * limits->c * wide + 3 * limits->c * limits->c : 0;
    return larger(limits->vocab_padded, larger(attention, muon));
}

poe_status poe_plain_create(const poe_backend_limits *limits, poe_backend **backend)
{
    plain_backend *plain = calloc(1, sizeof(*plain));
    double *scratch = calloc(scratch_doubles(limits), sizeof(*scratch));
    if (!plain || !scratch) {
        poe_error("out of memory for the scratch of the reference backend");
        free(plain);
        free(scratch);
        return POE_FAILED;
    }
    *plain = (plain_backend){.head.ops = &plain_ops, .scratch = scratch};
    *backend = &plain->head;
    return POE_OK;
}

void poe_plain_destroy(poe_backend *backend)
{
    if (backend)
        free(plain_scratch(backend));
    free(backend);
}
