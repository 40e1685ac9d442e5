/* SPDX-License-Identifier: MIT
 * Layouts: stages, slots and windows of links; with these windows a chained schedule takes exactly as long as with
 * links that never hold anybody back, whatever the round trip. */
#include <string.h>

#include "pipeline/layout.h"
#include "tests/check.h"

enum { RANKS = 8, MICRO = 16, STEPS = 2, GIVEN = STEPS * MICRO, TASKS = 3 * MICRO };

static poe_layout make_layout(poe_schedule schedule, int n_ranks, int n_micro)
{
    return (poe_layout){.order = {.schedule = schedule, .n_ranks = n_ranks, .n_virtual = 1, .n_micro = n_micro}};
}

/* When what was done, by rank and micro-batch counted over the steps; negative: not yet. */
typedef struct machine {
    poe_layout layout;
    double latency;
    bool endless; /* windows */
    int at[RANKS];
    double clock[RANKS], forward[RANKS][GIVEN], backward[RANKS][GIVEN], used[RANKS][GIVEN];
} machine;

static int window_of(const machine *m, int link)
{
    return m->endless ? GIVEN : poe_layout_window(&m->layout, link);
}

/* `start` is not before `event` has come over a link; false: it has not happened yet. */
static bool after(const machine *m, double event, double *start)
{
    if (event >= 0 && event + m->latency > *start)
        *start = event + m->latency;
    return event >= 0;
}

/* An input is released by its first backward task, which is when its gradient is sent; a gradient by the backward that
 * used it. */
static bool forward(machine *m, int r, int g, double *start)
{
    int last = m->layout.order.n_ranks - 1;
    bool ready = r == 0 || after(m, m->forward[r - 1][g], start);
    int w = r < last ? window_of(m, r) : 0;
    return ready && (r == last || g < w || after(m, m->backward[r + 1][g - w], start));
}

static bool backward(machine *m, int r, int g, double *start)
{
    bool ready = r == m->layout.order.n_ranks - 1 || after(m, m->backward[r + 1][g], start);
    int w = r > 0 ? window_of(m, r - 1) : 0;
    return ready && (r == 0 || g < w || after(m, m->used[r - 1][g - w], start));
}

static bool run_task(machine *m, int r, const poe_task *tasks, int count)
{
    poe_task t = tasks[m->at[r] % count];
    int g = m->at[r] / count * m->layout.order.n_micro + t.micro;
    double start = m->clock[r], whole = 2;
    bool is_forward = t.kind == POE_TASK_FORWARD, is_weight = t.kind == POE_TASK_BACKWARD_WEIGHT;
    if (!is_weight && !(is_forward ? forward(m, r, g, &start) : backward(m, r, g, &start)))
        return false;
    double end = start + (is_forward || t.kind != POE_TASK_BACKWARD ? 1 : whole);
    if (is_forward)
        m->forward[r][g] = end;
    else if (!is_weight)
        m->backward[r][g] = m->used[r][g] = end;
    m->clock[r] = end;
    m->at[r]++;
    return true;
}

/* How long two steps take; negative: they never end. */
static double time_of(poe_layout layout, double latency, bool endless)
{
    static machine m;
    static poe_task tasks[RANKS][TASKS];
    int count[RANKS];
    bool moved = true;
    double longest = 0;
    m = (machine){.layout = layout, .latency = latency, .endless = endless};
    for (int r = 0; r < layout.order.n_ranks; r++) {
        count[r] = poe_schedule_tasks(&layout.order, r, tasks[r]);
        for (int g = 0; g < GIVEN; g++)
            m.forward[r][g] = m.backward[r][g] = m.used[r][g] = -1;
    }
    while (moved) {
        moved = false;
        for (int r = 0; r < layout.order.n_ranks; r++)
            while (m.at[r] < STEPS * count[r] && run_task(&m, r, tasks[r], count[r]))
                moved = true;
    }
    for (int r = 0; r < layout.order.n_ranks; r++) {
        if (m.at[r] < STEPS * count[r])
            return -1;
        longest = m.clock[r] > longest ? m.clock[r] : longest;
    }
    return longest;
}

static void test_windows(void)
{
    static const int micros[] = {1, 2, 3, 5, 8, MICRO};
    static const double latencies[] = {0, 0.5, 7};
    for (int s = 0; s < POE_SCHEDULE_COUNT; s++)
        for (int p = 2; poe_schedule_chained((poe_schedule)s) && p <= RANKS; p++)
            for (size_t i = 0; i < sizeof(micros) / sizeof(micros[0]); i++)
                for (size_t j = 0; j < sizeof(latencies) / sizeof(latencies[0]); j++) {
                    poe_layout layout = make_layout((poe_schedule)s, p, micros[i]);
                    double free_of_credits = time_of(layout, latencies[j], true);
                    CHECK(free_of_credits > 0);
                    CHECK_NEAR(time_of(layout, latencies[j], false), free_of_credits, 1e-12, 0);
                }
}

static void test_figures(void)
{
    poe_layout ddp = make_layout(POE_SCHEDULE_DDP, 4, 8), poe = make_layout(POE_SCHEDULE_POE, 5, 8),
               gpipe = make_layout(POE_SCHEDULE_GPIPE, 4, 8);
    CHECK_INT(poe_layout_stages(&ddp), 1);
    CHECK_INT(poe_layout_stage(&ddp, 3), 0);
    CHECK_INT(poe_layout_slots(&ddp, 0), 1);
    CHECK_INT(poe_layout_window(&ddp, 0), 2);
    ddp.link_window = 6;
    CHECK_INT(poe_layout_window(&ddp, 0), 6);
    CHECK_INT(poe_layout_stages(&poe), 5);
    CHECK_INT(poe_layout_stage(&poe, 3), 3);
    CHECK_INT(poe_layout_slots(&poe, 3), 1);
    CHECK_INT(poe_layout_window(&poe, 0), 4);
    poe.delay = 3; /* 24 micro-batches over 4 links */
    CHECK_INT(poe_layout_window(&poe, 0), 10);
    poe.link_window = 2;
    CHECK_INT(poe_layout_window(&poe, 0), 2);
    CHECK_INT(poe_layout_slots(&gpipe, 0), 8);
    CHECK_INT(poe_layout_window(&gpipe, 0), 9);
    gpipe.link_window = 2; /* less than the schedule needs */
    CHECK_INT(poe_layout_window(&gpipe, 0), 9);
    gpipe.link_window = 20;
    CHECK_INT(poe_layout_window(&gpipe, 0), 20);
}

static void check_chosen(const char *objective, const char *schedule, poe_schedule expected)
{
    poe_options o = {.device_batch_size = 2, .sequence_len = 16, .total_batch_size = 128, .sync_delay = 5};
    poe_layout layout;
    strcpy(o.objective, objective);
    strcpy(o.schedule, schedule);
    poe_layout_init(&layout, &o, 3);
    CHECK_INT(layout.order.schedule, expected);
    CHECK_INT(layout.order.n_ranks, 3);
    CHECK_INT(layout.order.n_micro, 4);
    CHECK_INT(layout.delay, 5);
}

int main(void)
{
    test_windows();
    test_figures();
    check_chosen("poe", "auto", POE_SCHEDULE_POE);
    check_chosen("bp", "auto", POE_SCHEDULE_1F1B);
    check_chosen("hierarchical", "auto", POE_SCHEDULE_1F1B);
    check_chosen("bp", "zb-h2", POE_SCHEDULE_ZB_H2);
    check_chosen("bp", "ddp", POE_SCHEDULE_DDP);
    return check_result();
}
