/* SPDX-License-Identifier: MIT
 * Small models with random weights on every backend, for tests of stages; and comparing them. */
#ifndef POE_TESTS_STAGE_SMALL_H
#define POE_TESTS_STAGE_SMALL_H

#include "src/rng.h"
#include "stages/cpu/cpu.h"
#include "stages/plain/plain.h"
#include "tests/stage_chain.h"

enum { B = 2, T = 9, V = 70, C = 24 };

static inline poe_status create_cpu(const poe_backend_limits *limits, poe_backend **result)
{
    return poe_cpu_create(poe_kernels_best(), 1, limits, result);
}

static inline poe_status create_cpu_pair(const poe_backend_limits *limits, poe_backend **result)
{
    return poe_cpu_create(poe_kernels_best(), 2, limits, result);
}

static inline poe_status create_cpu_threads(const poe_backend_limits *limits, poe_backend **result)
{
    return poe_cpu_create(poe_kernels_best(), 3, limits, result);
}

static const chain_backend plain = {"plain", poe_plain_create, poe_plain_destroy};
static const chain_backend cpu = {"cpu", create_cpu, poe_cpu_destroy};
static const chain_backend cpu_pair = {"cpu with 2 threads", create_cpu_pair, poe_cpu_destroy};
static const chain_backend cpu_threads = {"cpu with 3 threads", create_cpu_threads, poe_cpu_destroy};

static int32_t idx[B * T], targets[B * T];

static inline poe_model_config small_config(int n_stages, const int *layers)
{
    poe_model_config config = {.n_stages = n_stages,
                               .head = POE_HEAD_SHARED,
                               .alpha = 1,
                               .n_embd = C,
                               .n_head = 4,
                               .n_kv_head = 2,
                               .mlp_dim = 40,
                               .sequence_len = T,
                               .vocab_size = V,
                               .window_pattern = "SL",
                               .norm_eps = 1.1920929e-7};
    memcpy(config.stage_layers, layers, (size_t)n_stages * sizeof(*layers));
    return config;
}

/* Short windows are 128 positions at least: cut to 3 here, so that T positions feel them. */
static inline poe_model small_model(const poe_model_config *config)
{
    poe_model model;
    chain_require(poe_model_init(&model, config) == POE_OK, "poe_model_init");
    for (int i = 0; i < model.n_layers; i++)
        if (model.layers[i].window != T)
            model.layers[i].window = 3;
    return model;
}

static inline void fill_tokens(void)
{
    poe_rng rng;
    poe_rng_init(&rng, 5, "tokens");
    for (int i = 0; i < B * T; i++) {
        idx[i] = (int32_t)(poe_rng_next(&rng) % V);
        targets[i] = i % 7 == 3 ? -1 : (int32_t)(poe_rng_next(&rng) % V);
    }
    idx[4] = idx[2]; /* one token twice in a row */
}

/* Every weight is non-zero, so that every path carries a gradient. */
static inline void randomise(const poe_tensor_table *table, uint64_t seed, float *values)
{
    static const double deviation[] = {
        [POE_GROUP_MATRIX] = 0.15, [POE_GROUP_HEAD] = 0.2, [POE_GROUP_WTE] = 0.7,  [POE_GROUP_VALUE_EMBED] = 0.7,
        [POE_GROUP_RESID] = 0.05,  [POE_GROUP_X0] = 0.2,   [POE_GROUP_SMEAR] = 0.3};
    for (size_t i = 0; i < table->count; i++) {
        const poe_tensor *tensor = &table->rows[i];
        double mean = tensor->group == POE_GROUP_RESID ? 1.1 : 0;
        for (size_t j = 0; j < tensor->rows * tensor->cols; j++) {
            char stream[POE_NAME_MAX + 32];
            poe_rng rng; /* one stream for each element: slices of a vector get the same in any partition */
            snprintf(stream, sizeof(stream), "%s/%zu", tensor->name, tensor->first + j);
            poe_rng_init(&rng, seed, stream);
            values[tensor->offset + j] = (float)(mean + deviation[tensor->group] * poe_rng_normal(&rng));
        }
    }
}

static inline void randomise_stage(poe_stage *stage, uint64_t seed)
{
    randomise(poe_stage_own_table(stage), seed, poe_stage_own_values(stage));
    randomise(poe_stage_shared_table(stage), seed, poe_stage_shared_values(stage));
    poe_stage_parameters_changed(stage);
}

static inline void open_random_recomputing(stage_chain *chain, const poe_model *model, bool training,
                                           const chain_backend *kind, poe_recompute recompute)
{
    chain_open_recomputing(chain, model, B, training, kind, recompute);
    for (int k = 0; k < chain->n_stages; k++)
        randomise_stage(chain->stages[k], 11);
}

static inline void open_random(stage_chain *chain, const poe_model *model, bool training, const chain_backend *kind)
{
    open_random_recomputing(chain, model, training, kind, POE_RECOMPUTE_NONE);
}

static inline bool same_floats(const float *a, const float *b, size_t n)
{
    return memcmp(a, b, n * sizeof(*a)) == 0;
}

/* Own gradients end before an own head (stage.h). */
static inline size_t own_gradient_floats(poe_stage *stage)
{
    const poe_tensor_table *own = poe_stage_own_table(stage);
    const poe_tensor *last = &own->rows[own->count - 1];
    return last->group == POE_GROUP_HEAD ? last->offset : own->floats;
}

static inline bool same_gradients(poe_stage *a, poe_stage *b)
{
    return same_floats(poe_stage_own_gradients(a), poe_stage_own_gradients(b), own_gradient_floats(a)) &&
           same_floats(poe_stage_shared_gradients(a), poe_stage_shared_gradients(b), poe_stage_shared_table(a)->floats);
}

static inline bool same_values(poe_stage *a, poe_stage *b)
{
    return same_floats(poe_stage_own_values(a), poe_stage_own_values(b), poe_stage_own_table(a)->floats) &&
           same_floats(poe_stage_shared_values(a), poe_stage_shared_values(b), poe_stage_shared_table(a)->floats);
}

static const poe_rates some_rates = {.lrm = 1,
                                     .momentum = 0.9,
                                     .matrix_wd = 0.3,
                                     .matrix_lr = 0.02,
                                     .head_lr = 0.01,
                                     .wte_lr = 0.05,
                                     .ve_lr = 0.05,
                                     .resid_lr = 0.001,
                                     .x0_lr = 0.01,
                                     .smear_lr = 0.02};

static inline double relative_distance(const float *a, const float *b, size_t n)
{
    double off = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        off += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        norm += (double)b[i] * b[i];
    }
    return norm > 0 ? sqrt(off / norm) : sqrt(off);
}

/* --- the same tensors in another partition ----------------------------------------------------------------------- */

/* Where a one-stage model keeps a tensor, or its gradient, which stage `k` of another partition has as `row`. */
static const float *find_tensor(poe_stage *one, const poe_tensor *wanted, bool gradient)
{
    for (int shared = 0; shared < 2; shared++) {
        const poe_tensor_table *table = shared ? poe_stage_shared_table(one) : poe_stage_own_table(one);
        const poe_tensor *found = poe_tensor_find(table, wanted->name);
        if (!found)
            continue;
        size_t at = found->offset + wanted->first;
        if (gradient)
            return shared ? poe_stage_shared_gradients(one) + at
                          : chain_own_gradient(one, (size_t)(found - table->rows)) + wanted->first;
        return (shared ? poe_stage_shared_values(one) : poe_stage_own_values(one)) + at;
    }
    return NULL;
}

/* Values and gradients of all tensors of `parts`, whose stages share nothing, against those of a single stage. */
static inline void check_same_tensors(stage_chain *one, stage_chain *parts)
{
    for (int k = 0; k < parts->n_stages; k++) {
        poe_stage *stage = parts->stages[k];
        const poe_tensor_table *own = poe_stage_own_table(stage);
        CHECK_INT(poe_stage_shared_table(stage)->count, 0);
        for (size_t i = 0; i < own->count; i++) {
            const poe_tensor *tensor = &own->rows[i];
            size_t n = tensor->rows * tensor->cols;
            const float *gradient = find_tensor(one->stages[0], tensor, true);
            const float *value = find_tensor(one->stages[0], tensor, false);
            if (!gradient || !same_floats(chain_own_gradient(stage, i), gradient, n) ||
                !same_floats(poe_stage_own_values(stage) + tensor->offset, value, n)) {
                fprintf(stderr, "%s differs from that of a single stage\n", tensor->name);
                check_failures++;
            }
        }
    }
}

#endif
