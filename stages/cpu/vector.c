/* SPDX-License-Identifier: MIT
 * The vector kernels: compiled once per instruction set, each time under another name for its table
 * (POE_VECTOR_TABLE). Nothing here depends on threads or on the alignment of pointers. */
#include "stages/cpu/vector.h"

#include "stages/cpu/vector_math.h"

static const float cap = 15.0f, head_scale = 1.2f;

/* --- floats ------------------------------------------------------------------------------------------------------ */

static void fill(const void *args, size_t span, size_t first, size_t last)
{
    const poe_flat_args *a = args;
    (void)span;
    for (size_t i = first; i < last; i++)
        a->y[i] = a->value;
}

static void add(const void *args, size_t span, size_t first, size_t last)
{
    const poe_flat_args *a = args;
    float *y = a->y;
    (void)span;
    EACH
    for (size_t i = first; i < last; i++)
        y[i] += a->a[i];
}

static void sum(const void *args, size_t span, size_t first, size_t last)
{
    const poe_flat_args *a = args;
    (void)span;
    EACH
    for (size_t i = first; i < last; i++)
        a->y[i] = a->a[i] + a->b[i];
}

static void mix(const void *args, size_t span, size_t first, size_t last)
{
    const poe_flat_args a = *(const poe_flat_args *)args;
    (void)span;
    EACH
    for (size_t i = first; i < last; i++)
        a.y[i] = madd(a.alpha, a.a[i], a.beta * a.b[i]);
}

static void relu2(const void *args, size_t span, size_t first, size_t last)
{
    const poe_flat_args a = *(const poe_flat_args *)args;
    (void)span;
    EACH
    for (size_t i = first; i < last; i++) {
        float f = a.a[i] < 0.0f ? 0.0f : a.a[i];
        a.y[i] = f * f;
    }
}

static void relu2_backward(const void *args, size_t span, size_t first, size_t last)
{
    const poe_flat_args a = *(const poe_flat_args *)args;
    (void)span;
    EACH
    for (size_t i = first; i < last; i++) {
        float f = a.b[i] < 0.0f ? 0.0f : a.b[i];
        a.y[i] = a.a[i] * (2.0f * f);
    }
}

static void scale(const void *args, size_t span, size_t first, size_t last)
{
    const poe_flat_args a = *(const poe_flat_args *)args;
    (void)span;
    EACH
    for (size_t i = first; i < last; i++)
        a.y[i] *= a.value;
}

static void cap_row(float *z, size_t n)
{
    EACH
    for (size_t i = 0; i < n; i++)
        z[i] = cap * hyperbolic_tangent(z[i] * (1.0f / cap));
}

static void softcap(const void *args, size_t span, size_t first, size_t last)
{
    const poe_flat_args *a = args;
    (void)span;
    cap_row(a->y + first, last - first);
}

static void all_finite(const void *args, size_t span, size_t first, size_t last)
{
    const poe_finite_args *a = args;
    uint32_t bad = 0;
    for (size_t i = first; i < last; i++)
        bad |= (to_bits(a->x[i]) & 0x7f800000u) == 0x7f800000u;
    a->bad[span] = bad != 0;
}

/* --- norm and embedding ------------------------------------------------------------------------------------------ */

static void norm(const void *args, size_t span, size_t first, size_t last)
{
    const poe_norm_args *a = args;
    (void)span;
    for (size_t r = first; r < last; r++) {
        const float *x = a->x + (a->idx ? (size_t)a->idx[r] : r) * a->c;
        float *u = a->u + r * a->c;
        float rinv = 1.0f / sqrtf(row_dot(x, x, a->c) / (float)a->c + a->eps);
        a->rinv[r] = rinv;
        EACH
        for (size_t i = 0; i < a->c; i++)
            u[i] = x[i] * rinv;
    }
}

/* dx (c) += rinv * (du - u * mean) */
static void norm_backward_row(float *dx, const float *du, const float *u, float rinv, float mean, size_t c)
{
    EACH
    for (size_t i = 0; i < c; i++)
        dx[i] = madd(rinv, madd(u[i], -mean, du[i]), dx[i]);
}

static void norm_backward(const void *args, size_t span, size_t first, size_t last)
{
    const poe_norm_backward_args *a = args;
    (void)span;
    for (size_t r = first; r < last; r++) {
        const float *du = a->du + r * a->c, *u = a->u + r * a->c;
        norm_backward_row(a->dx + r * a->c, du, u, a->rinv[r], row_dot(du, u, a->c) / (float)a->c, a->c);
    }
}

static void embed_mean(const void *args, size_t span, size_t first, size_t last)
{
    const poe_embed_backward_args *a = args;
    (void)span;
    for (size_t r = first; r < last; r++)
        a->mean[r] = row_dot(a->de + r * a->c, a->e + r * a->c, a->c) / (float)a->c;
}

static void embed_scatter(const void *args, size_t span, size_t first, size_t last)
{
    const poe_embed_backward_args *a = args;
    (void)span;
    for (size_t r = 0; r < a->n; r++) {
        size_t at = r * a->c + first;
        norm_backward_row(a->dwte + (size_t)a->idx[r] * a->c + first, a->de + at, a->e + at, a->rinv[r], a->mean[r],
                          last - first);
    }
}

/* --- smear ------------------------------------------------------------------------------------------------------- */

static void smear(const void *args, size_t span, size_t first, size_t last)
{
    const poe_smear_args *a = args;
    (void)span;
    for (size_t r = first; r < last; r++) {
        const float *e = a->e + r * a->c;
        float *x0 = a->x0 + r * a->c;
        bool begins = r % a->t == 0;
        float sig = begins ? 0.0f : sigmoid(row_dot(a->gate, e, POE_SMEAR_CHANNELS));
        const float *before = begins ? e : e - a->c;
        float share = a->lambda * sig;
        a->sig[r] = sig;
        EACH
        for (size_t i = 0; i < a->c; i++)
            x0[i] = madd(share, before[i], e[i]);
    }
}

/* What row r gives its own embedding through its gate, and the gate's and lambda's gradients into `parts`. */
static void smear_gate_backward(const poe_smear_backward_args *a, size_t r, double *parts)
{
    const float *e = a->e + r * a->c;
    float sig = a->sig[r], through = row_dot(a->dx0 + r * a->c, e - a->c, a->c);
    float dlogit = a->lambda * through * sig * (1.0f - sig);
    for (size_t i = 0; i < POE_SMEAR_CHANNELS; i++) {
        a->de[r * a->c + i] = madd(dlogit, a->gate[i], a->de[r * a->c + i]);
        parts[i] += (double)(dlogit * e[i]);
    }
    parts[POE_SMEAR_CHANNELS] += (double)(sig * through);
}

static void smear_backward(const void *args, size_t span, size_t first, size_t last)
{
    const poe_smear_backward_args *a = args;
    double *parts = a->parts + span * (POE_SMEAR_CHANNELS + 1);
    memset(parts, 0, (POE_SMEAR_CHANNELS + 1) * sizeof(*parts));
    for (size_t r = first; r < last; r++) {
        const float *dx0 = a->dx0 + r * a->c;
        float *de = a->de + r * a->c;
        bool ends = r % a->t == a->t - 1;
        const float *after = ends ? dx0 : dx0 + a->c;
        float share = ends ? 0.0f : a->lambda * a->sig[r + 1];
        EACH
        for (size_t i = 0; i < a->c; i++)
            de[i] = madd(share, after[i], dx0[i]);
        if (r % a->t)
            smear_gate_backward(a, r, parts);
    }
}

/* --- residual stream --------------------------------------------------------------------------------------------- */

static void mix_backward(const void *args, size_t span, size_t first, size_t last)
{
    const poe_mix_backward_args a = *(const poe_mix_backward_args *)args;
    double da = 0, db = 0;
    for (size_t at = first * a.c; at < last * a.c; at += a.c) {
        const float *dy = a.dy + at;
        float *dx0 = a.dx0 + at;
        if (a.x)
            da += (double)row_dot(dy, a.x + at, a.c);
        db += (double)row_dot(dy, a.x0 + at, a.c);
        EACH
        for (size_t i = 0; i < a.c; i++)
            dx0[i] = madd(a.b, dy[i], dx0[i]);
        if (!a.dx)
            continue;
        EACH
        for (size_t i = 0; i < a.c; i++)
            a.dx[at + i] = a.a * dy[i];
    }
    a.parts[2 * span] = da;
    a.parts[2 * span + 1] = db;
}

/* --- value embedding --------------------------------------------------------------------------------------------- */

static void value_embed(const void *args, size_t span, size_t first, size_t last)
{
    const poe_value_embed_args *a = args;
    size_t kv = a->n_kv_head * a->hs;
    (void)span;
    for (size_t r = first; r < last; r++)
        for (size_t h = 0; h < a->n_kv_head; h++) {
            const float *ve = a->ve + (size_t)a->idx[r] * kv + h * a->hs;
            float *v = a->v + r * kv + h * a->hs;
            float gate = 3.0f * sigmoid(row_dot(a->u + r * a->c, a->w + h * POE_GATE_CHANNELS, POE_GATE_CHANNELS));
            a->gate[r * a->n_kv_head + h] = gate;
            EACH
            for (size_t i = 0; i < a->hs; i++)
                v[i] = madd(gate, ve[i], v[i]);
        }
}

static void value_embed_backward(const void *args, size_t span, size_t first, size_t last)
{
    const poe_value_embed_backward_args *a = args;
    size_t kv = a->n_kv_head * a->hs;
    double *parts = a->parts + span * a->n_kv_head * POE_GATE_CHANNELS;
    memset(parts, 0, a->n_kv_head * POE_GATE_CHANNELS * sizeof(*parts));
    for (size_t r = first; r < last; r++)
        for (size_t h = 0; h < a->n_kv_head; h++) {
            const float *ve = a->ve + (size_t)a->idx[r] * kv + h * a->hs, *w = a->w + h * POE_GATE_CHANNELS;
            float gate = a->gate[r * a->n_kv_head + h];
            float dgate = row_dot(a->dv + r * kv + h * a->hs, ve, a->hs);
            float dlogit = dgate * gate * (1.0f - gate / 3.0f); /* gate = 3 s, ds/dlogit = s (1 - s) */
            for (size_t i = 0; i < POE_GATE_CHANNELS; i++) {
                parts[h * POE_GATE_CHANNELS + i] += (double)(dlogit * a->u[r * a->c + i]);
                a->du[r * a->c + i] = madd(dlogit, w[i], a->du[r * a->c + i]);
            }
        }
}

static void value_embed_scatter(const void *args, size_t span, size_t first, size_t last)
{
    const poe_value_embed_backward_args *a = args;
    size_t kv = a->n_kv_head * a->hs;
    (void)span;
    for (size_t r = 0; r < a->n; r++)
        for (size_t h = first; h < last; h++) {
            float *dve = a->dve + (size_t)a->idx[r] * kv + h * a->hs;
            const float *dv = a->dv + r * kv + h * a->hs;
            float gate = a->gate[r * a->n_kv_head + h];
            EACH
            for (size_t i = 0; i < a->hs; i++)
                dve[i] = madd(gate, dv[i], dve[i]);
        }
}

/* --- rotary ------------------------------------------------------------------------------------------------------ */

/* One head of one row; y may be x. */
static float rotary_head(float *y, const float *x, const float *cosine, const float *sine, size_t hs, float eps)
{
    size_t half = hs / 2;
    EACH
    for (size_t i = 0; i < half; i++) {
        float x1 = x[i], x2 = x[i + half];
        y[i] = madd(x1, cosine[i], x2 * sine[i]);
        y[i + half] = madd(x2, cosine[i], -(x1 * sine[i]));
    }
    float rinv = 1.0f / sqrtf(row_dot(y, y, hs) / (float)hs + eps);
    EACH
    for (size_t i = 0; i < hs; i++)
        y[i] *= head_scale * rinv;
    return rinv;
}

static void rotary(const void *args, size_t span, size_t first, size_t last)
{
    const poe_rotary_args *a = args;
    (void)span;
    for (size_t r = first; r < last; r++) {
        size_t angle = r % a->t * (a->hs / 2);
        for (size_t h = 0; h < a->heads; h++) {
            size_t at = (r * a->heads + h) * a->hs;
            a->rinv[r * a->heads + h] =
                rotary_head(a->y + at, a->x + at, a->cos + angle, a->sin + angle, a->hs, a->eps);
        }
    }
}

/* One head of one row; dx may be dy or y. With n = y / 1.2: dr = rinv * (1.2 dy - n * mean(1.2 dy * n)), turned back. */
static void rotary_head_backward(float *dx, const float *dy, const float *y, float rinv, const float *cosine,
                                 const float *sine, size_t hs)
{
    size_t half = hs / 2;
    float mean = row_dot(dy, y, hs) / ((float)hs * head_scale);
    EACH
    for (size_t i = 0; i < half; i++) {
        float r1 = rinv * madd(y[i], -mean, head_scale * dy[i]);
        float r2 = rinv * madd(y[i + half], -mean, head_scale * dy[i + half]);
        dx[i] = madd(r1, cosine[i], -(r2 * sine[i]));
        dx[i + half] = madd(r1, sine[i], r2 * cosine[i]);
    }
}

static void rotary_backward(const void *args, size_t span, size_t first, size_t last)
{
    const poe_rotary_backward_args *a = args;
    (void)span;
    for (size_t r = first; r < last; r++) {
        size_t angle = r % a->t * (a->hs / 2);
        for (size_t h = 0; h < a->heads; h++) {
            size_t at = (r * a->heads + h) * a->hs;
            rotary_head_backward(a->dx + at, a->dy + at, a->y + at, a->rinv[r * a->heads + h], a->cos + angle,
                                 a->sin + angle, a->hs);
        }
    }
}

/* --- attention --------------------------------------------------------------------------------------------------- */

/* The columns begin..end-1 of a block that row r sees. */
static void visible(const poe_score_block *block, size_t r, size_t *begin, size_t *end)
{
    size_t query = block->first_query + r;
    size_t oldest = query > block->window ? query - block->window : 0;
    *begin = oldest > block->first_key ? oldest - block->first_key : 0;
    *end = query + 1 - block->first_key;
}

static void clear_outside(float *row, size_t begin, size_t end, size_t n)
{
    memset(row, 0, begin * sizeof(*row));
    memset(row + end, 0, (n - end) * sizeof(*row));
}

/* The sum of e = exp(x - shift) over n, with x <- e where `keep`. */
static inline float exp_sum(float *x, float shift, bool keep, size_t n)
{
    float lane[LANES] = {0};
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (size_t l = 0; l < LANES; l++) {
            float e = exponential(x[i + l] - shift);
            lane[l] += e;
            if (keep)
                x[i + l] = e;
        }
    for (size_t l = 0; i + l < n; l++) {
        float e = exponential(x[i + l] - shift);
        lane[l] += e;
        if (keep)
            x[i + l] = e;
    }
    return lanes_sum(lane);
}

static void softmax(float *s, float *inverse, float *lse, const poe_score_block *block)
{
    for (size_t r = 0; r < block->rows; r++, s += block->ld) {
        size_t begin, end;
        visible(block, r, &begin, &end);
        float largest = row_max(s + begin, end - begin);
        float total = exp_sum(s + begin, largest, true, end - begin);
        clear_outside(s, begin, end, block->cols);
        inverse[r] = 1.0f / total;
        lse[r] = largest + (float)log((double)total);
    }
}

static void scale_rows(float *y, size_t ld, const float *inverse, size_t rows, size_t hs)
{
    for (size_t r = 0; r < rows; r++, y += ld)
        EACH
    for (size_t i = 0; i < hs; i++)
        y[i] *= inverse[r];
}

static void softmax_backward(float *s, float *dp, const float *lse, const float *delta, const poe_score_block *block)
{
    for (size_t r = 0; r < block->rows; r++, s += block->ld, dp += block->ld) {
        size_t begin, end;
        visible(block, r, &begin, &end);
        float row_lse = lse[r], row_delta = delta[r];
        EACH
        for (size_t i = begin; i < end; i++) {
            float p = exponential(s[i] - row_lse);
            s[i] = p;
            dp[i] = p * (dp[i] - row_delta);
        }
        clear_outside(s, begin, end, block->cols);
        clear_outside(dp, begin, end, block->cols);
    }
}

static void row_dots(float *out, const float *a, size_t lda, const float *b, size_t ldb, size_t rows, size_t n)
{
    for (size_t r = 0; r < rows; r++)
        out[r] = row_dot(a + r * lda, b + r * ldb, n);
}

/* --- head -------------------------------------------------------------------------------------------------------- */

static void capped_exp(float *z, float *sums, const poe_logit_tile *tile)
{
    for (size_t r = 0; r < tile->rows; r++, z += tile->ld) {
        cap_row(z, tile->cols);
        sums[r] = exp_sum(z, 0.0f, false, tile->cols); /* no maximum: within the cap nothing overflows */
    }
}

static void capped_exp_backward(float *z, const float *inverse, const float *factor, const int32_t *targets,
                                const poe_logit_tile *tile)
{
    for (size_t r = 0; r < tile->rows; r++, z += tile->ld) {
        /* A negative target becomes a huge column, outside every tile. */
        size_t target = (size_t)(int64_t)targets[r] - tile->first_token;
        float at_target = target < tile->cols ? z[target] : 0.0f;
        float share = inverse[r], f = factor[r];
        EACH
        for (size_t i = 0; i < tile->cols; i++) {
            float slope = madd(z[i] * (1.0f / cap), -(z[i] * (1.0f / cap)), 1.0f);
            z[i] = f * (exponential(z[i]) * share) * slope;
        }
        if (target < tile->cols)
            z[target] -= f * madd(at_target * (1.0f / cap), -(at_target * (1.0f / cap)), 1.0f);
    }
}

/* --- optimiser --------------------------------------------------------------------------------------------------- */

/* Moments of tensors that get no gradient fade away; below this they are zero, for denormal numbers are slow. */
static float flush(float x)
{
    return fabsf(x) < 1e-36f ? 0.0f : x;
}

static void adamw(const void *args, size_t span, size_t first, size_t last)
{
    const poe_adamw_args a = *(const poe_adamw_args *)args;
    (void)span;
    EACH
    for (size_t i = first; i < last; i++) {
        float g = a.g[i];
        float m = flush(madd(a.toward_g, g - a.m[i], a.m[i]));
        float v = flush(madd(a.toward_g2, madd(g, g, -a.v[i]), a.v[i]));
        float w = a.w[i] * a.keep;
        a.m[i] = m;
        a.v[i] = v;
        a.w[i] = madd(-a.rate, m / (sqrtf(v * a.v_correction) + a.eps), w);
    }
}

static void momentum(const void *args, size_t span, size_t first, size_t last)
{
    const poe_momentum_args a = *(const poe_momentum_args *)args;
    float toward_g = 1.0f - a.momentum;
    EACH
    for (size_t i = first; i < last; i++) {
        float g = a.g[i];
        float m = flush(madd(toward_g, g - a.m[i], a.m[i]));
        a.m[i] = m;
        a.x[i] = madd(a.momentum, m - g, g);
    }
    a.parts[span] = (double)row_dot(a.x + first, a.x + first, last - first);
}

static void square_rows(const void *args, size_t span, size_t first, size_t last)
{
    const poe_square_args *a = args;
    (void)span;
    for (size_t r = first; r < last; r++)
        a->mean[r] = row_dot(a->x + r * a->cols, a->x + r * a->cols, a->cols) / (float)a->cols;
}

static void square_columns(const void *args, size_t span, size_t first, size_t last)
{
    const poe_square_args a = *(const poe_square_args *)args;
    (void)span;
    for (size_t i = first; i < last; i++)
        a.mean[i] = 0.0f;
    for (size_t r = 0; r < a.rows; r++)
        EACH
    for (size_t i = first; i < last; i++)
        a.mean[i] = madd(a.x[r * a.cols + i], a.x[r * a.cols + i], a.mean[i]);
    for (size_t i = first; i < last; i++)
        a.mean[i] /= (float)a.rows;
}

static float muon_updated(const poe_muon_update_args *a, float w, float x)
{
    float kept = x * w >= 0.0f ? w : 0.0f;
    return madd(-a->decay, kept, madd(-a->lr, x, w));
}

static void muon_update(const void *args, size_t span, size_t first, size_t last)
{
    const poe_muon_update_args a = *(const poe_muon_update_args *)args;
    (void)span;
    for (size_t r = first; r < last; r++) {
        float *w = a.w + r * a.cols;
        const float *x = a.x + r * a.cols;
        float row_scale = a.by_row ? a.scale[r] : 0.0f;
        if (a.by_row)
            EACH
        for (size_t i = 0; i < a.cols; i++)
            w[i] = muon_updated(&a, w[i], x[i] * row_scale);
        else EACH
        for (size_t i = 0; i < a.cols; i++)
            w[i] = muon_updated(&a, w[i], x[i] * a.scale[i]);
    }
}

const poe_vector POE_VECTOR_TABLE = {
    .fill = fill,
    .add = add,
    .sum = sum,
    .mix = mix,
    .relu2 = relu2,
    .relu2_backward = relu2_backward,
    .scale = scale,
    .softcap = softcap,
    .finite = all_finite,
    .norm = norm,
    .norm_backward = norm_backward,
    .embed_mean = embed_mean,
    .embed_scatter = embed_scatter,
    .smear = smear,
    .smear_backward = smear_backward,
    .mix_backward = mix_backward,
    .value_embed = value_embed,
    .value_embed_backward = value_embed_backward,
    .value_embed_scatter = value_embed_scatter,
    .rotary = rotary,
    .rotary_backward = rotary_backward,
    .adamw = adamw,
    .momentum = momentum,
    .square_rows = square_rows,
    .square_columns = square_columns,
    .muon_update = muon_update,
    .softmax = softmax,
    .scale_rows = scale_rows,
    .softmax_backward = softmax_backward,
    .row_dots = row_dots,
    .capped_exp = capped_exp,
    .capped_exp_backward = capped_exp_backward,
};
