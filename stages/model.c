/* SPDX-License-Identifier: MIT */
#include "stages/model.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "src/arena.h"
#include "src/log.h"
#include "src/rng.h"

enum { SMEAR_CHANNELS = 24, GATE_CHANNELS = 12, VOCAB_PAD = 64 };
/* Far above any use; below them no product of sizes leaves 64 bits and no dimension leaves an int. */
enum { EMBD_LIMIT = 1 << 17, WIDTH_LIMIT = 1 << 22 };

static poe_status check_range(const char *flag, int value, int least, int most)
{
    if (value >= least && value <= most)
        return POE_OK;
    poe_error("%s is %d: it must be from %d to %d", flag, value, least, most);
    return POE_BAD_INPUT;
}

static poe_status check_stages(const poe_model_config *config)
{
    if (config->n_stages < 1 || config->n_stages > POE_MAX_STAGES) {
        poe_error("--stages names %d stages: there must be from 1 to %d", config->n_stages, POE_MAX_STAGES);
        return POE_BAD_INPUT;
    }
    long long layers = 0;
    for (int k = 0; k < config->n_stages; k++) {
        if (config->stage_layers[k] < 1) {
            poe_error("--stages gives stage %d %d layers: each stage needs at least 1", k, config->stage_layers[k]);
            return POE_BAD_INPUT;
        }
        layers += config->stage_layers[k];
    }
    if (layers > POE_MAX_LAYERS) {
        poe_error("--stages adds up to %lld layers: at most %d are allowed", layers, POE_MAX_LAYERS);
        return POE_BAD_INPUT;
    }
    return POE_OK;
}

static poe_status check_heads(const poe_model_config *config)
{
    poe_status status = check_range("--n-embd", config->n_embd, SMEAR_CHANNELS, EMBD_LIMIT);
    if (status == POE_OK)
        status = check_range("--n-head", config->n_head, 1, config->n_embd);
    if (status == POE_OK)
        status = check_range("--n-kv-head", config->n_kv_head, 1, config->n_head);
    if (status != POE_OK)
        return status;
    if (config->n_embd % config->n_head) {
        poe_error("--n-embd %d is not divisible by --n-head %d", config->n_embd, config->n_head);
        return POE_BAD_INPUT;
    }
    if (config->n_embd / config->n_head % 2) {
        poe_error("--n-embd %d with --n-head %d gives heads of %d channels: the number must be even", config->n_embd,
                  config->n_head, config->n_embd / config->n_head);
        return POE_BAD_INPUT;
    }
    if (config->n_head % config->n_kv_head) {
        poe_error("--n-head %d is not divisible by --n-kv-head %d", config->n_head, config->n_kv_head);
        return POE_BAD_INPUT;
    }
    return POE_OK;
}

static poe_status check_pattern(const char *pattern)
{
    size_t length = strnlen(pattern, POE_PATTERN_MAX);
    if (length > 0 && length < POE_PATTERN_MAX && strspn(pattern, "SL") == length)
        return POE_OK;
    poe_error("--window-pattern is \"%.*s\": it must be 1 to %d letters S (short window) and L (long)", (int)length,
              pattern, POE_PATTERN_MAX - 1);
    return POE_BAD_INPUT;
}

static poe_status check_config(const poe_model_config *config)
{
    poe_status status = check_stages(config);
    if (status == POE_OK)
        status = check_heads(config);
    if (status == POE_OK)
        status = check_range("--mlp-dim", config->mlp_dim, 0, WIDTH_LIMIT);
    if (status == POE_OK)
        status = check_range("--sequence-len", config->sequence_len, 1, WIDTH_LIMIT);
    if (status == POE_OK)
        status = check_range("--vocab-size", config->vocab_size, 1, WIDTH_LIMIT);
    if (status == POE_OK)
        status = check_pattern(config->window_pattern);
    if (status != POE_OK)
        return status;
    if (!(config->alpha >= 0 && config->alpha <= 1)) {
        poe_error("--alpha is %g: it must be from 0 to 1", config->alpha);
        return POE_BAD_INPUT;
    }
    if (!(config->norm_eps > 0 && config->norm_eps < 1)) {
        poe_error("the epsilon of the norms (norm_eps) is %g: it must be between 0 and 1", config->norm_eps);
        return POE_BAD_INPUT;
    }
    return POE_OK;
}

static void derive_layers(poe_model *model)
{
    const poe_model_config *config = &model->config;
    int short_window = (config->sequence_len + 511) / 512 * 128; /* a quarter of the sequence, in blocks of 128 */
    size_t period = strlen(config->window_pattern);
    for (int i = 0; i < model->n_layers; i++) {
        bool last = i == model->n_layers - 1;
        bool wide = last || config->window_pattern[(size_t)i % period] == 'L';
        model->layers[i].window = wide ? config->sequence_len : short_window;
        model->layers[i].has_value_embed = i % 2 == (model->n_layers - 1) % 2;
    }
}

static void derive(poe_model *model, const poe_model_config *config)
{
    *model = (poe_model){.config = *config};
    for (int k = 0; k < config->n_stages; k++)
        model->first_layer[k + 1] = model->first_layer[k] + config->stage_layers[k];
    model->n_layers = model->first_layer[config->n_stages];
    model->head_size = (size_t)(config->n_embd / config->n_head);
    model->kv_dim = (size_t)config->n_kv_head * model->head_size;
    model->mlp_dim = config->mlp_dim ? (size_t)config->mlp_dim : 4 * (size_t)config->n_embd;
    model->vocab_padded = ((size_t)config->vocab_size + VOCAB_PAD - 1) / VOCAB_PAD * VOCAB_PAD;
    derive_layers(model);
}

poe_status poe_model_init(poe_model *model, const poe_model_config *config)
{
    poe_status status = check_config(config);
    if (status == POE_OK)
        derive(model, config);
    return status;
}

/* --- objectives -------------------------------------------------------------------------------------------------- */

bool poe_model_has_head(const poe_model *model, int stage)
{
    return model->config.objective != POE_OBJECTIVE_BP || stage == model->config.n_stages - 1;
}

int poe_model_mid_layer(const poe_model *model)
{
    return model->config.objective == POE_OBJECTIVE_BP && model->config.backout ? model->n_layers / 2 : -1;
}

bool poe_model_crosses_x0(const poe_model *model, int boundary)
{
    (void)boundary;
    return model->config.objective != POE_OBJECTIVE_POE;
}

bool poe_model_crosses_mid(const poe_model *model, int boundary)
{
    int mid = poe_model_mid_layer(model);
    return mid >= 0 && mid < model->first_layer[boundary + 1];
}

/* --- tensor table ------------------------------------------------------------------------------------------------ */

/* Runs over a stage's tensors twice: with rows NULL it counts, then it fills. */
typedef struct collector {
    poe_tensor *rows;
    poe_tensor counted; /* stands in for a row while counting */
    size_t count, floats;
    uint64_t parameters, matrix_parameters, head_parameters;
} collector;

/* Appends a trained matrix; the caller may change the row it gets. */
__attribute__((format(printf, 5, 6))) static poe_tensor *put(collector *c, poe_group group, size_t rows, size_t cols,
                                                             const char *name, ...)
{
    poe_tensor *tensor = c->rows ? &c->rows[c->count] : &c->counted;
    *tensor = (poe_tensor){
        .rows = rows, .cols = cols, .ndim = 2, .group = group, .trained = true, .layer = -1, .offset = c->floats};
    va_list args;
    va_start(args, name);
    vsnprintf(tensor->name, sizeof(tensor->name), name, args);
    va_end(args);
    c->count++;
    c->floats += poe_arena_round(rows * cols * sizeof(float)) / sizeof(float);
    c->parameters += rows * cols;
    c->matrix_parameters += group == POE_GROUP_MATRIX ? rows * cols : 0;
    c->head_parameters += group == POE_GROUP_HEAD ? rows * cols : 0;
    return tensor;
}

static poe_tensor *put_vector(collector *c, poe_group group, size_t length, const char *name)
{
    poe_tensor *tensor = put(c, group, 1, length, "%s", name);
    tensor->ndim = 1;
    return tensor;
}

static void put_layer(collector *c, const poe_model *model, int i)
{
    size_t channels = (size_t)model->config.n_embd, kv = model->kv_dim, mlp = model->mlp_dim;
    put(c, POE_GROUP_MATRIX, channels, channels, "transformer.h.%d.attn.c_q.weight", i)->layer = i;
    put(c, POE_GROUP_MATRIX, kv, channels, "transformer.h.%d.attn.c_k.weight", i)->layer = i;
    put(c, POE_GROUP_MATRIX, kv, channels, "transformer.h.%d.attn.c_v.weight", i)->layer = i;
    put(c, POE_GROUP_MATRIX, channels, channels, "transformer.h.%d.attn.c_proj.weight", i)->layer = i;
    put(c, POE_GROUP_MATRIX, mlp, channels, "transformer.h.%d.mlp.c_fc.weight", i)->layer = i;
    put(c, POE_GROUP_MATRIX, channels, mlp, "transformer.h.%d.mlp.c_proj.weight", i)->layer = i;
    if (!model->layers[i].has_value_embed)
        return;
    size_t heads = (size_t)model->config.n_kv_head;
    put(c, POE_GROUP_MATRIX, heads, GATE_CHANNELS, "transformer.h.%d.attn.ve_gate.weight", i)->layer = i;
    put(c, POE_GROUP_VALUE_EMBED, model->vocab_padded, kv, "value_embeds.%d.weight", i)->layer = i;
}

static void put_smear(collector *c)
{
    put(c, POE_GROUP_SMEAR, 1, SMEAR_CHANNELS, "smear_gate.weight");
    put_vector(c, POE_GROUP_SMEAR, 1, "smear_lambda");
}

static void put_wte(collector *c, const poe_model *model)
{
    put(c, POE_GROUP_WTE, model->vocab_padded, (size_t)model->config.n_embd, "transformer.wte.weight");
}

static void put_head(collector *c, const poe_model *model)
{
    put(c, POE_GROUP_HEAD, model->vocab_padded, (size_t)model->config.n_embd, "lm_head.weight");
}

static void put_own(collector *c, const poe_model *model, int stage)
{
    int first = model->first_layer[stage], end = model->first_layer[stage + 1];
    bool bp = model->config.objective == POE_OBJECTIVE_BP, is_last = stage == model->config.n_stages - 1;
    if (stage == 0 && model->config.objective != POE_OBJECTIVE_POE) {
        put_wte(c, model);
        put_smear(c);
    }
    for (int i = first; i < end; i++)
        put_layer(c, model, i);
    put_vector(c, POE_GROUP_RESID, (size_t)(end - first), "resid_lambdas")->first = (size_t)first;
    put_vector(c, POE_GROUP_X0, (size_t)(end - first), "x0_lambdas")->first = (size_t)first;
    if (is_last && bp)
        put_head(c, model);
    if (is_last)
        put_vector(c, POE_GROUP_SMEAR, 1, "backout_lambda")->trained = poe_model_mid_layer(model) >= 0;
    /* Last, so that the gradients, which have no room for it (stage.h), can end before it. */
    if (model->config.head == POE_HEAD_PER_STAGE && poe_model_has_head(model, stage))
        put(c, POE_GROUP_HEAD, model->vocab_padded, (size_t)model->config.n_embd, "lm_head_stages.%d.weight",
            bp ? 0 : stage);
}

static void put_shared(collector *c, const poe_model *model)
{
    bool poe = model->config.objective == POE_OBJECTIVE_POE;
    if (poe)
        put_wte(c, model);
    if (model->config.objective != POE_OBJECTIVE_BP)
        put_head(c, model);
    if (poe)
        put_smear(c);
}

static collector collect(const poe_model *model, int stage, poe_tensor *rows)
{
    collector c = {.rows = rows};
    if (stage < 0)
        put_shared(&c, model);
    else
        put_own(&c, model, stage);
    return c;
}

poe_status poe_model_tensors(const poe_model *model, int stage, poe_tensor_table *table)
{
    size_t count = collect(model, stage, NULL).count;
    poe_tensor *rows = calloc(count ? count : 1, sizeof(*rows));
    if (!rows) {
        poe_error("out of memory for a table of %zu tensors", count);
        return POE_FAILED;
    }
    collector c = collect(model, stage, rows);
    *table = (poe_tensor_table){.rows = rows, .count = c.count, .floats = c.floats};
    return POE_OK;
}

void poe_tensor_table_free(poe_tensor_table *table)
{
    free(table->rows);
    *table = (poe_tensor_table){0};
}

const poe_tensor *poe_tensor_find(const poe_tensor_table *table, const char *name)
{
    for (size_t i = 0; i < table->count; i++)
        if (strcmp(table->rows[i].name, name) == 0)
            return &table->rows[i];
    return NULL;
}

/* --- counts ------------------------------------------------------------------------------------------------------ */

uint64_t poe_model_stage_parameters(const poe_model *model, int stage)
{
    return collect(model, stage, NULL).parameters;
}

uint64_t poe_model_parameters(const poe_model *model)
{
    uint64_t sum = 0;
    for (int stage = -1; stage < model->config.n_stages; stage++)
        sum += poe_model_stage_parameters(model, stage);
    return sum;
}

uint64_t poe_model_scaling_parameters(const poe_model *model)
{
    uint64_t sum = 0;
    for (int stage = -1; stage < model->config.n_stages; stage++) {
        collector c = collect(model, stage, NULL);
        sum += c.matrix_parameters + c.head_parameters;
    }
    return sum;
}

uint64_t poe_model_reference_parameters(const poe_model *model)
{
    poe_model d12;
    derive(&d12, &(poe_model_config){.n_stages = 1,
                                     .stage_layers = {12},
                                     .n_embd = 768,
                                     .n_head = 6,
                                     .n_kv_head = 6,
                                     .sequence_len = 1,
                                     .vocab_size = model->config.vocab_size,
                                     .window_pattern = "L"});
    return poe_model_scaling_parameters(&d12);
}

/* --- initial values ---------------------------------------------------------------------------------------------- */

static bool ends_with(const char *text, const char *end)
{
    size_t n = strlen(text), m = strlen(end);
    return n >= m && strcmp(text + n - m, end) == 0;
}

static void draw_normal(const poe_tensor *tensor, uint64_t seed, double deviation, float *values)
{
    poe_rng rng;
    poe_rng_init(&rng, seed, tensor->name);
    for (size_t i = 0; i < tensor->rows * tensor->cols; i++)
        values[i] = (float)(deviation * poe_rng_normal(&rng));
}

static void draw_uniform(const poe_tensor *tensor, uint64_t seed, double low, double high, float *values)
{
    poe_rng rng;
    poe_rng_init(&rng, seed, tensor->name);
    for (size_t i = 0; i < tensor->rows * tensor->cols; i++)
        values[i] = (float)(low + (high - low) * poe_rng_uniform(&rng));
}

static void fill(const poe_tensor *tensor, double value, float *values)
{
    for (size_t i = 0; i < tensor->rows * tensor->cols; i++)
        values[i] = (float)value;
}

/* From `start` at layer 0 down by `fall` until the last layer. */
static void fill_ramp(const poe_model *model, const poe_tensor *tensor, double start, double fall, float *values)
{
    for (size_t i = 0; i < tensor->cols; i++)
        values[i] = (float)(start - fall * (double)(tensor->first + i) / fmax(model->n_layers - 1, 1));
}

static void initialise_matrix(const poe_model *model, const poe_tensor *tensor, uint64_t seed, float *values)
{
    double s = sqrt(3.0 / model->config.n_embd);
    if (ends_with(tensor->name, ".c_proj.weight"))
        fill(tensor, 0, values);
    else if (ends_with(tensor->name, ".ve_gate.weight"))
        draw_uniform(tensor, seed, 0, 0.02, values);
    else if (ends_with(tensor->name, ".c_fc.weight"))
        draw_uniform(tensor, seed, -0.4 * s, 0.4 * s, values);
    else
        draw_uniform(tensor, seed, -s, s, values);
}

static void initialise_tensor(const poe_model *model, const poe_tensor *tensor, uint64_t seed, float *values)
{
    double s = sqrt(3.0 / model->config.n_embd);
    switch (tensor->group) {
    case POE_GROUP_MATRIX:
        initialise_matrix(model, tensor, seed, values);
        break;
    case POE_GROUP_HEAD: /* a stage's own head starts as nothing beside the shared one */
        draw_normal(tensor, seed, strcmp(tensor->name, "lm_head.weight") == 0 ? 0.001 : 0, values);
        break;
    case POE_GROUP_WTE:
        draw_normal(tensor, seed, 0.8, values);
        break;
    case POE_GROUP_VALUE_EMBED:
        draw_uniform(tensor, seed, -s, s, values);
        break;
    case POE_GROUP_RESID:
        fill_ramp(model, tensor, 1.15, 0.10, values);
        break;
    case POE_GROUP_X0:
        fill_ramp(model, tensor, 0.20, 0.15, values);
        break;
    case POE_GROUP_SMEAR:
        if (strcmp(tensor->name, "smear_gate.weight") == 0)
            draw_uniform(tensor, seed, 0, 0.02, values);
        else
            fill(tensor, strcmp(tensor->name, "backout_lambda") == 0 ? 0.2 : 0, values);
        break;
    }
}

void poe_model_initialise(const poe_model *model, const poe_tensor_table *table, uint64_t seed, float *values)
{
    for (size_t i = 0; i < table->count; i++)
        initialise_tensor(model, &table->rows[i], seed, values + table->rows[i].offset);
}
