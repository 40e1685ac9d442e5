/* SPDX-License-Identifier: MIT
 * Matrix products: a library's, called by each thread for tiles of the result that depend on its size alone. */
#include "stages/cpu/internal.h"

/* Tiles of a result: large, for the library copies both operands of each into its own layout, but so many that several
 * threads share even a small product. */
enum { LARGEST_SIDE = 512, SMALLEST_SIDE = 128, ENOUGH_TILES = 8 };

size_t poe_cpu_products_scratch(const poe_backend_limits *limits, int n_threads)
{
    return limits->bf16 ? (size_t)n_threads * POE_BLOCK_SCRATCH : 0;
}

/* The rows, columns and terms of a product from `row`, `column` and `term` on, as many as `side` and its end allow. */
static poe_product block_of(const poe_product *p, size_t row, size_t column, size_t term, size_t side)
{
    poe_product block = *p;
    block.m = poe_smaller(side, p->m - row);
    block.n = poe_smaller(side, p->n - column);
    block.k = poe_smaller(side, p->k - term);
    block.a += p->transpose_a ? term * p->lda + row : row * p->lda + term;
    block.b += p->transpose_b ? column * p->ldb + term : term * p->ldb + column;
    block.c += row * p->ldc + column;
    return block;
}

static void by_blocks(const poe_product *p, poe_block_product *product, void *scratch)
{
    for (size_t row = 0; row < p->m; row += POE_BLOCK_SIDE)
        for (size_t column = 0; column < p->n; column += POE_BLOCK_SIDE)
            for (size_t term = 0; term < p->k; term += POE_BLOCK_SIDE) {
                poe_product block = block_of(p, row, column, term, POE_BLOCK_SIDE);
                block.beta = term ? 1.0f : p->beta;
                product(&block, scratch);
            }
}

void poe_product_tile(poe_cpu *cpu, int thread, const poe_product *p, size_t first_row, size_t rows,
                      size_t first_column, size_t columns)
{
    poe_product tile = block_of(p, first_row, first_column, 0, SIZE_MAX);
    tile.m = rows;
    tile.n = columns;
    if (cpu->block)
        by_blocks(&tile, cpu->block, cpu->block_scratch + (size_t)thread * POE_BLOCK_SCRATCH);
    else
        poe_sgemm(&tile);
}

size_t poe_tile_side(size_t n, size_t most)
{
    size_t side = poe_parts(n, poe_parts(n, most));
    return poe_parts(side, 16) * 16;
}

typedef struct tiled {
    poe_cpu *cpu;
    const poe_product *product;
    size_t rows, columns; /* of a tile */
    size_t across;        /* tiles side by side */
} tiled;

static void tile_task(void *arg, size_t task, int thread)
{
    const tiled *t = arg;
    size_t row = task / t->across * t->rows, column = task % t->across * t->columns;
    poe_product_tile(t->cpu, thread, t->product, row, poe_smaller(t->rows, t->product->m - row), column,
                     poe_smaller(t->columns, t->product->n - column));
}

static size_t cut(tiled *t, size_t most_rows, size_t most_columns)
{
    t->rows = poe_tile_side(t->product->m, most_rows);
    t->columns = poe_tile_side(t->product->n, most_columns);
    t->across = poe_parts(t->product->n, t->columns);
    return poe_parts(t->product->m, t->rows) * t->across;
}

void poe_cpu_product(poe_cpu *cpu, const poe_product *p)
{
    tiled t = {.cpu = cpu, .product = p};
    size_t tiles = cut(&t, LARGEST_SIDE, LARGEST_SIDE);
    while (tiles < ENOUGH_TILES && poe_larger(t.rows, t.columns) >= 2 * SMALLEST_SIDE)
        tiles = t.rows > t.columns ? cut(&t, t.rows / 2, t.columns) : cut(&t, t.rows, t.columns / 2);
    poe_team_run(cpu->team, tiles, tile_task, &t);
}

static void matmul(poe_backend *be, float *y, size_t ldy, const float *x, size_t ldx, const float *w, size_t n,
                   size_t in, size_t out, bool accumulate)
{
    poe_product p = {false, true, n, out, in, 1.0f, x, ldx, w, in, accumulate ? 1.0f : 0.0f, y, ldy};
    poe_cpu_product(poe_cpu_of(be), &p);
}

static void matmul_dx(poe_backend *be, float *dx, size_t lddx, const float *dy, size_t lddy, const float *w, size_t n,
                      size_t in, size_t out, bool accumulate)
{
    poe_product p = {false, false, n, in, out, 1.0f, dy, lddy, w, in, accumulate ? 1.0f : 0.0f, dx, lddx};
    poe_cpu_product(poe_cpu_of(be), &p);
}

static void matmul_dw(poe_backend *be, float *dw, const float *dy, size_t lddy, const float *x, size_t ldx, size_t n,
                      size_t in, size_t out)
{
    poe_product p = {true, false, out, in, n, 1.0f, dy, lddy, x, ldx, 1.0f, dw, in};
    poe_cpu_product(poe_cpu_of(be), &p);
}

void poe_cpu_products_ops(poe_ops *ops)
{
    ops->matmul = matmul;
    ops->matmul_dx = matmul_dx;
    ops->matmul_dw = matmul_dw;
}
