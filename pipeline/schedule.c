/* SPDX-License-Identifier: MIT */
#include "pipeline/schedule.h"

#include <string.h>

/* Every chained schedule is one pattern: `ahead` forwards, then rounds of one forward and one backward (its first half)
 * each; the second halves lag `lag` micro-batches behind the first ones. Under interleaved it is that of a processor. */
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
    [POE_SCHEDULE_INTERLEAVED] = {"interleaved", true, false, twice_ahead, 0},
};

static int smaller(int a, int b)
{
    return a < b ? a : b;
}

/* --- interleaved ------------------------------------------------------------------------------------------------------ */

/* The processor's passes of one direction, in order: groups of micro-batches, each through all of its ranks before the next
 * group. A group has as many as there are processors, so that the first of them is back when the last has left; what is
 * over is spread, as a group with fewer would wait for itself. */
typedef struct pass {
    int place; /* which of the processor's ranks, from its first */
    int micro;
} pass;

int poe_schedule_processors(const poe_order *order)
{
    return order->n_ranks / order->n_virtual;
}

static int groups_of(const poe_order *order)
{
    int processors = poe_schedule_processors(order);
    return order->n_micro < processors ? 1 : order->n_micro / processors;
}

static int first_group(const poe_order *order)
{
    return (order->n_micro + groups_of(order) - 1) / groups_of(order);
}

static pass pass_at(const poe_order *order, int index, bool backward)
{
    int places = order->n_virtual, size = order->n_micro / groups_of(order), first = 0;
    int over = order->n_micro % groups_of(order), passes_over = over * (size + 1) * places; /* of groups with one more */
    if (index < passes_over) {
        size++;
    } else {
        index -= passes_over;
        first = over * (size + 1);
    }
    first += index / (places * size) * size;
    int place = index % (places * size) / size;
    return (pass){backward ? places - 1 - place : place, first + index % size};
}

/* A processor's whole step, one entry after the other. */
typedef struct walk {
    const poe_order *order;
    int total, ahead; /* passes of a direction */
    int forwards, backwards, updates; /* done */
} walk;

typedef struct entry {
    pass pass; /* an update: of the place alone */
    bool backward, update;
} entry;

static walk start_walk(const poe_order *order, int processor)
{
    int processors = poe_schedule_processors(order), places = order->n_virtual;
    int total = places * order->n_micro;
    int ahead = patterns[order->schedule].ahead(processors, processor, total) + (places - 1) * first_group(order);
    return (walk){.order = order, .total = total, .ahead = smaller(ahead, total)};
}

static bool next_entry(walk *w, entry *e)
{
    bool more = w->forwards < w->total, due = w->forwards - w->backwards > w->ahead;
    if (more && !due)
        *e = (entry){.pass = pass_at(w->order, w->forwards++, false)};
    else if (w->backwards < w->total)
        *e = (entry){.pass = pass_at(w->order, w->backwards++, true), .backward = true};
    else
        *e = (entry){.pass = {.place = w->updates++}, .update = true};
    return w->updates <= w->order->n_virtual;
}

static int interleaved_tasks(const poe_order *order, int rank, poe_task *tasks)
{
    int processors = poe_schedule_processors(order), n = 0;
    walk w = start_walk(order, rank % processors);
    for (entry e; next_entry(&w, &e);)
        if (e.pass.place == rank / processors && !e.update)
            tasks[n++] = (poe_task){e.backward ? POE_TASK_BACKWARD : POE_TASK_FORWARD, e.pass.micro};
    return n;
}

static int interleaved_slots(const poe_order *order, int rank)
{
    int processors = poe_schedule_processors(order), kept = 0, most = 0;
    walk w = start_walk(order, rank % processors);
    for (entry e; next_entry(&w, &e);) {
        if (e.pass.place != rank / processors || e.update)
            continue;
        kept += e.backward ? -1 : 1;
        most = kept > most ? kept : most;
    }
    return most;
}

void poe_schedule_turns(const poe_order *order, int rank, poe_turn *turns)
{
    int processors = poe_schedule_processors(order), first = rank % processors, n = 0;
    walk w = start_walk(order, first);
    int before = first + (order->n_virtual - 1) * processors; /* the last update of the step before */
    bool mine = false;
    for (entry e; next_entry(&w, &e);) {
        int now = first + e.pass.place * processors;
        if (mine)
            turns[n++].after = now == rank ? -1 : now;
        mine = now == rank;
        if (mine)
            turns[n].before = before == rank ? -1 : before;
        before = now;
    }
    if (mine)
        turns[n].after = first == rank ? -1 : first;
}

/* --- all of them ------------------------------------------------------------------------------------------------------ */

int poe_schedule_tasks(const poe_order *order, int rank, poe_task *tasks)
{
    const pattern *p = &patterns[order->schedule];
    if (order->schedule == POE_SCHEDULE_INTERLEAVED)
        return interleaved_tasks(order, rank, tasks);
    bool shares = order->schedule == POE_SCHEDULE_DDP;
    int first = shares ? rank : 0, stride = shares ? order->n_ranks : 1, n_micro = order->n_micro;
    int own = first < n_micro ? (n_micro - first + stride - 1) / stride : 0; /* micro-batches of this rank */
    int ahead = p->ahead(order->n_ranks, rank, own), lag = p->splits ? p->lag * rank : 0;
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

int poe_schedule_slots(const poe_order *order, int rank)
{
    const pattern *p = &patterns[order->schedule];
    if (order->schedule == POE_SCHEDULE_INTERLEAVED)
        return interleaved_slots(order, rank);
    int lag = p->splits ? p->lag * rank : 0;
    return smaller(p->ahead(order->n_ranks, rank, order->n_micro) + 1 + lag, order->n_micro);
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
