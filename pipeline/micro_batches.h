/* SPDX-License-Identifier: MIT
 * A step's micro-batches at one rank: runs the task list of the schedule, whatever it is. A forward receives (or reads)
 * and sends at once; a backward receives the gradients of what it put out, where these come back, and sends on those of
 * what it took in. A micro-batch that was received stays where it arrived until its backward has used it. */
#ifndef POE_PIPELINE_MICRO_BATCHES_H
#define POE_PIPELINE_MICRO_BATCHES_H

#include "pipeline/run.h"
#include "pipeline/step_reports.h"

typedef struct poe_micro_batches {
    poe_run *run;              /* borrowed */
    poe_step_reports *reports; /* borrowed: passed on between passes */
    int n_tasks, n_slots;
    poe_task *tasks;  /* of a step; the same for all */
    poe_batch *slots; /* (n_slots) micro-batches whose backward is still to come: m is in m % n_slots */
    int64_t step;
    int read;         /* micro-batches of the step that were read from the data */
    int counted;      /* losses in `sum` */
    double sum;
    /* of the last step */
    double loss;    /* mean over this rank's micro-batches; 0 for a stage without one */
    bool stop;      /* the user wishes to stop after it */
    uint32_t epoch; /* that the data is in */
} poe_micro_batches;

/* POE_FAILED: out of memory, said. The caller calls poe_micro_batches_close() in any case. */
poe_status poe_micro_batches_open(poe_micro_batches *batches, poe_run *run, poe_step_reports *reports);
void poe_micro_batches_close(poe_micro_batches *batches);

/* All passes of `step`: the gradients are accumulated, the updates are still to come. POE_NUMERIC: a loss or gradient is
 * not finite; said. */
poe_status poe_micro_batches_run(poe_micro_batches *batches, int64_t step);

#endif
