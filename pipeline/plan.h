/* SPDX-License-Identifier: MIT
 * What a run would be like before it is started: the theory of its schedule (theory.h) on the times of this machine's
 * kernels or on given ones, beside 1f1b and beside other layouts of the same layers. */
#ifndef POE_PIPELINE_PLAN_H
#define POE_PIPELINE_PLAN_H

#include <jansson.h>

#include "pipeline/calibrate.h"
#include "pipeline/run.h"
#include "pipeline/theory.h"
#include "src/options.h"

typedef struct poe_plan_settings {
    const poe_options *options; /* of poe-pipe plan; checked */
    int n_ranks;
    const poe_calibration *calibration; /* what the parts of a stage take; NULL: `given` */
    const poe_theory_rank *given;       /* (n_ranks): what each stage takes as a whole; NULL: `calibration` */
    const poe_theory_link *down, *up;   /* as in poe_theory_job; NULL: the calibration's links */
} poe_plan_settings;

/* One way of running it. */
typedef struct poe_plan_case {
    const char *name;       /* "asked", "streaming", ... */
    poe_stage_list layout;
    poe_theory_job job;
    poe_theory_result result;
    double closed;          /* s; 0: no formula holds */
} poe_plan_case;

enum { POE_PLAN_CASES = 5, POE_PLAN_RANKS = 8, POE_PLAN_MICRO = 7 };

/* Throughput of PoE over that of 1f1b with the same layers, each in its most even layout. */
typedef struct poe_plan_balance {
    int n_ranks;
    double exact[POE_PLAN_MICRO], stale[POE_PLAN_MICRO]; /* at poe_plan_micro[]; stale: the smallest D that streams */
    int until_exact, until_stale; /* largest M, of 1..POE_PLAN_MOST_MICRO, where it is not below 1; 0: none */
} poe_plan_balance;

enum { POE_PLAN_MOST_MICRO = 256 };
extern const int poe_plan_micro[POE_PLAN_MICRO];

typedef struct poe_plan {
    int n_cases;
    poe_plan_case cases[POE_PLAN_CASES]; /* [0]: as the flags have it */
    int smallest_delay;                  /* D of stale:D that streams in case 0; 0: nothing is shared */
    int link_window;                     /* --link-window that it takes; 0: links are wide enough as they are */
    double tokens;                       /* of a step */
    poe_run_memory memory[POE_THEORY_RANKS]; /* of each rank in case 0 */
    double down_bytes, up_bytes;         /* per step, on the link from a rank to the next, and back, in case 0 */
    int n_balances;
    poe_plan_balance balances[POE_PLAN_RANKS];
} poe_plan;

/* POE_BAD_INPUT: said, flags that do not go together. */
poe_status poe_plan_make(const poe_plan_settings *settings, poe_plan *plan);

/* A table on standard output; `rates` and `network` say in words where the times come from. */
void poe_plan_print(const poe_plan_settings *settings, const poe_plan *plan, const char *rates, const char *network);
/* The same, and more digits. New reference; NULL: out of memory. */
json_t *poe_plan_json(const poe_plan_settings *settings, const poe_plan *plan, const char *rates, const char *network);

/* The most even layout of `n_layers` layers with these costs over `n_stages` stages, of which the first, those between
 * and the last have a cost beside (a single stage: the last's): the greatest stage is as small as can be. */
void poe_plan_even(const double *costs, int n_layers, int n_stages, const double beside[3], poe_stage_list *layout);

#endif
