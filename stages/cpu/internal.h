/* SPDX-License-Identifier: MIT
 * What the files of the CPU backend share. Scratch memory belongs to the operation that runs: each starts with
 * poe_cpu_scratch_reset(), takes what it needs, and has a function that says how much that is at most. */
#ifndef POE_STAGES_CPU_INTERNAL_H
#define POE_STAGES_CPU_INTERNAL_H

#include "src/arena.h"
#include "src/team.h"
#include "stages/cpu/cpu.h"
#include "stages/cpu/product.h"
#include "stages/cpu/vector.h"
#include "stages/ops.h"

typedef struct poe_cpu {
    poe_backend base;
    poe_ops ops;
    const poe_vector *vector;
    poe_team *team;
    poe_arena scratch;
    poe_block_product *block; // NULL: products in fp32
    char *block_scratch;      /* POE_BLOCK_SCRATCH bytes for each thread, ahead of what operations take */
    size_t block_bytes;       /* of all threads */
} poe_cpu;

/* How work is cut: part of the results' definition, for partial sums are kept per span. */
enum {
    POE_SPAN_FLOATS = 16384,
    POE_SPAN_ROWS = 32,
    POE_SPAN_COLUMNS = 64,
};

static inline size_t poe_parts(size_t n, size_t part)
{
    return (n + part - 1) / part;
}

static inline size_t poe_smaller(size_t a, size_t b)
{
    return a < b ? a : b;
}

static inline size_t poe_larger(size_t a, size_t b)
{
    return a > b ? a : b;
}

/* Floats from row to row of a scratch matrix with n columns: never a multiple of a page, whose rows share cache sets.
 */
static inline size_t poe_padded(size_t n)
{
    return poe_parts(n, 16) * 16 + 16;
}

static inline poe_cpu *poe_cpu_of(poe_backend *be)
{
    return (poe_cpu *)be;
}

static inline void poe_cpu_scratch_reset(poe_cpu *cpu)
{
    cpu->scratch.used = cpu->block_bytes;
}

static inline float *poe_cpu_scratch_floats(poe_cpu *cpu, size_t n)
{
    return poe_arena_take(&cpu->scratch, n * sizeof(float));
}

/* Deals spans of `span` of `n` things to the team. */
void poe_cpu_spans(poe_cpu *cpu, poe_span_kernel *kernel, const void *args, size_t n, size_t span);

/* The rows and columns first.. of C, `rows` by `columns`, by this thread of the team. */
void poe_product_tile(poe_cpu *cpu, int thread, const poe_product *p, size_t first_row, size_t rows,
                      size_t first_column, size_t columns);
/* All of C, in tiles by the team. */
void poe_cpu_product(poe_cpu *cpu, const poe_product *p);
/* The side of equal tiles that cut n into parts of at most `most`, a multiple of 16. */
size_t poe_tile_side(size_t n, size_t most);

/* The faster engine for bf16 that these kernels allow on this processor. */
poe_block_product *poe_block_choose(poe_kernels kernels);

/* Each fills its operations into the table. */
void poe_cpu_rows_ops(poe_ops *ops);
void poe_cpu_products_ops(poe_ops *ops);
void poe_cpu_attention_ops(poe_ops *ops);
void poe_cpu_head_ops(poe_ops *ops);
void poe_cpu_optimizer_ops(poe_ops *ops);

/* Bytes of scratch that each one's operations take at most; products come on top of others. */
size_t poe_cpu_products_scratch(const poe_backend_limits *limits, int n_threads);
size_t poe_cpu_rows_scratch(const poe_backend_limits *limits);
size_t poe_cpu_attention_scratch(const poe_backend_limits *limits, int n_threads);
size_t poe_cpu_head_scratch(const poe_backend_limits *limits);
size_t poe_cpu_optimizer_scratch(const poe_backend_limits *limits);

#endif
