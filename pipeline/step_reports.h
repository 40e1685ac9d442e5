/* SPDX-License-Identifier: MIT
 * Losses and accounts of time ride forward from rank to rank, and the last one writes them down. A rank before may well
 * end the step later than this one: nobody waits for reports while there is work. */
#ifndef POE_PIPELINE_STEP_REPORTS_H
#define POE_PIPELINE_STEP_REPORTS_H

#include "pipeline/report.h"

/* Steps whose reports may be waiting for those of the ranks before: more than ranks are ever apart. */
enum { POE_STEP_REPORTS = 4 * POE_MAX_STAGES };

typedef struct poe_step_reports {
    poe_run *run;          /* borrowed */
    poe_progress progress; /* last rank */
    struct {
        poe_step_report report;
        uint32_t epoch;
    } own[POE_STEP_REPORTS]; /* by step; those of steps passed..done-1 are to be passed on */
    int64_t passed, done;
} poe_step_reports;

void poe_step_reports_start(poe_step_reports *reports, poe_run *run);

/* After `step`: this rank's own, which must not be more than POE_STEP_REPORTS ahead: see poe_step_reports_full(). */
void poe_step_reports_add(poe_step_reports *reports, int64_t step, const poe_step_report *report, uint32_t epoch);
bool poe_step_reports_full(const poe_step_reports *reports);

/* For snapshots, between two steps. */
void poe_step_reports_image(poe_step_reports *reports, poe_image *image);

/* Passes on those that need no waiting, or `all`. */
poe_status poe_step_reports_pass(poe_step_reports *reports, bool all);

#endif
