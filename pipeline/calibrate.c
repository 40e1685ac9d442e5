/* SPDX-License-Identifier: MIT */
#include "pipeline/calibrate.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "comm/inproc/inproc.h"
#include "src/clock.h"
#include "src/log.h"
#include "src/rng.h"
#include "stages/cpu/cpu.h"
#include "stages/stage.h"

enum {
    MOST_REPETITIONS = 25, /* short ones: the least is what no other process disturbed */
    LEAST_POSITIONS = 512, /* fewer only when everything else was made smaller */
    LEAST_WIDTH = 256,
    DEEP = 3, /* layers of the stage that tells a layer from the rest */
    FEW_TOKENS = 64, /* the vocabulary of stages whose layers are timed: their head takes next to nothing */
    PROBE_SIDE = 512,
    MESSAGES = 12,
    MOST_MESSAGE = 16 << 20, /* bytes */
    MUON_SIDE = 512,         /* larger matrices are timed at a size below and scaled */
    ADAMW_FLOATS = 1 << 22,
};

/* Seconds: what the parts, and the updates, may take; a pass of the largest. */
static const double PARTS = 5.4, UPDATES = 0.9, PASS = 0.1;

/* How much of the run's micro-batch and width is tried. */
typedef struct extent {
    size_t rows, positions;
    int narrower; /* the model's widths are divided by this */
} extent;

/* A stage of its own: one or DEEP of the run's layers, with embedding and a small head; or the run's head alone. */
typedef struct probe {
    poe_model model;
    poe_backend *backend;
    poe_stage *stage;
    extent extent;
    int32_t *tokens;    /* (2, rows * positions): inputs, targets */
    float *u;           /* the head alone: (2, rows * positions, C), its input and that one's gradient; else NULL */
    poe_part_time time; /* least of the passes so far */
} probe;

/* The probes of a calibration: a layer without and with value embedding, of a short and of the whole window; DEEP of the
 * second kind; a head. What a layer takes is a difference of two of them. */
enum { ONE_LAYER, DEEP_STAGE = 4, HEAD, PROBES };

/* What a stopwatch reads: of one thread its processor's time, so that other programs do not count; of several, which
 * wait for each other, the time on the clock. */
static double stopwatch(int threads)
{
    struct timespec t;
    if (threads > 1)
        return poe_now();
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static size_t smaller(size_t a, size_t b)
{
    return a < b ? a : b;
}

double poe_muon_flops(size_t rows, size_t cols)
{
    double small = (double)(rows < cols ? rows : cols), large = (double)(rows < cols ? cols : rows);
    return 5 * 2 * (2 * small * small * large + small * small * small);
}

/* --- arithmetic of a micro-batch, for scaling ------------------------------------------------------------------------- */

static double attention_flops(const poe_model *m, size_t rows, size_t positions, bool whole)
{
    double t = (double)positions, visible = t / 2;
    if (!whole) {
        double window = fmin(ceil((double)m->config.sequence_len / 4 / 128) * 128, t);
        visible = window - window * window / (2 * t);
    }
    return 4.0 * (double)rows * t * visible * m->config.n_embd;
}

static double layer_flops(const poe_model *m, size_t rows, size_t positions, bool whole)
{
    double n = (double)(rows * positions), c = m->config.n_embd;
    double matrices = 2 * c * c + 2 * c * (double)m->kv_dim + 2 * c * (double)m->mlp_dim;
    return 2 * n * matrices + attention_flops(m, rows, positions, whole);
}

/* --- one stage -------------------------------------------------------------------------------------------------------- */

static poe_status small_model(const poe_model *model, int layers, bool value_embed, bool whole, int vocabulary,
                              probe *p)
{
    poe_model_config config = model->config;
    poe_model *small = &p->model;
    config.n_embd /= p->extent.narrower;
    config.n_head /= p->extent.narrower;
    config.n_kv_head /= p->extent.narrower;
    config.mlp_dim = (int)model->mlp_dim / p->extent.narrower;
    config.vocab_size = vocabulary;
    config.n_stages = 1;
    config.stage_layers[0] = layers;
    config.objective = POE_OBJECTIVE_POE;
    config.backout = false;
    config.head = POE_HEAD_SHARED;
    strcpy(config.window_pattern, whole ? "L" : "S");
    poe_status status = poe_model_init(small, &config);
    if (status != POE_OK)
        return status;
    int short_window = (int)ceil((double)config.sequence_len / 4 / 128) * 128;
    for (int i = 0; i < layers; i++)
        small->layers[i] = (poe_layer_shape){.window = whole ? config.sequence_len : short_window,
                                             .has_value_embed = value_embed};
    return POE_OK;
}

static void fill_values(probe *p, const poe_tensor_table *table, float *values)
{
    for (size_t i = 0; i < table->count; i++) {
        const poe_tensor *tensor = &table->rows[i];
        float scale = 0.5f / sqrtf((float)tensor->cols);
        p->backend->ops->fill(p->backend, values + tensor->offset, scale, tensor->rows * tensor->cols);
    }
}

static void close_probe(probe *p)
{
    poe_stage_destroy(p->stage);
    poe_cpu_destroy(p->backend);
    free(p->tokens);
    free(p->u);
}

static poe_status open_probe(const poe_options *o, int threads, probe *p)
{
    poe_kernels kernels;
    poe_stage_settings settings = {.rows = p->extent.rows, .slots = 1, .training = true};
    poe_backend_limits limits;
    poe_status status = poe_kernels_parse(o->kernels, &kernels);
    if (status != POE_OK)
        return status;
    poe_stage_limits(&p->model, &settings, &limits);
    limits.bf16 = strcmp(o->dtype, "bf16") == 0;
    size_t n = p->extent.rows * p->extent.positions;
    p->tokens = malloc(2 * n * sizeof(*p->tokens));
    if (!p->tokens) {
        poe_error("out of memory for the calibration");
        return POE_FAILED;
    }
    poe_rng rng;
    poe_rng_init(&rng, 0, "calibration");
    for (size_t i = 0; i < 2 * n; i++)
        p->tokens[i] = (int32_t)(poe_rng_next(&rng) % (uint64_t)p->model.config.vocab_size);
    status = poe_cpu_create(kernels, threads, &limits, &p->backend);
    if (status == POE_OK)
        status = poe_stage_create(&p->model, &settings, p->backend, &p->stage);
    if (status != POE_OK)
        return status;
    fill_values(p, poe_stage_own_table(p->stage), poe_stage_own_values(p->stage));
    fill_values(p, poe_stage_shared_table(p->stage), poe_stage_shared_values(p->stage));
    poe_stage_parameters_changed(p->stage);
    return POE_OK;
}

static void pass_stage(probe *p, int threads)
{
    double loss, start = stopwatch(threads);
    poe_stage_forward(p->stage, 0, p->extent.rows, p->extent.positions, p->tokens, NULL, NULL);
    double middle = stopwatch(threads);
    (void)poe_stage_backward(p->stage, 0, p->tokens + p->extent.rows * p->extent.positions, 1, NULL, NULL, &loss);
    p->time.forward = fmin(p->time.forward, middle - start);
    p->time.backward = fmin(p->time.backward, stopwatch(threads) - middle);
}

/* On its own operation, whose loss and gradients are one: no forward. */
static void pass_head(probe *p, int threads)
{
    size_t n = p->extent.rows * p->extent.positions, c = (size_t)p->model.config.n_embd;
    const poe_tensor *head = poe_tensor_find(poe_stage_shared_table(p->stage), "lm_head.weight");
    float *w = poe_stage_shared_values(p->stage) + head->offset, *dw = poe_stage_shared_gradients(p->stage) + head->offset;
    double loss, start = stopwatch(threads);
    p->backend->ops->head_loss(p->backend, &loss, p->u + n * c, dw, p->u, w, p->tokens, 1, n, c,
                               (size_t)p->model.config.vocab_size, p->model.vocab_padded);
    p->time.forward = 0;
    p->time.backward = fmin(p->time.backward, stopwatch(threads) - start);
}

static poe_status open_head(probe *p)
{
    size_t floats = 2 * p->extent.rows * p->extent.positions * (size_t)p->model.config.n_embd;
    p->u = malloc(floats * sizeof(*p->u));
    if (!p->u) {
        poe_error("out of memory for the calibration");
        return POE_FAILED;
    }
    p->backend->ops->fill(p->backend, p->u, 0.5f, floats);
    return POE_OK;
}

static poe_status open_kind(const poe_options *o, const poe_model *model, int threads, int kind, probe *p)
{
    int layers = kind == DEEP_STAGE ? DEEP : 1;
    bool value_embed = kind < DEEP_STAGE && kind / 2, whole = kind >= DEEP_STAGE || kind % 2;
    int vocabulary = kind == HEAD ? model->config.vocab_size / p->extent.narrower : FEW_TOKENS;
    poe_status status = small_model(model, layers, value_embed, whole, vocabulary, p);
    if (status == POE_OK)
        status = open_probe(o, threads, p);
    return status == POE_OK && kind == HEAD ? open_head(p) : status;
}

/* Round after round, a pass of each: a machine whose speed changes within seconds does so for all of them, which matters as
 * they are subtracted from each other. The first round is for caches and pages. */
static void time_rounds(probe *probes, int threads)
{
    double end = poe_now() + PARTS;
    for (int i = 0; i < MOST_REPETITIONS && (i < 2 || poe_now() < end); i++)
        for (int kind = 0; kind < PROBES; kind++) {
            probe *p = &probes[kind];
            if (i < 2)
                p->time = (poe_part_time){INFINITY, INFINITY};
            (p->u ? pass_head : pass_stage)(p, threads);
        }
}

/* --- parts ------------------------------------------------------------------------------------------------------------ */

static double largest(double a, double b)
{
    return a > b ? a : b;
}

static poe_part_time difference(poe_part_time a, poe_part_time b)
{
    return (poe_part_time){largest(a.forward - b.forward, 0), largest(a.backward - b.backward, 0)};
}

static poe_part_time scaled(poe_part_time t, double factor)
{
    return (poe_part_time){t.forward * factor, t.backward * factor};
}

/* Floating-point operations per second of this backend's products. */
static poe_status time_products(const poe_options *o, int threads, double *rate)
{
    const size_t n = PROBE_SIDE;
    poe_kernels kernels;
    poe_backend *backend = NULL;
    poe_backend_limits limits = {.rows = n, .t = n, .c = n, .head_size = 2, .n_head = 1, .n_kv_head = 1, .mlp_dim = n,
                                 .vocab_padded = 64, .bf16 = strcmp(o->dtype, "bf16") == 0};
    poe_status status = poe_kernels_parse(o->kernels, &kernels);
    if (status == POE_OK)
        status = poe_cpu_create(kernels, threads, &limits, &backend);
    float *memory = malloc(3 * n * n * sizeof(*memory));
    if (status == POE_OK && !memory) {
        poe_error("out of memory for the calibration");
        status = POE_FAILED;
    }
    if (status == POE_OK) {
        double least = INFINITY;
        backend->ops->fill(backend, memory, 0.5f, 3 * n * n);
        for (int i = 0; i < 3; i++) {
            double start = stopwatch(threads);
            backend->ops->matmul(backend, memory, n, memory + n * n, n, memory + 2 * n * n, n, n, n, false);
            least = fmin(least, stopwatch(threads) - start);
        }
        *rate = 2.0 * (double)(n * n * n) / least;
    }
    free(memory);
    poe_cpu_destroy(backend);
    return status;
}

static double head_flops(const poe_model *m, size_t rows, size_t positions)
{
    return 6.0 * (double)(rows * positions) * m->config.n_embd * (double)m->vocab_padded;
}

/* Of the longest pass: the deep stage's, forward and backward, or the head's. */
static double pass_flops(const poe_model *model, const extent *e)
{
    double layers = 3 * DEEP * layer_flops(model, e->rows, e->positions, true);
    return fmax(layers, head_flops(model, e->rows, e->positions)) / (e->narrower * e->narrower);
}

static bool can_narrow(const poe_model_config *c, int mlp_dim, int narrower)
{
    return c->n_embd / narrower >= LEAST_WIDTH && c->n_head % narrower == 0 && c->n_kv_head % narrower == 0 &&
           mlp_dim % narrower == 0 && c->vocab_size / narrower >= 64;
}

/* As much of a micro-batch and of the model's width as a pass may take. */
static poe_status choose_extent(const poe_options *o, const poe_model *model, int threads, extent *e)
{
    double rate;
    poe_status status = time_products(o, threads, &rate);
    if (status != POE_OK)
        return status;
    double most = rate * PASS;
    *e = (extent){.rows = (size_t)o->device_batch_size, .positions = (size_t)model->config.sequence_len, .narrower = 1};
    while (e->rows > 1 && pass_flops(model, e) > most)
        e->rows--;
    while (e->positions > LEAST_POSITIONS && pass_flops(model, e) > most)
        e->positions /= 2;
    while (can_narrow(&model->config, (int)model->mlp_dim, 2 * e->narrower) && pass_flops(model, e) > most)
        e->narrower *= 2;
    while (e->positions > 16 && pass_flops(model, e) > most)
        e->positions /= 2;
    return POE_OK;
}

static void take_parts(const poe_options *o, const poe_model *model, const probe *probes, poe_calibration *c)
{
    extent e = probes[HEAD].extent;
    const poe_model *small = &probes[HEAD].model;
    size_t rows = (size_t)o->device_batch_size, t = (size_t)model->config.sequence_len;
    double tokens = (double)(rows * t) / (double)(e.rows * e.positions);
    poe_part_time one = probes[ONE_LAYER + 1].time, head = probes[HEAD].time; /* of the whole window */
    poe_part_time whole = scaled(difference(probes[DEEP_STAGE].time, one), 1.0 / (DEEP - 1)), rest = difference(one, whole);
    c->rows = e.rows;
    c->positions = e.positions;
    c->narrower = e.narrower;
    c->head = scaled(head, head_flops(model, rows, t) / head_flops(small, e.rows, e.positions));
    poe_part_time small_head = scaled(head, (double)FEW_TOKENS / (double)small->vocab_padded);
    c->embedding = scaled(difference(rest, small_head), tokens * e.narrower);
    for (int kind = 0; kind < DEEP_STAGE; kind++) {
        poe_part_time layer = difference(probes[kind].time, rest);
        bool all = kind % 2;
        c->layers[kind / 2][all] =
            scaled(layer, layer_flops(model, rows, t, all) / layer_flops(small, e.rows, e.positions, all));
    }
}

static poe_status time_parts(const poe_options *o, const poe_model *model, int threads, poe_calibration *c)
{
    probe *probes = calloc(PROBES, sizeof(*probes));
    extent e;
    poe_status status = probes ? choose_extent(o, model, threads, &e) : POE_FAILED;
    if (!probes)
        poe_error("out of memory for the calibration");
    for (int kind = 0; status == POE_OK && kind < PROBES; kind++) {
        probes[kind].extent = e;
        status = open_kind(o, model, threads, kind, &probes[kind]);
    }
    if (status == POE_OK) {
        time_rounds(probes, threads);
        take_parts(o, model, probes, c);
    }
    for (int kind = 0; probes && kind < PROBES; kind++)
        close_probe(&probes[kind]);
    free(probes);
    return status;
}

/* --- updates ---------------------------------------------------------------------------------------------------------- */

/* On a matrix like the mlp's, or one of its shape that is small enough. */
static poe_status time_updates(const poe_options *o, const poe_model *model, int threads, poe_calibration *c)
{
    size_t cols = smaller((size_t)model->config.n_embd, MUON_SIDE);
    size_t rows = smaller(model->mlp_dim * cols / (size_t)model->config.n_embd, 4 * MUON_SIDE);
    size_t floats = smaller((size_t)ADAMW_FLOATS, model->vocab_padded * (size_t)model->config.n_embd);
    size_t room = floats > rows * cols ? floats : rows * cols;
    poe_kernels kernels;
    poe_backend *backend = NULL;
    poe_status status = poe_kernels_parse(o->kernels, &kernels);
    poe_backend_limits limits = {.rows = 1, .t = 1, .c = cols, .head_size = 2, .n_head = 1, .n_kv_head = 1,
                                 .mlp_dim = rows, .vocab_padded = 64, .training = true,
                                 .bf16 = strcmp(o->dtype, "bf16") == 0};
    if (status == POE_OK)
        status = poe_cpu_create(kernels, threads, &limits, &backend);
    float *memory = malloc((4 * room + rows + cols) * sizeof(*memory));
    if (status == POE_OK && !memory) {
        poe_error("out of memory for the calibration");
        status = POE_FAILED;
    }
    if (status == POE_OK) {
        const poe_ops *ops = backend->ops;
        float *w = memory, *m = w + room, *v = m + room, *g = v + room, *second = g + room;
        poe_muon_step muon = {.lr = 0.01f, .momentum = 0.9f, .weight_decay = 0.01f};
        poe_adamw_step adamw = {.lr = 0.01f, .beta1 = 0.8f, .beta2 = 0.95f, .eps = 1e-10f, .t = 10};
        ops->fill(backend, memory, 0.01f, 4 * room + rows + cols);
        c->muon = c->adamw = INFINITY;
        double end = poe_now() + UPDATES;
        for (int i = 0; i < MOST_REPETITIONS && (i < 2 || poe_now() < end); i++) {
            double start = stopwatch(threads);
            ops->muon(backend, w, m, second, g, rows, cols, &muon);
            double middle = stopwatch(threads);
            ops->adamw(backend, w, m, v, g, floats, &adamw);
            c->muon = fmin(c->muon, (middle - start) / poe_muon_flops(rows, cols));
            c->adamw = fmin(c->adamw, (stopwatch(threads) - middle) / (double)floats);
        }
    }
    free(memory);
    poe_cpu_destroy(backend);
    return status;
}

/* --- messages --------------------------------------------------------------------------------------------------------- */

static poe_status open_link(poe_comm *comm, int peer, bool outgoing, size_t bytes, poe_link **link)
{
    poe_link_settings settings = {
        .name = "calibration", .peer = peer, .outgoing = outgoing, .max_bytes = bytes, .window = 1, .run = 1};
    return poe_link_open(comm, &settings, link);
}

/* From the hand-over until the other end has it. This thread plays both ranks. */
static poe_status time_message(poe_link *out, poe_link *in, size_t bytes, double *seconds)
{
    *seconds = INFINITY;
    for (int i = 0; i < MESSAGES; i++) {
        poe_message message = {.kind = 1, .step = i, .bytes = bytes};
        void *payload;
        poe_status status = poe_link_acquire(out, &message, &payload);
        double start = poe_now();
        if (status == POE_OK)
            status = poe_link_send(out, &message);
        if (status == POE_OK)
            status = poe_link_receive(in, &message, NULL, &payload);
        if (status != POE_OK)
            return status;
        *seconds = fmin(*seconds, poe_now() - start);
        poe_link_release(in);
    }
    return POE_OK;
}

static poe_status time_messages(const poe_model *model, size_t rows, poe_calibration *c)
{
    size_t wanted = rows * (size_t)model->config.sequence_len * (size_t)model->config.n_embd * sizeof(float);
    size_t bytes = smaller(wanted, MOST_MESSAGE);
    poe_transport *transports[2];
    poe_comm *comms[2] = {NULL, NULL};
    poe_link *out = NULL, *in = NULL;
    double small = 0, large = 0;
    poe_status status = poe_inproc_create(2, transports);
    for (int k = 0; status == POE_OK && k < 2; k++)
        status = poe_comm_create(transports[k], NULL, &comms[k]);
    if (status == POE_OK)
        status = open_link(comms[0], 1, true, bytes, &out);
    if (status == POE_OK)
        status = open_link(comms[1], 0, false, bytes, &in);
    if (status == POE_OK)
        status = time_message(out, in, 64, &small);
    if (status == POE_OK)
        status = time_message(out, in, bytes, &large);
    poe_link_close(out);
    poe_link_close(in);
    for (int k = 0; k < 2; k++)
        if (comms[k])
            poe_comm_destroy(comms[k], false);
    c->latency = small;
    c->bandwidth = large > small ? (double)bytes / (large - small) : 0;
    return status;
}

poe_status poe_calibrate(const poe_options *o, const poe_model *model, int threads, poe_calibration *c)
{
    double start = poe_now();
    *c = (poe_calibration){.threads = threads};
    poe_status status = poe_blas_check();
    if (status == POE_OK)
        status = time_parts(o, model, threads, c);
    if (status == POE_OK)
        status = time_updates(o, model, threads, c);
    if (status == POE_OK)
        status = time_messages(model, (size_t)o->device_batch_size, c);
    c->seconds = poe_now() - start;
    return status;
}
