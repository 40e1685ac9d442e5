/* SPDX-License-Identifier: MIT
 * How fast one process computes a training step of all stages, one after the other, without ranks or messages: what
 * compares with a PyTorch trainer of the same model on the same cores. Prints one JSON object:
 *   tok_s                   tokens per second of the whole step
 *   tok_s_forward_backward  of forward and backward alone
 *   optimizer_ms            all updates of a step
 *   model_gflops            6 per matrix parameter and token, attention by its visible window; forward and backward
 *   sgemm_gflops            1024^3 products by the same kernels on the same threads
 *   share_of_sgemm          model_gflops / sgemm_gflops
 *   peak_mib                most resident memory of the process, before sgemm and triad are measured
 * and with --profile:
 *   triad_gbs               memory bandwidth, y += x on arrays that no cache holds, on the same threads
 *   step_ms, operations     of the fastest step: see ops_timer.h
 * Times are the minimum over --reps steps. --stage K leaves the other stages out: what the rank of stage K needs.
 *   bench_step --stages 2,2,2 --n-embd 384 --n-head 6 --sequence-len 512 --vocab-size 4096 --threads 2 */
#include <errno.h>
#include <getopt.h>
#include <jansson.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "experiments/speed/ops_timer.h"
#include "src/clock.h"
#include "src/log.h"
#include "src/rng.h"
#include "stages/cpu/cpu.h"
#include "stages/stage.h"

typedef struct settings {
    poe_model_config model;
    int batch, micro, reps, threads;
    int stage; /* -1: all */
    bool bf16; /* operands of the products */
    bool profile;
} settings;

typedef struct bench {
    const settings *s;
    poe_model model;
    poe_backend *backend;
    poe_ops_timer *timer; // may be NULL
    int first, end;       /* the stages that are here */
    poe_stage *stages[POE_MAX_STAGES];
    int32_t *idx, *targets;
    float *h[2];
    poe_rates rates;
    double work, update; /* seconds, each the least of all steps */
    double step;         /* the fastest step's */
    json_t *operations;  /* the fastest step's, or NULL */
} bench;

static void *checked(void *memory)
{
    if (!memory) {
        poe_error("out of memory");
        exit(1);
    }
    return memory;
}

static void check(poe_status status)
{
    if (status != POE_OK)
        exit(poe_exit_status(status));
}

/* --- flags ------------------------------------------------------------------------------------------------------- */

/* The whole number at the start of `text`, which `stop` (or the end) must follow. */
static int parse_int(const char *flag, const char *text, char stop, const char **rest)
{
    char *end;
    errno = 0;
    long value = strtol(text, &end, 10);
    if (errno || end == text || (*end && *end != stop) || value < 0 || value > INT_MAX) {
        poe_error("--%s is \"%s\": it must be a whole number%s", flag, text, stop ? ", or several with commas" : "");
        exit(2);
    }
    *rest = end;
    return (int)value;
}

static void parse_stages(poe_model_config *model, const char *text)
{
    for (model->n_stages = 0; model->n_stages < POE_MAX_STAGES; text++) {
        model->stage_layers[model->n_stages++] = parse_int("stages", text, ',', &text);
        if (!*text)
            return;
    }
    poe_error("--stages has more than %d stages", POE_MAX_STAGES);
    exit(2);
}

/* True when `text` is `yes`, false when it is `no`. */
static bool parse_choice(const char *flag, const char *text, const char *yes, const char *no)
{
    if (strcmp(text, yes) && strcmp(text, no)) {
        poe_error("--%s is \"%s\": it must be %s or %s", flag, text, no, yes);
        exit(2);
    }
    return !strcmp(text, yes);
}

enum { STAGES = 256, HEAD, OBJECTIVE, WINDOW, DTYPE, PROFILE };

static const struct option flags[] = {
    {"n-embd", 1, NULL, 0}, /* 0 to 10: see `numbers` */
    {"n-head", 1, NULL, 1},
    {"n-kv-head", 1, NULL, 2},
    {"mlp-dim", 1, NULL, 3},
    {"sequence-len", 1, NULL, 4},
    {"vocab-size", 1, NULL, 5},
    {"batch", 1, NULL, 6},
    {"micro", 1, NULL, 7},
    {"reps", 1, NULL, 8},
    {"threads", 1, NULL, 9},
    {"stage", 1, NULL, 10},
    {"stages", 1, NULL, STAGES},
    {"head", 1, NULL, HEAD},
    {"objective", 1, NULL, OBJECTIVE},
    {"window-pattern", 1, NULL, WINDOW},
    {"dtype", 1, NULL, DTYPE},
    {"profile", 0, NULL, PROFILE},
    {NULL, 0, NULL, 0},
};

static void parse(int argc, char **argv, settings *s)
{
    poe_model_config *m = &s->model;
    int *numbers[] = {&m->n_embd, &m->n_head, &m->n_kv_head, &m->mlp_dim, &m->sequence_len, &m->vocab_size,
                      &s->batch,  &s->micro,  &s->reps,      &s->threads, &s->stage};
    const char *rest;
    for (int flag, row; (flag = getopt_long(argc, argv, "", flags, &row)) != -1;) {
        if (flag == '?')
            exit(2);
        if (flag < STAGES)
            *numbers[flag] = parse_int(flags[row].name, optarg, 0, &rest);
        else if (flag == STAGES)
            parse_stages(m, optarg);
        else if (flag == HEAD)
            m->head = parse_choice("head", optarg, "ps", "sh") ? POE_HEAD_PER_STAGE : POE_HEAD_SHARED;
        else if (flag == OBJECTIVE)
            m->objective = parse_choice("objective", optarg, "bp", "poe") ? POE_OBJECTIVE_BP : POE_OBJECTIVE_POE;
        else if (flag == WINDOW)
            snprintf(m->window_pattern, sizeof(m->window_pattern), "%s", optarg);
        else if (flag == DTYPE)
            s->bf16 = parse_choice("dtype", optarg, "bf16", "fp32");
        else
            s->profile = true;
    }
    if (s->batch < 1 || s->micro < 1 || s->reps < 1 || s->threads < 1 || s->stage >= m->n_stages) {
        poe_error("--batch, --micro, --reps and --threads must be at least 1, --stage less than the number of stages");
        exit(2);
    }
    if (!m->n_kv_head)
        m->n_kv_head = m->n_head;
}

/* --- a step ------------------------------------------------------------------------------------------------------ */

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

static void open_stages(bench *b, poe_backend_limits *limits)
{
    for (int k = b->first; k < b->end; k++) {
        poe_stage_settings stage = {.stage = k, .rows = (size_t)b->s->batch, .slots = 1, .training = true};
        poe_stage_limits(&b->model, &stage, limits);
        limits->bf16 = b->s->bf16;
        if (k == b->first)
            check(poe_cpu_create(poe_kernels_best(), b->s->threads, limits, &b->backend));
        check(poe_stage_create(&b->model, &stage, b->backend, &b->stages[k]));
        fill_normal(poe_stage_own_table(b->stages[k]), poe_stage_own_values(b->stages[k]));
        fill_normal(poe_stage_shared_table(b->stages[k]), poe_stage_shared_values(b->stages[k]));
        poe_stage_parameters_changed(b->stages[k]);
    }
}

static void open_buffers(bench *b, size_t n, size_t c)
{
    b->idx = checked(malloc(n * sizeof(int32_t)));
    b->targets = checked(malloc(n * sizeof(int32_t)));
    poe_rng rng;
    poe_rng_init(&rng, 1, "activations");
    for (int i = 0; i < 2; i++) {
        b->h[i] = checked(malloc(n * c * sizeof(float)));
        for (size_t j = 0; j < n * c; j++) /* what --stage K reads */
            b->h[i][j] = (float)poe_rng_normal(&rng);
    }
}

static void open_bench(bench *b, const settings *s)
{
    *b = (bench){.s = s, .first = s->stage < 0 ? 0 : s->stage, .work = INFINITY, .update = INFINITY, .step = INFINITY};
    check(poe_model_init(&b->model, &s->model));
    b->end = s->stage < 0 ? s->model.n_stages : s->stage + 1;
    poe_backend_limits limits;
    open_stages(b, &limits);
    if (s->profile)
        b->timer = checked(poe_ops_timer_attach(b->backend));
    open_buffers(b, limits.rows, limits.c);
    poe_optimizer_config optimizer = {.matrix_lr = 0.02,
                                      .embedding_lr = 0.3,
                                      .unembedding_lr = 0.008,
                                      .scalar_lr = 0.5,
                                      .weight_decay = 0.28,
                                      .total_batch_size = (double)limits.rows * s->micro,
                                      .num_iterations = 1000,
                                      .warmup_steps = 2,
                                      .warmdown_ratio = 0.65,
                                      .final_lr_frac = 0.05};
    poe_rates_at(&b->model, &optimizer, 0, &b->rates);
}

static void micro_batch(bench *b, poe_rng *rng)
{
    size_t t = (size_t)b->s->model.sequence_len, n = (size_t)b->s->batch * t;
    for (size_t i = 0; i < n; i++) {
        b->idx[i] = (int32_t)(poe_rng_next(rng) % (uint64_t)b->s->model.vocab_size);
        b->targets[i] = (int32_t)(poe_rng_next(rng) % (uint64_t)b->s->model.vocab_size);
    }
    for (int k = b->first; k < b->end; k++) {
        double loss;
        poe_stage_forward(b->stages[k], 0, (size_t)b->s->batch, t, b->idx,
                          k ? &(poe_crossing){.h = b->h[(k + 1) % 2]} : NULL, &(poe_crossing){.h = b->h[k % 2]});
        check(poe_stage_backward(b->stages[k], 0, b->targets, b->s->micro, NULL, NULL, &loss));
    }
}

/* Every stage's own update; the shared sum, and its update on every replica, as ranks do it. */
static void update(bench *b)
{
    float *sum = poe_stage_shared_gradients(b->stages[b->first]);
    size_t floats = poe_stage_shared_table(b->stages[b->first])->floats;
    for (int k = b->first; k < b->end; k++)
        poe_stage_update_own(b->stages[k], &b->rates);
    for (int k = b->first + 1; k < b->end; k++)
        b->backend->ops->add(b->backend, sum, poe_stage_shared_gradients(b->stages[k]), floats);
    for (int k = b->first; k < b->end; k++)
        poe_stage_update_shared(b->stages[k], &b->rates, sum);
    for (int k = b->first; k < b->end; k++) {
        poe_stage_clear_gradients(b->stages[k]);
        poe_stage_clear_shared_gradients(b->stages[k]);
    }
}

/* --- measuring --------------------------------------------------------------------------------------------------- */

/* Those that were called. */
static json_t *operations_json(const poe_ops_timer *timer)
{
    size_t count;
    const poe_ops_timer_row *rows = poe_ops_timer_rows(timer, &count);
    json_t *list = checked(json_array());
    for (size_t i = 0; i < count; i++)
        if (rows[i].calls)
            json_array_append_new(
                list, checked(json_pack("{ss ss sI sf sf sf sf}", "name", rows[i].name, "group", rows[i].group, "calls",
                                        (json_int_t)rows[i].calls, "seconds", rows[i].seconds, "cpu_seconds",
                                        rows[i].cpu_seconds, "flops", rows[i].flops, "bytes", rows[i].bytes)));
    return list;
}

static void measure_step(bench *b, poe_rng *rng)
{
    if (b->timer)
        poe_ops_timer_reset(b->timer);
    double start = poe_now();
    for (int m = 0; m < b->s->micro; m++)
        micro_batch(b, rng);
    double middle = poe_now();
    update(b);
    double end = poe_now();
    b->work = fmin(b->work, middle - start);
    b->update = fmin(b->update, end - middle);
    if (end - start >= b->step)
        return;
    b->step = end - start;
    if (b->timer) {
        json_decref(b->operations);
        b->operations = operations_json(b->timer);
    }
}

static double sgemm_gflops(const bench *b)
{
    enum { N = 1024 };
    float *x = checked(calloc(3 * N * N, sizeof(float)));
    double best = INFINITY;
    for (int rep = 0; rep < 11; rep++) {
        double start = poe_now();
        b->backend->ops->matmul(b->backend, x, N, x + N * N, N, x + 2 * N * N, N, N, N, false);
        best = rep ? fmin(best, poe_now() - start) : best;
    }
    free(x);
    return 2.0 * N * N * N / best / 1e9;
}

/* In place, so that no write hides a read of the same line; on the backend's memory, which has huge pages. */
static double triad_gbs(const bench *b)
{
    enum { N = 1 << 25 };
    const poe_ops *ops = b->backend->ops;
    size_t bytes = N * sizeof(float);
    float *y = checked(ops->memory_allocate(b->backend, "triad", bytes));
    float *x = checked(ops->memory_allocate(b->backend, "triad", bytes));
    ops->fill(b->backend, x, 1, N); /* pages of its own: untouched ones are all the same zeros */
    double best = INFINITY;
    for (int rep = 0; rep < 6; rep++) {
        double start = poe_now();
        ops->add(b->backend, y, x, N);
        best = rep ? fmin(best, poe_now() - start) : best;
    }
    ops->memory_free(b->backend, x, bytes);
    ops->memory_free(b->backend, y, bytes);
    return 12.0 * N / best / 1e9;
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

static void print_result(const bench *b)
{
    const settings *s = b->s;
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    double tokens = (double)s->batch * s->model.sequence_len * s->micro, sgemm = sgemm_gflops(b);
    double gflops = flops_per_token(&b->model) * tokens / b->work / 1e9;
    json_t *result = checked(json_pack("{si ss so sf sf sf sf sf sf sf}", "threads", s->threads, "kernels",
                                       poe_kernels_name(poe_kernels_best()), "blas",
                                       json_sprintf("%s (%s)", poe_blas_library(), poe_blas_kernels()), "tok_s",
                                       tokens / (b->work + b->update), "tok_s_forward_backward", tokens / b->work,
                                       "optimizer_ms", b->update * 1e3, "model_gflops", gflops, "sgemm_gflops", sgemm,
                                       "share_of_sgemm", gflops / sgemm, "peak_mib", (double)usage.ru_maxrss / 1024));
    if (b->timer) {
        json_object_set_new(result, "triad_gbs", json_real(triad_gbs(b)));
        json_object_set_new(result, "step_ms", json_real(b->step * 1e3));
        json_object_set(result, "operations", b->operations);
    }
    json_dumpf(result, stdout, JSON_COMPACT | JSON_REAL_PRECISION(9));
    putchar('\n');
    json_decref(result);
}

static void close_bench(bench *b)
{
    for (int k = b->first; k < b->end; k++)
        poe_stage_destroy(b->stages[k]);
    poe_ops_timer_detach(b->timer);
    poe_cpu_destroy(b->backend);
    for (int i = 0; i < 2; i++)
        free(b->h[i]);
    free(b->idx);
    free(b->targets);
    json_decref(b->operations);
}

int main(int argc, char **argv)
{
    settings s = {.model = {.n_stages = 3,
                            .stage_layers = {2, 2, 2},
                            .n_embd = 384,
                            .n_head = 6,
                            .sequence_len = 512,
                            .vocab_size = 4096,
                            .window_pattern = "L",
                            .norm_eps = 1.1920929e-7},
                  .batch = 4,
                  .micro = 4,
                  .reps = 3,
                  .threads = 1,
                  .stage = -1};
    poe_blas_ensure(poe_kernels_best(), argv);
    parse(argc, argv, &s);
    bench b;
    open_bench(&b, &s);
    poe_rng rng;
    poe_rng_init(&rng, 1, "tokens");
    micro_batch(&b, &rng); /* warms up */
    update(&b);
    for (int rep = 0; rep < s.reps; rep++)
        measure_step(&b, &rng);
    print_result(&b);
    close_bench(&b);
    return 0;
}
