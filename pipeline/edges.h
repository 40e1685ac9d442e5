/* SPDX-License-Identifier: MIT
 * Which stage feeds which: a table of edges, so that nothing else assumes a chain. */
#ifndef POE_PIPELINE_EDGES_H
#define POE_PIPELINE_EDGES_H

#include "stages/model.h"

typedef struct poe_edge {
    int from, to; /* stages; from < to: activations only ever flow forward */
} poe_edge;

typedef struct poe_edges {
    int count;
    poe_edge rows[2 * POE_MAX_STAGES];
} poe_edges;

/* 0 -> 1 -> ... -> n_stages - 1. */
void poe_edges_chain(poe_edges *edges, int n_stages);

/* The one stage that feeds `stage`, or -1 when it reads the data itself. */
int poe_edges_source(const poe_edges *edges, int stage);

/* The stages that `stage` feeds, into targets[]; returns how many. */
int poe_edges_targets(const poe_edges *edges, int stage, int targets[POE_MAX_STAGES]);

#endif
