/* SPDX-License-Identifier: MIT
 * What a run shows on standard output: the table at its start, a line per step, evaluations, and the report at its end. */
#ifndef POE_PIPELINE_REPORT_H
#define POE_PIPELINE_REPORT_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "pipeline/run.h"

struct poe_training;

/* Whether standard output ends up on a terminal: also under mpiexec, which gives its ranks a pseudo-terminal always. */
bool poe_report_terminal(void);

/* The start-up table, on one rank. `threads` and `ranks_on_host` as they will be; `run` NULL for --dry-run. */
poe_status poe_report_start(const poe_options *options, const poe_model *model, int threads, const poe_run *run);

/* The total of the losses of the stages that have one: with weights 1 / K^(1 - alpha), K the number of these,
 * or under bp as it is. NAN when none has one. */
double poe_report_loss(const poe_run *run, const double *stage_losses);

/* Sets in `config` (poe_options_json()) what was resolved since, so that it repeats the run exactly. */
void poe_report_complete_config(const poe_run *run, json_t *config);

/* One line per step, nanochat's; on a terminal one line that renews itself. What a process before this one has shown is
 * not shown again. */
typedef struct poe_progress {
    const poe_run *run;
    bool terminal;
    double started, shown; /* clock */
    int64_t first_step;
    double step_seconds; /* of all steps but the first, whose time is not typical */
    int64_t counted;
    bool pending_newline;
} poe_progress;

void poe_progress_start(poe_progress *progress, const poe_run *run);
void poe_progress_step(poe_progress *progress, int64_t step, double loss, const double *stage_losses, double lrm,
                       double dt, uint32_t epoch);
void poe_progress_evaluation(poe_progress *progress, int64_t step, const poe_evaluation *e, bool has_tokenizer);
/* For snapshots. */
void poe_progress_image(poe_progress *progress, poe_image *image);
void poe_progress_end(poe_progress *progress);

/* The table of an evaluation: every stage, every prefix, the aggregate. */
void poe_report_evaluation(const poe_options *options, const poe_evaluation *e, bool has_tokenizer);

/* Collective, after poe_train(): speed, accounts of time, overlap and memory of every rank, printed by rank 0; idle shares
 * and the accounts of all steps together are the last object of the last rank's metrics. */
poe_status poe_report_ranks(poe_run *run, const struct poe_training *training);

/* Where things are and how to go on; on rank 0. */
void poe_report_files(const poe_run *run, const struct poe_training *training, bool interrupted);

#endif
