/* SPDX-License-Identifier: MIT
 * What a stage process leaves for the one after it, and what that one does with it (comm/agent/board.h). Without an
 * agent nobody comes after, and all of this does nothing. */
#ifndef POE_PIPELINE_RECOVERY_H
#define POE_PIPELINE_RECOVERY_H

#include "pipeline/run.h"

/* In a process that is back at a snapshot of `from` updates, under --recover skip: what its predecessor did since is not
 * repeated. The last stage has told the others totals of the shared gradients, and repeats what it had added to them. */
void poe_recovery_begin_absence(poe_run *run, int64_t from);
/* About to take in a micro-batch: notes how far the run has got, ends the absence of a process that has caught up, and
 * says whether this micro-batch is within it. */
poe_attendance poe_recovery_reach(poe_run *run, int64_t step, int micro);

/* Rank 0, once a step, before the step's last micro-batch is sent: whether the run stops after it, as the user may
 * wish. A process that repeats the step decides as its predecessor did. */
bool poe_recovery_stops_after(poe_run *run, int64_t step);

/* Whether the stage is to move elsewhere; and the end of this process, which has just taken a snapshot to go on from. */
bool poe_recovery_leaves(const poe_run *run);
_Noreturn void poe_recovery_leave(void);

/* --on-nan skip. A loss, or with `micro` -1 some gradient of the step, is not finite: the next process leaves the
 * micro-batch out, or finds out which one it was. Does not return when that can help; false: the run is to stop. */
bool poe_recovery_leave_out(poe_run *run, int64_t step, int micro, const char *what);
/* Whether this micro-batch's backward pass is to be left out; and whether one of the step's is to be found. */
bool poe_recovery_is_left_out(const poe_run *run, int64_t step, int micro);
bool poe_recovery_examines(const poe_run *run, int64_t step);

#endif
