/* SPDX-License-Identifier: MIT
 * One walk over everything in a file serves to measure, write and read it. */
#include "pipeline/stage_file.h"

#include <inttypes.h>
#include <stdio.h>

#include "src/h5file.h"
#include "src/log.h"

typedef enum walk_mode { MEASURE, WRITE, READ } walk_mode;

typedef struct walk {
    walk_mode mode;
    const char *path;
    poe_h5 *file;   /* NULL to measure */
    uint64_t bytes; /* measured */
} walk;

/* HDF5's own bytes: of a file, of an array or group with its attributes. Both generous. */
enum { FILE_BYTES = 1 << 16, OBJECT_BYTES = 1 << 11 };

static poe_status visit_array(walk *w, const char *name, int ndim, const size_t *shape, float *values)
{
    if (w->mode == WRITE)
        return poe_h5_write(w->file, name, ndim, shape, values);
    if (w->mode == READ)
        return poe_h5_read(w->file, name, ndim, shape, values);
    w->bytes += OBJECT_BYTES + sizeof(*values) * shape[0] * (ndim == 2 ? shape[1] : 1);
    return POE_OK;
}

static poe_status visit_integer(walk *w, const char *object, const char *name, int64_t *value)
{
    if (w->mode == WRITE)
        return poe_h5_write_integer(w->file, object, name, *value);
    return w->mode == READ ? poe_h5_read_integer(w->file, object, name, value) : POE_OK;
}

/* Reading: the file must say the same. */
static poe_status visit_fixed(walk *w, const char *object, const char *name, int64_t value)
{
    int64_t found = value;
    poe_status status = visit_integer(w, object, name, &found);
    if (status || found == value)
        return status;
    poe_error("%s: %s has %s %" PRId64 " where %" PRId64 " is expected", w->path, object, name, found, value);
    return POE_BAD_INPUT;
}

static poe_status visit_state(walk *w, poe_stage *stage, bool shared, size_t row, const char *tensor)
{
    int parts = 1;
    for (int part = 0; part < parts; part++) {
        char name[2 * POE_NAME_MAX];
        const char *part_name;
        float *values;
        size_t floats;
        parts = poe_stage_state(stage, shared, row, part, &part_name, &values, &floats);
        if (parts == 0)
            break;
        snprintf(name, sizeof(name), "/optimizer/%s/%s", tensor, part_name);
        poe_status status = visit_array(w, name, 1, &floats, values);
        if (status)
            return status;
    }
    return POE_OK;
}

static poe_status visit_tensors(walk *w, poe_stage *stage, bool shared)
{
    const poe_tensor_table *table = shared ? poe_stage_shared_table(stage) : poe_stage_own_table(stage);
    float *values = shared ? poe_stage_shared_values(stage) : poe_stage_own_values(stage);
    for (size_t row = 0; row < table->count; row++) {
        const poe_tensor *tensor = &table->rows[row];
        const size_t matrix[] = {tensor->rows, tensor->cols}, vector[] = {tensor->rows * tensor->cols};
        bool slice = tensor->group == POE_GROUP_RESID || tensor->group == POE_GROUP_X0;
        char name[2 * POE_NAME_MAX];
        snprintf(name, sizeof(name), "/parameters/%s", tensor->name);
        poe_status status =
            visit_array(w, name, tensor->ndim, tensor->ndim == 2 ? matrix : vector, values + tensor->offset);
        if (!status && slice)
            status = visit_fixed(w, name, "first", (int64_t)tensor->first);
        if (!status)
            status = visit_state(w, stage, shared, row, tensor->name);
        if (status)
            return status;
    }
    return POE_OK;
}

/* Written only: a model has them before its stages can be made. */
static poe_status write_layers(walk *w, const poe_model *model, int stage_number)
{
    for (int i = model->first_layer[stage_number]; i < model->first_layer[stage_number + 1]; i++) {
        char name[32];
        snprintf(name, sizeof(name), "/layers/%d", i);
        w->bytes += OBJECT_BYTES;
        int64_t window = model->layers[i].window, has_value_embed = model->layers[i].has_value_embed;
        poe_status status = visit_integer(w, name, "window", &window);
        if (!status)
            status = visit_integer(w, name, "has_value_embed", &has_value_embed);
        if (status)
            return status;
    }
    return POE_OK;
}

static poe_status walk_stage(walk *w, int64_t step, poe_stage *stage, int stage_number, const poe_pending *pending)
{
    poe_status status = visit_fixed(w, "/", "stage", stage_number);
    if (!status)
        status = visit_fixed(w, "/", "step", step);
    if (!status)
        status = visit_integer(w, "/", "own_updates", poe_stage_own_updates(stage));
    if (!status && w->mode != READ)
        status = write_layers(w, poe_stage_model(stage), stage_number);
    if (!status)
        status = visit_tensors(w, stage, false);
    if (!status && pending && pending->held_steps > 0) {
        status = visit_array(w, "/held", 1, &pending->floats, pending->held);
        if (!status)
            status = visit_fixed(w, "/held", "steps", pending->held_steps);
    }
    return status;
}

static poe_status walk_shared(walk *w, int64_t step, poe_stage *stage, const poe_pending *pending)
{
    poe_status status = visit_fixed(w, "/", "step", step);
    if (!status)
        status = visit_integer(w, "/", "shared_updates", poe_stage_shared_updates(stage));
    if (!status)
        status = visit_tensors(w, stage, true);
    for (int i = 0; pending && i < pending->n_totals && !status; i++) {
        char name[32];
        snprintf(name, sizeof(name), "/pending/%d", i);
        status = visit_array(w, name, 1, &pending->floats, pending->totals[i]);
        if (!status)
            status = visit_integer(w, name, "step", &pending->total_steps[i]);
    }
    return status;
}

/* The whole of a file: the stage's own, or with stage_number -1 the shared one. */
static poe_status walk_file(walk_mode mode, const char *path, int64_t step, poe_stage *stage, int stage_number,
                            const poe_pending *pending)
{
    walk w = {.mode = mode, .path = path};
    poe_status status = mode == WRITE ? poe_h5_create(path, &w.file) : poe_h5_open(path, &w.file);
    if (status)
        return status;
    status =
        stage_number < 0 ? walk_shared(&w, step, stage, pending) : walk_stage(&w, step, stage, stage_number, pending);
    poe_status closed = poe_h5_close(w.file);
    return status ? status : closed;
}

uint64_t poe_stage_file_bytes(poe_stage *stage, int stage_number, const poe_pending *pending)
{
    walk w = {.mode = MEASURE, .bytes = FILE_BYTES};
    walk_stage(&w, 0, stage, stage_number, pending);
    return w.bytes;
}

uint64_t poe_shared_file_bytes(poe_stage *stage, const poe_pending *pending)
{
    walk w = {.mode = MEASURE, .bytes = FILE_BYTES};
    walk_shared(&w, 0, stage, pending);
    return w.bytes;
}

poe_status poe_stage_file_write(const char *path, int64_t step, poe_stage *stage, int stage_number,
                                const poe_pending *pending)
{
    return walk_file(WRITE, path, step, stage, stage_number, pending);
}

poe_status poe_shared_file_write(const char *path, int64_t step, poe_stage *stage, const poe_pending *pending)
{
    return walk_file(WRITE, path, step, stage, -1, pending);
}

poe_status poe_stage_file_read(const char *path, int64_t step, poe_stage *stage, int stage_number, poe_pending *pending)
{
    return walk_file(READ, path, step, stage, stage_number, pending);
}

poe_status poe_shared_file_read(const char *path, int64_t step, poe_stage *stage, poe_pending *pending)
{
    return walk_file(READ, path, step, stage, -1, pending);
}

poe_status poe_stage_file_read_layers(const char *path, int first, int end, poe_layer_shape *layers)
{
    poe_h5 *file;
    poe_status status = poe_h5_open(path, &file);
    if (status)
        return status;
    for (int i = first; i < end; i++) {
        char name[32];
        int64_t window = 0, has_value_embed = 0;
        snprintf(name, sizeof(name), "/layers/%d", i);
        poe_h5_read_integer(file, name, "window", &window);
        poe_h5_read_integer(file, name, "has_value_embed", &has_value_embed);
        layers[i - first] = (poe_layer_shape){(int)window, has_value_embed != 0};
    }
    return poe_h5_close(file);
}
