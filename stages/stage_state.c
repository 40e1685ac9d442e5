/* SPDX-License-Identifier: MIT
 * A stage's tensors from outside, and their updates. */
#include "src/arena.h"
#include "stages/stage.h"
#include "stages/stage_impl.h"

const poe_model *poe_stage_model(const poe_stage *stage)
{
    return stage->model;
}

bool poe_stage_has_head(const poe_stage *stage)
{
    return stage->has_head;
}

const poe_tensor_table *poe_stage_own_table(const poe_stage *stage)
{
    return &stage->own.table;
}

const poe_tensor_table *poe_stage_shared_table(const poe_stage *stage)
{
    return &stage->shared.table;
}

float *poe_stage_own_values(poe_stage *stage)
{
    return stage->own.values;
}

float *poe_stage_shared_values(poe_stage *stage)
{
    return stage->shared.values;
}

float *poe_stage_own_gradients(poe_stage *stage)
{
    return stage->own.gradients;
}

float *poe_stage_shared_gradients(poe_stage *stage)
{
    return stage->shared.gradients;
}

int64_t *poe_stage_own_updates(poe_stage *stage)
{
    return &stage->own.updates;
}

int64_t *poe_stage_shared_updates(poe_stage *stage)
{
    return &stage->shared.updates;
}

void poe_stage_parameters_changed(poe_stage *stage)
{
    stage->head_sum_stale = true;
}

void poe_stage_on_head_gradient(poe_stage *stage, void (*done)(void *arg), void *arg)
{
    stage->head_done = done;
    stage->head_done_arg = arg;
}

/* --- gradients --------------------------------------------------------------------------------------------------- */

void poe_stage_clear_gradients(poe_stage *stage)
{
    stage->backend->ops->fill(stage->backend, stage->own.gradients, 0, own_gradient_floats(stage));
}

void poe_stage_clear_shared_gradients(poe_stage *stage)
{
    stage->backend->ops->fill(stage->backend, stage->shared.gradients, 0, stage->shared.table.floats);
}

bool poe_stage_gradients_finite(const poe_stage *stage)
{
    return stage->backend->ops->finite(stage->backend, stage->own.gradients, own_gradient_floats(stage));
}

/* --- parts of the shared tensors --------------------------------------------------------------------------------- */

static bool is_of(poe_shared_part part, poe_group group)
{
    return part == POE_SHARED_HEAD ? group == POE_GROUP_HEAD : part == POE_SHARED_WTE ? group == POE_GROUP_WTE
                                                                                      : group == POE_GROUP_SMEAR;
}

poe_shared_extent poe_stage_shared_extent(const poe_tensor_table *table, poe_shared_part part)
{
    poe_shared_extent extent = {0};
    for (size_t row = 0; row < table->count; row++) {
        const poe_tensor *tensor = &table->rows[row];
        if (!is_of(part, tensor->group))
            continue;
        if (!extent.n_rows++) {
            extent.first_row = row;
            extent.offset = tensor->offset;
        }
        extent.floats = tensor->offset + tensor->rows * tensor->cols - extent.offset;
    }
    return extent;
}

void poe_stage_clear_shared_part(poe_stage *stage, poe_shared_part part)
{
    poe_shared_extent extent = poe_stage_shared_extent(&stage->shared.table, part);
    stage->backend->ops->fill(stage->backend, stage->shared.gradients + extent.offset, 0, extent.floats);
}

bool poe_stage_shared_part_finite(const poe_stage *stage, poe_shared_part part)
{
    poe_shared_extent extent = poe_stage_shared_extent(&stage->shared.table, part);
    return stage->backend->ops->finite(stage->backend, stage->shared.gradients + extent.offset, extent.floats);
}

/* --- optimiser --------------------------------------------------------------------------------------------------- */

/* Floats of a part of the optimiser's state, padding left out. */
static size_t state_floats(const poe_tensor *tensor, int part)
{
    if (tensor->group == POE_GROUP_MATRIX && part == 1)
        return tensor->rows >= tensor->cols ? tensor->rows : tensor->cols;
    return tensor->rows * tensor->cols;
}

/* Where part 1 is, seen from part 0. */
static size_t state_offset(const poe_tensor *tensor)
{
    return poe_arena_round(state_floats(tensor, 0) * sizeof(float)) / sizeof(float);
}

int poe_stage_state(poe_stage *stage, bool shared, size_t row, int part, const char **name, float **values,
                    size_t *floats)
{
    static const char *const names[2][2] = {{"m", "v"}, {"momentum", "second"}};
    const tensor_set *set = shared ? &stage->shared : &stage->own;
    const poe_tensor *tensor = &set->table.rows[row];
    if (!tensor->trained || !stage->settings.training)
        return 0;
    if (part < 2) {
        float *first = set->state[row];
        *name = names[tensor->group == POE_GROUP_MATRIX][part];
        *values = first && part == 1 ? first + state_offset(tensor) : first;
        *floats = state_floats(tensor, part);
    }
    return 2;
}

static void update_tensor(poe_stage *stage, const tensor_set *set, size_t row, const poe_rates *rates,
                          const float *gradient)
{
    const poe_tensor *tensor = &set->table.rows[row];
    float *w = set->values + tensor->offset, *first = set->state[row], *second = first + state_offset(tensor);
    if (tensor->group == POE_GROUP_MATRIX) {
        poe_muon_step step = {(float)rates->matrix_lr, (float)rates->momentum, (float)rates->matrix_wd};
        stage->backend->ops->muon(stage->backend, w, first, second, gradient, tensor->rows, tensor->cols, &step);
        return;
    }
    poe_adamw settings = poe_adamw_of(tensor->group, rates);
    poe_adamw_step step = {.lr = (float)settings.lr,
                           .beta1 = (float)settings.beta1,
                           .beta2 = (float)settings.beta2,
                           .eps = 1e-10f,
                           .weight_decay = (float)settings.weight_decay,
                           .t = set->updates};
    stage->backend->ops->adamw(stage->backend, w, first, second, gradient, tensor->rows * tensor->cols, &step);
}

void poe_stage_update_own(poe_stage *stage, const poe_rates *rates)
{
    tensor_set *own = &stage->own;
    own->updates++;
    for (size_t row = 0; row < own->table.count; row++) {
        const poe_tensor *tensor = &own->table.rows[row];
        if (tensor->trained)
            update_tensor(stage, own, row, rates,
                          (int)row == stage->own_head_row ? stage->g.head : own->gradients + tensor->offset);
    }
    poe_stage_parameters_changed(stage);
}

void poe_stage_update_shared(poe_stage *stage, const poe_rates *rates, const float *sum)
{
    tensor_set *shared = &stage->shared;
    shared->updates++;
    for (size_t row = 0; row < shared->table.count; row++)
        update_tensor(stage, shared, row, rates, sum + shared->table.rows[row].offset);
    poe_stage_parameters_changed(stage);
}

void poe_stage_update_shared_part(poe_stage *stage, poe_shared_part part, const poe_rates *rates, const float *sum)
{
    const tensor_set *shared = &stage->shared;
    poe_shared_extent extent = poe_stage_shared_extent(&shared->table, part);
    for (size_t row = extent.first_row; row < extent.first_row + extent.n_rows; row++)
        update_tensor(stage, shared, row, rates, sum + shared->table.rows[row].offset - extent.offset);
    poe_stage_parameters_changed(stage);
}
