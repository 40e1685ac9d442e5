/* SPDX-License-Identifier: MIT
 * Attention over blocks of query rows. The scores of a block exist only for the keys that some row of it sees: from
 * the window of its first row to its last row. Forward tasks are blocks; backward tasks are (row of the batch, key
 * head), so that one task alone adds to a key head's gradients, in the order of query heads and blocks. */
#include <math.h>
#include <string.h>

#include "stages/cpu/internal.h"

enum { BLOCK_ROWS = 64 };

typedef struct attention {
    poe_cpu *cpu;
    const poe_attention_shape *shape;
    const poe_vector *vector;
    float *y, *lse, *dq, *dk, *dv; /* forward has the first two, backward the others */
    const float *q, *k, *v, *saved_y, *saved_lse, *dy;
    size_t ld, kv_ld;      /* floats from position to position of q, y and of k, v */
    size_t blocks;         /* of query rows */
    float *scratch;        /* of all threads */
    size_t thread_scratch; /* floats each */
} attention;

static attention attention_init(poe_cpu *cpu, const poe_attention_shape *shape)
{
    return (attention){.cpu = cpu,
                       .shape = shape,
                       .vector = cpu->vector,
                       .ld = shape->n_head * shape->head_size,
                       .kv_ld = shape->n_kv_head * shape->head_size,
                       .blocks = poe_parts(shape->t, BLOCK_ROWS)};
}

static void take_scratch(attention *a, poe_cpu *cpu, size_t matrices)
{
    a->thread_scratch = BLOCK_ROWS * (matrices * poe_padded(a->shape->t) + 16);
    poe_cpu_scratch_reset(cpu);
    a->scratch = poe_cpu_scratch_floats(cpu, (size_t)poe_team_size(cpu->team) * a->thread_scratch);
}

size_t poe_cpu_attention_scratch(const poe_backend_limits *limits, int n_threads)
{
    size_t matrices = limits->training ? 2 : 1;
    return (size_t)n_threads * BLOCK_ROWS * (matrices * poe_padded(limits->t) + 16) * sizeof(float);
}

static poe_score_block score_block(const poe_attention_shape *shape, size_t index)
{
    size_t first = index * BLOCK_ROWS, rows = poe_smaller(BLOCK_ROWS, shape->t - first);
    size_t first_key = first > shape->window ? first - shape->window : 0;
    return (poe_score_block){.rows = rows,
                             .cols = first + rows - first_key,
                             .ld = poe_padded(shape->t),
                             .first_query = first,
                             .first_key = first_key,
                             .window = shape->window};
}

/* s (rows, cols) = scale * x y^T: x (rows, hs) at query positions, y (cols, hs) at key positions. */
static void scores(const attention *a, int thread, float *s, float scale, const float *x, const float *y,
                   const poe_score_block *block)
{
    poe_product p = {false,    true, block->rows, block->cols, a->shape->head_size, scale, x, a->ld, y,
                     a->kv_ld, 0.0f, s,           block->ld};
    poe_product_tile(a->cpu, thread, &p, 0, p.m, 0, p.n);
}

/* out (rows, hs) = scale * s x, x (cols, hs) at key positions. */
static void gather(const attention *a, int thread, float *out, float scale, const float *s, const float *x,
                   const poe_score_block *block)
{
    poe_product p = {false, false, block->rows, a->shape->head_size, block->cols, scale, s, block->ld, x, a->kv_ld,
                     0.0f,  out,   a->ld};
    poe_product_tile(a->cpu, thread, &p, 0, p.m, 0, p.n);
}

/* out (cols, hs) at key positions += scale * s^T x, x (rows, hs) at query positions. */
static void scatter(const attention *a, int thread, float *out, float scale, const float *s, const float *x,
                    const poe_score_block *block)
{
    poe_product p = {true, false, block->cols, a->shape->head_size, block->rows, scale, s, block->ld, x, a->ld,
                     1.0f, out,   a->kv_ld};
    poe_product_tile(a->cpu, thread, &p, 0, p.m, 0, p.n);
}

static float score_scale(const poe_attention_shape *shape)
{
    return 1.0f / sqrtf((float)shape->head_size);
}

static void forward_task(void *arg, size_t task, int thread)
{
    const attention *a = arg;
    const poe_attention_shape *shape = a->shape;
    size_t head = task % (shape->b * shape->n_head); /* the longest blocks of all heads come first */
    poe_score_block block = score_block(shape, a->blocks - 1 - task / (shape->b * shape->n_head));
    size_t b = head / shape->n_head, h = head % shape->n_head;
    size_t kv_head = h / (shape->n_head / shape->n_kv_head);
    size_t query = (b * shape->t + block.first_query) * a->ld + h * shape->head_size;
    size_t key = (b * shape->t + block.first_key) * a->kv_ld + kv_head * shape->head_size;
    float *inverse = a->scratch + (size_t)thread * a->thread_scratch, *s = inverse + BLOCK_ROWS;

    scores(a, thread, s, score_scale(shape), a->q + query, a->k + key, &block);
    a->vector->softmax(s, inverse, a->lse + head * shape->t + block.first_query, &block);
    gather(a, thread, a->y + query, 1.0f, s, a->v + key, &block);
    a->vector->scale_rows(a->y + query, a->ld, inverse, block.rows, shape->head_size);
}

static void attention_forward(poe_backend *be, float *y, float *lse, const float *q, const float *k, const float *v,
                              const poe_attention_shape *shape)
{
    poe_cpu *cpu = poe_cpu_of(be);
    attention a = attention_init(cpu, shape);
    a.y = y, a.lse = lse, a.q = q, a.k = k, a.v = v;
    take_scratch(&a, cpu, 1);
    poe_team_run(cpu->team, shape->b * shape->n_head * a.blocks, forward_task, &a);
}

/* One block of query head h: ds = p * (dp - delta), dp = dy v^T, delta = dy . y. */
static void backward_block(const attention *a, size_t b, size_t h, size_t index, int thread)
{
    const poe_attention_shape *shape = a->shape;
    poe_score_block block = score_block(shape, index);
    size_t kv_head = h / (shape->n_head / shape->n_kv_head);
    size_t query = (b * shape->t + block.first_query) * a->ld + h * shape->head_size;
    size_t key = (b * shape->t + block.first_key) * a->kv_ld + kv_head * shape->head_size;
    const float *lse = a->saved_lse + (b * shape->n_head + h) * shape->t + block.first_query;
    float *delta = a->scratch + (size_t)thread * a->thread_scratch, *p = delta + BLOCK_ROWS;
    float *ds = p + BLOCK_ROWS * block.ld;
    float scale = score_scale(shape);

    a->vector->row_dots(delta, a->dy + query, a->ld, a->saved_y + query, a->ld, block.rows, shape->head_size);
    scores(a, thread, p, scale, a->q + query, a->k + key, &block);
    scores(a, thread, ds, 1.0f, a->dy + query, a->v + key, &block);
    a->vector->softmax_backward(p, ds, lse, delta, &block);
    gather(a, thread, a->dq + query, scale, ds, a->k + key, &block);
    scatter(a, thread, a->dk + key, scale, ds, a->q + query, &block);
    scatter(a, thread, a->dv + key, 1.0f, p, a->dy + query, &block);
}

static void backward_task(void *arg, size_t task, int thread)
{
    const attention *a = arg;
    const poe_attention_shape *shape = a->shape;
    size_t b = task / shape->n_kv_head, kv_head = task % shape->n_kv_head;
    size_t group = shape->n_head / shape->n_kv_head;
    for (size_t t = 0; t < shape->t; t++) {
        size_t at = (b * shape->t + t) * a->kv_ld + kv_head * shape->head_size;
        memset(a->dk + at, 0, shape->head_size * sizeof(float));
        memset(a->dv + at, 0, shape->head_size * sizeof(float));
    }
    for (size_t h = kv_head * group; h < (kv_head + 1) * group; h++)
        for (size_t index = 0; index < a->blocks; index++)
            backward_block(a, b, h, index, thread);
}

static void attention_backward(poe_backend *be, float *dq, float *dk, float *dv, const float *dy, const float *y,
                               const float *lse, const float *q, const float *k, const float *v,
                               const poe_attention_shape *shape)
{
    poe_cpu *cpu = poe_cpu_of(be);
    attention a = attention_init(cpu, shape);
    a.dq = dq, a.dk = dk, a.dv = dv;
    a.dy = dy, a.saved_y = y, a.saved_lse = lse, a.q = q, a.k = k, a.v = v;
    take_scratch(&a, cpu, 2);
    poe_team_run(cpu->team, shape->b * shape->n_kv_head, backward_task, &a);
}

void poe_cpu_attention_ops(poe_ops *ops)
{
    ops->attention_forward = attention_forward;
    ops->attention_backward = attention_backward;
}
