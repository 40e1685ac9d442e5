/* SPDX-License-Identifier: MIT
 * The gradients' sum of --schedule ddp, where every rank has the whole model: a ring of links, rank r to r + 1. In P - 1
 * rounds every rank sums one part of the vector (each part in the fixed order in which it goes round), in P - 1 more
 * the sums go round. All ranks end with the same bits, the same every time. */
#ifndef POE_PIPELINE_REPLICAS_H
#define POE_PIPELINE_REPLICAS_H

#include "comm/comm.h"

typedef struct poe_replicas {
    int rank, size;
    size_t floats, part; /* of the vector, of a part */
    poe_link *in, *out;  /* NULL with a single rank */
} poe_replicas;

/* For vectors of `floats` numbers, with links of `window` messages. Collective with the neighbours. */
poe_status poe_replicas_open(poe_replicas *replicas, poe_comm *comm, size_t floats, int window, uint64_t run);
void poe_replicas_close(poe_replicas *replicas);
/* Bytes of the links' buffers at one rank. */
size_t poe_replicas_memory(int n_ranks, size_t floats, int window);

/* Collective. Sums `values` (floats) over the ranks, in place; *flags becomes rank 0's. */
poe_status poe_replicas_sum(poe_replicas *replicas, int64_t step, float *values, uint32_t *flags);

#endif
