/* SPDX-License-Identifier: MIT
 * Whoever watches a process from outside knows three things: that it has ended, that its helper thread counts
 * (board->beats), and where its own thread is (board->place). Each has a limit here. */
#include "pipeline/agent.h"

#include <inttypes.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>

#include "pipeline/outage.h"
#include "src/clock.h"
#include "src/log.h"

enum {
    MAX_DEATHS = 5, /* in a row, none of them later in the training than the one before */
    TEXT = 160,
};

static const double tick = 0.25;        /* seconds between looks at the stage process */
static const double short_tick = 0.01;  /* while it catches up, so that the time that is said is right */
static const double stay_floor = 60;    /* seconds in one account that are never too long ... */
static const double stay_factor = 20;   /* ... and how much longer than the longest so far is */
static const double exit_patience = 5;  /* seconds from its outcome to its end */
static const double kill_patience = 10; /* from SIGKILL to its end */
static const double outage_pause = 60;  /* until a stage that the run goes on without tries again, ... */
static const double outage_trial = 60;  /* ... and is back if it has lived for so long */
static const double loss_patience = 2;  /* for the stage process to end by itself, after the relay has lost a peer */

typedef struct place {
    int64_t step; /* -1: training has not begun */
    int micro;
    const char *doing; // may be NULL
} place;

typedef struct agent {
    poe_board *board;
    poe_keeper *keeper;
    poe_relay *relay;
    const poe_agent_settings *settings;
    double deadline, heartbeat;
    double now;  /* of this look */
    double lost; /* since when a peer is lost; 0: none is */
    /* the stage process */
    bool running;
    unsigned beats;
    double heard;  /* when they last changed */
    double beaten; /* when this agent last spoke for it */
    unsigned entered;
    double stay;    /* since when its thread is where it is; 0: it waits for others */
    double longest; /* stay so far */
    int64_t first;  /* step in which it was first seen; -1: not yet */
    double done;    /* when its outcome was seen; 0: not yet */
    double killed;  /* when it was sent SIGKILL; 0: it was not */
    char why[TEXT]; /* then */
    /* its deaths */
    place furthest, fell;
    int deaths;
    double outage, trial; /* when they began; 0: there was none */
    bool catching_up, left, arriving;
    double died, started; /* the last start's time */
    int64_t from; /* step of the snapshot that it went on from */
} agent;

static place place_of(const poe_board *board)
{
    const poe_board_place *p = &board->place;
    return (place){atomic_load(&p->step), atomic_load(&p->micro), atomic_load(&p->doing)};
}

static bool is_before(const place *a, const place *b)
{
    return a->step < b->step || (a->step == b->step && a->micro < b->micro);
}

/* --- words ------------------------------------------------------------------------------------------------------ */

/* "in step 20, backward, micro-batch 3" */
static void describe_place(const place *p, char text[TEXT])
{
    if (p->step < 0) {
        snprintf(text, TEXT, "before training began");
        return;
    }
    int used = snprintf(text, TEXT, "in step %" PRId64 ", %.60s", p->step, p->doing ? p->doing : "waiting for others");
    if (p->doing && p->micro >= 0)
        snprintf(text + used, (size_t)(TEXT - used), ", micro-batch %d", p->micro);
}

/* "was ended by signal 9 (Killed)" */
static void describe_end(int status, char text[TEXT])
{
    if (WIFEXITED(status) && WEXITSTATUS(status) == POE_BOARD_AGAIN)
        snprintf(text, TEXT, "asks to be started again");
    else if (WIFSIGNALED(status))
        snprintf(text, TEXT, "was ended by signal %d (%s)", WTERMSIG(status), strsignal(WTERMSIG(status)));
    else
        snprintf(text, TEXT, "has ended with exit status %d and no outcome", WEXITSTATUS(status));
}

/* --- the stage process ------------------------------------------------------------------------------------------ */

/* POE_AGAIN: the run goes on. */
static poe_status start_stage(agent *a)
{
    poe_board *board = a->board;
    poe_status status = poe_relay_begin(a->relay);
    if (status != POE_OK)
        return status;
    atomic_store(&board->place.step, -1);
    atomic_store(&board->place.micro, -1);
    atomic_store(&board->place.doing, NULL);
    int valid = atomic_load(&board->valid);
    a->from = valid < 0 ? 0 : board->snapshots[valid].step;
    a->heard = a->now;
    a->beats = atomic_load(&board->beats);
    a->stay = a->done = a->killed = 0;
    poe_keeper_spawn(a->keeper);
    return POE_AGAIN;
}

/* Why it cannot be started again; NULL: it can. */
static const char *hopeless(const agent *a)
{
    if (!atomic_load(&a->board->recoverable))
        return atomic_load(&a->board->valid) < 0 ? "it has no snapshot to go on from"
                                                 : "training is over, and the rest of a run is not repeated";
    return a->deaths >= MAX_DEATHS ? "it dies again and again, and gets no further" : NULL;
}

/* The run goes on without the stage from now on, or again: what is started next computes nothing. */
static bool begin_outage(agent *a)
{
    poe_board *board = a->board;
    bool failed = a->trial > 0 && a->now - a->trial < outage_trial;
    if (!a->settings->continues || !atomic_load(&board->recoverable) || atomic_load(&board->outage) ||
        (a->deaths < MAX_DEATHS && !failed))
        return false;
    atomic_store(&board->outage, true);
    a->outage = a->now;
    a->deaths = 0;
    return true;
}

/* The stage process takes its stage up again with its next step. */
static void watch_outage(agent *a)
{
    if (!atomic_load(&a->board->outage) || a->now - a->outage < outage_pause)
        return;
    a->trial = a->now;
    atomic_store(&a->board->outage, false);
}

/* POE_AGAIN: it is to be started again. */
static poe_status mourn(agent *a, const char *where)
{
    char rest[POE_OUTAGE_TEXT];
    if (begin_outage(a)) {
        poe_outage_describe_rest(a->board->rank, rest);
        poe_warn("its stage process %s %s; the run goes on without its stage, as the model of %s (--outage continue): it dies "
                 "again and again, and tries again after %.0f s", a->why, where, rest, outage_pause);
        return POE_AGAIN;
    }
    const char *reason = hopeless(a);
    if (reason) {
        poe_error("its stage process %s %s, and is not started again: %s", a->why, where, reason);
        return POE_FAILED;
    }
    poe_warn("its stage process %s %s; starting it again", a->why, where);
    return POE_AGAIN;
}

static bool has_left(const agent *a, int wait_status)
{
    bool again = WIFEXITED(wait_status) && WEXITSTATUS(wait_status) == POE_BOARD_AGAIN;
    return again && atomic_load(&a->board->leave) && atomic_load(&a->board->recoverable);
}

static poe_status bury(agent *a, int wait_status)
{
    char where[TEXT];
    place at = place_of(a->board);
    a->running = false;
    if (atomic_load(&a->board->ended)) /* what it has asked for last is still to be done */
        return (poe_status)atomic_load(&a->board->outcome);
    poe_relay_end(a->relay);
    if (has_left(a, wait_status)) {
        a->left = true;
        return POE_AGAIN;
    }
    if (!a->killed)
        describe_end(wait_status, a->why);
    bool further = is_before(&a->furthest, &at);
    a->deaths = further ? 1 : a->deaths + 1;
    if (further)
        a->furthest = at;
    describe_place(&at, where);
    poe_status status = mourn(a, where);
    if (status != POE_AGAIN)
        return status;
    a->fell = a->furthest;
    a->died = a->catching_up ? a->died : a->now;
    a->catching_up = true;
    return start_stage(a);
}

static poe_status take_event(agent *a, const poe_keeper_event *event)
{
    char how[TEXT];
    switch (event->news) {
    case POE_KEEPER_STARTED:
        a->running = true;
        a->heard = a->started = a->now;
        return POE_AGAIN;
    case POE_KEEPER_REFUSED:
        poe_error("cannot start its stage process: %s", strerror(event->status));
        return POE_FAILED;
    case POE_KEEPER_ENDED:
        return bury(a, event->status);
    default:
        describe_end(event->status, how);
        poe_error("its keeper, process %d, %s, and its stage process with it", (int)event->pid, how);
        return POE_FAILED;
    }
}

static poe_status take_events(agent *a)
{
    poe_keeper_event event;
    poe_status status = POE_AGAIN;
    while (status == POE_AGAIN && poe_keeper_next(a->keeper, &event))
        status = take_event(a, &event);
    return status;
}

/* --- watching --------------------------------------------------------------------------------------------------- */

static void end_stage(agent *a, const char *why, double seconds)
{
    snprintf(a->why, TEXT, why, seconds);
    a->killed = a->now;
    poe_keeper_signal(a->keeper, SIGKILL);
}

/* It must be over before peers think the same of this rank, and longer than the pause between two beats. */
static double longest_silence(const agent *a)
{
    return fmax(a->deadline / 4, 3 * a->heartbeat);
}

/* Its thread may be in one account much longer than ever before, but not for ever. What is long shows in the first step;
 * a disk takes the time that it takes. */
static void watch_progress(agent *a)
{
    const poe_board_place *p = &a->board->place;
    unsigned entered = atomic_load(&p->entered);
    int64_t step = atomic_load(&p->step);
    const char *doing = atomic_load(&p->doing);
    a->first = a->first < 0 ? step : a->first;
    bool computes = doing && strcmp(doing, "checkpoint") != 0;
    if (a->stay > 0 && (entered != a->entered || !computes)) {
        a->longest = fmax(a->longest, a->now - a->stay);
        a->stay = 0;
    }
    a->entered = entered;
    if (computes && !(a->stay > 0))
        a->stay = a->now;
    double limit = fmax(stay_floor, stay_factor * a->longest);
    if (a->stay > 0 && step > a->first && a->now - a->stay > limit)
        end_stage(a, "has not come forward for %.0f s", a->now - a->stay);
}

static void watch_life(agent *a)
{
    unsigned beats = atomic_load(&a->board->beats);
    if (beats != a->beats)
        a->heard = a->now;
    a->beats = beats;
    if (a->now - a->heard > longest_silence(a))
        end_stage(a, "has given no sign of life for %.3g s", a->now - a->heard);
}

/* Peers wait for a rank whose agent speaks for it. */
static void speak(agent *a)
{
    bool silent = a->now - a->heard > 2 * a->heartbeat;
    if ((a->running && !silent) || a->now - a->beaten < a->heartbeat)
        return;
    a->beaten = a->now;
    poe_relay_beat(a->relay,
                   a->running ? "its stage process gives no sign of life" : "its stage process is being started again");
}

/* One that has come from elsewhere is there when it is at work on the step after its snapshot. */
static void expect_arrival(agent *a)
{
    a->arriving = a->catching_up = true;
    a->died = a->settings->arriving;
    a->fell = (place){.step = a->from, .micro = 0};
}

static void watch_return(agent *a)
{
    place at = place_of(a->board);
    if (!a->catching_up || is_before(&at, &a->fell))
        return;
    a->catching_up = false;
    if (a->arriving) {
        a->arriving = false;
        poe_info("here after %.3f s: its stage goes on with step %" PRId64, a->now - a->died, a->from);
        return;
    }
    if (atomic_load(&a->board->outage))
        return;
    double restored = atomic_load(&a->board->restored);
    char rest[TEXT];
    int64_t steps = a->fell.step - a->from;
    if (a->settings->skips)
        snprintf(rest, TEXT, "then on with step %" PRId64, a->fell.step);
    else
        snprintf(rest, TEXT, "then %" PRId64 " step%s and what had begun of another again", steps, steps == 1 ? "" : "s");
    poe_info("back after %.3f s: started after %.3f, at its snapshot of step %" PRId64 " after %.3f, %s", a->now - a->died,
             a->started - a->died, a->from, restored - a->died, rest);
}

/* POE_AGAIN: nothing that ends the run. */
static poe_status watch(agent *a)
{
    bool ended = atomic_load(&a->board->ended);
    if (ended && !(a->done > 0))
        a->done = a->now;
    speak(a);
    watch_return(a);
    watch_outage(a);
    if (a->killed > 0 && a->now - a->killed > kill_patience) {
        poe_error("its stage process %s, and its keeper does not end it", a->why);
        return POE_FAILED;
    }
    if (!a->running || a->killed > 0)
        return POE_AGAIN;
    if (ended && a->now - a->done > exit_patience)
        end_stage(a, "has not ended %.0f s after its outcome", a->now - a->done);
    if (ended)
        return POE_AGAIN;
    watch_life(a);
    if (!(a->killed > 0))
        watch_progress(a);
    return POE_AGAIN;
}

/* Time in which this process itself was stopped is nobody's silence. */
static void look_at_clock(agent *a)
{
    double now = poe_now(), gap = now - a->now;
    a->now = now;
    if (gap < 2 * a->heartbeat)
        return;
    a->heard += gap;
    a->stay += a->stay > 0 ? gap : 0;
}

/* --- the loop --------------------------------------------------------------------------------------------------- */

/* A lost peer is the stage process's to find out, and to give as its outcome; here only if it does not. */
static poe_status relay(agent *a)
{
    const struct timespec moment = {.tv_nsec = 10000000};
    double wait = fmin(a->catching_up ? short_tick : tick, a->heartbeat / 2);
    poe_status status = poe_relay_progress(a->relay, wait);
    look_at_clock(a);
    if (a->settings->attend)
        a->settings->attend(a->settings->context);
    if (status == POE_OK)
        return POE_AGAIN;
    nanosleep(&moment, NULL);
    if (!(a->lost > 0))
        a->lost = a->now;
    return a->now - a->lost > loss_patience ? status : POE_AGAIN;
}

/* What was sent last is still on its way when the stage process is gone. */
static void drain(agent *a)
{
    for (double until = poe_now() + a->deadline; !poe_relay_idle(a->relay) && poe_now() < until;)
        if (poe_relay_progress(a->relay, tick) != POE_OK)
            return;
}

poe_status poe_agent_run(poe_board *board, poe_keeper *keeper, poe_relay *relayed, const poe_agent_settings *settings)
{
    double deadline = settings->deadline > 0 ? settings->deadline : 120;
    agent a = {.board = board,
               .keeper = keeper,
               .relay = relayed,
               .settings = settings,
               .deadline = deadline,
               .heartbeat = deadline < 4 ? deadline / 4 : 1, /* as poe_comm_configure() chooses it */
               .now = poe_now(),
               .first = -1,
               .furthest = {.step = -1, .micro = -1}};
    a.beaten = a.now;
    poe_relay_watch(relayed, poe_keeper_fd(keeper));
    poe_status status = start_stage(&a);
    if (settings->arriving > 0)
        expect_arrival(&a);
    while (status == POE_AGAIN && !a.left) {
        status = relay(&a);
        if (status == POE_AGAIN)
            status = take_events(&a);
        if (status == POE_AGAIN)
            status = watch(&a);
    }
    poe_relay_watch(relayed, -1);
    if (status == POE_OK || status == POE_BAD_INPUT || status == POE_INTERRUPTED)
        drain(&a);
    return status;
}
