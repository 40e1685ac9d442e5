/* SPDX-License-Identifier: MIT */
#include "pipeline/recovery.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "comm/agent/board.h"
#include "src/files.h"
#include "src/log.h"

static uint64_t place_of(int64_t step, int micro)
{
    return (uint64_t)step << 32 | (uint32_t)micro;
}

static poe_attendance end_absence(poe_run *r, int64_t step, int micro)
{
    poe_absence *a = &r->absence;
    if (step < a->from)
        return POE_PRESENT;
    if (step < a->step || (step == a->step && micro < a->micro))
        return POE_ABSENT;
    if (step == a->step && a->micro > 0)
        return POE_RETURNING;
    a->ends = false;
    poe_warn("stage %d goes on without its own updates of steps %lld to %lld; its gradients of what it had under way "
             "count as zero", r->index, (long long)a->from, (long long)(a->micro > 0 ? a->step : a->step - 1));
    return POE_PRESENT;
}

poe_attendance poe_recovery_reach(poe_run *r, int64_t step, int micro)
{
    poe_board *board = poe_comm_board(r->comm);
    if (!board)
        return POE_PRESENT;
    if (place_of(step, micro) > atomic_load(&board->reached))
        atomic_store(&board->reached, place_of(step, micro));
    return r->absence.ends ? end_absence(r, step, micro) : POE_PRESENT;
}

/* What the stages after this one have not been sent must be computed; an evaluation is followed by a snapshot, so since
 * then there were micro-batches of training. */
static uint64_t first_unsent(const poe_run *r, int64_t from)
{
    const poe_board *board = poe_comm_board(r->comm);
    const int channel = POE_CHANNEL_BATCH + POE_CHANNEL_PAYLOAD, micro_batches = r->layout.order.n_micro;
    uint64_t first = UINT64_MAX;
    for (int i = 0; i < r->streams.n_targets; i++) {
        int peer = r->streams.targets[i];
        uint64_t before = board->snapshots[atomic_load(&board->valid)].traffic[peer][channel].sent;
        int64_t sent = (int64_t)(atomic_load(&board->sent[peer][channel]) - before);
        uint64_t place = place_of(from + sent / micro_batches, (int)(sent % micro_batches));
        first = place < first ? place : first;
    }
    return first;
}

void poe_recovery_begin_absence(poe_run *r, int64_t from)
{
    const poe_board *board = poe_comm_board(r->comm);
    uint64_t end = atomic_load(&board->reached), unsent = first_unsent(r, from);
    int64_t left = atomic_load(&board->left);
    end = unsent < end ? unsent : end;
    from = poe_run_is_last(r) && left > from ? left : from;
    r->absence = (poe_absence){.ends = end > place_of(from, 0),
                               .from = from,
                               .step = (int64_t)(end >> 32),
                               .micro = (int)(uint32_t)end};
}

bool poe_recovery_stops_after(poe_run *r, int64_t step)
{
    poe_board *board = poe_comm_board(r->comm);
    bool wanted = poe_comm_stop_wanted(r->comm);
    if (!board)
        return wanted;
    if (step >= atomic_load(&board->decided)) {
        if (wanted)
            atomic_store(&board->stop_step, step);
        atomic_store(&board->decided, step + 1);
    }
    return atomic_load(&board->stop_step) == step;
}

bool poe_recovery_leaves(const poe_run *r)
{
    const poe_board *board = poe_comm_board(r->comm);
    return board && atomic_load(&board->leave);
}

_Noreturn void poe_recovery_leave(void)
{
    poe_temporary_remove_all();
    fflush(NULL);
    _exit(POE_BOARD_AGAIN);
}

/* --- what is not finite ----------------------------------------------------------------------------------------- */

bool poe_recovery_is_left_out(const poe_run *r, int64_t step, int micro)
{
    const poe_board *board = poe_comm_board(r->comm);
    int n = board ? atomic_load(&board->n_left_out) : 0;
    for (int i = 0; i < n; i++)
        if (atomic_load(&board->left_out[i]) == place_of(step, micro))
            return true;
    return false;
}

bool poe_recovery_examines(const poe_run *r, int64_t step)
{
    return poe_recovery_is_left_out(r, step, -1);
}

bool poe_recovery_leave_out(poe_run *r, int64_t step, int micro, const char *what)
{
    poe_board *board = poe_comm_board(r->comm);
    int n = board ? atomic_load(&board->n_left_out) : 0;
    if (strcmp(r->options->on_nan, "skip") != 0 || !board || n == POE_BOARD_LEFT_OUT ||
        poe_recovery_is_left_out(r, step, micro))
        return false;
    if (micro >= 0)
        poe_warn("step %lld, micro-batch %d: %s of stage %d is not finite: the stage goes back to its snapshot, and "
                 "leaves this micro-batch's gradients out",
                 (long long)step, micro, what, r->index);
    else
        poe_warn("step %lld: %s of stage %d is not finite: the stage goes back to its snapshot, and looks for the "
                 "micro-batch that it comes from",
                 (long long)step, what, r->index);
    atomic_store(&board->left_out[n], place_of(step, micro));
    atomic_store(&board->n_left_out, n + 1);
    poe_recovery_leave();
}
