/* SPDX-License-Identifier: MIT */
#include "pipeline/edges.h"

void poe_edges_chain(poe_edges *edges, int n_stages)
{
    edges->count = 0;
    for (int k = 1; k < n_stages; k++)
        edges->rows[edges->count++] = (poe_edge){.from = k - 1, .to = k};
}

int poe_edges_source(const poe_edges *edges, int stage)
{
    for (int i = 0; i < edges->count; i++)
        if (edges->rows[i].to == stage)
            return edges->rows[i].from;
    return -1;
}

int poe_edges_targets(const poe_edges *edges, int stage, int targets[POE_MAX_STAGES])
{
    int n = 0;
    for (int i = 0; i < edges->count; i++)
        if (edges->rows[i].from == stage)
            targets[n++] = edges->rows[i].to;
    return n;
}
