/* SPDX-License-Identifier: MIT
 * The library behind the matrix products: oneDNN where the build has it and the processor AVX2 (measured 5 to 18 % above
 * OpenBLAS at the shapes that matter), OpenBLAS elsewhere. Either is made to run the kernels that the processor deserves,
 * by one thread, and shown to be right before anyone relies on it. */
#include <cblas.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

#ifdef POE_HAVE_ONEDNN
#include <omp.h>
#include <oneapi/dnnl/dnnl.h>
#endif

#include "src/log.h"
#include "stages/cpu/cpu.h"
#include "stages/cpu/product.h"

static void sgemm_openblas(const poe_product *p)
{
    cblas_sgemm(CblasRowMajor, p->transpose_a ? CblasTrans : CblasNoTrans, p->transpose_b ? CblasTrans : CblasNoTrans,
                (blasint)p->m, (blasint)p->n, (blasint)p->k, p->alpha, p->a, (blasint)p->lda, p->b, (blasint)p->ldb,
                p->beta, p->c, (blasint)p->ldc);
}

static void (*sgemm)(const poe_product *product) = sgemm_openblas;

void poe_sgemm(const poe_product *product)
{
    sgemm(product);
}

/* --- oneDNN -------------------------------------------------------------------------------------------------------- */

#ifdef POE_HAVE_ONEDNN

static const dnnl_cpu_isa_t isas[POE_KERNELS_COUNT] = {
    [POE_KERNELS_AVX2] = dnnl_cpu_isa_avx2,
    [POE_KERNELS_AVX512] = dnnl_cpu_isa_avx512_core,
};

static void sgemm_onednn(const poe_product *p)
{
    static _Thread_local bool alone; /* oneDNN asks OpenMP how many threads to use: our team has them already */
    if (!alone)
        omp_set_num_threads(1);
    alone = true;
    dnnl_sgemm(p->transpose_a ? 'T' : 'N', p->transpose_b ? 'T' : 'N', (dnnl_dim_t)p->m, (dnnl_dim_t)p->n,
               (dnnl_dim_t)p->k, p->alpha, p->a, (dnnl_dim_t)p->lda, p->b, (dnnl_dim_t)p->ldb, p->beta, p->c,
               (dnnl_dim_t)p->ldc);
}

/* False when oneDNN has no kernels of its own for these, or has been used with others. */
static bool choose_onednn(poe_kernels kernels)
{
    if (kernels == POE_KERNELS_GENERIC)
        return false;
    dnnl_set_max_cpu_isa(isas[kernels]);
    if (dnnl_get_effective_cpu_isa() != isas[kernels])
        return false;
    sgemm = sgemm_onednn;
    return true;
}

const char *poe_blas_kernels(void)
{
    if (sgemm == sgemm_openblas)
        return openblas_get_corename();
    return dnnl_get_effective_cpu_isa() == dnnl_cpu_isa_avx2 ? "AVX2" : "AVX-512";
}

#else

static bool choose_onednn(poe_kernels kernels)
{
    (void)kernels;
    return false;
}

const char *poe_blas_kernels(void)
{
    return openblas_get_corename();
}

#endif

const char *poe_blas_library(void)
{
    return sgemm == sgemm_openblas ? "OpenBLAS" : "oneDNN";
}

/* --- OpenBLAS ------------------------------------------------------------------------------------------------------ */

#if defined(__x86_64__)

/* Prescott (SSE3) is what OpenBLAS itself falls back to; it is the one that every x86-64 processor runs. */
static const char *const cores[POE_KERNELS_COUNT] = {"PRESCOTT", "HASWELL", "SKYLAKEX"};

static void ensure_openblas(poe_kernels kernels, char **argv)
{
    static const char tried[] = "POE_BLAS_TRIED"; /* the core that this program was executed again for */
    const char *core = cores[kernels], *before = getenv(tried);
    if (!strcasecmp(openblas_get_corename(), core) && openblas_get_num_threads() == 1)
        return;
    if (before && !strcmp(before, core))
        return;
    if (!setenv("OPENBLAS_CORETYPE", core, 1) && !setenv("OPENBLAS_NUM_THREADS", "1", 1) && !setenv(tried, core, 1))
        execv("/proc/self/exe", argv);
    poe_warn("cannot execute this program again for OpenBLAS's %s kernels: going on with %s", core,
             openblas_get_corename());
}

#else

static void ensure_openblas(poe_kernels kernels, char **argv)
{
    (void)kernels;
    (void)argv;
}

#endif

void poe_blas_ensure(poe_kernels kernels, char **argv)
{
    if (!choose_onednn(kernels))
        ensure_openblas(kernels, argv);
}

/* --- known answers ------------------------------------------------------------------------------------------------- */

/* Small whole numbers, whose products and sums are exact in any order. */
static float known_a(size_t i, size_t k)
{
    return (float)((i * 7 + k * 3) % 11) - 5.0f;
}

static float known_b(size_t k, size_t j)
{
    return (float)((k * 5 + j * 2) % 13) - 6.0f;
}

static double known_c(size_t i, size_t j, size_t k)
{
    double sum = 0;
    for (size_t l = 0; l < k; l++)
        sum += (double)known_a(i, l) * (double)known_b(l, j);
    return sum;
}

/* One product (m,k) (k,n); a, b, c have room for it. Transposed operands are stored (k,m) and (n,k). */
static bool product_is_right(bool ta, bool tb, size_t m, size_t n, size_t k, float *a, float *b, float *c)
{
    for (size_t i = 0; i < m; i++)
        for (size_t l = 0; l < k; l++)
            a[ta ? l * m + i : i * k + l] = known_a(i, l);
    for (size_t l = 0; l < k; l++)
        for (size_t j = 0; j < n; j++)
            b[tb ? j * k + l : l * n + j] = known_b(l, j);
    for (size_t i = 0; i < m * n; i++)
        c[i] = NAN; /* beta 0 must not read it */
    poe_sgemm(&(poe_product){ta, tb, m, n, k, 1.0f, a, ta ? m : k, b, tb ? k : n, 0.0f, c, n});
    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < n; j++)
            if (!((double)c[i * n + j] == known_c(i, j, k)))
                return false;
    return true;
}

poe_status poe_blas_check(void)
{
    enum { LARGEST = 70, DEEPEST = 400 };
    static const size_t sizes[][3] = {{64, 64, DEEPEST}, {LARGEST, 67, 129}, {1, 65, 64}, {33, 1, 17}, {5, 7, 3}};
    float *memory = malloc((2 * LARGEST * DEEPEST + LARGEST * LARGEST) * sizeof(*memory));
    if (!memory) {
        poe_error("cannot check %s: out of memory", poe_blas_library());
        return POE_FAILED;
    }
    poe_status status = POE_OK;
    for (size_t s = 0; s < sizeof(sizes) / sizeof(*sizes) && status == POE_OK; s++)
        for (int form = 0; form < 4 && status == POE_OK; form++) {
            const size_t *size = sizes[s];
            if (product_is_right(form & 1, form & 2, size[0], size[1], size[2], memory, memory + LARGEST * DEEPEST,
                                 memory + 2 * LARGEST * DEEPEST))
                continue;
            poe_error("%s's %s kernels give a wrong product of %zux%zu and %zux%zu: choose others with --kernels",
                      poe_blas_library(), poe_blas_kernels(), size[0], size[2], size[2], size[1]);
            status = POE_FAILED;
        }
    free(memory);
    return status;
}
