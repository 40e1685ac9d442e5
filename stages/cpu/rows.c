/* SPDX-License-Identifier: MIT
 * The operations that go by rows or floats: memory, embedding, residual stream, value embedding, rotary, mlp. Here
 * they are cut into spans; what happens to a span is in vector.c. */
#include <string.h>

#include "stages/cpu/internal.h"

/* --- floats ------------------------------------------------------------------------------------------------------ */

static void flat(poe_cpu *cpu, poe_span_kernel *kernel, const poe_flat_args *args, size_t n)
{
    poe_cpu_spans(cpu, kernel, args, n, POE_SPAN_FLOATS);
}

static void fill(poe_backend *be, float *x, float value, size_t n)
{
    poe_cpu *cpu = poe_cpu_of(be);
    flat(cpu, cpu->vector->fill, &(poe_flat_args){.y = x, .value = value}, n);
}

static void copy_span(const void *args, size_t span, size_t first, size_t last)
{
    const poe_flat_args *a = args;
    (void)span;
    memcpy(a->y + first, a->a + first, (last - first) * sizeof(float));
}

static void copy(poe_backend *be, float *y, const float *x, size_t n)
{
    flat(poe_cpu_of(be), copy_span, &(poe_flat_args){.y = y, .a = x}, n);
}

static void add(poe_backend *be, float *y, const float *x, size_t n)
{
    poe_cpu *cpu = poe_cpu_of(be);
    flat(cpu, cpu->vector->add, &(poe_flat_args){.y = y, .a = x}, n);
}

static void sum(poe_backend *be, float *y, const float *a, const float *b, size_t n)
{
    poe_cpu *cpu = poe_cpu_of(be);
    flat(cpu, cpu->vector->sum, &(poe_flat_args){.y = y, .a = a, .b = b}, n);
}

static bool all_finite(poe_backend *be, const float *x, size_t n)
{
    enum { SPANS = 256 };
    bool bad[SPANS] = {false};
    poe_cpu *cpu = poe_cpu_of(be);
    poe_cpu_spans(cpu, cpu->vector->finite, &(poe_finite_args){x, bad}, n,
                  poe_larger(POE_SPAN_FLOATS, poe_parts(n, SPANS)));
    for (size_t i = 0; i < SPANS; i++)
        if (bad[i])
            return false;
    return true;
}

static void relu2_forward(poe_backend *be, float *a, const float *f, size_t n)
{
    poe_cpu *cpu = poe_cpu_of(be);
    flat(cpu, cpu->vector->relu2, &(poe_flat_args){.y = a, .a = f}, n);
}

static void relu2_backward(poe_backend *be, float *df, const float *da, const float *f, size_t n)
{
    poe_cpu *cpu = poe_cpu_of(be);
    flat(cpu, cpu->vector->relu2_backward, &(poe_flat_args){.y = df, .a = da, .b = f}, n);
}

static void mix_forward(poe_backend *be, float *y, const float *x, const float *x0, const float *a, const float *b,
                        size_t n, size_t c)
{
    poe_cpu *cpu = poe_cpu_of(be);
    flat(cpu, cpu->vector->mix, &(poe_flat_args){.y = y, .a = x, .b = x0, .alpha = *a, .beta = *b}, n * c);
}

static void backout_forward(poe_backend *be, float *h, const float *x, const float *mid, const float *lambda, size_t n,
                            size_t c)
{
    poe_cpu *cpu = poe_cpu_of(be);
    flat(cpu, cpu->vector->mix, &(poe_flat_args){.y = h, .a = x, .b = mid, .alpha = 1.0f, .beta = -*lambda}, n * c);
}

/* --- rows -------------------------------------------------------------------------------------------------------- */

static void rows(poe_cpu *cpu, poe_span_kernel *kernel, const void *args, size_t n)
{
    poe_cpu_spans(cpu, kernel, args, n, POE_SPAN_ROWS);
}

/* Room for `width` partial sums per span of n rows. */
static double *take_parts(poe_cpu *cpu, size_t n, size_t width)
{
    poe_cpu_scratch_reset(cpu);
    return poe_arena_take(&cpu->scratch, poe_parts(n, POE_SPAN_ROWS) * width * sizeof(double));
}

/* The sum of part `which` of `width` over the spans of n rows, in their order. */
static float total(const double *parts, size_t n, size_t width, size_t which)
{
    double sum_of_spans = 0;
    for (size_t span = 0; span < poe_parts(n, POE_SPAN_ROWS); span++)
        sum_of_spans += parts[span * width + which];
    return (float)sum_of_spans;
}

static void norm_forward(poe_backend *be, float *u, float *rinv, const float *x, size_t n, size_t c, float eps)
{
    poe_cpu *cpu = poe_cpu_of(be);
    rows(cpu, cpu->vector->norm, &(poe_norm_args){u, rinv, x, NULL, c, eps}, n);
}

static void norm_backward(poe_backend *be, float *dx, const float *du, const float *u, const float *rinv, size_t n,
                          size_t c)
{
    poe_cpu *cpu = poe_cpu_of(be);
    rows(cpu, cpu->vector->norm_backward, &(poe_norm_backward_args){dx, du, u, rinv, c}, n);
}

static void embed_forward(poe_backend *be, float *e, float *rinv, const int32_t *idx, const float *wte, size_t n,
                          size_t c, float eps)
{
    poe_cpu *cpu = poe_cpu_of(be);
    rows(cpu, cpu->vector->norm, &(poe_norm_args){e, rinv, wte, idx, c, eps}, n);
}

/* Rows that share a token meet in one place, so the second pass goes by columns. */
static void embed_backward(poe_backend *be, float *dwte, const float *de, const float *e, const float *rinv,
                           const int32_t *idx, size_t n, size_t c)
{
    poe_cpu *cpu = poe_cpu_of(be);
    poe_cpu_scratch_reset(cpu);
    poe_embed_backward_args args = {dwte, poe_cpu_scratch_floats(cpu, n), de, e, rinv, idx, n, c};
    rows(cpu, cpu->vector->embed_mean, &args, n);
    poe_cpu_spans(cpu, cpu->vector->embed_scatter, &args, c, POE_SPAN_COLUMNS);
}

static void smear_forward(poe_backend *be, float *x0, float *sig, const float *e, const float *gate,
                          const float *lambda, size_t b, size_t t, size_t c)
{
    poe_cpu *cpu = poe_cpu_of(be);
    rows(cpu, cpu->vector->smear, &(poe_smear_args){x0, sig, e, gate, *lambda, t, c}, b * t);
}

static void smear_backward(poe_backend *be, float *de, float *dgate, float *dlambda, const float *dx0, const float *e,
                           const float *sig, const float *gate, const float *lambda, size_t b, size_t t, size_t c)
{
    enum { WIDTH = POE_SMEAR_CHANNELS + 1 };
    poe_cpu *cpu = poe_cpu_of(be);
    double *parts = take_parts(cpu, b * t, WIDTH);
    poe_smear_backward_args args = {de, parts, dx0, e, sig, gate, *lambda, t, c};
    rows(cpu, cpu->vector->smear_backward, &args, b * t);
    for (size_t i = 0; i < POE_SMEAR_CHANNELS; i++)
        dgate[i] += total(parts, b * t, WIDTH, i);
    *dlambda += total(parts, b * t, WIDTH, POE_SMEAR_CHANNELS);
}

static void mix_backward(poe_backend *be, float *dx, float *dx0, float *da, float *db, const float *dy, const float *x,
                         const float *x0, const float *a, const float *b, size_t n, size_t c)
{
    poe_cpu *cpu = poe_cpu_of(be);
    double *parts = take_parts(cpu, n, 2);
    rows(cpu, cpu->vector->mix_backward, &(poe_mix_backward_args){dx, dx0, parts, dy, x, x0, *a, *b, c}, n);
    *da += total(parts, n, 2, 0);
    *db += total(parts, n, 2, 1);
}

static void backout_backward(poe_backend *be, float *dmid, float *dlambda, const float *dh, const float *mid,
                             const float *lambda, size_t n, size_t c)
{
    poe_cpu *cpu = poe_cpu_of(be);
    double *parts = take_parts(cpu, n, 2);
    poe_mix_backward_args args = {.dx0 = dmid, .parts = parts, .dy = dh, .x0 = mid, .b = -*lambda, .c = c};
    rows(cpu, cpu->vector->mix_backward, &args, n);
    *dlambda -= total(parts, n, 2, 1);
}

static void value_embed_forward(poe_backend *be, float *v, float *gate, const float *u, const int32_t *idx,
                                const float *w, const float *ve, size_t n, size_t c, size_t n_kv_head, size_t hs)
{
    poe_cpu *cpu = poe_cpu_of(be);
    rows(cpu, cpu->vector->value_embed, &(poe_value_embed_args){v, gate, u, idx, w, ve, c, n_kv_head, hs}, n);
}

static void value_embed_backward(poe_backend *be, float *du, float *dw, float *dve, const float *dv, const float *gate,
                                 const float *u, const int32_t *idx, const float *w, const float *ve, size_t n,
                                 size_t c, size_t n_kv_head, size_t hs)
{
    size_t width = n_kv_head * POE_GATE_CHANNELS;
    poe_cpu *cpu = poe_cpu_of(be);
    double *parts = take_parts(cpu, n, width);
    poe_value_embed_backward_args args = {du, dve, parts, dv, gate, u, idx, w, ve, n, c, n_kv_head, hs};
    rows(cpu, cpu->vector->value_embed_backward, &args, n);
    poe_cpu_spans(cpu, cpu->vector->value_embed_scatter, &args, n_kv_head, 1);
    for (size_t i = 0; i < width; i++)
        dw[i] += total(parts, n, width, i);
}

static void rotary_forward(poe_backend *be, float *y, float *rinv, const float *x, const float *cos, const float *sin,
                           size_t b, size_t t, size_t heads, size_t hs, float eps)
{
    poe_cpu *cpu = poe_cpu_of(be);
    rows(cpu, cpu->vector->rotary, &(poe_rotary_args){y, rinv, x, cos, sin, t, heads, hs, eps}, b * t);
}

static void rotary_backward(poe_backend *be, float *dx, const float *dy, const float *y, const float *rinv,
                            const float *cos, const float *sin, size_t b, size_t t, size_t heads, size_t hs)
{
    poe_cpu *cpu = poe_cpu_of(be);
    rows(cpu, cpu->vector->rotary_backward, &(poe_rotary_backward_args){dx, dy, y, rinv, cos, sin, t, heads, hs},
         b * t);
}

size_t poe_cpu_rows_scratch(const poe_backend_limits *limits)
{
    size_t width = poe_larger(POE_SMEAR_CHANNELS + 1, limits->n_kv_head * POE_GATE_CHANNELS);
    size_t parts = poe_parts(limits->rows, POE_SPAN_ROWS) * width * sizeof(double);
    return poe_arena_round(poe_larger(parts, limits->rows * sizeof(float)));
}

void poe_cpu_rows_ops(poe_ops *ops)
{
    ops->fill = fill;
    ops->copy = copy;
    ops->add = add;
    ops->sum = sum;
    ops->finite = all_finite;
    ops->embed_forward = embed_forward;
    ops->embed_backward = embed_backward;
    ops->smear_forward = smear_forward;
    ops->smear_backward = smear_backward;
    ops->mix_forward = mix_forward;
    ops->mix_backward = mix_backward;
    ops->norm_forward = norm_forward;
    ops->norm_backward = norm_backward;
    ops->backout_forward = backout_forward;
    ops->backout_backward = backout_backward;
    ops->value_embed_forward = value_embed_forward;
    ops->value_embed_backward = value_embed_backward;
    ops->rotary_forward = rotary_forward;
    ops->rotary_backward = rotary_backward;
    ops->relu2_forward = relu2_forward;
    ops->relu2_backward = relu2_backward;
}
