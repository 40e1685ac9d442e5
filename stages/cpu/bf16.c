/* SPDX-License-Identifier: MIT
 * Blocks of bf16 products: which engine this processor has, and the one that runs anywhere. The dot products of
 * AVX512_BF16 are left out: they are slower than fp32. */
#include <stdint.h>
#include <stdlib.h>

#include "src/arena.h"
#include "src/bf16.h"
#include "src/log.h"
#include "stages/cpu/internal.h"

/* --- anywhere ---------------------------------------------------------------------------------------------------- */

static void round_rows(float *y, const float *x, size_t ld, size_t rows, size_t columns)
{
    for (size_t r = 0; r < rows; r++)
        for (size_t i = 0; i < columns; i++)
            y[r * columns + i] = poe_bf16_value(poe_bf16_bits(x[r * ld + i]));
}

/* The product of two bf16 numbers is exact in fp32. */
void poe_block_in_fp32(const poe_product *p, void *scratch)
{
    size_t a_columns = p->transpose_a ? p->m : p->k, b_columns = p->transpose_b ? p->k : p->n;
    float *a = scratch, *b = a + p->m * p->k;
    round_rows(a, p->a, p->lda, p->transpose_a ? p->k : p->m, a_columns);
    round_rows(b, p->b, p->ldb, p->transpose_b ? p->n : p->k, b_columns);
    poe_product rounded = *p;
    rounded.a = a;
    rounded.lda = a_columns;
    rounded.b = b;
    rounded.ldb = b_columns;
    poe_sgemm(&rounded);
}

/* --- the choice -------------------------------------------------------------------------------------------------- */

#ifdef POE_HAVE_TILES

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

static bool processor_has_tiles(void)
{
    enum { OSXSAVE = 1 << 27, AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24 };
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & OSXSAVE))
        return false;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & AMX_BF16) && (d & AMX_TILE);
}

/* The registers must be saved when threads change, and Linux wants to be asked before a process uses them. */
static bool system_allows_tiles(void)
{
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18, TILE_STATES = 3 << 17 };
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & TILE_STATES) == TILE_STATES && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

static bool have_tiles(void)
{
    return processor_has_tiles() && system_allows_tiles();
}

#else

static bool have_tiles(void)
{
    return false;
}

void poe_block_on_tiles(const poe_product *block, void *scratch)
{
    (void)block;
    (void)scratch;
    abort(); /* never chosen */
}

#endif

poe_block_product *poe_block_choose(poe_kernels kernels)
{
    return kernels == POE_KERNELS_AVX512 && have_tiles() ? poe_block_on_tiles : poe_block_in_fp32;
}

const char *poe_bf16_engine(poe_kernels kernels)
{
    if (poe_block_choose(kernels) == poe_block_on_tiles)
        return "AMX tiles";
    if (have_tiles())
        return "rounded, products in fp32: AMX goes with the avx512 kernels";
    return "rounded, products in fp32: this processor has no AMX, and its bf16 instructions are slower than fp32";
}

/* --- known answer ------------------------------------------------------------------------------------------------ */

/* Small whole numbers: bf16 holds them, and their products and sums are exact in any order. */
static float known(size_t row, size_t column, size_t modulus)
{
    return (float)((row * 7 + column * 3) % modulus) - (float)(modulus / 2);
}

static bool block_is_right(poe_block_product *product, poe_product p, char *scratch)
{
    float *a = (float *)(scratch + POE_BLOCK_SCRATCH), *b = a + p.m * p.k;
    p.a = a, p.b = b, p.c = b + p.k * p.n, p.ldc = p.n;
    p.lda = p.transpose_a ? p.m : p.k, p.ldb = p.transpose_b ? p.k : p.n;
    for (size_t i = 0; i < p.m; i++)
        for (size_t l = 0; l < p.k; l++)
            a[p.transpose_a ? l * p.m + i : i * p.k + l] = known(i, l, 11);
    for (size_t l = 0; l < p.k; l++)
        for (size_t j = 0; j < p.n; j++)
            b[p.transpose_b ? j * p.k + l : l * p.n + j] = known(l, j, 13);
    product(&p, scratch);
    for (size_t i = 0; i < p.m; i++)
        for (size_t j = 0; j < p.n; j++) {
            double sum = 0;
            for (size_t l = 0; l < p.k; l++)
                sum += (double)known(i, l, 11) * (double)known(l, j, 13);
            if (!((double)p.c[i * p.n + j] == sum))
                return false;
        }
    return true;
}

poe_status poe_bf16_check(poe_kernels kernels)
{
    enum { M = 70, N = 67, K = 129 };
    poe_arena arena;
    poe_status status =
        poe_arena_create(&arena, "bf16 check", POE_BLOCK_SCRATCH + (M * K + K * N + M * N) * sizeof(float));
    if (status != POE_OK)
        return status;
    for (int form = 0; form < 4 && status == POE_OK; form++) {
        poe_product p = {.transpose_a = form & 1, .transpose_b = form & 2, .m = M, .n = N, .k = K, .alpha = 1};
        if (block_is_right(poe_block_choose(kernels), p, arena.base))
            continue;
        poe_error("--dtype bf16: wrong product of %dx%d and %dx%d (%s): choose others with --kernels", M, K, K, N,
                  poe_bf16_engine(kernels));
        status = POE_FAILED;
    }
    poe_arena_destroy(&arena);
    return status;
}
