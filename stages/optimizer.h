/* SPDX-License-Identifier: MIT
 * Rates and schedules of MuonAdamW (spec 3; nanochat's optim.py). The update kernels are in the operations table. */
#ifndef POE_STAGES_OPTIMIZER_H
#define POE_STAGES_OPTIMIZER_H

#include "stages/model.h"

typedef struct poe_optimizer_config {
    double matrix_lr, embedding_lr, unembedding_lr, scalar_lr, weight_decay; /* base rates, as flags */
    double total_batch_size; /* tokens of a step */
    int num_iterations;
    int warmup_steps;
    double warmdown_ratio; /* share of num_iterations; its length is rounded half to even */
    double final_lr_frac;
} poe_optimizer_config;

/* The schedule's values of one step. */
typedef struct poe_rates {
    double lrm; /* the multiplier that warm-up and warm-down give */
    double momentum, matrix_wd;
    double matrix_lr, head_lr, wte_lr, ve_lr, resid_lr, x0_lr, smear_lr;
} poe_rates;

void poe_rates_at(const poe_model *model, const poe_optimizer_config *config, int step, poe_rates *rates);

/* AdamW's settings of a group (not POE_GROUP_MATRIX). */
typedef struct poe_adamw {
    double lr, beta1, beta2, weight_decay;
} poe_adamw;
poe_adamw poe_adamw_of(poe_group group, const poe_rates *rates);

#endif
