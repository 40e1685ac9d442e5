/* SPDX-License-Identifier: MIT
 * Second copies of what ranks write into a checkpoint: each rank's file goes over a link of its own to a rank after it that
 * keeps its checkpoints in another folder, and so on another disk or host. Where all share one folder there is nobody. */
#ifndef POE_PIPELINE_COPIES_H
#define POE_PIPELINE_COPIES_H

#include "comm/comm.h"
#include "src/manifest.h"
#include "stages/model.h"

typedef struct poe_passage poe_passage;

typedef struct poe_copies {
    poe_comm *comm;
    int rank, size;
    int holders[POE_MAX_STAGES];  /* of each rank's copies; -1: nobody */
    poe_link *out;                /* to this rank's holder; NULL: it has none */
    poe_link *in[POE_MAX_STAGES]; /* by rank: of those whose holder this rank is */
    poe_passage *passages;        /* files under way: this rank's, and others' */
} poe_copies;

/* Collective. leaders (size): for each rank a number that tells its folder from others. POE_FAILED: said; then close. */
poe_status poe_copies_open(poe_copies *copies, poe_comm *comm, const int *leaders, uint64_t run);
/* Closed before, or all zero, is legal. */
void poe_copies_close(poe_copies *copies);
/* Whether any rank has a holder. */
bool poe_copies_any(const poe_copies *copies);

/* Collective. files (size): each rank's file of that name in its folder, with an empty name none. Writes those that this
 * rank is to hold into `folder`, syncs them and reads them back. `done`: a process before this one has, so messages go
 * through the links and nothing else happens. POE_FAILED, said, when this rank cannot read or write, or what came is not
 * what was sent: the others' calls do not fail by that. POE_PEER_LOST. */
poe_status poe_copies_exchange(poe_copies *copies, int64_t step, const char *folder, const poe_manifest_file *files,
                               bool done);

#endif
