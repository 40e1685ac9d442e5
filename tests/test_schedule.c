/* SPDX-License-Identifier: MIT
 * Task lists: complete, in order, within their slots, and free of deadlock however few credits the links have. */
#include "pipeline/schedule.h"

#include <stdlib.h>

#include "tests/check.h"

enum { MAX_RANKS = 96, MAX_MICRO = 33 };

typedef struct lists {
    poe_order order;
    int count[MAX_RANKS];
    poe_task tasks[MAX_RANKS][3 * MAX_MICRO];
    poe_turn turns[MAX_RANKS][2 * MAX_MICRO + 1]; /* interleaved */
} lists;

static poe_order order_of(poe_schedule schedule, int n_ranks, int n_micro)
{
    return (poe_order){.schedule = schedule, .n_ranks = n_ranks, .n_virtual = 1, .n_micro = n_micro};
}

static bool interleaved(const lists *l)
{
    return l->order.schedule == POE_SCHEDULE_INTERLEAVED;
}

static void make_lists(lists *l, const poe_order *order)
{
    l->order = *order;
    for (int r = 0; r < order->n_ranks; r++) {
        l->count[r] = poe_schedule_tasks(order, r, l->tasks[r]);
        if (interleaved(l))
            poe_schedule_turns(order, r, l->turns[r]);
    }
}

static bool is_last_kind(const lists *l, poe_task_kind kind)
{
    return kind == (poe_schedule_splits(l->order.schedule) ? POE_TASK_BACKWARD_WEIGHT : POE_TASK_BACKWARD);
}

/* Each kind once per micro-batch, in order, no backward before its forward, no more in flight than slots. */
static int defects_of_rank(const lists *l, int r)
{
    bool shares = l->order.schedule == POE_SCHEDULE_DDP;
    int next[POE_TASK_KINDS], defects = 0, in_flight = 0, most = 0;
    for (int k = 0; k < POE_TASK_KINDS; k++)
        next[k] = shares ? r : 0;
    for (int i = 0; i < l->count[r]; i++) {
        poe_task t = l->tasks[r][i];
        defects += t.micro != next[t.kind] || t.micro >= l->order.n_micro;
        next[t.kind] += shares ? l->order.n_ranks : 1;
        if (t.kind == POE_TASK_FORWARD && ++in_flight > most)
            most = in_flight;
        in_flight -= is_last_kind(l, t.kind);
        defects += t.kind != POE_TASK_FORWARD && t.micro >= next[POE_TASK_FORWARD];
        defects += t.kind == POE_TASK_BACKWARD_WEIGHT && t.micro >= next[POE_TASK_BACKWARD_INPUT];
    }
    bool splits = poe_schedule_splits(l->order.schedule);
    for (int k = 0; k < POE_TASK_KINDS; k++) {
        bool used = k == POE_TASK_FORWARD || (k == POE_TASK_BACKWARD) != splits;
        defects += used ? next[k] < l->order.n_micro : next[k] != (shares ? r : 0);
    }
    bool idle = shares && r >= l->order.n_micro;
    defects += in_flight != 0 || (!idle && most != poe_schedule_slots(&l->order, r));
    return defects;
}

/* Where each rank is, how many of each kind it has finished, and how many inputs it has given back. */
typedef struct machine {
    bool waits[MAX_RANKS]; /* for its turn */
    int at[MAX_RANKS], done[MAX_RANKS][POE_TASK_KINDS], released[MAX_RANKS];
} machine;

static int backs(const machine *m, int r)
{
    return m->done[r][POE_TASK_BACKWARD] + m->done[r][POE_TASK_BACKWARD_INPUT];
}

/* May rank r do its next task? `window` credits on both links; inputs are held until the last backward task or, when
 * `held` is false, until their forward is done. */
static bool may_run(const lists *l, const machine *m, int r, int window, bool held)
{
    poe_task t = l->tasks[r][m->at[r]];
    if (m->waits[r])
        return false;
    bool chained = poe_schedule_chained(l->order.schedule), linked = l->order.schedule != POE_SCHEDULE_DDP;
    bool has_next = linked && r + 1 < l->order.n_ranks, has_previous = linked && r > 0;
    if (t.kind == POE_TASK_FORWARD) {
        if (has_previous && m->done[r - 1][POE_TASK_FORWARD] <= t.micro)
            return false;
        int taken = !has_next ? 0 : held ? m->released[r + 1] : m->done[r + 1][POE_TASK_FORWARD];
        return !has_next || t.micro - taken < window;
    }
    if (t.kind == POE_TASK_BACKWARD_WEIGHT || !chained)
        return true;
    if (has_next && backs(m, r + 1) <= t.micro)
        return false;
    return !has_previous || t.micro - backs(m, r - 1) < window;
}

/* Hands the turn to whom it says, who must be waiting for it from this rank. */
static void pass_turn(const lists *l, machine *m, int r)
{
    int after = interleaved(l) ? l->turns[r][m->at[r]].after : -1;
    if (after < 0)
        return;
    CHECK(m->waits[after]);
    CHECK_INT(l->turns[after][m->at[after] % (l->count[after] + 1)].before, r);
    m->waits[r] = true;
    m->waits[after] = false;
}

/* 0 when every rank comes to the end of its list (and has had its update). */
static int tasks_left(const lists *l, int window, bool held)
{
    static machine m;
    m = (machine){0};
    bool moved = true;
    int left = 0;
    for (int r = poe_schedule_processors(&l->order); r < l->order.n_ranks; r++)
        m.waits[r] = true;
    while (moved) {
        moved = false;
        left = 0;
        for (int r = 0; r < l->order.n_ranks; r++) {
            while (m.at[r] < l->count[r] && may_run(l, &m, r, window, held)) {
                poe_task_kind kind = l->tasks[r][m.at[r]].kind;
                m.done[r][kind]++;
                m.released[r] += is_last_kind(l, kind);
                pass_turn(l, &m, r);
                m.at[r]++;
                moved = true;
            }
            if (m.at[r] == l->count[r] && interleaved(l) && !m.waits[r]) {
                pass_turn(l, &m, r);
                m.at[r]++;
                moved = true;
            }
            left += l->count[r] + interleaved(l) - m.at[r];
        }
    }
    return left;
}

static void check_order(const poe_order *order)
{
    static lists l;
    make_lists(&l, order);
    int defects = 0, total = 0, n_micro = order->n_micro, hungriest = 0;
    for (int r = 0; r < order->n_ranks; r++) {
        int slots = poe_schedule_slots(order, r);
        defects += defects_of_rank(&l, r);
        total += l.count[r];
        bool sends = r > 0 || interleaved(&l); /* whose slots a link in front of another rank has to match */
        hungriest = sends && slots > hungriest ? slots : hungriest;
    }
    bool shares = order->schedule == POE_SCHEDULE_DDP;
    int expected = n_micro * (poe_schedule_splits(order->schedule) ? 3 : 2) * (shares ? 1 : order->n_ranks);
    int left = tasks_left(&l, interleaved(&l) ? hungriest : 1, false) + tasks_left(&l, n_micro, false);
    /* Inputs that stay lent while their micro-batch is in flight: as many credits as the hungriest rank's slots. */
    left += tasks_left(&l, hungriest ? hungriest : 1, true);
    if (defects || left || total != expected)
        fprintf(stderr, "%s, %d ranks, %d a processor, %d micro-batches\n", poe_schedule_name(order->schedule),
                order->n_ranks, order->n_virtual, n_micro);
    CHECK_INT(defects, 0);
    CHECK_INT(left, 0);
    CHECK_INT(total, expected);
}

static void test_lists(int n_ranks, int n_micro)
{
    for (int s = 0; s < POE_SCHEDULE_COUNT; s++) {
        poe_order order = order_of((poe_schedule)s, n_ranks, n_micro);
        if (s != POE_SCHEDULE_INTERLEAVED)
            check_order(&order);
        for (order.n_virtual = 2; s == POE_SCHEDULE_INTERLEAVED && order.n_virtual <= n_ranks; order.n_virtual++)
            if (n_ranks % order.n_virtual == 0)
                check_order(&order);
    }
}

static int slots_of(poe_schedule schedule, int n_ranks, int rank, int n_micro)
{
    poe_order order = order_of(schedule, n_ranks, n_micro);
    return poe_schedule_slots(&order, rank);
}

/* What the schedules promise to keep in memory. */
static void test_slots(void)
{
    for (int r = 0; r < 4; r++) {
        CHECK_INT(slots_of(POE_SCHEDULE_POE, 4, r, 16), 1);
        CHECK_INT(slots_of(POE_SCHEDULE_GPIPE, 4, r, 16), 16);
        CHECK_INT(slots_of(POE_SCHEDULE_1F1B, 4, r, 16), 4 - r);
        CHECK_INT(slots_of(POE_SCHEDULE_ZB_H1, 4, r, 16), 4);
        CHECK_INT(slots_of(POE_SCHEDULE_ZB_H2, 4, r, 16), 7);
        CHECK_INT(slots_of(POE_SCHEDULE_1F1B, 4, r, 1), 1);
        CHECK_INT(slots_of(POE_SCHEDULE_ZB_H2, 4, r, 3), 3);
    }
    /* zb-h2 has 2P - 2 rank - 1 forwards done when its first gradient comes. */
    poe_task tasks[3 * MAX_MICRO];
    poe_order order = order_of(POE_SCHEDULE_ZB_H2, 4, 16);
    for (int r = 0; r < 4; r++) {
        poe_schedule_tasks(&order, r, tasks);
        int forwards = 0;
        while (tasks[forwards].kind == POE_TASK_FORWARD)
            forwards++;
        CHECK_INT(forwards, 2 * 4 - 2 * r - 1);
    }
}

static void spell(poe_schedule schedule, int rank, char *text)
{
    static const char letters[POE_TASK_KINDS] = {'F', 'B', 'I', 'W'};
    poe_task tasks[3 * MAX_MICRO];
    poe_order order = order_of(schedule, 3, 4);
    int n = poe_schedule_tasks(&order, rank, tasks);
    for (int i = 0; i < n; i++)
        text += sprintf(text, "%c%d", letters[tasks[i].kind], tasks[i].micro);
}

/* Three ranks, four micro-batches, written down by hand. */
static void test_by_hand(void)
{
    static const struct {
        poe_schedule schedule;
        int rank;
        const char *tasks;
    } rows[] = {
        {POE_SCHEDULE_POE, 1, "F0B0F1B1F2B2F3B3"},
        {POE_SCHEDULE_GPIPE, 1, "F0F1F2F3B0B1B2B3"},
        {POE_SCHEDULE_1F1B, 0, "F0F1F2B0F3B1B2B3"},
        {POE_SCHEDULE_1F1B, 2, "F0B0F1B1F2B2F3B3"},
        {POE_SCHEDULE_ZB_H1, 0, "F0F1F2I0W0F3I1W1I2W2I3W3"},
        {POE_SCHEDULE_ZB_H1, 1, "F0F1I0F2I1W0F3I2W1I3W2W3"},
        {POE_SCHEDULE_ZB_H1, 2, "F0I0F1I1F2I2W0F3I3W1W2W3"},
        {POE_SCHEDULE_ZB_H2, 0, "F0F1F2F3I0W0I1W1I2W2I3W3"},
        {POE_SCHEDULE_ZB_H2, 1, "F0F1F2I0F3I1I2W0I3W1W2W3"},
        {POE_SCHEDULE_DDP, 0, "F0B0F3B3"},
        {POE_SCHEDULE_DDP, 1, "F1B1"},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        char text[256];
        spell(rows[i].schedule, rows[i].rank, text);
        CHECK_STRING(text, rows[i].tasks);
    }
}

/* Two processors with two ranks each, four micro-batches: what the first processor does, its ranks 0 and 2 by turns. */
static void test_interleaved_by_hand(void)
{
    static const struct {
        int rank;
        const char *tasks;
    } order_of_first[] = {{0, "F0"}, {0, "F1"}, {2, "F0"}, {2, "F1"}, {0, "F2"}, {2, "B0"}, {0, "F3"}, {2, "B1"},
                          {2, "F2"}, {0, "B0"}, {2, "F3"}, {0, "B1"}, {2, "B2"}, {2, "B3"}, {0, "B2"}, {0, "B3"}};
    enum { ENTRIES = sizeof(order_of_first) / sizeof(order_of_first[0]) };
    poe_order order = {.schedule = POE_SCHEDULE_INTERLEAVED, .n_ranks = 4, .n_virtual = 2, .n_micro = 4};
    lists *l = calloc(1, sizeof(*l));
    int at[4] = {0};
    make_lists(l, &order);
    for (int i = 0; i < ENTRIES; i++) {
        int r = order_of_first[i].rank, next = i + 1 < ENTRIES ? order_of_first[i + 1].rank : 0; /* rank 0's update */
        char text[8];
        poe_task t = l->tasks[r][at[r]];
        sprintf(text, "%c%d", t.kind == POE_TASK_FORWARD ? 'F' : 'B', t.micro);
        CHECK_STRING(text, order_of_first[i].tasks);
        CHECK_INT(l->turns[r][at[r]++].after, next == r ? -1 : next);
    }
    CHECK_INT(l->turns[0][8].after, 2);
    CHECK_INT(l->turns[2][8].before, 0);
    CHECK_INT(l->turns[2][8].after, 0);
    CHECK_INT(l->turns[0][0].before, 2);
    free(l);
}

static void test_names(void)
{
    poe_schedule found;
    for (int s = 0; s < POE_SCHEDULE_COUNT; s++) {
        CHECK(poe_schedule_parse(poe_schedule_name((poe_schedule)s), &found));
        CHECK_INT(found, s);
    }
    CHECK(!poe_schedule_parse("2f2b", &found));
}

int main(void)
{
    for (int n_micro = 1; n_micro <= MAX_MICRO; n_micro++) {
        for (int n_ranks = 1; n_ranks <= 16; n_ranks++)
            test_lists(n_ranks, n_micro);
        test_lists(32, n_micro);
        test_lists(96, n_micro);
    }
    test_slots();
    test_by_hand();
    test_interleaved_by_hand();
    test_names();
    return check_result();
}
