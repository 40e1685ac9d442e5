/* SPDX-License-Identifier: MIT
 * Head, softcap, softmax, cross-entropy and their gradients, by chunks of rows: three products, the logits of a chunk
 * computed once, and each tile of them worked on while it is in the cache. */
#include <math.h>

#include "stages/cpu/internal.h"

enum {
    CHUNK_ROWS = 256,   /* more would not fit the cache, fewer would read w and dw too often */
    TILE_COLUMNS = 512, /* of the vocabulary */
};

typedef struct head {
    poe_cpu *cpu;
    const poe_vector *vector;
    float *du, *dw; // NULL: the loss only
    const float *u, *w;
    const int32_t *targets;
    size_t c, v;
    size_t columns, tiles; /* how the vocabulary is cut */

    /* Of the chunk. */
    size_t first, rows, ld;
    float *z;                /* (rows, ld): logits, then their gradients */
    float *sums;             /* (tiles, CHUNK_ROWS): sums of exp(z) */
    float *inverse, *factor; /* (rows): 1 / sum of all exp(z); weight of the row's gradient */
} head;

size_t poe_cpu_head_scratch(const poe_backend_limits *limits)
{
    size_t v = limits->vocab_padded, tiles = poe_parts(v, TILE_COLUMNS);
    return (CHUNK_ROWS * poe_padded(v) + (tiles + 2) * CHUNK_ROWS) * sizeof(float);
}

static poe_logit_tile logit_tile(const head *a, size_t tile)
{
    size_t first = tile * a->columns;
    return (poe_logit_tile){a->rows, poe_smaller(a->columns, a->v - first), a->ld, first};
}

static void logits_task(void *arg, size_t task, int thread)
{
    const head *a = arg;
    poe_logit_tile tile = logit_tile(a, task);
    poe_product p = {false, true, a->rows, a->v, a->c, 1.0f, a->u + a->first * a->c,
                     a->c,  a->w, a->c,    0.0f, a->z, a->ld};
    poe_product_tile(a->cpu, thread, &p, 0, tile.rows, tile.first_token, tile.cols);
    a->vector->capped_exp(a->z + tile.first_token, a->sums + task * CHUNK_ROWS, &tile);
}

/* The chunk's loss (a sum); leaves in inverse and factor what the gradients need. */
static double chunk_loss(const head *a, float weight)
{
    double loss = 0;
    for (size_t r = 0; r < a->rows; r++) {
        int32_t target = a->targets[a->first + r];
        double sum = 0;
        for (size_t tile = 0; tile < a->tiles; tile++)
            sum += (double)a->sums[tile * CHUNK_ROWS + r];
        a->inverse[r] = (float)(1.0 / sum);
        a->factor[r] = target < 0 ? 0.0f : weight;
        if (target >= 0)
            loss += log(sum) - (double)a->z[r * a->ld + (size_t)target];
    }
    return loss;
}

static void gradient_task(void *arg, size_t task, int thread)
{
    const head *a = arg;
    poe_logit_tile tile = logit_tile(a, task);
    a->vector->capped_exp_backward(a->z + tile.first_token, a->inverse, a->factor, a->targets + a->first, &tile);
    poe_product p = {true, false, a->v,  a->c, a->rows, 1.0f, a->z, a->ld, a->u + a->first * a->c,
                     a->c, 1.0f,  a->dw, a->c};
    poe_product_tile(a->cpu, thread, &p, tile.first_token, tile.cols, 0, a->c);
}

static size_t count_targets(const int32_t *targets, size_t n)
{
    size_t count = 0;
    for (size_t i = 0; i < n; i++)
        count += targets[i] >= 0;
    return count;
}

static void head_loss(poe_backend *be, double *loss, float *du, float *dw, const float *u, const float *w,
                      const int32_t *targets, float scale, size_t n, size_t c, size_t v, size_t vp)
{
    (void)vp; /* the rows beyond v take no part */
    poe_cpu *cpu = poe_cpu_of(be);
    size_t count = poe_larger(count_targets(targets, n), 1), columns = poe_tile_side(v, TILE_COLUMNS);
    head a = {.cpu = cpu,
              .vector = cpu->vector,
              .du = du,
              .dw = dw,
              .u = u,
              .w = w,
              .targets = targets,
              .c = c,
              .v = v,
              .columns = columns,
              .tiles = poe_parts(v, columns),
              .ld = poe_padded(v)};
    poe_cpu_scratch_reset(cpu);
    a.z = poe_cpu_scratch_floats(cpu, CHUNK_ROWS * a.ld);
    a.sums = poe_cpu_scratch_floats(cpu, a.tiles * CHUNK_ROWS);
    a.inverse = poe_cpu_scratch_floats(cpu, CHUNK_ROWS);
    a.factor = poe_cpu_scratch_floats(cpu, CHUNK_ROWS);
    double sum = 0;
    for (; a.first < n; a.first += CHUNK_ROWS) {
        a.rows = poe_smaller(CHUNK_ROWS, n - a.first);
        poe_team_run(cpu->team, a.tiles, logits_task, &a);
        sum += chunk_loss(&a, scale / (float)count);
        if (!du)
            continue;
        poe_team_run(cpu->team, a.tiles, gradient_task, &a);
        poe_product p = {false, false, a.rows, c, v, 1.0f, a.z, a.ld, w, c, 0.0f, du + a.first * c, c};
        poe_cpu_product(cpu, &p);
    }
    *loss = sum / (double)count;
}

static void head_logits(poe_backend *be, float *z, const float *u, const float *w, size_t n, size_t c, size_t v)
{
    poe_cpu *cpu = poe_cpu_of(be);
    poe_product p = {false, true, n, v, c, 1.0f, u, c, w, c, 0.0f, z, v};
    poe_cpu_product(cpu, &p);
    poe_cpu_spans(cpu, cpu->vector->softcap, &(poe_flat_args){.y = z}, n * v, POE_SPAN_FLOATS);
}

void poe_cpu_head_ops(poe_ops *ops)
{
    ops->head_loss = head_loss;
    ops->head_logits = head_logits;
}
