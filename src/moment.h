/* SPDX-License-Identifier: MIT
 * Moments of a run: the rank's thread says where it is, and whoever wants to know is told. Who observes is set from
 * outside (fault plans are what it is for), so that nothing in between knows of it. */
#ifndef POE_SRC_MOMENT_H
#define POE_SRC_MOMENT_H

#include <stdint.h>

typedef enum poe_phase {
    POE_PHASE_RECEIVE, /* about to take in a micro-batch, read or received */
    POE_PHASE_FORWARD,
    POE_PHASE_BACKWARD,
    POE_PHASE_REDUCE, /* about to hand over, or to wait for, shared gradients */
    POE_PHASE_OPTIMIZER,
    POE_PHASE_SNAPSHOT, /* halfway through writing one */
    POE_PHASE_CHECKPOINT,
    POE_PHASE_RECOVERY, /* a restarted stage process, before it has its snapshot back and while it catches up */
    POE_PHASE_COUNT,
} poe_phase;
const char *poe_phase_name(poe_phase phase); /* "receive", ..., "recovery" */

typedef void (*poe_moment_observer)(void *context, poe_phase phase, int64_t step, int micro);

/* For the calling thread; NULL: nobody is told. */
void poe_moment_observe(poe_moment_observer observer, void *context);
/* A negative micro-batch is none. */
void poe_moment(poe_phase phase, int64_t step, int micro);

#endif
