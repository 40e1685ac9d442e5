/* SPDX-License-Identifier: MIT
 * How fast the operations that matter are, beside one thread's plain OpenBLAS: GFLOP/s, the best of several tries.
 * Columns: operation, then 1, 2, ... threads up to the processors here. `bench_kernels [kernels [n c v t]]`. */
#include <cblas.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "src/clock.h"
#include "stages/cpu/cpu.h"

enum { TRIES = 20, MAX_THREADS = 4 };

typedef struct bench {
    poe_backend *be;
    const poe_ops *ops;
    size_t n, c, v, t, heads;
    float *a, *b, *d, *e, *f; /* (n, 4c) each */
    float *w, *dw;            /* (larger of v and 4c, c): weights */
    float *stats;
    int32_t *targets;
} bench;

static void run_matmul(bench *x)
{
    x->ops->matmul(x->be, x->a, 4 * x->c, x->b, x->c, x->w, x->n, x->c, 4 * x->c, false);
}

static void run_matmul_square(bench *x)
{
    x->ops->matmul(x->be, x->a, x->c, x->b, x->c, x->w, x->n, x->c, x->c, false);
}

static void run_matmul_dx(bench *x)
{
    x->ops->matmul_dx(x->be, x->a, x->c, x->b, 4 * x->c, x->w, x->n, x->c, 4 * x->c, false);
}

static void run_matmul_dw(bench *x)
{
    x->ops->matmul_dw(x->be, x->dw, x->a, 4 * x->c, x->b, x->c, x->n, x->c, 4 * x->c);
}

static void run_matmul_dw_square(bench *x)
{
    x->ops->matmul_dw(x->be, x->dw, x->a, x->c, x->b, x->c, x->n, x->c, x->c);
}

static poe_attention_shape shape_of(const bench *x)
{
    return (poe_attention_shape){x->n / x->t, x->t, x->heads, x->heads, x->c / x->heads, x->t};
}

static void run_attention(bench *x)
{
    poe_attention_shape shape = shape_of(x);
    x->ops->attention_forward(x->be, x->a, x->stats, x->b, x->d, x->e, &shape);
}

static void run_attention_backward(bench *x)
{
    poe_attention_shape shape = shape_of(x);
    size_t part = x->n * x->c;
    x->ops->attention_backward(x->be, x->a + part, x->f, x->f + part, x->b + part, x->a, x->stats, x->b, x->d, x->e,
                               &shape);
}

static void run_head(bench *x)
{
    double loss;
    x->ops->head_loss(x->be, &loss, x->a, x->dw, x->b, x->w, x->targets, 1.0f, x->n, x->c, x->v, x->v);
}

static void run_muon(bench *x)
{
    x->ops->muon(x->be, x->w, x->d, x->stats, x->b, 4 * x->c, x->c, &(poe_muon_step){1e-6f, 0.9f, 0.0f});
}

static void run_adamw(bench *x)
{
    poe_adamw_step step = {1e-6f, 0.8f, 0.95f, 1e-10f, 0.0f, 10};
    x->ops->adamw(x->be, x->w, x->a, x->d, x->dw, x->v * x->c, &step);
}

static void run_norm(bench *x)
{
    x->ops->norm_forward(x->be, x->a, x->stats, x->b, x->n, x->c, 1e-7f);
    x->ops->norm_backward(x->be, x->d, x->b, x->a, x->stats, x->n, x->c);
}

static void run_relu2(bench *x)
{
    x->ops->relu2_forward(x->be, x->a, x->b, x->n * 4 * x->c);
    x->ops->relu2_backward(x->be, x->d, x->d, x->b, x->n * 4 * x->c);
}

static void run_sgemm(bench *x)
{
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)x->n, (int)(4 * x->c), (int)x->c, 1.0f, x->b, (int)x->c,
                x->w, (int)x->c, 0.0f, x->a, (int)(4 * x->c));
}

typedef struct row {
    const char *name;
    void (*run)(bench *x);
    double (*flops)(const bench *x);
} row;

static double flops_wide(const bench *x)
{
    return 8.0 * (double)(x->n * x->c * x->c);
}

static double flops_square(const bench *x)
{
    return 2.0 * (double)(x->n * x->c * x->c);
}

/* Of the pairs that are seen; what is computed beside them does not count. */
static double flops_attention(const bench *x)
{
    return 4.0 * (double)(x->n / x->t * x->c) * (double)x->t * (double)(x->t + 1) / 2;
}

static double flops_attention_backward(const bench *x)
{
    return 2.5 * flops_attention(x);
}

static double flops_head(const bench *x)
{
    return 6.0 * (double)(x->n * x->c) * (double)x->v;
}

/* Five times A = x x^T, A^2 and the product, symmetric ones counted once. */
static double flops_muon(const bench *x)
{
    double c = (double)x->c;
    return 5 * (4 * c * c * c + c * c * c + 8 * c * c * c);
}

/* Floats, for what only moves them: the column is then Gfloat/s. */
static double floats_nc(const bench *x)
{
    return (double)(x->n * x->c);
}

static double floats_wide(const bench *x)
{
    return 4 * floats_nc(x);
}

static double floats_head(const bench *x)
{
    return (double)(x->v * x->c);
}

static const row rows[] = {
    {"cblas_sgemm n,c,4c", run_sgemm, flops_wide},
    {"matmul n,c,4c", run_matmul, flops_wide},
    {"matmul n,c,c", run_matmul_square, flops_square},
    {"matmul_dx n,4c,c", run_matmul_dx, flops_wide},
    {"matmul_dw 4c,c", run_matmul_dw, flops_wide},
    {"matmul_dw c,c", run_matmul_dw_square, flops_square},
    {"attention_forward", run_attention, flops_attention},
    {"attention_backward", run_attention_backward, flops_attention_backward},
    {"head_loss", run_head, flops_head},
    {"muon 4c,c", run_muon, flops_muon},
    {"adamw v,c (Gfloat/s)", run_adamw, floats_head},
    {"norm both ways (Gfloat/s)", run_norm, floats_nc},
    {"relu2 both ways (Gfloat/s)", run_relu2, floats_wide},
};

static float *noise(bench *x, size_t n)
{
    float *y = x->ops->memory_allocate(x->be, "the benchmark", n * sizeof(*y));
    uint32_t state = 1;
    for (size_t i = 0; y && i < n; i++) {
        state = state * 1664525u + 1013904223u;
        y[i] = (float)(state >> 8) * 0x1p-23f - 1.0f;
    }
    return y;
}

static double rate_of(bench *x, const row *r)
{
    double start = poe_now(), taken;
    int times = 0;
    do {
        r->run(x);
        times++;
        taken = poe_now() - start;
    } while (taken < 0.03);
    return r->flops(x) * times / taken * 1e-9;
}

/* Memory that lives as long as the process. */
static bool prepare(bench *x, const poe_backend_limits *limits, poe_kernels kernels, int threads)
{
    *x = (bench){.n = limits->rows, .c = limits->c, .v = limits->vocab_padded, .t = limits->t, .heads = limits->n_head};
    if (poe_cpu_create(kernels, threads, limits, &x->be) != POE_OK)
        return false;
    x->ops = x->be->ops;
    size_t wide = x->v > 4 * x->n ? x->v : 4 * x->n;
    size_t weights = x->v > 4 * x->c ? x->v : 4 * x->c;
    float **pieces[] = {&x->a, &x->b, &x->d, &x->e, &x->f};
    for (size_t i = 0; i < 5; i++)
        *pieces[i] = noise(x, wide * x->c);
    x->w = noise(x, weights * x->c);
    x->dw = noise(x, weights * x->c);
    x->stats = noise(x, x->n * x->c);
    x->targets = calloc(x->n, sizeof(*x->targets));
    return x->targets != NULL;
}

int main(int argc, char **argv)
{
    poe_kernels kernels;
    if (poe_kernels_parse(argc > 1 ? argv[1] : "auto", &kernels) != POE_OK)
        return 2;
    poe_blas_ensure(kernels, argv);
    size_t sizes[4] = {2048, 384, 4096, 512};
    for (int i = 2; i < argc && i < 6; i++)
        sizes[i - 2] = strtoul(argv[i], NULL, 10);
    size_t c = sizes[1], heads = c / 64;
    poe_backend_limits limits = {.rows = sizes[0],
                                 .t = sizes[3],
                                 .c = c,
                                 .head_size = 64,
                                 .n_head = heads,
                                 .n_kv_head = heads,
                                 .mlp_dim = 4 * c,
                                 .vocab_padded = sizes[2],
                                 .training = true};
    enum { ROWS = sizeof(rows) / sizeof(*rows) };
    static bench benches[MAX_THREADS];
    double rates[MAX_THREADS][ROWS] = {{0}};
    int threads = (int)sysconf(_SC_NPROCESSORS_ONLN);
    threads = threads < MAX_THREADS ? threads : MAX_THREADS;
    for (int t = 0; t < threads; t++)
        if (!prepare(&benches[t], &limits, kernels, t + 1))
            return 1;
    for (int try = 0; try < TRIES; try++)
        for (size_t i = 0; i < ROWS; i++)
            for (int t = 0; t < threads; t++) {
                double rate = rate_of(&benches[t], &rows[i]);
                rates[t][i] = rate > rates[t][i] ? rate : rates[t][i];
            }
    printf("%s, products by %s (%s), n %zu, c %zu, v %zu, t %zu: GFLOP/s on 1..%d threads\n", poe_kernels_name(kernels),
           poe_blas_library(), poe_blas_kernels(), sizes[0], c, sizes[2], sizes[3], threads);
    for (size_t i = 0; i < ROWS; i++) {
        printf("%-28s", rows[i].name);
        for (int t = 0; t < threads; t++)
            printf(" %8.2f", rates[t][i]);
        printf("\n");
    }
    return 0;
}
