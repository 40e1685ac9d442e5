/* SPDX-License-Identifier: MIT
 * A stage's memory: which pieces there are, how large, and where. */
#include "stages/stage.h"

#include <assert.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "src/arena.h"
#include "src/log.h"
#include "stages/stage_impl.h"

static const char *const region_names[REGION_COUNT] = {"parameters", "gradients", "optimiser state", "activations"};

const char *poe_recompute_name(poe_recompute recompute)
{
    static const char *const names[POE_RECOMPUTE_COUNT] = {"none", "norms", "block"};
    return names[recompute];
}

static float *take(stage_region *region, size_t floats)
{
    char *piece = region->base ? region->base + region->used : NULL;
    region->used += poe_arena_round(floats * sizeof(float));
    return (float *)(void *)piece;
}

/* --- tensors ----------------------------------------------------------------------------------------------------- */

/* Where the named tensor is in `base`, which is laid out as `table`; NULL without such a tensor or without memory. */
__attribute__((format(printf, 3, 4))) static float *locate(const poe_tensor_table *table, float *base,
                                                           const char *format, ...)
{
    char name[POE_NAME_MAX];
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof(name), format, args);
    va_end(args);
    const poe_tensor *tensor = poe_tensor_find(table, name);
    return base && tensor ? base + tensor->offset : NULL;
}

static layer_tensors locate_layer(const poe_stage *stage, float *base, int i)
{
    const poe_tensor_table *table = &stage->own.table;
    int number = stage->model->first_layer[stage->settings.stage] + i;
    layer_tensors tensors = {
        .q = locate(table, base, "transformer.h.%d.attn.c_q.weight", number),
        .k = locate(table, base, "transformer.h.%d.attn.c_k.weight", number),
        .v = locate(table, base, "transformer.h.%d.attn.c_v.weight", number),
        .proj = locate(table, base, "transformer.h.%d.attn.c_proj.weight", number),
        .fc = locate(table, base, "transformer.h.%d.mlp.c_fc.weight", number),
        .mlp_proj = locate(table, base, "transformer.h.%d.mlp.c_proj.weight", number),
        .gate = locate(table, base, "transformer.h.%d.attn.ve_gate.weight", number),
        .value_embed = locate(table, base, "value_embeds.%d.weight", number),
    };
    if (base) {
        tensors.resid = locate(table, base, "resid_lambdas") + i;
        tensors.x0 = locate(table, base, "x0_lambdas") + i;
    }
    return tensors;
}

/* In whichever of the two tables. */
static float *locate_either(const poe_stage *stage, float *own, float *shared, const char *name)
{
    float *found = locate(&stage->own.table, own, "%s", name);
    return found ? found : locate(&stage->shared.table, shared, "%s", name);
}

static model_tensors locate_model(const poe_stage *stage, float *own, float *shared)
{
    return (model_tensors){
        .wte = locate_either(stage, own, shared, "transformer.wte.weight"),
        .head = locate_either(stage, own, shared, "lm_head.weight"),
        .smear_gate = locate_either(stage, own, shared, "smear_gate.weight"),
        .smear_lambda = locate_either(stage, own, shared, "smear_lambda"),
        .backout = locate_either(stage, own, shared, "backout_lambda"),
    };
}

static void lay_out_state(poe_stage *stage, tensor_set *set, bool shared)
{
    for (size_t row = 0; row < set->table.count; row++) {
        const char *name;
        float *values;
        size_t floats;
        for (int part = 0; part < poe_stage_state(stage, shared, row, part, &name, &values, &floats); part++) {
            float *piece = take(&stage->regions[OPTIMIZER], floats);
            if (part == 0)
                set->state[row] = piece;
        }
    }
}

static void lay_out_tensors(poe_stage *stage)
{
    stage_region *parameters = &stage->regions[PARAMETERS], *gradients = &stage->regions[GRADIENTS];
    stage->own.values = take(parameters, stage->own.table.floats);
    stage->shared.values = take(parameters, stage->shared.table.floats);
    if (stage->own_head_row >= 0)
        stage->head_sum = take(parameters, stage->model->vocab_padded * (size_t)stage->model->config.n_embd);
    if (stage->settings.training) {
        stage->own.gradients = take(gradients, own_gradient_floats(stage));
        stage->shared.gradients = take(gradients, stage->shared.table.floats);
        lay_out_state(stage, &stage->own, false);
        lay_out_state(stage, &stage->shared, true);
    }
}

static void locate_tensors(poe_stage *stage)
{
    const poe_tensor_table *own = &stage->own.table;
    for (int i = 0; i < stage->n_layers; i++) {
        stage->layers[i].w = locate_layer(stage, stage->own.values, i);
        stage->layers[i].g = locate_layer(stage, stage->own.gradients, i);
    }
    stage->w = locate_model(stage, stage->own.values, stage->shared.values);
    stage->g = locate_model(stage, stage->own.gradients, stage->shared.gradients);
    if (stage->own_head_row >= 0)
        stage->own_head = stage->own.values + own->rows[stage->own_head_row].offset;
}

/* --- activations ------------------------------------------------------------------------------------------------- */

/* A normalised input: kept, or made in the scratch, which is free whenever one is wanted. */
static float *take_norm(poe_stage *stage, size_t n)
{
    size_t floats = n * (size_t)stage->model->config.n_embd;
    return keeps_norms(stage) ? take(&stage->regions[ACTIVATIONS], floats) : stage->wide;
}

/* All but x and u_attn. */
static layer_kept take_block(poe_stage *stage, size_t n)
{
    const poe_model *model = stage->model;
    stage_region *region = &stage->regions[ACTIVATIONS];
    size_t c = (size_t)model->config.n_embd, kv = model->kv_dim;
    size_t heads = (size_t)model->config.n_head, kv_heads = (size_t)model->config.n_kv_head;
    layer_kept kept = {0};
    kept.rinv_attn = take(region, n);
    kept.q = take(region, n * c);
    kept.rinv_q = take(region, n * heads);
    kept.k = take(region, n * kv);
    kept.rinv_k = take(region, n * kv_heads);
    kept.v = take(region, n * kv);
    kept.gate = take(region, n * kv_heads);
    kept.y = take(region, n * c);
    kept.lse = take(region, n * heads);
    kept.u_mlp = take(region, n * c);
    kept.rinv_mlp = take(region, n);
    kept.f = take(region, n * model->mlp_dim);
    return kept;
}

static layer_kept take_kept(poe_stage *stage, const stage_slot *slot, int i, size_t n)
{
    layer_kept kept = keeps_blocks(stage) ? take_block(stage, n) : stage->block;
    /* Without training the output of `mid` alone is read after the next layer's forward: the others share one. */
    int first_other = stage->mid == 0;
    bool own_x = stage->settings.training || i == first_other || i == stage->mid;
    kept.x =
        own_x ? take(&stage->regions[ACTIVATIONS], n * (size_t)stage->model->config.n_embd) : slot->kept[first_other].x;
    kept.u_attn = take_norm(stage, n);
    return kept;
}

/* Nobody reads a layer's output any more when the gradient that has come to it is owed, nor q, k, v when theirs are. */
static layer_owed take_owed(poe_stage *stage, const layer_kept *kept, size_t n)
{
    stage_region *region = &stage->regions[ACTIVATIONS];
    layer_owed owed = {.mlp = kept->x, .q = kept->q, .k = kept->k, .v = kept->v};
    owed.f = take(region, n * stage->model->mlp_dim);
    owed.attn = take(region, n * (size_t)stage->model->config.n_embd);
    return owed;
}

static layer_owed owed_at_once(const poe_stage *stage)
{
    return (layer_owed){
        .mlp = stage->dx, .f = stage->wide, .attn = stage->dx, .q = stage->dq, .k = stage->dk, .v = stage->dv};
}

static void lay_out_slot(poe_stage *stage, stage_slot *slot, size_t n)
{
    stage_region *region = &stage->regions[ACTIVATIONS];
    size_t c = (size_t)stage->model->config.n_embd;
    if (stage->has_wte) {
        slot->rinv_e = take(region, n);
        slot->sig = take(region, n);
        slot->x0 = take(region, n * c);
        slot->e = take_norm(stage, n);
    }
    if (stage->has_head) {
        slot->u = take(region, n * c);
        slot->rinv = take(region, n);
    }
    for (int i = 0; i < stage->n_layers; i++) {
        slot->kept[i] = take_kept(stage, slot, i, n);
        if (stage->settings.split)
            slot->owed[i] = take_owed(stage, &slot->kept[i], n);
        else
            slot->owed[i] = owed_at_once(stage);
    }
}

/* What all slots share. */
static void lay_out_backward(poe_stage *stage, size_t n)
{
    stage_region *region = &stage->regions[ACTIVATIONS];
    size_t c = (size_t)stage->model->config.n_embd, kv = stage->model->kv_dim;
    stage->dx = take(region, n * c);
    stage->du = take(region, n * c);
    if (stage->has_wte)
        stage->dx0 = take(region, n * c);
    if (stage->backs_out && stage->mid >= 0)
        stage->dmid = take(region, n * c);
    stage->dq = take(region, n * c);
    stage->dk = take(region, n * kv);
    stage->dv = take(region, n * kv);
}

static void lay_out_activations(poe_stage *stage)
{
    const poe_model *model = stage->model;
    stage_region *region = &stage->regions[ACTIVATIONS];
    size_t t = (size_t)model->config.sequence_len, n = stage->settings.rows * t, c = (size_t)model->config.n_embd;
    stage->cos = take(region, t * model->head_size / 2);
    stage->sin = take(region, t * model->head_size / 2);
    stage->wide = take(region, n * (model->mlp_dim > c ? model->mlp_dim : c));
    if (!keeps_blocks(stage))
        stage->block = take_block(stage, n);
    if (stage->settings.training)
        lay_out_backward(stage, n);
    for (int m = 0; m < stage->settings.slots; m++)
        lay_out_slot(stage, &stage->slots[m], n);
}

/* Angles in fp32, as nanochat has them. */
static void fill_rotary(poe_stage *stage)
{
    size_t half = stage->model->head_size / 2;
    for (size_t i = 0; i < half; i++) {
        float exponent = -(float)(2 * i) / (float)stage->model->head_size;
        float frequency = (float)pow(100000, exponent);
        for (size_t t = 0; t < (size_t)stage->model->config.sequence_len; t++) {
            float angle = (float)t * frequency;
            stage->cos[t * half + i] = (float)cos(angle);
            stage->sin[t * half + i] = (float)sin(angle);
        }
    }
}

/* --- life -------------------------------------------------------------------------------------------------------- */

static poe_status prepare_set(const poe_model *model, int stage, tensor_set *set)
{
    poe_status status = poe_model_tensors(model, stage, &set->table);
    if (status != POE_OK)
        return status;
    set->state = calloc(set->table.count ? set->table.count : 1, sizeof(*set->state));
    if (!set->state) {
        poe_error("out of memory for the table of optimiser states");
        return POE_FAILED;
    }
    return POE_OK;
}

static void lay_out(poe_stage *stage)
{
    for (int r = 0; r < REGION_COUNT; r++)
        stage->regions[r].used = 0;
    lay_out_tensors(stage);
    lay_out_activations(stage);
}

static poe_status prepare_tables(poe_stage *stage)
{
    poe_status status = prepare_set(stage->model, stage->settings.stage, &stage->own);
    if (status == POE_OK)
        status = prepare_set(stage->model, -1, &stage->shared);
    if (status != POE_OK)
        return status;
    const poe_tensor_table *own = &stage->own.table;
    stage->has_wte = poe_tensor_find(own, "transformer.wte.weight") ||
                     poe_tensor_find(&stage->shared.table, "transformer.wte.weight");
    bool per_stage = stage->has_head && stage->model->config.head == POE_HEAD_PER_STAGE;
    stage->own_head_row = per_stage ? (int)own->count - 1 : -1;
    return POE_OK;
}

/* Records of layers and slots; poe_stage_destroy() frees them. */
static poe_status prepare_records(poe_stage *stage, int first)
{
    size_t layers = (size_t)stage->n_layers, slots = (size_t)stage->settings.slots;
    stage->layers = calloc(layers, sizeof(*stage->layers));
    stage->slots = calloc(slots, sizeof(*stage->slots));
    stage->all_kept = calloc(slots * layers, sizeof(*stage->all_kept));
    stage->all_owed = calloc(slots * layers, sizeof(*stage->all_owed));
    if (!stage->layers || !stage->slots || !stage->all_kept || !stage->all_owed) {
        poe_error("out of memory for stage %d", stage->settings.stage);
        return POE_FAILED;
    }
    for (size_t i = 0; i < layers; i++)
        stage->layers[i].shape = &stage->model->layers[(size_t)first + i];
    for (size_t m = 0; m < slots; m++) {
        stage->slots[m].kept = stage->all_kept + m * layers;
        stage->slots[m].owed = stage->all_owed + m * layers;
    }
    stage->slot = stage->slots;
    return POE_OK;
}

static poe_status check_settings(const poe_stage_settings *settings)
{
    assert(settings->slots >= 1 && (settings->training || !settings->split));
    if (!settings->split || settings->recompute == POE_RECOMPUTE_NONE)
        return POE_OK;
    poe_error("--recompute %s: a backward pass in two parts (zero bubble) needs everything kept: it allows none only",
              poe_recompute_name(settings->recompute));
    return POE_BAD_INPUT;
}

/* A stage that is laid out but has no memory yet. */
static poe_status prepare(const poe_model *model, const poe_stage_settings *settings, poe_stage **result)
{
    poe_status status = check_settings(settings);
    if (status != POE_OK)
        return status;
    poe_stage *stage = calloc(1, sizeof(*stage));
    if (!stage) {
        poe_error("out of memory for stage %d", settings->stage);
        return POE_FAILED;
    }
    int first = model->first_layer[settings->stage], n_layers = model->first_layer[settings->stage + 1] - first;
    int mid = poe_model_mid_layer(model);
    *stage = (poe_stage){.model = model,
                         .settings = *settings,
                         .n_layers = n_layers,
                         .mid = mid >= first && mid < first + n_layers ? mid - first : -1,
                         .has_head = poe_model_has_head(model, settings->stage),
                         .backs_out = mid >= 0 && settings->stage == model->config.n_stages - 1};
    status = prepare_records(stage, first);
    if (status == POE_OK)
        status = prepare_tables(stage);
    if (status != POE_OK) {
        poe_stage_destroy(stage);
        return status;
    }
    lay_out(stage);
    *result = stage;
    return POE_OK;
}

static poe_status allocate(poe_stage *stage, poe_backend *backend)
{
    stage->backend = backend;
    for (int r = 0; r < REGION_COUNT; r++) {
        stage_region *region = &stage->regions[r];
        if (region->used == 0)
            continue;
        region->base = backend->ops->memory_allocate(backend, region_names[r], region->used);
        if (!region->base) {
            poe_error("stage %d cannot get %.1f MiB of memory for its %s", stage->settings.stage,
                      (double)region->used / 0x1p20, region_names[r]);
            return POE_FAILED;
        }
        region->size = region->used;
    }
    return POE_OK;
}

poe_status poe_stage_size(const poe_model *model, const poe_stage_settings *settings, poe_stage_memory *memory)
{
    poe_stage *stage;
    poe_status status = prepare(model, settings, &stage);
    if (status != POE_OK)
        return status;
    *memory = (poe_stage_memory){.parameters = stage->regions[PARAMETERS].used,
                                 .gradients = stage->regions[GRADIENTS].used,
                                 .optimizer = stage->regions[OPTIMIZER].used,
                                 .activations = stage->regions[ACTIVATIONS].used};
    poe_stage_destroy(stage);
    return POE_OK;
}

void poe_stage_limits(const poe_model *model, const poe_stage_settings *settings, poe_backend_limits *limits)
{
    size_t t = (size_t)model->config.sequence_len;
    *limits = (poe_backend_limits){.rows = settings->rows * t,
                                   .t = t,
                                   .c = (size_t)model->config.n_embd,
                                   .head_size = model->head_size,
                                   .n_head = (size_t)model->config.n_head,
                                   .n_kv_head = (size_t)model->config.n_kv_head,
                                   .mlp_dim = model->mlp_dim,
                                   .vocab_padded = model->vocab_padded,
                                   .training = settings->training};
}

poe_status poe_stage_create(const poe_model *model, const poe_stage_settings *settings, poe_backend *backend,
                            poe_stage **result)
{
    poe_stage *stage;
    poe_status status = prepare(model, settings, &stage);
    if (status != POE_OK)
        return status;
    status = allocate(stage, backend);
    if (status != POE_OK) {
        poe_stage_destroy(stage);
        return status;
    }
    lay_out(stage);
    locate_tensors(stage);
    fill_rotary(stage);
    *result = stage;
    return POE_OK;
}

static void finish_set(tensor_set *set)
{
    poe_tensor_table_free(&set->table);
    free(set->state);
}

void poe_stage_destroy(poe_stage *stage)
{
    if (!stage)
        return;
    for (int r = 0; r < REGION_COUNT; r++)
        if (stage->regions[r].base)
            stage->backend->ops->memory_free(stage->backend, stage->regions[r].base, stage->regions[r].size);
    finish_set(&stage->own);
    finish_set(&stage->shared);
    free(stage->layers);
    free(stage->slots);
    free(stage->all_kept);
    free(stage->all_owed);
    free(stage);
}
