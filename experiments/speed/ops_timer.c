/* SPDX-License-Identifier: MIT
 * The table replaces the backend's own, so that operations get the backend that they know; from its `ops` they find
 * the way back to the timer. */
#include "experiments/speed/ops_timer.h"

#include <stdlib.h>
#include <time.h>

#include "src/clock.h"

enum {
#define OPERATION(name, ...) ROW_##name,
#include "experiments/speed/ops_timer_rows.h"
#undef OPERATION
    ROW_COUNT
};

struct poe_ops_timer {
    poe_ops ops; /* first: the backend's pointer to it is the pointer to the timer */
    const poe_ops *inner;
    poe_backend *backend;
    poe_ops_timer_row rows[ROW_COUNT];
};

static double cpu_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Pairs of positions that see each other, times head size. */
static size_t visible(const poe_attention_shape *shape)
{
    size_t pairs = 0;
    for (size_t t = 0; t < shape->t; t++)
        pairs += (t < shape->window ? t : shape->window) + 1;
    return shape->b * shape->n_head * pairs * shape->head_size;
}

/* `queries` tensors shaped as q, `keys` shaped as k. */
static size_t attention_floats(const poe_attention_shape *shape, size_t queries, size_t keys)
{
    return shape->b * shape->t * shape->head_size * (queries * shape->n_head + keys * shape->n_kv_head);
}

/* What five steps need, s being the smaller side: of a square matrix its Gram matrix, a polynomial of that, and their
 * product; of others the Gram matrix and the product twice, the rest on (s, s). Symmetric products count half. */
static size_t muon_flops(size_t rows, size_t cols)
{
    size_t s = rows < cols ? rows : cols, longer = rows < cols ? cols : rows;
    return rows == cols ? 20 * s * s * s : 6 * s * s * longer + 14 * s * s * s;
}

#define OPERATION(name, group, flops_, floats, parameters, ...)                                                        \
    static void name parameters                                                                                        \
    {                                                                                                                  \
        poe_ops_timer *timer = (poe_ops_timer *)(uintptr_t)be->ops;                                                    \
        poe_ops_timer_row *row = &timer->rows[ROW_##name];                                                             \
        double start = poe_now(), cpu_start = cpu_now();                                                               \
        timer->inner->name(be, __VA_ARGS__);                                                                           \
        row->cpu_seconds += cpu_now() - cpu_start;                                                                     \
        row->seconds += poe_now() - start;                                                                             \
        row->calls++;                                                                                                  \
        row->flops += (double)(flops_);                                                                                \
        row->bytes += 4.0 * (double)(floats);                                                                          \
    }
#include "experiments/speed/ops_timer_rows.h"
#undef OPERATION

poe_ops_timer *poe_ops_timer_attach(poe_backend *backend)
{
    poe_ops_timer *timer = calloc(1, sizeof(*timer));
    if (!timer)
        return NULL;
    timer->backend = backend;
    timer->inner = backend->ops;
    timer->ops = *backend->ops;
#define OPERATION(name, ...) timer->ops.name = name;
#include "experiments/speed/ops_timer_rows.h"
#undef OPERATION
    poe_ops_timer_reset(timer);
    backend->ops = &timer->ops;
    return timer;
}

void poe_ops_timer_detach(poe_ops_timer *timer)
{
    if (!timer)
        return;
    timer->backend->ops = timer->inner;
    free(timer);
}

void poe_ops_timer_reset(poe_ops_timer *timer)
{
#define OPERATION(name_, group_, ...) timer->rows[ROW_##name_] = (poe_ops_timer_row){.name = #name_, .group = group_};
#include "experiments/speed/ops_timer_rows.h"
#undef OPERATION
}

const poe_ops_timer_row *poe_ops_timer_rows(const poe_ops_timer *timer, size_t *count)
{
    *count = ROW_COUNT;
    return timer->rows;
}
