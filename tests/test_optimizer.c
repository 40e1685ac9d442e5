/* SPDX-License-Identifier: MIT
 * Rates and schedules: worked values here, the golden runs' tables where they are. */
#include "stages/optimizer.h"

#include "tests/check.h"
#include "tests/golden.h"

static const poe_model_config d12_config = {.n_stages = 1,
                                            .stage_layers = {12},
                                            .n_embd = 768,
                                            .n_head = 6,
                                            .n_kv_head = 6,
                                            .sequence_len = 1024,
                                            .vocab_size = 1000,
                                            .window_pattern = "L",
                                            .norm_eps = 1e-6};

/* On nanochat's d12 itself, at its batch, every scaling is 1. */
static void check_reference_point(void)
{
    poe_model model;
    CHECK_INT(poe_model_init(&model, &d12_config), POE_OK);
    poe_optimizer_config config = {.matrix_lr = 0.02,
                                   .embedding_lr = 0.3,
                                   .unembedding_lr = 0.008,
                                   .scalar_lr = 0.5,
                                   .weight_decay = 0.28,
                                   .total_batch_size = 524288,
                                   .num_iterations = 2000,
                                   .warmup_steps = 40,
                                   .warmdown_ratio = 0.65,
                                   .final_lr_frac = 0.05};
    poe_rates r;
    poe_rates_at(&model, &config, 0, &r);
    CHECK_NEAR(r.lrm, 1.0 / 40, 1e-12, 0);
    CHECK_NEAR(r.momentum, 0.85, 1e-12, 0);
    CHECK_NEAR(r.matrix_wd, 0.28, 1e-12, 0);
    poe_rates_at(&model, &config, 500, &r);
    CHECK_NEAR(r.lrm, 1, 0, 0);
    CHECK_NEAR(r.momentum, 0.97, 1e-12, 0);
    CHECK_NEAR(r.head_lr, 0.008, 1e-12, 0);
    CHECK_NEAR(r.matrix_wd, 0.28 * 0.5 * (1 + sqrt(0.5)), 1e-12, 0);
    poe_rates_at(&model, &config, 700 + 650, &r); /* in the middle of the warm-down */
    CHECK_NEAR(r.lrm, 0.5 + 0.5 * 0.05, 1e-12, 0);
    CHECK_NEAR(r.momentum, 0.935, 1e-12, 0);
    CHECK_NEAR(poe_adamw_of(POE_GROUP_X0, &r).beta1, 0.96, 0, 0);
    CHECK_NEAR(poe_adamw_of(POE_GROUP_VALUE_EMBED, &r).lr, r.ve_lr, 0, 0);
}

/* 0.5 * 5 = 2.5 rounds to 2 and 0.5 * 7 = 3.5 to 4, half to even: steps before the warm-down run at full rate. */
static void check_rounding(void)
{
    poe_model model;
    CHECK_INT(poe_model_init(&model, &d12_config), POE_OK);
    poe_optimizer_config config = {.total_batch_size = 1, .num_iterations = 5, .warmdown_ratio = 0.5};
    poe_rates r;
    poe_rates_at(&model, &config, 4, &r);
    CHECK_NEAR(r.lrm, 0.5, 1e-12, 0);
    config.num_iterations = 7;
    poe_rates_at(&model, &config, 4, &r);
    CHECK_NEAR(r.lrm, 0.75, 1e-12, 0);
    config.warmdown_ratio = 0;
    poe_rates_at(&model, &config, 6, &r);
    CHECK_NEAR(r.lrm, 1, 0, 0);
}

/* Both sides are double precision: 1e-12 is rounding. */
static void check_golden(const char *name)
{
    golden run;
    golden_open(&run, name);
    for (int step = 0; step < run.optimizer.num_iterations; step++) {
        const json_t *expected = json_array_get(run.expected, (size_t)step);
        poe_rates r;
        poe_rates_at(&run.model, &run.optimizer, step, &r);
        CHECK_NEAR(r.lrm, golden_number(expected, "lrm"), 1e-12, 0);
        CHECK_NEAR(r.momentum, golden_number(expected, "momentum"), 1e-12, 0);
        CHECK_NEAR(r.matrix_wd, golden_number(expected, "matrix_wd"), 1e-12, 0);
        CHECK_NEAR(r.matrix_lr, golden_number(expected, "matrix_lr"), 1e-12, 0);
        CHECK_NEAR(r.head_lr, golden_number(expected, "head_lr"), 1e-12, 0);
        CHECK_NEAR(r.wte_lr, golden_number(expected, "wte_lr"), 1e-12, 0);
        CHECK_NEAR(r.ve_lr, golden_number(expected, "ve_lr"), 1e-12, 0);
        CHECK_NEAR(r.resid_lr, golden_number(expected, "resid_lr"), 1e-12, 0);
        CHECK_NEAR(r.x0_lr, golden_number(expected, "x0_lr"), 1e-12, 0);
        CHECK_NEAR(r.smear_lr, golden_number(expected, "smear_lr"), 1e-12, 0);
    }
    golden_close(&run);
}

int main(void)
{
    check_reference_point();
    check_rounding();
    if (!poe_test_shared())
        return check_result();
    for (int i = 0; i < GOLDEN_COUNT; i++)
        check_golden(golden_names[i]);
    return check_result();
}
