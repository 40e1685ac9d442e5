/* SPDX-License-Identifier: MIT
 * All stages of a model in one thread, for test programs: forward outputs are handed on, shared gradients are summed in
 * stage order. */
#ifndef POE_TESTS_STAGE_CHAIN_H
#define POE_TESTS_STAGE_CHAIN_H

#include <stdlib.h>
#include <string.h>

#include "stages/stage.h"
#include "tests/check.h"

/* How a test makes its backends. */
typedef struct chain_backend {
    const char *name;
    poe_status (*create)(const poe_backend_limits *limits, poe_backend **backend);
    void (*destroy)(poe_backend *backend);
} chain_backend;

typedef struct stage_chain {
    const poe_model *model;
    const chain_backend *kind;
    int n_stages;
    poe_backend *backends[POE_MAX_STAGES];
    poe_stage *stages[POE_MAX_STAGES];
    float *h[POE_MAX_STAGES]; /* (B,T,C): the output of each stage */
    size_t shared_floats;
} stage_chain;

static inline void chain_require(int condition, const char *what)
{
    if (condition)
        return;
    fprintf(stderr, "chain of stages: %s failed\n", what);
    exit(1);
}

static inline void chain_open_recomputing(stage_chain *chain, const poe_model *model, size_t rows, bool training,
                                          const chain_backend *kind, poe_recompute recompute)
{
    memset(chain, 0, sizeof(*chain));
    chain->model = model;
    chain->kind = kind;
    chain->n_stages = model->config.n_stages;
    for (int k = 0; k < chain->n_stages; k++) {
        poe_stage_settings settings = {.stage = k, .rows = rows, .slots = 1, .training = training, .recompute = recompute};
        poe_backend_limits limits;
        poe_stage_limits(model, &settings, &limits);
        chain_require(kind->create(&limits, &chain->backends[k]) == POE_OK, "a backend");
        chain_require(poe_stage_create(model, &settings, chain->backends[k], &chain->stages[k]) == POE_OK, "a stage");
        chain->h[k] = calloc(limits.rows * limits.c, sizeof(float));
        chain_require(chain->h[k] != NULL, "memory");
    }
    chain->shared_floats = poe_stage_shared_table(chain->stages[0])->floats;
}

static inline void chain_open(stage_chain *chain, const poe_model *model, size_t rows, bool training,
                              const chain_backend *kind)
{
    chain_open_recomputing(chain, model, rows, training, kind, POE_RECOMPUTE_NONE);
}

static inline void chain_close(stage_chain *chain)
{
    for (int k = 0; k < chain->n_stages; k++) {
        poe_stage_destroy(chain->stages[k]);
        chain->kind->destroy(chain->backends[k]);
        free(chain->h[k]);
    }
}

static inline void chain_clear(stage_chain *chain)
{
    for (int k = 0; k < chain->n_stages; k++) {
        poe_stage_clear_gradients(chain->stages[k]);
        poe_stage_clear_shared_gradients(chain->stages[k]);
    }
}

/* Forward, and with `losses` backward too; losses[k] += that of stage k / n_micro. */
static inline void chain_run(stage_chain *chain, size_t b, size_t t, const int32_t *idx, const int32_t *targets,
                             int n_micro, double *losses)
{
    for (int k = 0; k < chain->n_stages; k++) {
        double loss;
        poe_stage_forward(chain->stages[k], 0, b, t, idx, k ? &(poe_crossing){.h = chain->h[k - 1]} : NULL,
                          &(poe_crossing){.h = chain->h[k]});
        if (!losses)
            continue;
        CHECK_INT(poe_stage_backward(chain->stages[k], 0, targets, n_micro, NULL, NULL, &loss), POE_OK);
        losses[k] += loss / n_micro;
    }
}

/* sum (shared table): the shared gradients of all stages, added in stage order. */
static inline void chain_sum_shared(stage_chain *chain, float *sum)
{
    memset(sum, 0, chain->shared_floats * sizeof(*sum));
    for (int k = 0; k < chain->n_stages; k++) {
        const float *part = poe_stage_shared_gradients(chain->stages[k]);
        for (size_t i = 0; i < chain->shared_floats; i++)
            sum[i] += part[i];
    }
}

static inline void chain_update_own(stage_chain *chain, const poe_rates *rates)
{
    for (int k = 0; k < chain->n_stages; k++)
        poe_stage_update_own(chain->stages[k], rates);
}

static inline void chain_update_shared(stage_chain *chain, const poe_rates *rates, const float *sum)
{
    for (int k = 0; k < chain->n_stages; k++)
        poe_stage_update_shared(chain->stages[k], rates, sum);
}

#endif
