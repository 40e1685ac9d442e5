/* SPDX-License-Identifier: MIT
 * How fast one process computes a training step of all stages, one after the other, without ranks or messages: what
 * compares with a PyTorch trainer of the same model on the same cores. Prints one JSON object:
 *   tok_s                   tokens per second of the whole step
 *   tok_s_forward_backward  of forward and backward alone
 *   optimizer_ms            all updates of a step
 *   model_gflops            6 per matrix parameter and token, attention by its visible window
 *   sgemm_gflops            1024^3 products by OpenBLAS on the same threads
 *   share_of_sgemm          model_gflops / sgemm_gflops
 *   peak_mib                resident memory of the process
 * Times are the minimum over --reps steps.
 *   bench_step --stages 2,2,2 --n-embd 384 --n-head 6 --sequence-len 512 --vocab-size 4096 --batch 4 --micro 4 --threads 2 */
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "src/clock.h"
#include "src/rng.h"
#include "stages/cpu/cpu.h"
#include "stages/stage.h"

typedef struct settings {
    poe_model_config model;
    int batch, micro, reps, threads;
} settings;

typedef struct bench {
    const settings *s;
    poe_model model;
    poe_backend *backend;
    poe_stage *stages[POE_MAX_STAGES];
    int32_t *idx, *targets;
    float *h[2];
    poe_rates rates;
} bench;

static void *checked(void *memory)
{
    if (!memory) {
        fprintf(stderr, "bench_step: out of memory\n");
        exit(1);
    }
    return memory;
}

static void check(poe_status status)
{
    if (status != POE_OK)
        exit(poe_exit_status(status));
}

static void parse_stages(poe_model_config *model, char *text)
{
    model->n_stages = 0;
    for (char *part = strtok(text, ","); part && model->n_stages < POE_MAX_STAGES; part = strtok(NULL, ","))
        model->stage_layers[model->n_stages++] = atoi(part);
}

enum { STAGES = 256, HEAD, OBJECTIVE, WINDOW };

static void parse(int argc, char **argv, settings *s)
{
    int embd = 384, heads = 6, kv = 0, mlp = 0, t = 512, v = 4096, *plain[] = {&embd, &heads, &kv, &mlp, &t, &v, &s->batch, &s->micro, &s->reps, &s->threads};
    static const struct option flags[] = {
        {"n-embd", 1, NULL, 0}, {"n-head", 1, NULL, 1}, {"n-kv-head", 1, NULL, 2}, {"mlp-dim", 1, NULL, 3},
        {"sequence-len", 1, NULL, 4}, {"vocab-size", 1, NULL, 5}, {"batch", 1, NULL, 6}, {"micro", 1, NULL, 7},
        {"reps", 1, NULL, 8}, {"threads", 1, NULL, 9}, {"stages", 1, NULL, STAGES}, {"head", 1, NULL, HEAD},
        {"objective", 1, NULL, OBJECTIVE}, {"window-pattern", 1, NULL, WINDOW}, {NULL, 0, NULL, 0}};
    for (int flag; (flag = getopt_long(argc, argv, "", flags, NULL)) != -1;) {
        if (flag == '?')
            exit(2);
        if (flag < STAGES)
            *plain[flag] = atoi(optarg);
        else if (flag == STAGES)
            parse_stages(&s->model, optarg);
        else if (flag == HEAD)
            s->model.head = strcmp(optarg, "ps") == 0 ? POE_HEAD_PER_STAGE : POE_HEAD_SHARED;
        else if (flag == OBJECTIVE)
            s->model.objective = strcmp(optarg, "bp") == 0 ? POE_OBJECTIVE_BP : POE_OBJECTIVE_POE;
        else
            snprintf(s->model.window_pattern, sizeof(s->model.window_pattern), "%s", optarg);
    }
    s->model.n_embd = embd, s->model.n_head = heads, s->model.n_kv_head = kv ? kv : heads, s->model.mlp_dim = mlp;
    s->model.sequence_len = t, s->model.vocab_size = v;
}

static void fill_normal(const poe_tensor_table *table, float *values)
{
    for (size_t row = 0; row < table->count; row++) {
        const poe_tensor *tensor = &table->rows[row];
        poe_rng rng;
        poe_rng_init(&rng, 0, tensor->name);
        for (size_t i = 0; i < tensor->rows * tensor->cols; i++)
            values[tensor->offset + i] = (float)(poe_rng_normal(&rng) * 0.3 / sqrt((double)tensor->cols));
    }
}

static void open_bench(bench *b, const settings *s)
{
    b->s = s;
    check(poe_model_init(&b->model, &s->model));
    poe_backend_limits limits;
    for (int k = 0; k < s->model.n_stages; k++) {
        poe_stage_settings stage = {.stage = k, .rows = (size_t)s->batch, .training = true};
        poe_stage_limits(&b->model, &stage, &limits);
        if (k == 0)
            check(poe_cpu_create(poe_kernels_best(), s->threads, &limits, &b->backend));
        check(poe_stage_create(&b->model, &stage, b->backend, &b->stages[k]));
        fill_normal(poe_stage_own_table(b->stages[k]), poe_stage_own_values(b->stages[k]));
        fill_normal(poe_stage_shared_table(b->stages[k]), poe_stage_shared_values(b->stages[k]));
        poe_stage_parameters_changed(b->stages[k]);
    }
    size_t n = limits.rows;
    b->idx = checked(malloc(n * sizeof(int32_t)));
    b->targets = checked(malloc(n * sizeof(int32_t)));
    for (int i = 0; i < 2; i++)
        b->h[i] = checked(malloc(n * limits.c * sizeof(float)));
    poe_optimizer_config optimizer = {.matrix_lr = 0.02, .embedding_lr = 0.3, .unembedding_lr = 0.008, .scalar_lr = 0.5,
                                      .weight_decay = 0.28, .total_batch_size = (double)n * s->micro,
                                      .num_iterations = 1000, .warmup_steps = 2, .warmdown_ratio = 0.65, .final_lr_frac = 0.05};
    poe_rates_at(&b->model, &optimizer, 0, &b->rates);
}

static void micro_batch(bench *b, poe_rng *rng)
{
    size_t t = (size_t)b->s->model.sequence_len, n = (size_t)b->s->batch * t;
    for (size_t i = 0; i < n; i++) {
        b->idx[i] = (int32_t)(poe_rng_next(rng) % (uint64_t)b->s->model.vocab_size);
        b->targets[i] = (int32_t)(poe_rng_next(rng) % (uint64_t)b->s->model.vocab_size);
    }
    const float *h_in = NULL;
    for (int k = 0; k < b->s->model.n_stages; k++) {
        float *h_out = b->h[k % 2];
        double loss;
        poe_stage_forward(b->stages[k], (size_t)b->s->batch, t, b->idx, h_in, h_out);
        check(poe_stage_backward(b->stages[k], b->targets, b->s->micro, &loss));
        h_in = h_out;
    }
}

/* Every stage's own update; the shared sum, and its update on every replica, as ranks do it. */
static void update(bench *b)
{
    int n_stages = b->s->model.n_stages;
    float *sum = poe_stage_shared_gradients(b->stages[0]);
    size_t floats = poe_stage_shared_table(b->stages[0])->floats;
    for (int k = 0; k < n_stages; k++)
        poe_stage_update_own(b->stages[k], &b->rates);
    for (int k = 1; k < n_stages; k++)
        b->backend->ops->add(b->backend, sum, poe_stage_shared_gradients(b->stages[k]), floats);
    for (int k = 0; k < n_stages; k++)
        poe_stage_update_shared(b->stages[k], &b->rates, sum);
    for (int k = 0; k < n_stages; k++) {
        poe_stage_clear_gradients(b->stages[k]);
        poe_stage_clear_shared_gradients(b->stages[k]);
    }
}

static double sgemm_gflops(bench *b)
{
    enum { N = 1024 };
    float *x = checked(calloc(3 * N * N, sizeof(float)));
    double best = INFINITY;
    for (int rep = 0; rep < 11; rep++) {
        double start = poe_now();
        b->backend->ops->matmul(b->backend, x, N, x + N * N, N, x + 2 * N * N, N, N, N, false);
        double seconds = poe_now() - start;
        if (rep && seconds < best)
            best = seconds;
    }
    free(x);
    return 2.0 * N * N * N / best / 1e9;
}

/* Model FLOPs of a token, counted as PyTorch's trainer counts them: causal attention at half its square. */
static double flops_per_token(const poe_model *model)
{
    double matrices = 0, attention = 0, t = model->config.sequence_len;
    for (int k = -1; k < model->config.n_stages; k++) {
        poe_tensor_table table;
        check(poe_model_tensors(model, k, &table));
        for (size_t row = 0; row < table.count; row++)
            if (table.rows[row].group == POE_GROUP_MATRIX)
                matrices += (double)(table.rows[row].rows * table.rows[row].cols);
        poe_tensor_table_free(&table);
    }
    matrices += model->config.n_stages * (double)model->vocab_padded * model->config.n_embd;
    for (int i = 0; i < model->n_layers; i++) {
        double window = model->layers[i].window;
        attention += 12.0 * model->config.n_embd * (window >= t ? t / 2 : window);
    }
    return 6 * matrices + attention;
}

static void run(bench *b)
{
    const settings *s = b->s;
    double best_work = INFINITY, best_update = INFINITY;
    poe_rng rng;
    poe_rng_init(&rng, 1, "tokens");
    for (int rep = 0; rep <= s->reps; rep++) {
        double start = poe_now();
        for (int m = 0; m < s->micro; m++)
            micro_batch(b, &rng);
        double middle = poe_now();
        update(b);
        double end = poe_now();
        if (rep == 0)
            continue;
        best_work = fmin(best_work, middle - start);
        best_update = fmin(best_update, end - middle);
    }
    double tokens = (double)s->batch * s->model.sequence_len * s->micro, sgemm = sgemm_gflops(b);
    double gflops = flops_per_token(&b->model) * tokens / best_work / 1e9;
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    printf("{\"threads\": %d, \"tok_s\": %.0f, \"tok_s_forward_backward\": %.0f, \"optimizer_ms\": %.1f, \"model_gflops\": %.0f, "
           "\"sgemm_gflops\": %.0f, \"share_of_sgemm\": %.3f, \"peak_mib\": %.0f}\n", s->threads,
           tokens / (best_work + best_update), tokens / best_work, best_update * 1e3, gflops, sgemm, gflops / sgemm,
           (double)usage.ru_maxrss / 1024);
}

int main(int argc, char **argv)
{
    settings s = {.model = {.n_stages = 3, .stage_layers = {2, 2, 2}, .window_pattern = "L", .norm_eps = 1.1920929e-7},
                  .batch = 4, .micro = 4, .reps = 3, .threads = 1};
    poe_blas_ensure(poe_kernels_best(), argv);
    parse(argc, argv, &s);
    bench *b = checked(calloc(1, sizeof(*b)));
    open_bench(b, &s);
    run(b);
    for (int k = 0; k < s.model.n_stages; k++)
        poe_stage_destroy(b->stages[k]);
    poe_cpu_destroy(b->backend);
    for (int i = 0; i < 2; i++)
        free(b->h[i]);
    free(b->idx);
    free(b->targets);
    free(b);
    return 0;
}
