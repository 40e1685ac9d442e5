/* SPDX-License-Identifier: MIT
 * Ranks that share a processor (--schedule interleaved) and take turns on it, in the order of its schedule: whoever has
 * done its part tells the next one, by a message without contents on a link of its own. Everything that computes is
 * inside a turn; what comes between steps is not. Without such a schedule nothing here waits or sends. */
#ifndef POE_PIPELINE_TURNS_H
#define POE_PIPELINE_TURNS_H

#include "comm/comm.h"
#include "pipeline/layout.h"

typedef struct poe_turns {
    int rank;
    int64_t first_step; /* of the run: it begins without anybody before */
    int n;              /* entries of a step: the rank's tasks, then its update; 0: every rank has its own processor */
    poe_turn *turns;    /* (n) */
    poe_link *in[POE_MAX_STAGES], *out[POE_MAX_STAGES]; /* by rank; NULL: no turn comes from there, or goes there */
} poe_turns;

/* Collective with the ranks of the same processor. POE_FAILED: said. The caller calls poe_turns_close() in any case. */
poe_status poe_turns_open(poe_turns *turns, poe_comm *comm, const poe_layout *layout, int64_t first_step, uint64_t run);
void poe_turns_close(poe_turns *turns);

/* Waits until it is the rank's turn to do entry `entry` of `step`; tells the next one that it is done. */
poe_status poe_turns_take(poe_turns *turns, int64_t step, int entry);
poe_status poe_turns_pass(poe_turns *turns, int64_t step, int entry);
/* Likewise for the update; `last`: of the run, so that nobody follows. */
poe_status poe_turns_take_update(poe_turns *turns, int64_t step);
poe_status poe_turns_pass_update(poe_turns *turns, int64_t step, bool last);

#endif
