/* SPDX-License-Identifier: MIT
 * All stages of a model in one thread, for test programs: what crosses a boundary is handed on and back, shared
 * gradients are summed in stage order. */
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
    int n_stages, slots, n_micro;
    poe_backend *backends[POE_MAX_STAGES];
    poe_stage *stages[POE_MAX_STAGES];
    poe_crossing *out[POE_MAX_STAGES];  /* per micro-batch, (B,T,C): what each stage puts out */
    poe_crossing *back[POE_MAX_STAGES]; /* per micro-batch: its gradients, where they flow back */
    size_t shared_floats;
} stage_chain;

static inline void chain_require(int condition, const char *what)
{
    if (condition)
        return;
    fprintf(stderr, "chain of stages: %s failed\n", what);
    exit(1);
}

/* What crosses from stage k; from the last one h alone. */
static inline poe_crossing chain_crossing(const poe_model *model, int k, size_t floats)
{
    bool last = k == model->config.n_stages - 1;
    poe_crossing crossing = {.h = calloc(floats, sizeof(float))};
    if (!last && poe_model_crosses_x0(model, k))
        crossing.x0 = calloc(floats, sizeof(float));
    if (!last && poe_model_crosses_mid(model, k))
        crossing.mid = calloc(floats, sizeof(float));
    return crossing;
}

static inline void chain_crossing_free(poe_crossing *crossing)
{
    free(crossing->h);
    free(crossing->x0);
    free(crossing->mid);
}

static inline void chain_open_stage(stage_chain *chain, int k, const poe_stage_settings *like)
{
    poe_stage_settings settings = *like;
    poe_backend_limits limits;
    settings.stage = k;
    poe_stage_limits(chain->model, &settings, &limits);
    chain_require(chain->kind->create(&limits, &chain->backends[k]) == POE_OK, "a backend");
    chain_require(poe_stage_create(chain->model, &settings, chain->backends[k], &chain->stages[k]) == POE_OK,
                  "a stage");
    chain->out[k] = calloc((size_t)chain->n_micro, sizeof(poe_crossing));
    chain->back[k] = calloc((size_t)chain->n_micro, sizeof(poe_crossing));
    chain_require(chain->out[k] && chain->back[k], "memory");
    for (int m = 0; m < chain->n_micro; m++) {
        chain->out[k][m] = chain_crossing(chain->model, k, limits.rows * limits.c);
        chain->back[k][m] = chain_crossing(chain->model, k, limits.rows * limits.c);
    }
}

/* `like`: the settings of every stage but for its number. n_micro: how many micro-batches may be under way at once;
 * micro-batch m takes slot m % slots. */
static inline void chain_open_like(stage_chain *chain, const poe_model *model, const poe_stage_settings *like,
                                   int n_micro, const chain_backend *kind)
{
    memset(chain, 0, sizeof(*chain));
    chain->model = model;
    chain->kind = kind;
    chain->n_stages = model->config.n_stages;
    chain->slots = like->slots;
    chain->n_micro = n_micro;
    for (int k = 0; k < chain->n_stages; k++)
        chain_open_stage(chain, k, like);
    chain->shared_floats = poe_stage_shared_table(chain->stages[0])->floats;
}

static inline void chain_open_recomputing(stage_chain *chain, const poe_model *model, size_t rows, bool training,
                                          const chain_backend *kind, poe_recompute recompute)
{
    chain_open_like(chain, model,
                    &(poe_stage_settings){.rows = rows, .slots = 1, .training = training, .recompute = recompute}, 1,
                    kind);
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
        for (int m = 0; m < chain->n_micro; m++) {
            chain_crossing_free(&chain->out[k][m]);
            chain_crossing_free(&chain->back[k][m]);
        }
        free(chain->out[k]);
        free(chain->back[k]);
    }
}

static inline void chain_clear(stage_chain *chain)
{
    for (int k = 0; k < chain->n_stages; k++) {
        poe_stage_clear_gradients(chain->stages[k]);
        poe_stage_clear_shared_gradients(chain->stages[k]);
    }
}

static inline bool chain_flows_back(const stage_chain *chain)
{
    return chain->model->config.objective != POE_OBJECTIVE_POE;
}

static inline void chain_forward(stage_chain *chain, int k, int micro, size_t b, size_t t, const int32_t *idx)
{
    poe_stage_forward(chain->stages[k], micro % chain->slots, b, t, idx, k ? &chain->out[k - 1][micro] : NULL,
                      &chain->out[k][micro]);
}

typedef poe_status (*chain_backward_function)(poe_stage *stage, int slot, const int32_t *targets, int n_micro,
                                              const poe_crossing *d_out, const poe_crossing *d_in, double *loss);

/* `function`: poe_stage_backward or poe_stage_backward_input. losses[k] += stage k's / n_micro. */
static inline void chain_backward(stage_chain *chain, chain_backward_function function, int k, int micro,
                                  const int32_t *targets, int n_micro, double *losses)
{
    bool flows = chain_flows_back(chain);
    const poe_crossing *d_out = flows && k < chain->n_stages - 1 ? &chain->back[k][micro] : NULL;
    const poe_crossing *d_in = flows && k > 0 ? &chain->back[k - 1][micro] : NULL;
    double loss;
    CHECK_INT(function(chain->stages[k], micro % chain->slots, targets, n_micro, d_out, d_in, &loss), POE_OK);
    losses[k] += loss / n_micro;
}

/* Forward as micro-batch 0, and with `losses` backward too: under poe stage by stage, as there nothing comes back. */
static inline void chain_run(stage_chain *chain, size_t b, size_t t, const int32_t *idx, const int32_t *targets,
                             int n_micro, double *losses)
{
    bool flows = chain_flows_back(chain);
    for (int k = 0; k < chain->n_stages; k++) {
        chain_forward(chain, k, 0, b, t, idx);
        if (losses && !flows)
            chain_backward(chain, poe_stage_backward, k, 0, targets, n_micro, losses);
    }
    for (int k = chain->n_stages - 1; losses && flows && k >= 0; k--)
        chain_backward(chain, poe_stage_backward, k, 0, targets, n_micro, losses);
}

/* The gradient of row `row` of a stage's own table: an own head's is its part of lm_head's (stage.h). */
static inline const float *chain_own_gradient(poe_stage *stage, size_t row)
{
    const poe_tensor_table *own = poe_stage_own_table(stage), *shared = poe_stage_shared_table(stage);
    if (strncmp(own->rows[row].name, "lm_head_stages.", 15) != 0)
        return poe_stage_own_gradients(stage) + own->rows[row].offset;
    const poe_tensor *head = poe_tensor_find(own, "lm_head.weight");
    return head ? poe_stage_own_gradients(stage) + head->offset
                : poe_stage_shared_gradients(stage) + poe_tensor_find(shared, "lm_head.weight")->offset;
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
