/* SPDX-License-Identifier: MIT */
#include "pipeline/interchange.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pipeline/streams.h"
#include "src/log.h"

enum { PIECE = 1 << 20 }; /* floats per message of an export */

/* The tensors of the whole model as they are in a file: the stages' slices of a vector are one tensor. */
typedef struct tensor_list {
    poe_safetensor *rows;
    size_t count, room;
} tensor_list;

static poe_status add_tensor(tensor_list *list, const poe_tensor *tensor)
{
    for (size_t i = 0; i < list->count; i++) {
        if (strcmp(list->rows[i].name, tensor->name) == 0) {
            list->rows[i].shape[0] += tensor->cols;
            return POE_OK;
        }
    }
    if (list->count == list->room) {
        size_t room = list->room ? 2 * list->room : 64;
        poe_safetensor *grown = realloc(list->rows, room * sizeof(*grown));
        if (!grown) {
            poe_error("out of memory for the names of %zu tensors", room);
            return POE_FAILED;
        }
        list->rows = grown;
        list->room = room;
    }
    poe_safetensor *row = &list->rows[list->count++];
    *row = (poe_safetensor){.ndim = tensor->ndim};
    snprintf(row->name, sizeof(row->name), "%s", tensor->name);
    row->shape[0] = tensor->ndim == 2 ? tensor->rows : tensor->cols;
    row->shape[1] = tensor->ndim == 2 ? tensor->cols : 0;
    return POE_OK;
}

/* `list` is the caller's to free, also on failure. */
static poe_status list_tensors(const poe_model *model, tensor_list *list)
{
    poe_status status = POE_OK;
    for (int k = -1; status == POE_OK && k < model->config.n_stages; k++) {
        poe_tensor_table table;
        status = poe_model_tensors(model, k, &table);
        for (size_t i = 0; status == POE_OK && i < table.count; i++)
            status = add_tensor(list, &table.rows[i]);
        poe_tensor_table_free(&table);
    }
    return status;
}

static poe_status check_shape(const char *path, const poe_safetensor *found, const poe_safetensor *wanted)
{
    bool same = found->ndim == wanted->ndim && found->shape[0] == wanted->shape[0] &&
                (wanted->ndim == 1 || found->shape[1] == wanted->shape[1]);
    if (same)
        return POE_OK;
    char a[64], b[64];
    const poe_safetensor *both[2] = {found, wanted};
    char *text[2] = {a, b};
    for (int i = 0; i < 2; i++) {
        if (both[i]->ndim == 2)
            snprintf(text[i], 64, "(%zu, %zu)", both[i]->shape[0], both[i]->shape[1]);
        else
            snprintf(text[i], 64, "(%zu)", both[i]->shape[0]);
    }
    poe_error("--init-from %s: tensor %s has shape %s; this model's is %s", path, found->name, a, b);
    return POE_BAD_INPUT;
}

static poe_status check_names(const char *path, const poe_safetensors *file, const tensor_list *list)
{
    for (size_t i = 0; i < list->count; i++) {
        const poe_safetensor *found = poe_safetensors_find(file, list->rows[i].name);
        if (!found) {
            poe_error("--init-from %s: tensor %s is missing (the model has %zu tensors, the file %zu)", path,
                      list->rows[i].name, list->count, poe_safetensors_count(file));
            return POE_BAD_INPUT;
        }
        poe_status status = check_shape(path, found, &list->rows[i]);
        if (status != POE_OK)
            return status;
    }
    for (size_t i = 0; i < poe_safetensors_count(file); i++) {
        const char *name = poe_safetensors_at(file, i)->name;
        bool known = false;
        for (size_t j = 0; !known && j < list->count; j++)
            known = strcmp(name, list->rows[j].name) == 0;
        if (!known) {
            poe_error("--init-from %s: tensor %s is superfluous: this model (--stages, --head) has none of that name",
                      path, name);
            return POE_BAD_INPUT;
        }
    }
    return POE_OK;
}

static void read_table(const poe_safetensors *file, const poe_tensor_table *table, float *values)
{
    for (size_t i = 0; i < table->count; i++) {
        const poe_tensor *t = &table->rows[i];
        poe_safetensors_read(file, poe_safetensors_find(file, t->name), t->first, t->rows * t->cols,
                             values + t->offset);
    }
}

poe_status poe_import(const char *path, const poe_model *model, poe_stage *stage)
{
    poe_safetensors *file;
    poe_status status = poe_safetensors_open(path, &file);
    if (status != POE_OK)
        return status;
    tensor_list list = {0};
    status = list_tensors(model, &list);
    if (status == POE_OK)
        status = check_names(path, file, &list);
    if (status == POE_OK) {
        read_table(file, poe_stage_own_table(stage), poe_stage_own_values(stage));
        read_table(file, poe_stage_shared_table(stage), poe_stage_shared_values(stage));
        poe_stage_parameters_changed(stage);
    }
    free(list.rows);
    poe_safetensors_close(file);
    return status;
}

static poe_status write_table(poe_safetensors_writer *writer, const poe_tensor_table *table, const float *values)
{
    poe_status status = POE_OK;
    for (size_t i = 0; status == POE_OK && i < table->count; i++) {
        const poe_tensor *t = &table->rows[i];
        status = poe_safetensors_writer_write(writer, t->name, t->first, t->rows * t->cols, values + t->offset);
    }
    return status;
}

static poe_message piece_message(int stage, size_t tensor, size_t first, size_t n)
{
    return (poe_message){.kind = POE_KIND_TENSOR,
                         .step = (int64_t)tensor,
                         .micro = (int32_t)(first / PIECE),
                         .stage = stage,
                         .shape = {(uint32_t)n, 0, 0, 0},
                         .bytes = n * sizeof(float)};
}

/* The end of the link from rank `from` to rank 0 that is this rank's. */
static poe_status open_link(poe_comm *comm, int from, uint64_t run, poe_link **link)
{
    bool outgoing = poe_comm_rank(comm) == from;
    return poe_channel_open(comm, outgoing ? 0 : from, POE_CHANNEL_EXPORT, outgoing, PIECE * sizeof(float), 2, run,
                            link);
}

static poe_status write_piece(poe_link *link, const poe_message *message, poe_safetensors_writer *writer,
                              const poe_tensor *t, size_t first)
{
    void *payload;
    poe_status status = poe_link_receive(link, message, NULL, &payload);
    if (status != POE_OK)
        return status;
    status = poe_safetensors_writer_write(writer, t->name, t->first + first, message->bytes / sizeof(float), payload);
    poe_link_release(link);
    return status;
}

/* One stage's table over its link: sent from `values`, or received into `writer`. */
static poe_status transfer_table(poe_link *link, int stage, const poe_tensor_table *table, const float *values,
                                 poe_safetensors_writer *writer)
{
    for (size_t i = 0; i < table->count; i++) {
        const poe_tensor *t = &table->rows[i];
        size_t total = t->rows * t->cols;
        for (size_t first = 0; first < total; first += PIECE) {
            size_t n = total - first < PIECE ? total - first : PIECE;
            poe_message message = piece_message(stage, i, first, n);
            poe_status status = values ? poe_link_send_copy(link, &message, values + t->offset + first)
                                       : write_piece(link, &message, writer, t, first);
            if (status != POE_OK)
                return status;
        }
    }
    return POE_OK;
}

static poe_status receive_stage(poe_comm *comm, const poe_model *model, int stage, uint64_t run,
                                poe_safetensors_writer *writer)
{
    poe_tensor_table table;
    poe_status status = poe_model_tensors(model, stage, &table);
    if (status != POE_OK)
        return status;
    poe_link *link;
    status = open_link(comm, stage, run, &link);
    if (status == POE_OK) {
        status = transfer_table(link, stage, &table, NULL, writer);
        poe_link_close(link);
    }
    poe_tensor_table_free(&table);
    return status;
}

static poe_status write_model(const poe_model *model, poe_comm *comm, poe_stage *stage, uint64_t run,
                              poe_safetensors_writer *writer)
{
    poe_status status = write_table(writer, poe_stage_shared_table(stage), poe_stage_shared_values(stage));
    if (status == POE_OK)
        status = write_table(writer, poe_stage_own_table(stage), poe_stage_own_values(stage));
    for (int k = 1; status == POE_OK && k < model->config.n_stages; k++)
        status = receive_stage(comm, model, k, run, writer);
    return status;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const poe_safetensor *)a)->name, ((const poe_safetensor *)b)->name);
}

/* In the order of names, whatever the stages: the same model makes the same file. */
static poe_status create_writer(const char *path, poe_dtype dtype, const poe_model *model,
                                poe_safetensors_writer **writer)
{
    tensor_list list = {0};
    poe_status status = list_tensors(model, &list);
    for (size_t i = 0; i < list.count; i++)
        list.rows[i].dtype = dtype;
    if (status == POE_OK)
        qsort(list.rows, list.count, sizeof(*list.rows), by_name);
    if (status == POE_OK)
        status = poe_safetensors_writer_create(path, list.rows, list.count, writer);
    free(list.rows);
    return status;
}

/* Of replicas rank 0 has it all. */
static bool has_own_stage(const poe_model *model, const poe_comm *comm)
{
    return poe_comm_rank(comm) < model->config.n_stages;
}

static poe_status send_stage(poe_comm *comm, poe_stage *stage, uint64_t run)
{
    poe_link *link;
    poe_status status = open_link(comm, poe_comm_rank(comm), run, &link);
    if (status != POE_OK)
        return status;
    status = transfer_table(link, poe_comm_rank(comm), poe_stage_own_table(stage), poe_stage_own_values(stage), NULL);
    if (status == POE_OK)
        status = poe_comm_barrier(comm, "the export");
    poe_link_close(link);
    return status;
}

poe_status poe_export(const char *path, poe_dtype dtype, const poe_model *model, poe_comm *comm, poe_stage *stage,
                      uint64_t run)
{
    bool writes = poe_comm_rank(comm) == 0;
    poe_safetensors_writer *writer = NULL;
    poe_status status = poe_comm_agree(comm, writes ? create_writer(path, dtype, model, &writer) : POE_OK);
    if (status != POE_OK)
        return status;
    if (!writes)
        return has_own_stage(model, comm) ? send_stage(comm, stage, run) : poe_comm_barrier(comm, "the export");
    status = write_model(model, comm, stage, run, writer);
    if (status != POE_OK) {
        poe_safetensors_writer_discard(writer);
        return status;
    }
    status = poe_safetensors_writer_finish(writer);
    poe_status done = poe_comm_barrier(comm, "the export");
    return status != POE_OK ? status : done;
}
