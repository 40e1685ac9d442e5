/* SPDX-License-Identifier: MIT
 * Matrix products: OpenBLAS, called by each thread for tiles of the result that depend on its size alone. */
#include <cblas.h>

#include "stages/cpu/internal.h"

/* Tiles of a result: large, for OpenBLAS copies both operands of each into its own layout, but so many that several
 * threads share even a small product. */
enum { LARGEST_SIDE = 512, SMALLEST_SIDE = 128, ENOUGH_TILES = 8 };

void poe_product_tile(const poe_product *p, size_t first_row, size_t rows, size_t first_column, size_t columns)
{
    const float *a = p->a + (p->transpose_a ? first_row : first_row * p->lda);
    const float *b = p->b + (p->transpose_b ? first_column * p->ldb : first_column);
    cblas_sgemm(CblasRowMajor, p->transpose_a ? CblasTrans : CblasNoTrans, p->transpose_b ? CblasTrans : CblasNoTrans,
                (blasint)rows, (blasint)columns, (blasint)p->k, p->alpha, a, (blasint)p->lda, b, (blasint)p->ldb,
                p->beta, p->c + first_row * p->ldc + first_column, (blasint)p->ldc);
}

size_t poe_tile_side(size_t n, size_t most)
{
    size_t side = poe_parts(n, poe_parts(n, most));
    return poe_parts(side, 16) * 16;
}

typedef struct tiled {
    const poe_product *product;
    size_t rows, columns; /* of a tile */
    size_t across;        /* tiles side by side */
} tiled;

static void tile_task(void *arg, size_t task, int thread)
{
    const tiled *t = arg;
    (void)thread;
    size_t row = task / t->across * t->rows, column = task % t->across * t->columns;
    poe_product_tile(t->product, row, poe_smaller(t->rows, t->product->m - row), column,
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
    tiled t = {.product = p};
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
