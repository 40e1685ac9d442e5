/* SPDX-License-Identifier: MIT
 * Private to the CPU backend: a matrix product, and blocks of products whose operands are rounded to bf16. */
#ifndef POE_STAGES_CPU_PRODUCT_H
#define POE_STAGES_CPU_PRODUCT_H

#include <stdbool.h>
#include <stddef.h>

/* C (m,n) = alpha op(A) op(B) + beta C; op(A) is (m,k), op(B) (k,n); all row-major, ld... floats from row to row. */
typedef struct poe_product {
    bool transpose_a, transpose_b;
    size_t m, n, k;
    float alpha;
    const float *a;
    size_t lda;
    const float *b;
    size_t ldb;
    float beta;
    float *c;
    size_t ldc;
} poe_product;

/* Computes it on the calling thread, by the library that poe_blas_ensure() chose. With beta 0, C is not read. */
void poe_sgemm(const poe_product *product);

enum {
    POE_BLOCK_SIDE = 512,
    POE_BLOCK_SCRATCH = 2 * POE_BLOCK_SIDE * POE_BLOCK_SIDE * (int)sizeof(float), /* bytes: both operands */
};

/* A product of operands rounded to bf16, summed in fp32, by the calling thread. m, n and k are POE_BLOCK_SIDE at most;
 * `scratch` is POE_BLOCK_SCRATCH bytes on a multiple of 64. With beta 0, C is not read. */
typedef void poe_block_product(const poe_product *block, void *scratch);

poe_block_product poe_block_in_fp32;      /* anywhere: poe_sgemm() on floats that are bf16 numbers */
poe_block_product poe_block_on_tiles;     /* AMX: where the processor and the operating system have it */
poe_block_product poe_block_by_emulation; /* of AMX, in plain C: for tests */

#endif
