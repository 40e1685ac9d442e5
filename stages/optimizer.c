/* SPDX-License-Identifier: MIT */
#include "stages/optimizer.h"

#include <math.h>

/* Nanochat's fixed points: the batch its rates were tuned at, and how long the momentum warms up. */
static const double reference_batch = 524288;
static const double momentum_steps = 400;

/* Length of the warm-down, in steps; rint rounds half to even. */
static double warmdown_steps(const poe_optimizer_config *config)
{
    return rint(config->warmdown_ratio * config->num_iterations);
}

static double multiplier_at(const poe_optimizer_config *config, int step)
{
    if (step < config->warmup_steps)
        return (double)(step + 1) / config->warmup_steps;
    double down = warmdown_steps(config), left = config->num_iterations - step;
    if (left >= down)
        return 1;
    double share = left / down;
    return share + (1 - share) * config->final_lr_frac;
}

static double momentum_at(const poe_optimizer_config *config, int step)
{
    if (step < momentum_steps)
        return 0.85 + (0.97 - 0.85) * step / momentum_steps;
    double down = warmdown_steps(config), since = step - (config->num_iterations - down);
    if (since < 0 || down <= 0)
        return 0.97;
    double share = since / down;
    return 0.97 * (1 - share) + 0.90 * share;
}

void poe_rates_at(const poe_model *model, const poe_optimizer_config *config, int step, poe_rates *rates)
{
    double batch = sqrt(config->total_batch_size / reference_batch);
    double width = sqrt(768.0 / model->config.n_embd);
    double size = (double)poe_model_reference_parameters(model) / (double)poe_model_scaling_parameters(model);
    double cosine = 0.5 * (1 + cos(3.14159265358979323846 * step / config->num_iterations));
    double lrm = multiplier_at(config, step);
    *rates = (poe_rates){
        .lrm = lrm,
        .momentum = momentum_at(config, step),
        .matrix_wd = config->weight_decay * batch * size * cosine,
        .matrix_lr = lrm * batch * config->matrix_lr,
        .head_lr = lrm * batch * width * config->unembedding_lr,
        .wte_lr = lrm * batch * width * config->embedding_lr,
        .ve_lr = lrm * batch * width * config->embedding_lr * 0.5,
        .resid_lr = lrm * batch * config->scalar_lr * 0.01,
        .x0_lr = lrm * batch * config->scalar_lr,
        .smear_lr = lrm * 0.2,
    };
}

poe_adamw poe_adamw_of(poe_group group, const poe_rates *rates)
{
    switch (group) {
    case POE_GROUP_HEAD:
        return (poe_adamw){rates->head_lr, 0.8, 0.96, 0.01};
    case POE_GROUP_WTE:
        return (poe_adamw){rates->wte_lr, 0.8, 0.995, 0.001};
    case POE_GROUP_VALUE_EMBED:
        return (poe_adamw){rates->ve_lr, 0.8, 0.995, 0.01};
    case POE_GROUP_RESID:
        return (poe_adamw){rates->resid_lr, 0.8, 0.95, 0.05};
    case POE_GROUP_X0:
        return (poe_adamw){rates->x0_lr, 0.96, 0.95, 0};
    default:
        return (poe_adamw){rates->smear_lr, 0.8, 0.95, 0};
    }
}
