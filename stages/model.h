/* SPDX-License-Identifier: MIT
 * What a model is made of: sizes, stages, and one table of tensors per stage. Letters as everywhere: B rows of a
 * micro-batch, T positions, C channels, V vocabulary, Vp V rounded up to 64, L layers, K stages, NH query heads,
 * NKV key/value heads, HS head size. No memory and no arithmetic is here. */
#ifndef POE_STAGES_MODEL_H
#define POE_STAGES_MODEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "src/status.h"

enum { POE_MAX_STAGES = 128, POE_MAX_LAYERS = 1024, POE_NAME_MAX = 64, POE_PATTERN_MAX = 64 };

typedef enum poe_head { POE_HEAD_SHARED, POE_HEAD_PER_STAGE } poe_head; /* "sh", "ps" */
/* poe: each stage learns from its own loss alone. bp: one loss, at the end. hierarchical: a loss per stage, whose
 * gradients go back through all stages before it. */
typedef enum poe_objective { POE_OBJECTIVE_POE, POE_OBJECTIVE_BP, POE_OBJECTIVE_HIERARCHICAL } poe_objective;

typedef struct poe_model_config {
    int n_stages;
    int stage_layers[POE_MAX_STAGES];
    poe_head head;
    poe_objective objective;
    double alpha; /* the loss of a stage counts 1 / K^(1 - alpha) */
    bool backout; /* bp only: subtract backout_lambda * x after layer L/2 */
    int n_embd;   /* C: at least 24 (the smear gate reads 24 channels), divisible by n_head */
    int n_head;   /* NH */
    int n_kv_head; /* NKV: divides NH */
    int mlp_dim;  /* 0: 4 C */
    int sequence_len;
    int vocab_size;
    char window_pattern[POE_PATTERN_MAX]; /* of S and L, tiled over the layers */
    double norm_eps;                      /* default 1.1920929e-7 */
} poe_model_config;

/* A layer's own properties: stored with it, never derived from the depth of what happens to be loaded. */
typedef struct poe_layer_shape {
    int window; /* position t sees s with 0 <= t - s <= window */
    bool has_value_embed;
} poe_layer_shape;

typedef struct poe_model {
    poe_model_config config;
    int n_layers;      /* L */
    size_t head_size;  /* HS, even */
    size_t kv_dim;     /* NKV * HS */
    size_t mlp_dim;
    size_t vocab_padded; /* Vp */
    poe_layer_shape layers[POE_MAX_LAYERS];
    int first_layer[POE_MAX_STAGES + 1]; /* stage k has layers first_layer[k] .. first_layer[k+1]-1 */
} poe_model;

/* Checks `config` and derives the rest. POE_BAD_INPUT: said, naming the flag, what was found, what is allowed. */
poe_status poe_model_init(poe_model *model, const poe_model_config *config);

/* Whether stage `stage` predicts: it has a head, logits and a loss. Under bp the last one alone. */
bool poe_model_has_head(const poe_model *model, int stage);
/* The layer whose output backout subtracts from the last one's, L/2; -1: none. */
int poe_model_mid_layer(const poe_model *model);
/* What crosses boundary k, between stages k and k+1, beside h (stage.h: poe_crossing), and in gradients back again. */
bool poe_model_crosses_x0(const poe_model *model, int boundary);
bool poe_model_crosses_mid(const poe_model *model, int boundary);

/* How a tensor is trained (spec 3) and where its learning rate comes from. */
typedef enum poe_group {
    POE_GROUP_MATRIX, /* Muon; all others AdamW */
    POE_GROUP_HEAD,
    POE_GROUP_WTE,
    POE_GROUP_VALUE_EMBED,
    POE_GROUP_RESID,
    POE_GROUP_X0,
    POE_GROUP_SMEAR, /* smear_gate, smear_lambda, backout_lambda */
} poe_group;

/* One row of the tensor table. `offset` counts floats from the start of its arena; pieces are padded to POE_ALIGN.
 * resid_lambdas and x0_lambdas are cut: a stage holds the entries of its own layers, starting at `first`. */
typedef struct poe_tensor {
    char name[POE_NAME_MAX]; /* nanochat's */
    size_t rows, cols;       /* of what this stage holds; vectors have rows 1 */
    int ndim;                /* 1 or 2: in files, resid_lambdas (L), smear_gate.weight (1, 24) */
    poe_group group;
    bool trained; /* false: kept and exported, never updated (backout_lambda under poe) */
    int layer;    /* -1 where it belongs to no layer */
    size_t first; /* first index within the whole tensor along its only dimension (lambdas), else 0 */
    size_t offset;
} poe_tensor;

typedef struct poe_tensor_table {
    poe_tensor *rows;
    size_t count;
    size_t floats; /* of the arena, padding included */
} poe_tensor_table;

/* The tensors that stage `stage` alone owns (its layers', its slices of the lambdas, its own head under ps; on the
 * last stage backout_lambda), or with stage -1 the shared ones, of which every stage has a replica: under poe wte,
 * lm_head, smear_gate, smear_lambda; under hierarchical lm_head, and the rest is stage 0's own; under bp none, and
 * lm_head is the last stage's own, with the one lm_head_stages.0 under ps. A table may be empty. The caller frees with
 * poe_tensor_table_free(). POE_FAILED: out of memory. */
poe_status poe_model_tensors(const poe_model *model, int stage, poe_tensor_table *table);
void poe_tensor_table_free(poe_tensor_table *table);
/* NULL when there is no such name. */
const poe_tensor *poe_tensor_find(const poe_tensor_table *table, const char *name);

/* Parameters (padding of V to Vp and backout_lambda included): of one stage's own tensors, of the shared ones with
 * stage -1, of everything. Spec 7: 3b has 3,019,900,506, 1.3b 1,384,122,122. */
uint64_t poe_model_stage_parameters(const poe_model *model, int stage);
uint64_t poe_model_parameters(const poe_model *model);

/* P of the weight decay rule (spec 3): elements of block matrices and of all heads, Vp rows each; and P_ref, the
 * same of nanochat's d12 with this vocabulary. */
uint64_t poe_model_scaling_parameters(const poe_model *model);
uint64_t poe_model_reference_parameters(const poe_model *model);

/* Writes the initial values (spec 1, "Initialisation") of `table`'s tensors at `values`; depends on the seed and each
 * tensor's name only. */
void poe_model_initialise(const poe_model *model, const poe_tensor_table *table, uint64_t seed, float *values);

#endif
