/* SPDX-License-Identifier: MIT */
#include "pipeline/settings.h"

#include <string.h>

#include "src/log.h"

_Static_assert((int)POE_OPTION_STAGES == (int)POE_MAX_STAGES, "options and model agree on the number of stages");

static poe_objective parse_objective(const char *text)
{
    return strcmp(text, "poe") == 0  ? POE_OBJECTIVE_POE
           : strcmp(text, "bp") == 0 ? POE_OBJECTIVE_BP
                                     : POE_OBJECTIVE_HIERARCHICAL;
}

poe_status poe_settings_model(const poe_options *o, int vocab_size, poe_model *model)
{
    poe_model_config c = {
        .n_stages = o->stages.count,
        .head = strcmp(o->head, "ps") == 0 ? POE_HEAD_PER_STAGE : POE_HEAD_SHARED,
        .objective = parse_objective(o->objective),
        .alpha = o->alpha,
        .n_embd = o->n_embd,
        .n_head = o->n_head,
        .n_kv_head = o->n_kv_head ? o->n_kv_head : o->n_head,
        .mlp_dim = o->mlp_dim,
        .sequence_len = o->sequence_len,
        .vocab_size = vocab_size,
        .norm_eps = o->norm_eps,
    };
    c.backout = c.objective == POE_OBJECTIVE_BP && strcmp(o->backout, "off") != 0;
    memcpy(c.stage_layers, o->stages.layers, sizeof(int) * (size_t)o->stages.count);
    memcpy(c.window_pattern, o->window_pattern, sizeof(c.window_pattern));
    return poe_model_init(model, &c);
}

void poe_settings_optimizer(const poe_options *o, poe_optimizer_config *config)
{
    *config = (poe_optimizer_config){
        .matrix_lr = o->matrix_lr,
        .embedding_lr = o->embedding_lr,
        .unembedding_lr = o->unembedding_lr,
        .scalar_lr = o->scalar_lr,
        .weight_decay = o->weight_decay,
        .total_batch_size = (double)o->total_batch_size,
        .num_iterations = o->num_iterations,
        .warmup_steps = o->warmup_steps,
        .warmdown_ratio = o->warmdown_ratio,
        .final_lr_frac = o->final_lr_frac,
    };
}

int poe_settings_micro_batches(const poe_options *o)
{
    return (int)(o->total_batch_size / ((int64_t)o->device_batch_size * o->sequence_len));
}
