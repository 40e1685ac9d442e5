/* SPDX-License-Identifier: MIT
 * What the HDF5 files of a checkpoint hold. A stage's file: its own parameters /parameters/NAME, their optimiser state
 * /optimizer/NAME/PART, its layers' properties as attributes of /layers/N (counted over the whole model), and under
 * every:N its held sum /held. The shared file: the same of the shared tensors, and under stale:D /pending/I. */
#ifndef POE_PIPELINE_STAGE_FILE_H
#define POE_PIPELINE_STAGE_FILE_H

#include "pipeline/checkpoint.h"

/* Bytes that the file will have, a little more than enough. */
uint64_t poe_stage_file_bytes(poe_stage *stage, int stage_number, const poe_pending *pending);
uint64_t poe_shared_file_bytes(poe_stage *stage, const poe_pending *pending);

/* `pending` may be NULL. POE_FAILED: said, and what was written is to be removed. */
poe_status poe_stage_file_write(const char *path, int64_t step, poe_stage *stage, int stage_number,
                                const poe_pending *pending);
poe_status poe_shared_file_write(const char *path, int64_t step, poe_stage *stage, const poe_pending *pending);

/* Only files that agree with their manifest may be read: HDF5 crashes on damaged ones. Optimiser state is read when the
 * stage is a training one, pending->held when held_steps says so, and n_totals totals. POE_BAD_INPUT: said. */
poe_status poe_stage_file_read(const char *path, int64_t step, poe_stage *stage, int stage_number,
                               poe_pending *pending);
poe_status poe_shared_file_read(const char *path, int64_t step, poe_stage *stage, poe_pending *pending);

/* The properties of the layers first..end-1. */
poe_status poe_stage_file_read_layers(const char *path, int first, int end, poe_layer_shape *layers);

#endif
