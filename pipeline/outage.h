/* SPDX-License-Identifier: MIT
 * The run goes on without a stage that cannot work (--outage continue). Its stage process takes part in everything, but
 * computes nothing, and marks the micro-batches that it passes on: no stage behind it can work on those either. All of
 * them have zero gradients, keep their own parameters and apply the shared totals as ever, so that replicas stay one.
 *
 * Whether a stage is there is decided once a step and noted on its board (comm/agent/board.h): a process that repeats
 * the step does as its predecessor did. Without agents, and without --outage continue, everybody is always there. */
#ifndef POE_PIPELINE_OUTAGE_H
#define POE_PIPELINE_OUTAGE_H

#include "pipeline/run.h"

/* In a process with an agent that begins training, or is back at a snapshot of `from` updates: in an outage the
 * predecessors' steps since then count as missed, so that nothing needs to be computed for them. The last stage has
 * told the others totals of the shared gradients by what it had computed, and repeats as much. */
void poe_outage_begin(poe_run *run, int64_t from);

/* A micro-batch of training has come, and nothing of it has been passed on: `attendance` as far as others know,
 * POE_ABSENT where this stage or one before it cannot work, POE_RETURNING behind such a micro-batch of the same step.
 * Marks the batch, and makes run->compute attend so. */
void poe_outage_attend(poe_run *run, poe_batch *batch, poe_attendance attendance);

/* Whether this stage could not work in `step`. */
bool poe_outage_covers(const poe_run *run, int64_t step);

/* "stages 0 to 1": those before rank `rank`'s, which is not the first. */
enum { POE_OUTAGE_TEXT = 40 };
void poe_outage_describe_rest(int rank, char text[POE_OUTAGE_TEXT]);

#endif
