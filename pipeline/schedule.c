/* SPDX-License-Identifier: MIT */
#include "pipeline/schedule.h"

#include <string.h>

/* Every chained schedule is one pattern: `ahead` forwards, then rounds of one forward and one backward (its first half)
 * each; the second halves lag `lag` micro-batches behind the first ones. */
typedef struct pattern {
    const char *name;
    bool chained, splits;
    int (*ahead)(int n_ranks, int rank, int n_micro);
    int lag; /* per rank */
} pattern;

static int none_ahead(int n_ranks, int rank, int n_micro)
{
    (void)n_ranks, (void)rank, (void)n_micro;
    return 0;
}

static int all_ahead(int n_ranks, int rank, int n_micro)
{
    (void)n_ranks, (void)rank;
    return n_micro;
}

static int distance_ahead(int n_ranks, int rank, int n_micro)
{
    (void)n_micro;
    return n_ranks - 1 - rank;
}

static int twice_ahead(int n_ranks, int rank, int n_micro)
{
    return 2 * distance_ahead(n_ranks, rank, n_micro);
}

static const pattern patterns[POE_SCHEDULE_COUNT] = {
    [POE_SCHEDULE_POE] = {"poe", false, false, none_ahead, 0},
    [POE_SCHEDULE_GPIPE] = {"gpipe", true, false, all_ahead, 0},
    [POE_SCHEDULE_1F1B] = {"1f1b", true, false, distance_ahead, 0},
    [POE_SCHEDULE_ZB_H1] = {"zb-h1", true, true, distance_ahead, 1},
    [POE_SCHEDULE_ZB_H2] = {"zb-h2", true, true, twice_ahead, 2},
    [POE_SCHEDULE_DDP] = {"ddp", false, false, none_ahead, 0},
};

static int smaller(int a, int b)
{
    return a < b ? a : b;
}

int poe_schedule_tasks(poe_schedule schedule, int n_ranks, int rank, int n_micro, poe_task *tasks)
{
    const pattern *p = &patterns[schedule];
    bool shares = schedule == POE_SCHEDULE_DDP;
    int first = shares ? rank : 0, stride = shares ? n_ranks : 1;
    int own = first < n_micro ? (n_micro - first + stride - 1) / stride : 0; /* micro-batches of this rank */
    int ahead = p->ahead(n_ranks, rank, own), lag = p->splits ? p->lag * rank : 0;
    poe_task_kind backward = p->splits ? POE_TASK_BACKWARD_INPUT : POE_TASK_BACKWARD;
    int n = 0;
    /* Counted by backward passes; those below 0 and from `own` on do not exist. */
    for (int j = -ahead; j < own + lag; j++) {
        if (j + ahead < own)
            tasks[n++] = (poe_task){POE_TASK_FORWARD, first + (j + ahead) * stride};
        if (j >= 0 && j < own)
            tasks[n++] = (poe_task){backward, first + j * stride};
        if (p->splits && j >= lag)
            tasks[n++] = (poe_task){POE_TASK_BACKWARD_WEIGHT, first + (j - lag) * stride};
    }
    return n;
}

int poe_schedule_slots(poe_schedule schedule, int n_ranks, int rank, int n_micro)
{
    const pattern *p = &patterns[schedule];
    int lag = p->splits ? p->lag * rank : 0;
    return smaller(p->ahead(n_ranks, rank, n_micro) + 1 + lag, n_micro);
}

bool poe_schedule_chained(poe_schedule schedule)
{
    return patterns[schedule].chained;
}

bool poe_schedule_splits(poe_schedule schedule)
{
    return patterns[schedule].splits;
}

const char *poe_schedule_name(poe_schedule schedule)
{
    return patterns[schedule].name;
}

bool poe_schedule_parse(const char *text, poe_schedule *schedule)
{
    for (int s = 0; s < POE_SCHEDULE_COUNT; s++) {
        if (strcmp(text, patterns[s].name) == 0) {
            *schedule = (poe_schedule)s;
            return true;
        }
    }
    return false;
}
