/* SPDX-License-Identifier: MIT */
#include "pipeline/outage.h"

#include <stdio.h>
#include <string.h>

#include "comm/agent/board.h"
#include "src/clock.h"
#include "src/log.h"

/* --- the board's ring of bits ----------------------------------------------------------------------------------- */

static bool is_noted(const poe_board *board, int64_t step)
{
    uint64_t bit = (uint64_t)step % POE_BOARD_STEPS;
    return atomic_load(&board->absent[bit / 64]) >> bit % 64 & 1;
}

static void note(poe_board *board, int64_t step, bool absent)
{
    uint64_t bit = (uint64_t)step % POE_BOARD_STEPS, mask = (uint64_t)1 << bit % 64;
    if (absent)
        atomic_fetch_or(&board->absent[bit / 64], mask);
    else
        atomic_fetch_and(&board->absent[bit / 64], ~mask);
}

bool poe_outage_covers(const poe_run *r, int64_t step)
{
    const poe_board *board = poe_comm_board(r->comm);
    return r->outage.allowed && step >= 0 && step < atomic_load(&board->attended) && is_noted(board, step);
}

/* --- decisions -------------------------------------------------------------------------------------------------- */

void poe_outage_describe_rest(int rank, char text[POE_OUTAGE_TEXT])
{
    snprintf(text, POE_OUTAGE_TEXT, rank > 1 ? "stages 0 to %d" : "stage %d", rank - 1);
}

/* The agent speaks of those that it has called. */
static void say_beginning(const poe_run *r, int64_t step)
{
    char rest[POE_OUTAGE_TEXT];
    if (atomic_load(&poe_comm_board(r->comm)->outage))
        return;
    poe_outage_describe_rest(r->index, rest);
    poe_warn("the run goes on without its stage from step %lld on, as the model of %s (--outage continue): --fault "
             "says that it cannot work",
             (long long)step, rest);
}

static void say_end(const poe_run *r, int64_t step)
{
    int64_t first = step;
    while (first > 0 && step - first < POE_BOARD_STEPS - 1 && poe_outage_covers(r, first - 1))
        first--;
    poe_info("stage %d is back in step %lld: it has missed %lld, from step %lld on", r->index, (long long)step,
             (long long)(step - first), (long long)first);
}

static bool cannot_work(const poe_board *board, int64_t step)
{
    return atomic_load(&board->outage) || step < atomic_load(&board->absent_until) ||
           poe_now() < atomic_load(&board->absent_until_time);
}

/* Once a step; a process that repeats it finds what was decided. */
static bool decide(poe_run *r, int64_t step)
{
    poe_board *board = poe_comm_board(r->comm);
    if (step >= atomic_load(&board->attended)) {
        bool before = poe_outage_covers(r, step - 1), now = cannot_work(board, step);
        if (now && !before)
            say_beginning(r, step);
        if (before && !now)
            say_end(r, step);
        note(board, step, now);
        atomic_store(&board->attended, step + 1);
    }
    return is_noted(board, step);
}

void poe_outage_begin(poe_run *r, int64_t from)
{
    poe_board *board = poe_comm_board(r->comm);
    r->outage = (poe_outage){.allowed = r->index > 0 && strcmp(r->options->outage, "continue") == 0};
    if (!r->outage.allowed || !atomic_load(&board->outage))
        return;
    int64_t left = atomic_load(&board->left), end = atomic_load(&board->attended);
    int64_t first = poe_run_is_last(r) && left > from ? left : from;
    for (int64_t step = first; step < end; step++)
        note(board, step, true);
}

void poe_outage_attend(poe_run *r, poe_batch *batch, poe_attendance attendance)
{
    poe_outage *o = &r->outage;
    if (batch->micro == 0) {
        o->absent = o->allowed && decide(r, batch->step);
        o->missed = false;
    }
    if (o->absent)
        batch->flags |= POE_FLAG_ABSENT;
    bool absent = batch->flags & POE_FLAG_ABSENT;
    o->missed |= absent;
    if (absent)
        attendance = POE_ABSENT;
    else if (o->missed && attendance == POE_PRESENT)
        attendance = POE_RETURNING;
    poe_compute_attend(&r->compute, attendance);
}
