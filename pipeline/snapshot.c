/* SPDX-License-Identifier: MIT
 * An area begins with where comm stands, which is needed before anything else is there to take its own. */
#include "pipeline/snapshot.h"

#include <stdlib.h>

#include "comm/agent/board.h"
#include "src/clock.h"
#include "src/crc32c.h"
#include "src/log.h"
#include "src/moment.h"

bool poe_snapshot_resumes(const poe_comm *comm)
{
    const poe_board *board = poe_comm_board(comm);
    return board && atomic_load(&board->incarnation) > 1;
}

static poe_status check(poe_board *board, int index)
{
    const poe_board_snapshot *s = &board->snapshots[index];
    uint32_t crc = poe_crc32c(0, poe_board_snapshot_area(board, index), s->bytes);
    if (crc == s->crc)
        return POE_OK;
    poe_error("the snapshot of step %lld is damaged: its CRC-32C is 0x%08x, expected 0x%08x", (long long)s->step, crc,
              s->crc);
    return POE_FAILED;
}

poe_status poe_snapshot_prepare(poe_comm *comm)
{
    poe_board *board = poe_comm_board(comm);
    int index = atomic_load(&board->valid);
    const void *area = poe_board_snapshot_area(board, index);
    poe_moment(POE_PHASE_RECOVERY, board->snapshots[index].step, -1);
    poe_status status = check(board, index);
    return status == POE_OK ? poe_comm_restore(comm, area, board->snapshots[index].traffic[0]) : status;
}

/* --- what there is to keep -------------------------------------------------------------------------------------- */

static void pass_optimizer(poe_stage *stage, bool shared, poe_image *image)
{
    const poe_tensor_table *table = shared ? poe_stage_shared_table(stage) : poe_stage_own_table(stage);
    const char *name;
    float *values;
    size_t floats;
    for (size_t row = 0; row < table->count; row++) {
        int parts = poe_stage_state(stage, shared, row, 0, &name, &values, &floats);
        for (int part = 0; part < parts; part++) {
            poe_stage_state(stage, shared, row, part, &name, &values, &floats);
            poe_image_pass(image, values, floats * sizeof(float));
        }
    }
}

/* Gradients are zero between two steps. */
static void pass_stage(poe_stage *stage, poe_image *image)
{
    poe_image_pass(image, poe_stage_own_values(stage), poe_stage_own_table(stage)->floats * sizeof(float));
    poe_image_pass(image, poe_stage_shared_values(stage), poe_stage_shared_table(stage)->floats * sizeof(float));
    pass_optimizer(stage, false, image);
    pass_optimizer(stage, true, image);
    poe_image_pass(image, poe_stage_own_updates(stage), sizeof(int64_t));
    poe_image_pass(image, poe_stage_shared_updates(stage), sizeof(int64_t));
    if (image->restores)
        poe_stage_parameters_changed(stage);
}

/* Where reading goes on; the length first. */
static poe_status pass_feed(poe_run *r, poe_image *image)
{
    if (!r->corpus.reads)
        return POE_OK;
    json_t *position = image->restores ? NULL : poe_feed_position(r->corpus.train);
    char *text = image->restores ? NULL : json_dumps(position, JSON_COMPACT);
    size_t length = text ? strlen(text) : 0;
    poe_status status = image->restores || text ? POE_OK : POE_FAILED;
    poe_image_pass(image, &length, sizeof(length));
    if (image->restores) {
        position = json_loadb((const char *)image->at + image->bytes, length, 0, NULL);
        status = poe_feed_seek(r->corpus.train, position);
        image->bytes += length;
    } else if (status == POE_OK) {
        poe_image_pass(image, text, length);
    }
    free(text);
    json_decref(position);
    return status;
}

/* Sums may be under way: only while comm stands still does their memory. */
static void pass_moving(poe_run *r, poe_comm_state *state, poe_image *image)
{
    poe_image_pass(image, state, sizeof(*state));
    poe_shared_image(&r->shared, image);
}

static poe_status pass_still(poe_run *r, poe_image *image, poe_snapshot_loop pass, void *loop)
{
    pass_stage(r->stage, image);
    poe_image_pass(image, &r->data_hash, sizeof(r->data_hash));
    poe_image_pass(image, &r->streams.received, sizeof(r->streams.received));
    poe_image_pass(image, &r->streams.saved, sizeof(r->streams.saved));
    poe_accounts_image(&r->accounts, image);
    pass(loop, image);
    poe_status status = poe_run_is_last(r) ? poe_metrics_image(&r->metrics, image) : POE_OK;
    return status == POE_OK ? pass_feed(r, image) : status;
}

/* --- taking and restoring --------------------------------------------------------------------------------------- */

/* The first snapshot finds out whether there is room for it. */
static poe_status measure(poe_run *r, poe_snapshot_loop pass, void *loop)
{
    poe_comm_state state;
    poe_image image = {0};
    pass_moving(r, &state, &image);
    poe_status status = pass_still(r, &image, pass, loop);
    if (status != POE_OK || image.bytes <= POE_BOARD_AREA)
        return status;
    poe_error("a snapshot of this stage takes %zu bytes, there is room for %zu; give --agents off", image.bytes,
              POE_BOARD_AREA);
    return POE_FAILED;
}

poe_status poe_snapshot_take(poe_run *r, int64_t step, poe_snapshot_loop pass, void *loop)
{
    poe_board *board = poe_comm_board(r->comm);
    int valid = atomic_load(&board->valid), index = valid == 0;
    poe_board_snapshot *s = &board->snapshots[index];
    poe_image image = {.at = poe_board_snapshot_area(board, index)};
    poe_comm_state state = {0};
    poe_status status = valid < 0 ? measure(r, pass, loop) : POE_OK;
    if (status == POE_OK)
        status = poe_comm_pause(r->comm, &state, s->traffic[0]);
    if (status != POE_OK)
        return status;
    pass_moving(r, &state, &image);
    poe_comm_resume(r->comm);
    poe_moment(POE_PHASE_SNAPSHOT, step, -1);
    status = pass_still(r, &image, pass, loop);
    if (status != POE_OK)
        return status;
    s->step = step;
    s->bytes = image.bytes;
    s->crc = poe_crc32c(0, image.at, image.bytes);
    atomic_store(&board->valid, index);
    atomic_store(&board->recoverable, true);
    poe_ring_wake(&board->to_agent);
    return POE_OK;
}

poe_status poe_snapshot_restore(poe_run *r, int64_t *step, poe_snapshot_loop pass, void *loop)
{
    poe_board *board = poe_comm_board(r->comm);
    int index = atomic_load(&board->valid);
    poe_image image = {.at = poe_board_snapshot_area(board, index), .restores = true};
    poe_comm_state state;
    pass_moving(r, &state, &image);
    poe_status status = poe_shared_resume(&r->shared);
    if (status == POE_OK)
        status = pass_still(r, &image, pass, loop);
    *step = board->snapshots[index].step;
    atomic_store(&board->restored, poe_now());
    poe_moment(POE_PHASE_RECOVERY, *step, -1);
    return status;
}
