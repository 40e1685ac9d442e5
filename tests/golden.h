/* SPDX-License-Identifier: MIT
 * Golden runs of the PyTorch reference, as test programs read them. Malformed ones end the test. */
#ifndef POE_TESTS_GOLDEN_H
#define POE_TESTS_GOLDEN_H

#include <jansson.h>

#include "src/safetensors.h"
#include "stages/model.h"
#include "stages/optimizer.h"
#include "tests/check.h"

enum { GOLDEN_COUNT = 8, GOLDEN_PATH = 4400 };

static const char *const golden_names[GOLDEN_COUNT] = {"ps-2,1,1",     "sh-1,3,1",   "bp-4",   "stale-2,2",
                                                       "delay2-1,1,1", "every3-1,2", "bp-2,1", "hier-1,2,1"};

typedef struct golden {
    const char *name;
    poe_model model;
    poe_optimizer_config optimizer;
    int device_batch_size, n_micro;
    json_t *config, *expected;
    int32_t *tokens;
} golden;

static inline void golden_require(int condition, const char *what)
{
    if (condition)
        return;
    fprintf(stderr, "golden run: %s\n", what);
    exit(1);
}

static inline double golden_number(const json_t *object, const char *key)
{
    const json_t *value = json_object_get(object, key);
    golden_require(json_is_number(value), key);
    return json_number_value(value);
}

static inline int golden_is(const golden *run, const char *key, const char *text)
{
    const char *value = json_string_value(json_object_get(run->config, key));
    golden_require(value != NULL, key);
    return strcmp(value, text) == 0;
}

static inline void golden_path(char path[GOLDEN_PATH], const golden *run, const char *file)
{
    snprintf(path, GOLDEN_PATH, "%s/golden/%s/%s", poe_test_shared(), run->name, file);
}

static inline json_t *golden_json(const golden *run, const char *file)
{
    char path[GOLDEN_PATH];
    golden_path(path, run, file);
    json_t *json = json_load_file(path, 0, NULL);
    golden_require(json != NULL, path);
    return json;
}

static inline poe_safetensors *golden_tensors(const golden *run, const char *file)
{
    char path[GOLDEN_PATH];
    poe_safetensors *tensors = NULL;
    golden_path(path, run, file);
    golden_require(poe_safetensors_open(path, &tensors) == POE_OK, path);
    return tensors;
}

static inline poe_objective golden_objective(const golden *run)
{
    if (golden_is(run, "objective", "bp"))
        return POE_OBJECTIVE_BP;
    return golden_is(run, "objective", "hierarchical") ? POE_OBJECTIVE_HIERARCHICAL : POE_OBJECTIVE_POE;
}

static inline void golden_read_model(golden *run)
{
    const json_t *c = run->config, *stages = json_object_get(c, "stages");
    const char *pattern = json_string_value(json_object_get(c, "window_pattern"));
    golden_require(pattern != NULL, "window_pattern");
    poe_model_config config = {
        .n_stages = (int)json_array_size(stages),
        .head = golden_is(run, "head", "ps") ? POE_HEAD_PER_STAGE : POE_HEAD_SHARED,
        .objective = golden_objective(run),
        .alpha = golden_number(c, "alpha"),
        .backout = !json_is_false(json_object_get(c, "backout")),
        .n_embd = (int)golden_number(c, "n_embd"),
        .n_head = (int)golden_number(c, "n_head"),
        .n_kv_head = (int)golden_number(c, "n_kv_head"),
        .mlp_dim = (int)golden_number(c, "mlp_dim"),
        .sequence_len = (int)golden_number(c, "sequence_len"),
        .vocab_size = (int)golden_number(c, "vocab_size"),
        .norm_eps = 1.1920929e-7,
    };
    snprintf(config.window_pattern, sizeof(config.window_pattern), "%s", pattern);
    for (int k = 0; k < config.n_stages; k++)
        config.stage_layers[k] = (int)json_integer_value(json_array_get(stages, (size_t)k));
    golden_require(poe_model_init(&run->model, &config) == POE_OK, "config.json");
}

static inline void golden_read_optimizer(golden *run)
{
    const json_t *c = run->config;
    run->optimizer = (poe_optimizer_config){
        .matrix_lr = golden_number(c, "matrix_lr"),
        .embedding_lr = golden_number(c, "embedding_lr"),
        .unembedding_lr = golden_number(c, "unembedding_lr"),
        .scalar_lr = golden_number(c, "scalar_lr"),
        .weight_decay = golden_number(c, "weight_decay"),
        .total_batch_size = golden_number(c, "total_batch_size"),
        .num_iterations = (int)golden_number(c, "num_iterations"),
        .warmup_steps = (int)golden_number(c, "warmup_steps"),
        .warmdown_ratio = golden_number(c, "warmdown_ratio"),
        .final_lr_frac = golden_number(c, "final_lr_frac"),
    };
    run->device_batch_size = (int)golden_number(c, "device_batch_size");
    run->n_micro = (int)(run->optimizer.total_batch_size / run->device_batch_size / golden_number(c, "sequence_len"));
}

/* llm.c's .bin: 256 int32 of header, then uint16 tokens. */
static inline void golden_read_tokens(golden *run)
{
    char path[GOLDEN_PATH];
    golden_path(path, run, "tokens.bin");
    FILE *file = fopen(path, "rb");
    golden_require(file != NULL, path);
    int32_t header[256];
    golden_require(fread(header, sizeof(header), 1, file) == 1 && header[0] == 20240520 && header[2] > 0, path);
    size_t count = (size_t)header[2];
    uint16_t *raw = malloc(count * sizeof(*raw));
    run->tokens = malloc(count * sizeof(*run->tokens));
    golden_require(raw && run->tokens && fread(raw, sizeof(*raw), count, file) == count, path);
    for (size_t i = 0; i < count; i++)
        run->tokens[i] = raw[i];
    free(raw);
    fclose(file);
}

static inline void golden_open(golden *run, const char *name)
{
    *run = (golden){.name = name};
    run->config = golden_json(run, "config.json");
    run->expected = golden_json(run, "expected.json");
    golden_read_model(run);
    golden_read_optimizer(run);
    golden_read_tokens(run);
}

static inline void golden_close(golden *run)
{
    json_decref(run->config);
    json_decref(run->expected);
    free(run->tokens);
}

#endif
