/* SPDX-License-Identifier: MIT
 * Snapshots: a stage process copies all that its training goes on from into the memory that it shares with its agent,
 * between two steps and without asking anybody. One that is started in the place of a dead one takes it back, is given
 * the messages that came since, and repeats what its predecessor did, bit for bit.
 *
 * There are two areas: the snapshot before stays whole until the new one counts. */
#ifndef POE_PIPELINE_SNAPSHOT_H
#define POE_PIPELINE_SNAPSHOT_H

#include "pipeline/image.h"
#include "pipeline/run.h"

/* Passes what the training loop itself has. */
typedef void (*poe_snapshot_loop)(void *loop, poe_image *image);

/* Whether this process is one that goes on from a snapshot. */
bool poe_snapshot_resumes(const poe_comm *comm);
/* When it does: links and sums that are opened from now on go on from it. POE_FAILED: its checksum is wrong, said. */
poe_status poe_snapshot_prepare(poe_comm *comm);

/* After `step` updates, with what is due of the shared parameters applied. POE_FAILED: it does not fit, said;
 * POE_PEER_LOST. */
poe_status poe_snapshot_take(poe_run *run, int64_t step, poe_snapshot_loop pass, void *loop);
/* Back to the last one. *step: updates made by then. */
poe_status poe_snapshot_restore(poe_run *run, int64_t *step, poe_snapshot_loop pass, void *loop);

#endif
