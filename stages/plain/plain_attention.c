/* SPDX-License-Identifier: MIT
 * Value embedding, rotary and attention of the reference backend. */
#include <math.h>
#include <string.h>

#include "stages/plain/plain_impl.h"

enum { GATE_CHANNELS = 12 };

void plain_value_embed_forward(poe_backend *be, float *v, float *gate, const float *u, const int32_t *idx,
                               const float *w, const float *ve, size_t n, size_t c, size_t n_kv_head, size_t hs)
{
    (void)be;
    for (size_t r = 0; r < n; r++)
        for (size_t h = 0; h < n_kv_head; h++) {
            double logit = 0;
            for (size_t i = 0; i < GATE_CHANNELS; i++)
                logit += (double)u[r * c + i] * w[h * GATE_CHANNELS + i];
            double g = 3 / (1 + exp(-logit));
            gate[r * n_kv_head + h] = (float)g;
            const float *embed = ve + ((size_t)idx[r] * n_kv_head + h) * hs;
            for (size_t i = 0; i < hs; i++)
                v[(r * n_kv_head + h) * hs + i] += (float)(g * embed[i]);
        }
}

void plain_value_embed_backward(poe_backend *be, float *du, float *dw, float *dve, const float *dv, const float *gate,
                                const float *u, const int32_t *idx, const float *w, const float *ve, size_t n, size_t c,
                                size_t n_kv_head, size_t hs)
{
    (void)be;
    for (size_t r = 0; r < n; r++)
        for (size_t h = 0; h < n_kv_head; h++) {
            const float *dv_rh = dv + (r * n_kv_head + h) * hs;
            size_t embed = ((size_t)idx[r] * n_kv_head + h) * hs;
            double g = gate[r * n_kv_head + h], dgate = 0;
            for (size_t i = 0; i < hs; i++) {
                dgate += (double)dv_rh[i] * ve[embed + i];
                dve[embed + i] += (float)(g * dv_rh[i]);
            }
            double dlogit = dgate * g * (1 - g / 3); /* g = 3 sigmoid(logit) */
            for (size_t i = 0; i < GATE_CHANNELS; i++) {
                dw[h * GATE_CHANNELS + i] += (float)(dlogit * u[r * c + i]);
                du[r * c + i] += (float)(dlogit * w[h * GATE_CHANNELS + i]);
            }
        }
}

/* y = 1.2 norm(rotate(x)) of one head; cos, sin of its position. Returns the norm's factor. */
static float rotate_head(float *y, const float *x, const float *cos, const float *sin, size_t hs, float eps)
{
    size_t half = hs / 2;
    double squares = 0;
    for (size_t i = 0; i < hs; i++)
        squares += (double)x[i] * x[i]; /* a rotation keeps it */
    double rinv = 1 / sqrt(squares / (double)hs + eps);
    for (size_t i = 0; i < half; i++) {
        double x1 = x[i], x2 = x[half + i];
        y[i] = (float)(1.2 * rinv * (x1 * cos[i] + x2 * sin[i]));
        y[half + i] = (float)(1.2 * rinv * (x2 * cos[i] - x1 * sin[i]));
    }
    return (float)rinv;
}

void plain_rotary_forward(poe_backend *be, float *y, float *rinv, const float *x, const float *cos, const float *sin,
                          size_t b, size_t t, size_t heads, size_t hs, float eps)
{
    (void)be;
    for (size_t r = 0; r < b * t; r++)
        for (size_t h = 0; h < heads; h++) {
            size_t at = (r * heads + h) * hs, angle = r % t * (hs / 2);
            rinv[r * heads + h] = rotate_head(y + at, x + at, cos + angle, sin + angle, hs, eps);
        }
}

static void rotate_head_backward(float *dx, const float *dy, const float *y, double rinv, const float *cos,
                                 const float *sin, size_t hs)
{
    size_t half = hs / 2;
    double mean = 0; /* of dn * n, where y = 1.2 n and dn = 1.2 dy */
    for (size_t i = 0; i < hs; i++)
        mean += (double)dy[i] * y[i] / (double)hs;
    for (size_t i = 0; i < half; i++) {
        double d1 = rinv * (1.2 * dy[i] - y[i] / 1.2 * mean);
        double d2 = rinv * (1.2 * dy[half + i] - y[half + i] / 1.2 * mean);
        dx[i] = (float)(d1 * cos[i] - d2 * sin[i]);
        dx[half + i] = (float)(d1 * sin[i] + d2 * cos[i]);
    }
}

void plain_rotary_backward(poe_backend *be, float *dx, const float *dy, const float *y, const float *rinv,
                           const float *cos, const float *sin, size_t b, size_t t, size_t heads, size_t hs)
{
    (void)be;
    for (size_t r = 0; r < b * t; r++)
        for (size_t h = 0; h < heads; h++) {
            size_t at = (r * heads + h) * hs, angle = r % t * (hs / 2);
            rotate_head_backward(dx + at, dy + at, y + at, rinv[r * heads + h], cos + angle, sin + angle, hs);
        }
}

/* --- attention --------------------------------------------------------------------------------------------------- */

static size_t first_seen(const poe_attention_shape *shape, size_t t)
{
    return t > shape->window ? t - shape->window : 0;
}

static size_t key_head(const poe_attention_shape *shape, size_t h)
{
    return h / (shape->n_head / shape->n_kv_head);
}

/* Where row (b, t) of head h is in a (b,t,heads*hs) tensor. */
static size_t row_of(const poe_attention_shape *shape, size_t b, size_t t, size_t heads, size_t h)
{
    return ((b * shape->t + t) * heads + h) * shape->head_size;
}

static double score(const poe_attention_shape *shape, const float *q, const float *k)
{
    double sum = 0;
    for (size_t i = 0; i < shape->head_size; i++)
        sum += (double)q[i] * k[i];
    return sum / sqrt((double)shape->head_size);
}

/* One query: y (hs); returns lse. p (t): scratch. */
static double attend(double *p, float *y, const float *q, const float *k, const float *v,
                     const poe_attention_shape *shape, size_t b, size_t t, size_t g)
{
    size_t first = first_seen(shape, t);
    double most = -INFINITY, total = 0;
    for (size_t s = first; s <= t; s++) {
        p[s] = score(shape, q, k + row_of(shape, b, s, shape->n_kv_head, g));
        most = fmax(most, p[s]);
    }
    for (size_t s = first; s <= t; s++) {
        p[s] = exp(p[s] - most);
        total += p[s];
    }
    for (size_t i = 0; i < shape->head_size; i++) {
        double value = 0;
        for (size_t s = first; s <= t; s++)
            value += p[s] / total * v[row_of(shape, b, s, shape->n_kv_head, g) + i];
        y[i] = (float)value;
    }
    return most + log(total);
}

void plain_attention_forward(poe_backend *be, float *y, float *lse, const float *q, const float *k, const float *v,
                             const poe_attention_shape *shape)
{
    double *p = plain_scratch(be);
    for (size_t b = 0; b < shape->b; b++)
        for (size_t h = 0; h < shape->n_head; h++)
            for (size_t t = 0; t < shape->t; t++) {
                size_t at = row_of(shape, b, t, shape->n_head, h);
                lse[(b * shape->n_head + h) * shape->t + t] =
                    (float)attend(p, y + at, q + at, k, v, shape, b, t, key_head(shape, h));
            }
}

/* One query's part of dk and dv (t,hs) in double, and its dq. */
static void attend_backward(double *dk, double *dv, float *dq, const float *dy, const float *y, double lse,
                            const float *q, const float *k, const float *v, const poe_attention_shape *shape, size_t b,
                            size_t t, size_t g)
{
    size_t hs = shape->head_size;
    double scale = 1 / sqrt((double)hs), inner = 0; /* inner: sum of dy * y = sum over s of p * dp */
    for (size_t i = 0; i < hs; i++) {
        inner += (double)dy[i] * y[i];
        dq[i] = 0;
    }
    for (size_t s = first_seen(shape, t); s <= t; s++) {
        size_t at = row_of(shape, b, s, shape->n_kv_head, g);
        double p = exp(score(shape, q, k + at) - lse), dp = 0;
        for (size_t i = 0; i < hs; i++)
            dp += (double)dy[i] * v[at + i];
        double ds = p * (dp - inner) * scale;
        for (size_t i = 0; i < hs; i++) {
            dv[s * hs + i] += p * dy[i];
            dk[s * hs + i] += ds * q[i];
            dq[i] += (float)(ds * k[at + i]);
        }
    }
}

void plain_attention_backward(poe_backend *be, float *dq, float *dk, float *dv, const float *dy, const float *y,
                              const float *lse, const float *q, const float *k, const float *v,
                              const poe_attention_shape *shape)
{
    size_t piece = shape->t * shape->head_size;
    double *sum_dk = plain_scratch(be), *sum_dv = sum_dk + piece;
    for (size_t b = 0; b < shape->b; b++)
        for (size_t g = 0; g < shape->n_kv_head; g++) {
            memset(sum_dk, 0, 2 * piece * sizeof(*sum_dk));
            for (size_t h = 0; h < shape->n_head; h++)
                for (size_t t = 0; key_head(shape, h) == g && t < shape->t; t++) {
                    size_t at = row_of(shape, b, t, shape->n_head, h);
                    attend_backward(sum_dk, sum_dv, dq + at, dy + at, y + at,
                                    lse[(b * shape->n_head + h) * shape->t + t], q + at, k, v, shape, b, t, g);
                }
            for (size_t i = 0; i < piece; i++) {
                size_t at = row_of(shape, b, i / shape->head_size, shape->n_kv_head, g) + i % shape->head_size;
                dk[at] = (float)sum_dk[i];
                dv[at] = (float)sum_dv[i];
            }
        }
}
