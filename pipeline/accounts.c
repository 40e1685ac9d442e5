/* SPDX-License-Identifier: MIT */
#include "pipeline/accounts.h"

#include "pipeline/streams.h"
#include "pipeline/trace.h"
#include "src/clock.h"
#include "src/moment.h"

const char *poe_account_name(poe_account account)
{
    static const char *const names[] = {"forward", "backward", "optimizer", "receive", "credit", "shared",
                                        "turn",    "send",     "data",       "checkpoint", "other",  "evaluation"};
    return names[account];
}

/* What neighbours are told; NULL: nothing new. */
static const char *doing(poe_account account)
{
    static const char *const texts[] = {[POE_ACCOUNT_FORWARD] = "forward",
                                        [POE_ACCOUNT_BACKWARD] = "loss and backward",
                                        [POE_ACCOUNT_OPTIMIZER] = "update",
                                        [POE_ACCOUNT_DATA] = "data",
                                        [POE_ACCOUNT_CHECKPOINT] = "checkpoint",
                                        [POE_ACCOUNT_OUTSIDE] = NULL};
    return texts[account];
}

json_t *poe_account_json(const poe_account_times *t)
{
    json_t *object = json_object();
    for (int i = 0; i < POE_ACCOUNT_COUNT; i++)
        json_object_set_new(object, poe_account_name((poe_account)i), json_real(t->seconds[i]));
    json_object_set_new(object, "wall", json_real(t->wall));
    return object;
}

double poe_account_busy(const poe_account_times *t)
{
    return t->seconds[POE_ACCOUNT_FORWARD] + t->seconds[POE_ACCOUNT_BACKWARD] + t->seconds[POE_ACCOUNT_OPTIMIZER];
}

double poe_account_step_seconds(const poe_account_times *times)
{
    return times->wall - times->seconds[POE_ACCOUNT_CHECKPOINT];
}

void poe_account_add(poe_account_times *sum, const poe_account_times *times)
{
    for (int i = 0; i < POE_ACCOUNT_COUNT; i++)
        sum->seconds[i] += times->seconds[i];
    sum->wall += times->wall;
}

/* Time up to `at` belongs to `account`. */
static void pass(poe_accounts *a, poe_account account, double at)
{
    double passed = at > a->since ? at - a->since : 0;
    if (a->trace && passed > 0)
        poe_trace_slice(a->trace, account, a->step, a->micro, a->since, at);
    if (account == POE_ACCOUNT_OUTSIDE)
        a->outside += passed;
    else
        a->times.seconds[account] += passed;
    a->since = passed > 0 ? at : a->since;
}

/* --- what comm says ----------------------------------------------------------------------------------------------------------- */

static void waited(void *context, poe_wait_kind kind, int peer, int channel, double from, double to)
{
    static const poe_account account_of[] = {[POE_WAIT_RECEIVE] = POE_ACCOUNT_RECEIVE,
                                             [POE_WAIT_CREDIT] = POE_ACCOUNT_CREDIT,
                                             [POE_WAIT_SHARED] = POE_ACCOUNT_SHARED,
                                             [POE_WAIT_COLLECTIVE] = POE_ACCOUNT_OTHER};
    poe_accounts *a = context;
    if (a->current == POE_ACCOUNT_CHECKPOINT || a->current == POE_ACCOUNT_OUTSIDE)
        return;
    pass(a, a->current, from);
    bool turn = kind == POE_WAIT_RECEIVE && channel == POE_CHANNEL_TURN;
    pass(a, turn ? POE_ACCOUNT_TURN : account_of[kind], to);
    if (kind == POE_WAIT_RECEIVE) {
        a->receive_wait[channel] += to - from;
        a->receive_peer[channel] = peer;
    }
}

static void sent(void *context, int peer, int channel, const poe_message *message)
{
    poe_accounts *a = context;
    poe_trace_message(a->trace, true, peer, channel, message, poe_now());
}

static void received(void *context, int peer, int channel, const poe_message *message)
{
    poe_accounts *a = context;
    poe_trace_message(a->trace, false, peer, channel, message, poe_now());
}

/* --- what the rank says ------------------------------------------------------------------------------------------------------- */

void poe_accounts_start(poe_accounts *a, poe_comm *comm, struct poe_trace *trace)
{
    double now = poe_now();
    *a = (poe_accounts){.comm = comm,
                        .trace = trace,
                        .current = POE_ACCOUNT_OTHER,
                        .micro = -1,
                        .since = now,
                        .opened = now,
                        .started = now};
    poe_comm_observer observer = {
        .context = a, .waited = waited, .sent = trace ? sent : NULL, .received = trace ? received : NULL};
    poe_comm_observe(comm, &observer);
}

void poe_accounts_stop(poe_accounts *a)
{
    pass(a, a->current, poe_now());
    poe_comm_observe(a->comm, NULL);
}

static void tell_moment(poe_account account, int64_t step, int micro)
{
    static const struct {
        bool is;
        poe_phase phase;
    } phases[POE_ACCOUNT_COUNT + 1] = {[POE_ACCOUNT_DATA] = {true, POE_PHASE_RECEIVE},
                                       [POE_ACCOUNT_FORWARD] = {true, POE_PHASE_FORWARD},
                                       [POE_ACCOUNT_BACKWARD] = {true, POE_PHASE_BACKWARD},
                                       [POE_ACCOUNT_OPTIMIZER] = {true, POE_PHASE_OPTIMIZER}};
    if (phases[account].is)
        poe_moment(phases[account].phase, step, micro);
}

void poe_account_enter_at(poe_accounts *a, poe_account account, int64_t step, int micro, double at)
{
    pass(a, a->current, at);
    a->current = account;
    a->step = step;
    a->micro = micro;
    if (account == POE_ACCOUNT_FORWARD && !a->first_forward)
        a->first_forward = at;
    if (doing(account))
        poe_comm_doing(a->comm, doing(account), step, micro);
    tell_moment(account, step, micro);
}

void poe_account_enter(poe_accounts *a, poe_account account, int64_t step, int micro)
{
    poe_account_enter_at(a, account, step, micro, poe_now());
}

void poe_accounts_close_step(poe_accounts *a, poe_account_times *times)
{
    double now = poe_now();
    poe_account_enter_at(a, POE_ACCOUNT_OTHER, a->step, -1, now);
    a->times.wall = now - a->opened - a->outside;
    *times = a->times;
    poe_account_add(&a->total, times);
    a->times = (poe_account_times){0};
    a->opened = now;
    a->outside = 0;
}

void poe_accounts_image(poe_accounts *a, poe_image *image)
{
    poe_image_pass(image, &a->total, sizeof(a->total));
    poe_image_pass(image, &a->started, sizeof(a->started));
    poe_image_pass(image, &a->first_forward, sizeof(a->first_forward));
    poe_image_pass(image, a->receive_wait, sizeof(a->receive_wait));
    poe_image_pass(image, a->receive_peer, sizeof(a->receive_peer));
}

double poe_accounts_fill(const poe_accounts *a)
{
    return a->first_forward ? a->first_forward - a->started : 0;
}
