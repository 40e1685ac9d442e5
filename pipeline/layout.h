/* SPDX-License-Identifier: MIT
 * How a run is spread over ranks: which stage each has, how many micro-batches it keeps, how far links run ahead. Pure
 * figures, the same on every rank. */
#ifndef POE_PIPELINE_LAYOUT_H
#define POE_PIPELINE_LAYOUT_H

#include <stdbool.h>

#include "pipeline/schedule.h"
#include "src/options.h"
#include "stages/model.h"

typedef struct poe_layout {
    poe_order order;   /* M of all ranks together */
    int delay;         /* D of --sync stale:D */
    int link_window;   /* --link-window; 0: none given */
} poe_layout;

/* Of a run of `n_ranks` ranks; `options` are checked. --schedule auto: poe for poe, else 1f1b. */
void poe_layout_init(poe_layout *layout, const poe_options *options, int n_ranks);

/* True when every rank has the whole model (ddp); else each has one stage. */
bool poe_layout_replicated(const poe_layout *layout);
int poe_layout_stages(const poe_layout *layout);           /* that are at work: P, or 1 when replicated */
int poe_layout_stage(const poe_layout *layout, int rank);  /* `rank`, or 0 when replicated */
int poe_layout_slots(const poe_layout *layout, int stage); /* micro-batches whose activations a stage keeps */

/* Messages that may be under way or lent on each link between `stage` and the next one. Activations stay lent until
 * their backward pass, so there are more than either end keeps; with as many for gradients no rank of a chained
 * schedule ever waits for a credit, whatever the round trip (tests/test_layout.c). Under poe the sender may be ahead by
 * the link's share of the delay, which is what the round trip may take. At least --link-window, if that was given. Of
 * replicas' ring: parts of the sum, 2 or as many as --link-window says. */
int poe_layout_window(const poe_layout *layout, int stage);

#endif
