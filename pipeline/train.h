/* SPDX-License-Identifier: MIT
 * The training loop of one rank: PoE streaming. Receive, forward, send at once, loss and local backward; after the
 * step's last micro-batch the updates, the shared sum and the report; then evaluation and checkpoint when due. */
#ifndef POE_PIPELINE_TRAIN_H
#define POE_PIPELINE_TRAIN_H

#include "pipeline/run.h"

/* What a run leaves to report. */
typedef struct poe_training {
    int64_t steps;      /* updates done in all */
    double seconds;     /* of this process's steps: the accounts' wall without checkpoints */
    poe_comm_stats traffic; /* in these steps: transfer, transfer_busy and bytes_sent alone */
    uint64_t saved;         /* bytes that these would have sent more if all had travelled, in fp32 */
    int64_t tokens;     /* trained on in these */
    bool evaluated;
    poe_evaluation evaluation; /* at the end; the same on every rank */
    char checkpoint[POE_PATH_MAX]; /* the last one written, or "" */
} poe_training;

/* Collective, on an open run. POE_INTERRUPTED: the user asked to stop; the checkpoint is written. POE_NUMERIC: a loss or
 * gradient is not finite; said, no checkpoint contains that step. */
poe_status poe_train(poe_run *run, poe_training *training);

#endif
