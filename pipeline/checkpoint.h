/* SPDX-License-Identifier: MIT
 * Writing and reading a run's checkpoints: OUT/checkpoints/step-%08d/ with stage-%03d.h5 for every stage, shared.h5 and
 * manifest.json. Every rank writes its own stage's file under its own OUT; ranks that see the same folder agree on one
 * leader who writes shared.h5 and the manifest and renames. Collective unless stated. */
#ifndef POE_PIPELINE_CHECKPOINT_H
#define POE_PIPELINE_CHECKPOINT_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "comm/comm.h"
#include "src/files.h"
#include "src/status.h"
#include "stages/stage.h"

/* Shared gradients that wait for their turn: under stale:D totals (the same on every rank), oldest first; under every:N
 * this stage's own sum over the steps held so far. `floats` each, as the shared table lays them out. */
typedef struct poe_pending {
    int n_totals;
    int64_t *total_steps; /* whose gradients: decides their rates */
    float **totals;
    int held_steps; /* every:N: how many steps the held sum covers; 0: none */
    float *held;
    size_t floats;
} poe_pending;

typedef struct poe_checkpoint_store poe_checkpoint_store;

/* What a copied history is called in a checkpoint's folder. */
#define POE_CHECKPOINT_HISTORY "metrics.jsonl"

/* Prepares OUT/checkpoints, finds the leader among the ranks that share the folder, removes what killed runs left.
 * `comm` is borrowed. */
poe_status poe_checkpoint_store_open(poe_comm *comm, const char *out, int keep, poe_checkpoint_store **store);
/* From now on every stage's file goes into the folder of another rank too (copies.h), where there is one; else rank 0 says
 * that there is not. So does `history` (borrowed; NULL: this rank has none), as long as it is then. */
poe_status poe_checkpoint_store_copy(poe_checkpoint_store *store, uint64_t run, const char *history);
void poe_checkpoint_store_close(poe_checkpoint_store *store);
/* True on the one rank, of those that share this folder, that writes what is there once. Not collective. */
bool poe_checkpoint_store_leads(const poe_checkpoint_store *store);
/* Whether all ranks write into one folder. Not collective; the same everywhere. */
bool poe_checkpoint_store_is_shared(const poe_checkpoint_store *store);
/* Not collective, for leaders: sets the store's checkpoints after `step` aside, see poe_checkpoint_abandon(). */
poe_status poe_checkpoint_store_abandon(const poe_checkpoint_store *store, int64_t step);

/* `stage_number`: whose file this rank writes; -1: another rank that sees the same folder has the same stage and does it.
 * Writes the state after `step` updates: files under a temporary name, synced, read back; then all ranks agree; then
 * leaders write the manifest (`facts`: rank 0's object: configuration, step, data position, kernels...; others may
 * pass NULL; "step", "pending_totals" and "held_steps" are added) and rename, and older checkpoints beyond `keep` go. A
 * failure anywhere (disk full) leaves the older checkpoints, no temporary file, and POE_FAILED on every rank, said
 * once. *path (may be NULL): where it is. */
poe_status poe_checkpoint_save(poe_checkpoint_store *store, int64_t step, poe_stage *stage, int stage_number,
                               const poe_pending *pending, const json_t *facts, char *path);

/* Not collective. Reads stage `stage_number`'s tensors (with optimiser state and pending gradients when the stage is a
 * training one) from a checkpoint folder into `stage`; checksums are checked before HDF5 opens a file. `pending` (may
 * be NULL) has `floats` set, memory for `held` and for as many totals as the facts' "pending_totals" says. */
poe_status poe_checkpoint_load(const char *folder, const json_t *facts, poe_stage *stage, int stage_number,
                               poe_pending *pending);
/* Not collective. One stage's layers' own windows and value embeddings, as stored, into model->layers. */
poe_status poe_checkpoint_load_layers(const char *folder, const json_t *facts, int stage_number, poe_model *model);

/* Collective. Which checkpoint to resume from: `what` is a run folder, a checkpoint folder, or "latest" (the newest one
 * under `out` that is valid on every rank). Damaged ones are named; with `use_older` the newest whole one before them
 * is taken (said), else POE_BAD_INPUT. Checkpoints that some rank does not have were never finished, and are passed
 * over. Each rank checks its own stage's file and the shared one, with stage_number -1 all. *facts: new reference. */
poe_status poe_checkpoint_find(poe_comm *comm, const char *what, const char *out, bool use_older, int stage_number,
                               char folder[POE_PATH_MAX], json_t **facts);

#endif
