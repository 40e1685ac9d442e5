/* SPDX-License-Identifier: MIT
 * Sizes, tensor tables, initial values, and what is refused. */
#include "stages/model.h"

#include "src/arena.h"
#include "src/log.h"
#include "tests/check.h"

static poe_model_config small_config(void)
{
    return (poe_model_config){.n_stages = 3,
                              .stage_layers = {2, 1, 1},
                              .head = POE_HEAD_PER_STAGE,
                              .n_embd = 48,
                              .n_head = 4,
                              .n_kv_head = 2,
                              .sequence_len = 160,
                              .vocab_size = 300,
                              .window_pattern = "SSSL",
                              .norm_eps = 1.1920929e-7};
}

/* Spec 7. */
static poe_model_config published_config(bool large)
{
    poe_model_config config = small_config();
    config.n_stages = 4;
    const int stages[2][4] = {{6, 6, 6, 6}, {16, 6, 5, 5}};
    memcpy(config.stage_layers, stages[large], sizeof(stages[large]));
    config.head = large ? POE_HEAD_PER_STAGE : POE_HEAD_SHARED;
    config.n_embd = large ? 2048 : 1536;
    config.n_head = large ? 16 : 12;
    config.n_kv_head = large ? 8 : 12;
    config.mlp_dim = large ? 12800 : 0;
    config.sequence_len = 2048;
    config.vocab_size = 32768;
    return config;
}

static void check_totals(void)
{
    poe_model model;
    poe_model_config config = published_config(true);
    CHECK_INT(poe_model_init(&model, &config), POE_OK);
    CHECK_INT(poe_model_parameters(&model), 3019900506);
    config = published_config(false);
    CHECK_INT(poe_model_init(&model, &config), POE_OK);
    CHECK_INT(poe_model_parameters(&model), 1384122122);
    /* nanochat's d12 at this vocabulary, by hand: 12 blocks, 6 gates of 6 x 12, one head */
    CHECK_INT(poe_model_reference_parameters(&model), 12 * 12 * 768 * 768 + 6 * 6 * 12 + 32768 * 768);
}

static void check_layers(void)
{
    poe_model model;
    poe_model_config config = small_config();
    config.sequence_len = 600;
    CHECK_INT(poe_model_init(&model, &config), POE_OK);
    CHECK_INT(model.n_layers, 4);
    CHECK_INT(model.vocab_padded, 320);
    CHECK_INT(model.mlp_dim, 192);
    CHECK_INT(model.kv_dim, 24);
    for (int i = 0; i < 4; i++) {
        CHECK_INT(model.layers[i].window, i == 3 ? 600 : 256);
        CHECK_INT(model.layers[i].has_value_embed, i % 2 == 1);
    }
    config.window_pattern[3] = 'S'; /* the last layer is long whatever the pattern says */
    CHECK_INT(poe_model_init(&model, &config), POE_OK);
    CHECK_INT(model.layers[3].window, 600);
}

static void check_table(const poe_model *model, int stage)
{
    poe_tensor_table table;
    CHECK_INT(poe_model_tensors(model, stage, &table), POE_OK);
    uint64_t elements = 0;
    size_t end = 0;
    for (size_t i = 0; i < table.count; i++) {
        const poe_tensor *tensor = &table.rows[i];
        CHECK_INT(tensor->offset, end);
        end = tensor->offset + poe_arena_round(tensor->rows * tensor->cols * sizeof(float)) / sizeof(float);
        elements += tensor->rows * tensor->cols;
        CHECK(poe_tensor_find(&table, tensor->name) == tensor);
    }
    CHECK_INT(table.floats, end);
    CHECK_INT(elements, poe_model_stage_parameters(model, stage));
    poe_tensor_table_free(&table);
}

static void check_tables(void)
{
    poe_model model;
    poe_model_config config = small_config();
    CHECK_INT(poe_model_init(&model, &config), POE_OK);
    for (int stage = -1; stage < 3; stage++)
        check_table(&model, stage);
    poe_tensor_table table;
    CHECK_INT(poe_model_tensors(&model, 2, &table), POE_OK);
    const poe_tensor *resid = poe_tensor_find(&table, "resid_lambdas");
    const poe_tensor *gate = poe_tensor_find(&table, "transformer.h.3.attn.ve_gate.weight");
    const poe_tensor *backout = poe_tensor_find(&table, "backout_lambda");
    CHECK(resid && resid->first == 3 && resid->cols == 1 && resid->ndim == 1);
    CHECK(gate && gate->group == POE_GROUP_MATRIX && gate->layer == 3 && gate->rows == 2 && gate->cols == 12);
    CHECK(backout && !backout->trained);
    CHECK(poe_tensor_find(&table, "lm_head_stages.2.weight") == &table.rows[table.count - 1]);
    CHECK(!poe_tensor_find(&table, "transformer.h.2.attn.c_q.weight"));
    poe_tensor_table_free(&table);
}

/* The stage (-1: shared) whose table has `name`; -2: none, -3: several. */
static int owner_of(const poe_model *model, const char *name)
{
    int owner = -2;
    for (int stage = -1; stage < model->config.n_stages; stage++) {
        poe_tensor_table table;
        CHECK_INT(poe_model_tensors(model, stage, &table), POE_OK);
        if (poe_tensor_find(&table, name))
            owner = owner == -2 ? stage : -3;
        poe_tensor_table_free(&table);
    }
    return owner;
}

static void check_owners(const poe_model *model, int wte, int head, int head_0, int head_2)
{
    CHECK_INT(owner_of(model, "transformer.wte.weight"), wte);
    CHECK_INT(owner_of(model, "smear_gate.weight"), wte);
    CHECK_INT(owner_of(model, "smear_lambda"), wte);
    CHECK_INT(owner_of(model, "lm_head.weight"), head);
    CHECK_INT(owner_of(model, "lm_head_stages.0.weight"), head_0);
    CHECK_INT(owner_of(model, "lm_head_stages.2.weight"), head_2);
    CHECK_INT(owner_of(model, "backout_lambda"), 2);
    for (int stage = -1; stage < 3; stage++)
        check_table(model, stage);
}

/* Who has what, and what crosses a boundary, by objective. */
static void check_objectives(void)
{
    poe_model model, whole;
    poe_model_config config = small_config();
    config.backout = true;
    CHECK_INT(poe_model_init(&model, &config), POE_OK);
    check_owners(&model, -1, -1, 0, 2);
    CHECK(!poe_model_crosses_x0(&model, 0) && !poe_model_crosses_mid(&model, 1) && poe_model_has_head(&model, 0));
    config.objective = POE_OBJECTIVE_HIERARCHICAL;
    CHECK_INT(poe_model_init(&model, &config), POE_OK);
    check_owners(&model, 0, -1, 0, 2);
    CHECK(poe_model_crosses_x0(&model, 0) && !poe_model_crosses_mid(&model, 1) && poe_model_has_head(&model, 0));
    config.objective = POE_OBJECTIVE_BP;
    CHECK_INT(poe_model_init(&model, &config), POE_OK);
    check_owners(&model, 0, 2, 2, -2);
    CHECK_INT(poe_model_mid_layer(&model), 2);
    CHECK(!poe_model_crosses_mid(&model, 0) && poe_model_crosses_mid(&model, 1)); /* layer 2 is stage 1's */
    CHECK(poe_model_crosses_x0(&model, 1) && !poe_model_has_head(&model, 1) && poe_model_has_head(&model, 2));
    config.n_stages = 1;
    config.stage_layers[0] = 4;
    CHECK_INT(poe_model_init(&whole, &config), POE_OK);
    CHECK_INT(poe_model_parameters(&model), poe_model_parameters(&whole));
    CHECK_INT(poe_model_scaling_parameters(&model), poe_model_scaling_parameters(&whole));
}

static void check_deviation(const poe_tensor_table *table, const float *values, const char *name, double deviation)
{
    const poe_tensor *tensor = poe_tensor_find(table, name);
    CHECK(tensor != NULL);
    if (!tensor)
        return;
    double squares = 0;
    size_t n = tensor->rows * tensor->cols;
    for (size_t i = 0; i < n; i++)
        squares += (double)values[tensor->offset + i] * values[tensor->offset + i];
    CHECK_NEAR(sqrt(squares / (double)n), deviation, 0.1, 0); /* 5 sigma of the smallest of them */
}

static void check_initial(void)
{
    poe_model model;
    poe_model_config config = small_config();
    CHECK_INT(poe_model_init(&model, &config), POE_OK);
    poe_tensor_table table, shared;
    CHECK_INT(poe_model_tensors(&model, 0, &table), POE_OK);
    CHECK_INT(poe_model_tensors(&model, -1, &shared), POE_OK);
    float *values = calloc(table.floats, sizeof(*values)), *common = calloc(shared.floats, sizeof(*common));
    poe_model_initialise(&model, &table, 7, values);
    poe_model_initialise(&model, &shared, 7, common);
    double s = 1 / sqrt(48); /* of U(-sqrt(3/C), sqrt(3/C)) */
    check_deviation(&table, values, "transformer.h.0.attn.c_q.weight", s);
    check_deviation(&table, values, "transformer.h.1.mlp.c_fc.weight", 0.4 * s);
    check_deviation(&table, values, "value_embeds.1.weight", s);
    check_deviation(&table, values, "transformer.h.0.attn.c_proj.weight", 0);
    check_deviation(&table, values, "transformer.h.0.mlp.c_proj.weight", 0);
    check_deviation(&table, values, "lm_head_stages.0.weight", 0);
    check_deviation(&shared, common, "transformer.wte.weight", 0.8);
    check_deviation(&shared, common, "lm_head.weight", 0.001);
    check_deviation(&shared, common, "smear_lambda", 0);
    const float *resid = values + poe_tensor_find(&table, "resid_lambdas")->offset;
    const float *x0 = values + poe_tensor_find(&table, "x0_lambdas")->offset;
    CHECK_NEAR(resid[1], 1.15 - 0.10 / 3, 1e-6, 0);
    CHECK_NEAR(x0[1], 0.20 - 0.15 / 3, 1e-6, 0);
    free(values);
    free(common);
    poe_tensor_table_free(&table);
    poe_tensor_table_free(&shared);
}

/* A tensor's values do not depend on the partition that holds it, nor on whether it is shared. */
static void check_initial_partition(void)
{
    poe_model model;
    poe_model_config config = small_config();
    config.objective = POE_OBJECTIVE_BP;
    CHECK_INT(poe_model_init(&model, &config), POE_OK);
    poe_tensor_table parts, whole, shared;
    CHECK_INT(poe_model_tensors(&model, 2, &parts), POE_OK);
    config.n_stages = 1;
    config.stage_layers[0] = 4;
    config.objective = POE_OBJECTIVE_POE;
    CHECK_INT(poe_model_init(&model, &config), POE_OK);
    CHECK_INT(poe_model_tensors(&model, 0, &whole), POE_OK);
    CHECK_INT(poe_model_tensors(&model, -1, &shared), POE_OK);
    float *a = calloc(parts.floats, sizeof(*a)), *b = calloc(whole.floats, sizeof(*b));
    float *common = calloc(shared.floats, sizeof(*common));
    poe_model_initialise(&model, &parts, 3, a);
    poe_model_initialise(&model, &whole, 3, b);
    poe_model_initialise(&model, &shared, 3, common);
    const poe_tensor *own_head = poe_tensor_find(&parts, "lm_head.weight");
    const poe_tensor *shared_head = poe_tensor_find(&shared, "lm_head.weight");
    CHECK(memcmp(a + own_head->offset, common + shared_head->offset, 320 * 48 * sizeof(float)) == 0);
    const poe_tensor *in_parts = poe_tensor_find(&parts, "value_embeds.3.weight");
    const poe_tensor *in_whole = poe_tensor_find(&whole, "value_embeds.3.weight");
    CHECK(memcmp(a + in_parts->offset, b + in_whole->offset, 320 * 24 * sizeof(float)) == 0);
    CHECK(a[poe_tensor_find(&parts, "resid_lambdas")->offset] ==
          b[poe_tensor_find(&whole, "resid_lambdas")->offset + 3]);
    free(a);
    free(b);
    free(common);
    poe_tensor_table_free(&parts);
    poe_tensor_table_free(&whole);
    poe_tensor_table_free(&shared);
}

static poe_log *test_log;

static void check_refused(const char *what, poe_model_config config)
{
    poe_model model;
    poe_log_hold();
    poe_status status = poe_model_init(&model, &config);
    poe_log_settle(false);
    if (status != POE_BAD_INPUT) {
        fprintf(stderr, "%s is accepted\n", what);
        check_failures++;
    }
}

#define REFUSED(change)                                                                                                \
    do {                                                                                                               \
        poe_model_config config = small_config();                                                                      \
        config.change;                                                                                                 \
        check_refused(#change, config);                                                                                \
    } while (0)

static void check_bad_input(void)
{
    REFUSED(n_stages = 0);
    REFUSED(n_stages = POE_MAX_STAGES + 1);
    REFUSED(stage_layers[1] = 0);
    REFUSED(stage_layers[1] = -3);
    REFUSED(stage_layers[1] = POE_MAX_LAYERS);
    REFUSED(n_embd = 23);
    REFUSED(n_embd = 50);
    REFUSED(n_embd = 1 << 30);
    REFUSED(n_embd = 36); /* heads of 9 channels */
    REFUSED(n_head = 0);
    REFUSED(n_head = 5);
    REFUSED(n_kv_head = 3);
    REFUSED(n_kv_head = 0);
    REFUSED(n_kv_head = 8);
    REFUSED(mlp_dim = -1);
    REFUSED(sequence_len = 0);
    REFUSED(vocab_size = 0);
    REFUSED(window_pattern[0] = 'X');
    REFUSED(window_pattern[0] = 0);
    REFUSED(alpha = 1.5);
    REFUSED(alpha = NAN);
    REFUSED(norm_eps = 0);
}

int main(void)
{
    test_log = poe_log_create(0, 1);
    poe_log_attach(test_log);
    check_totals();
    check_layers();
    check_tables();
    check_objectives();
    check_initial();
    check_initial_partition();
    check_bad_input();
    poe_log_attach(NULL);
    poe_log_destroy(test_log);
    return check_result();
}
