/* SPDX-License-Identifier: MIT
 * bf16: the rounding, both engines' blocks (AMX by emulation: packing, edges and loops are the ones that run on the
 * processor, only its instructions are not), products of the backend, and stages and a short training in both types. */
#include <stdbool.h>
#include <stdint.h>

#include "src/bf16.h"
#include "src/rng.h"
#include "stages/cpu/cpu.h"
#include "stages/cpu/product.h"
#include "tests/stage_chain.h"

/* --- rounding ---------------------------------------------------------------------------------------------------- */

static float rounded(float x)
{
    return poe_bf16_value(poe_bf16_bits(x));
}

static void test_rounding(void)
{
    const float ulp = 0x1p-7f;                                                   /* of 1 to 2 */
    CHECK(rounded(1 + ulp / 2) == 1 && rounded(1 + 3 * ulp / 2) == 1 + 2 * ulp); /* ties to even */
    CHECK(rounded(1 + 0.51f * ulp) == 1 + ulp && rounded(1 + 1.49f * ulp) == 1 + ulp);
    CHECK(rounded(-3.140625f) == -3.140625f && rounded(0x1.fep127f) == 0x1.fep127f);
    CHECK(isinf(rounded(3.4e38f)) && isinf(rounded(-INFINITY)) && rounded(-INFINITY) < 0);
    CHECK(isnan(rounded(NAN)) && poe_bf16_bits(-0.0f) == 0x8000 && poe_bf16_bits(0x1p-133f) == 1);
    uint32_t quiet = 0x7f800001; /* a NaN whose upper half alone would be infinity */
    float x;
    memcpy(&x, &quiet, sizeof(x));
    CHECK(isnan(rounded(x)));
    poe_rng rng;
    poe_rng_init(&rng, 1, "rounding");
    for (int i = 0; i < 100000; i++) { /* nearest: no neighbour is nearer */
        x = (float)poe_rng_normal(&rng);
        uint32_t bits = poe_bf16_bits(x);
        float off = fabsf(x - poe_bf16_value(bits));
        CHECK(off <= fabsf(x - poe_bf16_value(bits + 1)) && off <= fabsf(x - poe_bf16_value(bits - 1)));
    }
}

/* --- products ---------------------------------------------------------------------------------------------------- */

static float *draw(poe_rng *rng, size_t n)
{
    float *x = malloc((n ? n : 1) * sizeof(*x));
    chain_require(x != NULL, "memory");
    for (size_t i = 0; i < n; i++)
        x[i] = (float)poe_rng_normal(rng);
    return x;
}

static size_t pick(poe_rng *rng, size_t low, size_t high)
{
    return low + poe_rng_next(rng) % (high - low + 1);
}

/* Sums of k fp32 terms, in whatever order, err like a random walk of roundings by 2^-24 of the partial sums; four times
 * that of the sum of absolute terms is never met by chance, and far below what operands not rounded would be off by. */
static double tolerance(size_t k, double absolute)
{
    return 4 * (1 + sqrt((double)k)) * 0x1p-24 * absolute;
}

/* C of p against the sums of its rounded operands in double precision; `before`: C as it was. */
static void expect_product(const char *what, const poe_product *p, const float *before)
{
    for (size_t i = 0; i < p->m; i++)
        for (size_t j = 0; j < p->n; j++) {
            double sum = 0, absolute = 0, c = (double)p->c[i * p->ldc + j];
            for (size_t l = 0; l < p->k; l++) {
                double a = (double)rounded(p->a[p->transpose_a ? l * p->lda + i : i * p->lda + l]);
                double b = (double)rounded(p->b[p->transpose_b ? j * p->ldb + l : l * p->ldb + j]);
                sum += a * b;
                absolute += fabs(a * b);
            }
            double kept = p->beta == 0.0f ? 0 : (double)p->beta * (double)before[i * p->ldc + j];
            double want = (double)p->alpha * sum + kept;
            if (fabs(c - want) <= tolerance(p->k, fabs((double)p->alpha) * absolute + fabs(kept)))
                continue;
            fprintf(stderr, "%s: %zux%zux%zu%s%s, alpha %g, beta %g: [%zu, %zu] is %.9g, expected %.9g\n", what, p->m,
                    p->n, p->k, p->transpose_a ? ", A transposed" : "", p->transpose_b ? ", B transposed" : "",
                    (double)p->alpha, (double)p->beta, i, j, c, want);
            check_failures++;
            return;
        }
}

/* One block of the given shape; rows are longer than they need be, and what lies between them must stay as it is. */
static void try_block(const char *what, poe_block_product *product, poe_rng *rng, size_t m, size_t n, size_t k,
                      int form)
{
    static const float betas[] = {0, 1, 0.5f};
    poe_product p = {
        .transpose_a = form & 1, .transpose_b = form & 2, .m = m, .n = n, .k = k, .alpha = form & 4 ? -0.5f : 1};
    p.lda = (p.transpose_a ? m : k) + pick(rng, 0, 5);
    p.ldb = (p.transpose_b ? k : n) + pick(rng, 0, 5);
    p.ldc = n + pick(rng, 0, 5);
    p.beta = betas[pick(rng, 0, 2)];
    float *a = draw(rng, (p.transpose_a ? k : m) * p.lda), *b = draw(rng, (p.transpose_b ? n : k) * p.ldb);
    float *before = draw(rng, m * p.ldc), *c = malloc(m * p.ldc * sizeof(*c));
    void *scratch = aligned_alloc(64, POE_BLOCK_SCRATCH);
    chain_require(c && scratch, "memory");
    memset(scratch, 0xff, POE_BLOCK_SCRATCH);
    memcpy(c, before, m * p.ldc * sizeof(*c));
    for (size_t i = 0; p.beta == 0.0f && i < m; i++)
        for (size_t j = 0; j < n; j++)
            c[i * p.ldc + j] = NAN;
    p.a = a, p.b = b, p.c = c;
    product(&p, scratch);
    expect_product(what, &p, before);
    for (size_t i = 0; i < m; i++)
        CHECK(!memcmp(c + i * p.ldc + n, before + i * p.ldc + n, (p.ldc - n) * sizeof(*c)));
    free(a), free(b), free(c), free(before), free(scratch);
}

static void test_blocks(const char *what, poe_block_product *product)
{
    static const size_t shapes[][3] = {{1, 1, 1},    {16, 16, 32},  {32, 32, 32},  {33, 31, 33},
                                       {17, 1, 64},  {1, 47, 3},    {64, 64, 2},   {5, 512, 31},
                                       {512, 7, 65}, {48, 96, 512}, {512, 512, 9}, {64, 200, 129}};
    poe_rng rng;
    poe_rng_init(&rng, 2, what);
    for (int form = 0; form < 8; form++) {
        for (size_t s = 0; s < sizeof(shapes) / sizeof(*shapes); s++)
            try_block(what, product, &rng, shapes[s][0], shapes[s][1], shapes[s][2], form);
        for (int i = 0; i < 12; i++)
            try_block(what, product, &rng, pick(&rng, 1, 80), pick(&rng, 1, 80), pick(&rng, 1, 140), form);
    }
    try_block(what, product, &rng, POE_BLOCK_SIDE, POE_BLOCK_SIDE, POE_BLOCK_SIDE, 0); /* all of the scratch */
}

enum { MAX_THREADS = 3 };

static poe_backend *backend(int threads, bool bf16, const poe_backend_limits *given)
{
    poe_backend *be = NULL;
    poe_backend_limits limits = *given;
    limits.bf16 = bf16;
    chain_require(poe_cpu_create(poe_kernels_best(), threads, &limits, &be) == POE_OK, "poe_cpu_create");
    return be;
}

static const poe_backend_limits product_limits = {.rows = 64,
                                                  .t = 32,
                                                  .c = 32,
                                                  .head_size = 8,
                                                  .n_head = 4,
                                                  .n_kv_head = 2,
                                                  .mlp_dim = 64,
                                                  .vocab_padded = 64,
                                                  .training = true};

/* y = x W^T, dx = dy W and dw += dy^T x, as products of x (n,in), w (out,in), dy (n,out). */
static void try_matmuls(poe_backend *be[MAX_THREADS], poe_rng *rng, size_t n, size_t in, size_t out, bool accumulate)
{
    float *x = draw(rng, n * in), *w = draw(rng, out * in), *dy = draw(rng, n * out), *results[3], *before[3];
    const size_t sizes[3] = {n * out, n * in, out * in};
    float beta = accumulate ? 1.0f : 0.0f;
    for (int i = 0; i < 3; i++) {
        before[i] = draw(rng, sizes[i]);
        results[i] = draw(rng, sizes[i]);
    }
    uint8_t *first = malloc(3 * sizeof(float) * (sizes[0] + sizes[1] + sizes[2]));
    for (int threads = 1; threads <= MAX_THREADS; threads++) {
        poe_backend *b = be[threads - 1];
        for (int i = 0; i < 3; i++)
            memcpy(results[i], before[i], sizes[i] * sizeof(float));
        b->ops->matmul(b, results[0], out, x, in, w, n, in, out, accumulate);
        b->ops->matmul_dx(b, results[1], in, dy, out, w, n, in, out, accumulate);
        b->ops->matmul_dw(b, results[2], dy, out, x, in, n, in, out);
        for (size_t i = 0, at = 0; i < 3; at += sizes[i++] * sizeof(float)) {
            if (threads == 1)
                memcpy(first + at, results[i], sizes[i] * sizeof(float));
            CHECK(!memcmp(first + at, results[i], sizes[i] * sizeof(float)));
        }
    }
    expect_product("matmul", &(poe_product){false, true, n, out, in, 1, x, in, w, in, beta, results[0], out},
                   before[0]);
    expect_product("matmul_dx", &(poe_product){false, false, n, in, out, 1, dy, out, w, in, beta, results[1], in},
                   before[1]);
    expect_product("matmul_dw", &(poe_product){true, false, out, in, n, 1, dy, out, x, in, 1, results[2], in},
                   before[2]);
    for (int i = 0; i < 3; i++)
        free(before[i]), free(results[i]);
    free(x), free(w), free(dy), free(first);
}

static void test_matmuls(void)
{
    poe_backend *be[MAX_THREADS];
    poe_rng rng;
    poe_rng_init(&rng, 3, "matmuls");
    for (int i = 0; i < MAX_THREADS; i++)
        be[i] = backend(i + 1, true, &product_limits);
    for (int i = 0; i < 8; i++)
        try_matmuls(be, &rng, pick(&rng, 1, 150), pick(&rng, 1, 150), pick(&rng, 1, 150), i & 1);
    try_matmuls(be, &rng, 1100, 33, 17, true); /* several blocks along each of the three */
    try_matmuls(be, &rng, 19, 1100, 35, false);
    try_matmuls(be, &rng, 34, 21, 1100, true);
    for (int i = 0; i < MAX_THREADS; i++)
        poe_cpu_destroy(be[i]);
}

static void test_engine(void)
{
    for (poe_kernels kernels = 0; kernels <= poe_kernels_best(); kernels++)
        CHECK_INT(poe_bf16_check(kernels), POE_OK);
    CHECK(!strncmp(poe_bf16_engine(POE_KERNELS_GENERIC), "rounded, products in fp32", 25));
    printf("bf16 here: %s\n", poe_bf16_engine(poe_kernels_best()));
}

/* --- other operations that have products ---------------------------------------------------------------------------
 */

/* ||x - y|| / ||y|| */
static double distance(const float *x, const float *y, size_t n)
{
    double off = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        off += ((double)x[i] - (double)y[i]) * ((double)x[i] - (double)y[i]);
        norm += (double)y[i] * (double)y[i];
    }
    return norm > 0 ? sqrt(off / norm) : off > 0;
}

/* Rounded, but not more: a bf16 operand is off by at most 2^-9 of itself, results by about as much. */
static void expect_rounded(const char *what, const float *x, const float *y, size_t n, double most)
{
    double d = distance(x, y, n);
    if (d > 1e-5 && d <= most)
        return;
    fprintf(stderr, "%s: bf16 is off from fp32 by %.3g of the norm, expected 1e-5 to %.3g\n", what, d, most);
    check_failures++;
}

enum { ROWS = 64, CHANNELS = 32, VOCAB = 60 };

/* Each operation's outputs, one after the other. */
static size_t attention(poe_backend *be, poe_rng *rng, float *out)
{
    poe_attention_shape shape = {2, 32, 4, 2, 8, 20};
    size_t n = ROWS * CHANNELS, kv = n / 2;
    float *q = draw(rng, n), *k = draw(rng, kv), *v = draw(rng, kv), *dy = draw(rng, n), lse[2 * 4 * 32];
    be->ops->attention_forward(be, out, lse, q, k, v, &shape);
    be->ops->attention_backward(be, out + n, out + 2 * n, out + 2 * n + kv, dy, out, lse, q, k, v, &shape);
    free(q), free(k), free(v), free(dy);
    return 3 * n;
}

static size_t head(poe_backend *be, poe_rng *rng, float *out)
{
    size_t n = ROWS * CHANNELS, vc = 64 * CHANNELS;
    float *u = draw(rng, n), *w = draw(rng, vc);
    int32_t targets[ROWS];
    double loss;
    for (int i = 0; i < ROWS; i++)
        targets[i] = (int32_t)pick(rng, 0, VOCAB - 1);
    memset(out + n, 0, vc * sizeof(*out));
    be->ops->head_loss(be, &loss, out, out + n, u, w, targets, 1, ROWS, CHANNELS, VOCAB, 64);
    be->ops->head_logits(be, out + n + vc, u, w, ROWS, CHANNELS, VOCAB);
    free(u), free(w);
    return n + vc + (size_t)ROWS * VOCAB;
}

static size_t muon(poe_backend *be, poe_rng *rng, float *out)
{
    size_t n = 64 * CHANNELS;
    float *m = draw(rng, n), *g = draw(rng, n), second[64] = {0};
    memset(out, 0, n * sizeof(*out));
    be->ops->muon(be, out, m, second, g, 64, CHANNELS, &(poe_muon_step){0.02f, 0.9f, 0});
    free(m), free(g);
    return n;
}

static void test_operations(void)
{
    static const struct {
        const char *name;
        size_t (*run)(poe_backend *be, poe_rng *rng, float *out);
        double most; /* Muon's five steps amplify what the first rounds by up to 8, 4, 4, 3 and 2 in part */
    } rows[] = {{"attention", attention, 1e-2}, {"head", head, 1e-2}, {"muon", muon, 3e-2}};
    for (size_t i = 0; i < sizeof(rows) / sizeof(*rows); i++) {
        float *out[2];
        size_t n = 0;
        for (int bf16 = 0; bf16 < 2; bf16++) {
            poe_rng rng;
            poe_rng_init(&rng, 4, rows[i].name);
            poe_backend *be = backend(1, bf16, &product_limits);
            out[bf16] = draw(&rng, 16384);
            n = rows[i].run(be, &rng, out[bf16]);
            poe_cpu_destroy(be);
        }
        expect_rounded(rows[i].name, out[1], out[0], n, rows[i].most);
        free(out[0]), free(out[1]);
    }
}

/* --- stages ------------------------------------------------------------------------------------------------------ */

enum { B = 3, T = 48, STEPS = 30 };

static poe_status create_fp32(const poe_backend_limits *limits, poe_backend **be)
{
    *be = backend(1, false, limits);
    return POE_OK;
}

static poe_status create_bf16(const poe_backend_limits *limits, poe_backend **be)
{
    *be = backend(1, true, limits);
    return POE_OK;
}

static poe_status create_bf16_threads(const poe_backend_limits *limits, poe_backend **be)
{
    *be = backend(3, true, limits);
    return POE_OK;
}

static const chain_backend fp32 = {"fp32", create_fp32, poe_cpu_destroy};
static const chain_backend bf16 = {"bf16", create_bf16, poe_cpu_destroy};
static const chain_backend bf16_threads = {"bf16 with 3 threads", create_bf16_threads, poe_cpu_destroy};

/* A text of a few words over and over, in random order. */
static void fill_tokens(int32_t *tokens, size_t n)
{
    poe_rng rng;
    poe_rng_init(&rng, 6, "text");
    for (size_t i = 0, word = 0, at = 0; i < n; i++) {
        tokens[i] = (int32_t)((word * 7 + at * at + at) % VOCAB);
        if (++at == 3 + word) {
            word = pick(&rng, 0, 5);
            at = 0;
        }
    }
}

static poe_model small_model(void)
{
    poe_model_config config = {.n_stages = 2,
                               .stage_layers = {2, 1},
                               .head = POE_HEAD_PER_STAGE,
                               .n_embd = 64,
                               .n_head = 4,
                               .n_kv_head = 2,
                               .mlp_dim = 100,
                               .sequence_len = T,
                               .vocab_size = VOCAB,
                               .window_pattern = "L",
                               .norm_eps = 1.1920929e-7};
    poe_model model;
    chain_require(poe_model_init(&model, &config) == POE_OK, "poe_model_init");
    return model;
}

/* Initial values, and noise on top: some initial weights are zero, and so would gradients be. */
static void fill_stage(const poe_model *model, poe_stage *stage, double noise)
{
    const poe_tensor_table *tables[] = {poe_stage_own_table(stage), poe_stage_shared_table(stage)};
    float *values[] = {poe_stage_own_values(stage), poe_stage_shared_values(stage)};
    for (int i = 0; i < 2; i++) {
        poe_model_initialise(model, tables[i], 7, values[i]);
        poe_rng rng;
        poe_rng_init(&rng, 8, i ? "shared" : "own");
        for (size_t j = 0; j < tables[i]->floats; j++)
            values[i][j] += (float)(noise * poe_rng_normal(&rng));
    }
    poe_stage_parameters_changed(stage);
}

static void open_chain(stage_chain *chain, const poe_model *model, const chain_backend *kind, double noise)
{
    chain_open(chain, model, B, true, kind);
    for (int k = 0; k < chain->n_stages; k++)
        fill_stage(model, chain->stages[k], noise);
}

/* Relative norms per tensor. Every operand is off by at most 2^-9 of itself, in some tens of products one after the
 * other whose roundings are independent: 2 %. A tensor of single numbers sums terms of both signs, which cancel: it is
 * left out. */
static void compare_gradients(const poe_tensor_table *table, size_t floats, const float *x, const float *y)
{
    for (size_t i = 0; i < table->count; i++) {
        const poe_tensor *tensor = &table->rows[i];
        size_t n = tensor->rows * tensor->cols;
        if (tensor->offset < floats && n > 4)
            expect_rounded(tensor->name, x + tensor->offset, y + tensor->offset, n, 2e-2);
    }
}

static bool same_gradients(poe_stage *a, poe_stage *b, size_t own)
{
    return !memcmp(poe_stage_own_gradients(a), poe_stage_own_gradients(b), own * sizeof(float)) &&
           !memcmp(poe_stage_shared_gradients(a), poe_stage_shared_gradients(b),
                   poe_stage_shared_table(a)->floats * sizeof(float));
}

static void test_stages(void)
{
    const chain_backend *const kinds[3] = {&fp32, &bf16, &bf16_threads};
    poe_model model = small_model();
    stage_chain chains[3];
    int32_t tokens[B * T + 1];
    fill_tokens(tokens, B * T + 1);
    for (int i = 0; i < 3; i++) {
        double losses[POE_MAX_STAGES] = {0};
        open_chain(&chains[i], &model, kinds[i], 0.05);
        chain_clear(&chains[i]);
        chain_run(&chains[i], B, T, tokens, tokens + 1, 1, losses);
    }
    for (int k = 0; k < chains[0].n_stages; k++) {
        poe_stage *stages[3] = {chains[0].stages[k], chains[1].stages[k], chains[2].stages[k]};
        const poe_tensor_table *own = poe_stage_own_table(stages[0]), *shared = poe_stage_shared_table(stages[0]);
        size_t floats = own->rows[own->count - 1].offset; /* the stage's head has none of its own (stage.h) */
        compare_gradients(own, floats, poe_stage_own_gradients(stages[1]), poe_stage_own_gradients(stages[0]));
        compare_gradients(shared, shared->floats, poe_stage_shared_gradients(stages[1]),
                          poe_stage_shared_gradients(stages[0]));
        CHECK(same_gradients(stages[1], stages[2], floats));
    }
    for (int i = 0; i < 3; i++)
        chain_close(&chains[i]);
}

/* --- training ---------------------------------------------------------------------------------------------------- */

/* Losses of all steps, (STEPS, stages). */
static void train(const poe_model *model, const chain_backend *kind, const int32_t *tokens, double *losses)
{
    poe_optimizer_config config = {.matrix_lr = 0.02,
                                   .embedding_lr = 0.3,
                                   .unembedding_lr = 0.008,
                                   .scalar_lr = 0.5,
                                   .weight_decay = 0.28,
                                   .total_batch_size = 4096,
                                   .num_iterations = STEPS,
                                   .warmup_steps = 5,
                                   .warmdown_ratio = 0.65,
                                   .final_lr_frac = 0.05};
    stage_chain chain;
    open_chain(&chain, model, kind, 0);
    float *sum = malloc(chain.shared_floats * sizeof(*sum));
    chain_require(sum != NULL, "memory");
    for (int step = 0; step < STEPS; step++) {
        poe_rates rates;
        poe_rates_at(model, &config, step, &rates);
        chain_clear(&chain);
        const int32_t *idx = tokens + (size_t)step * B * T;
        chain_run(&chain, B, T, idx, idx + 1, 1, losses + step * chain.n_stages);
        chain_sum_shared(&chain, sum);
        chain_update_own(&chain, &rates);
        chain_update_shared(&chain, &rates, sum);
    }
    free(sum);
    chain_close(&chain);
}

static void test_training(void)
{
    enum { STAGES = 2 };
    static int32_t tokens[STEPS * B * T + 1];
    double a[STEPS * STAGES] = {0}, b[STEPS * STAGES] = {0}, c[STEPS * STAGES] = {0}, worst = 0;
    poe_model model = small_model();
    fill_tokens(tokens, STEPS * B * T + 1);
    train(&model, &fp32, tokens, a);
    train(&model, &bf16, tokens, b);
    train(&model, &bf16_threads, tokens, c);
    for (int i = 0; i < STEPS * STAGES; i++) {
        CHECK_NEAR(b[i], a[i], 1e-2, 0);
        worst = fmax(worst, fabs(b[i] / a[i] - 1));
    }
    CHECK(!memcmp(b, c, sizeof(b)));
    CHECK(a[STEPS * STAGES - 1] < 0.8 * a[0]); /* it learns */
    printf("%d steps: loss %.4f to %.4f; bf16 is off by at most %.2e of a loss\n", STEPS, a[0], a[STEPS * STAGES - 1],
           worst);
}

int main(void)
{
    test_rounding();
    test_engine();
    test_blocks("in fp32", poe_block_in_fp32);
    test_blocks("by emulation", poe_block_by_emulation);
    if (!strcmp(poe_bf16_engine(poe_kernels_best()), "AMX tiles"))
        test_blocks("on tiles", poe_block_on_tiles);
    test_matmuls();
    test_operations();
    test_stages();
    test_training();
    return check_result();
}
