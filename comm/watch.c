/* SPDX-License-Identifier: MIT
 * Signs of life. Ranks that talk to each other exchange heartbeats, which say in words what the rank's thread does or
 * waits for; so a long wait can be explained, and one for a silent or departed rank ended. The judgement is made here,
 * in the helper thread, for the wait that the rank's thread is in. A rank hears whoever writes to it, and answers. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "comm/comm_impl.h"
#include "src/clock.h"

enum { STOP = 1, LEAVING = 2, GONE = 4 }; /* flags of a beat */

/* What a departed rank sent last may still be on its way when its farewell is here. */
static const double grace = 0.5;
/* How long a rank that is gone waits for its farewell to leave. */
static const double farewell = 0.2;

typedef struct peer {
    atomic_bool watched;
    bool expected;      /* to give signs of life, since this rank watches it */
    double heard;
    poe_presence presence;
    double presence_since;
    double beaten;      /* when the last beat was sent */
    unsigned told;      /* news that it contained */
    char text[POE_BEAT_TEXT];
    unsigned char in[POE_BEAT_BYTES], out[POE_BEAT_BYTES];
} peer;

struct poe_watch {
    poe_part part;
    peer *peers;              /* (size) */
    atomic_uint news;         /* counts what peers should hear at once */
    atomic_int presence;      /* this rank's */
    atomic_uint told;         /* news that every watched peer has been sent */
    bool listening, stop_known;
    double looked;            /* when advance() last ran */
};

static poe_operation *in_operation(poe_watch *watch, int rank)
{
    return &watch->part.operations[2 * rank];
}

static poe_operation *out_operation(poe_watch *watch, int rank)
{
    return &watch->part.operations[2 * rank + 1];
}

static void format_time(time_t wall, char text[16])
{
    struct tm tm;
    strftime(text, 16, "%H:%M:%S", localtime_r(&wall, &tm));
}

/* What the rank's thread is up to, in words. */
static void describe(poe_comm *comm, char text[POE_BEAT_TEXT])
{
    char since[16];
    pthread_mutex_lock(&comm->lock);
    if (comm->wait) {
        format_time(comm->wait->since_wall, since);
        snprintf(text, POE_BEAT_TEXT, "waiting for %s from rank %d since %s", comm->wait->text,
                 atomic_load(comm->wait->peer), since);
    } else if (!comm->doing) {
        snprintf(text, POE_BEAT_TEXT, "at work");
    } else {
        int used = snprintf(text, POE_BEAT_TEXT, "%.64s", comm->doing);
        if (comm->doing_step >= 0)
            used += snprintf(text + used, (size_t)(POE_BEAT_TEXT - used), ", step %" PRId64, comm->doing_step);
        if (comm->doing_micro >= 0)
            snprintf(text + used, (size_t)(POE_BEAT_TEXT - used), ", micro-batch %d", comm->doing_micro);
    }
    pthread_mutex_unlock(&comm->lock);
}

/* --- beats out ---------------------------------------------------------------------------------------------------- */
static void beat(poe_watch *watch, int rank, unsigned news, double now)
{
    static const uint32_t flags_of[] = {[POE_HERE] = 0, [POE_LEAVING] = LEAVING, [POE_GONE] = GONE};
    poe_comm *comm = watch->part.comm;
    peer *p = &watch->peers[rank];
    char text[POE_BEAT_TEXT];
    describe(comm, text);
    uint32_t flags = flags_of[atomic_load(&watch->presence)] | (atomic_load(&comm->stop) ? STOP : 0);
    poe_beat_encode(text, flags, p->out);
    poe_part_send(&watch->part, rank, POE_CHANNEL_BEAT, p->out, POE_BEAT_BYTES, out_operation(watch, rank));
    p->beaten = now;
    p->told = news;
}

static bool send_beats(poe_watch *watch, double now, double period)
{
    poe_comm *comm = watch->part.comm;
    unsigned news = atomic_load(&watch->news);
    bool moved = false, all_told = true;
    for (int rank = 0; rank < poe_comm_size(comm); rank++) {
        peer *p = &watch->peers[rank];
        if (!atomic_load(&p->watched) || p->presence == POE_GONE)
            continue;
        if (!p->expected) /* with whom nothing was shared until now, such as a link for the export */
            p->heard = now;
        p->expected = true;
        bool idle = out_operation(watch, rank)->done;
        if (idle && (p->told != news || now - p->beaten >= period)) {
            beat(watch, rank, news, now);
            moved = true;
        } else if (idle) {
            comm->due = fmin(comm->due, p->beaten + period);
        }
        all_told &= p->told == news && out_operation(watch, rank)->done;
    }
    if (all_told)
        atomic_store(&watch->told, news);
    return moved;
}

/* --- beats in ----------------------------------------------------------------------------------------------------- */
static void listen_to(poe_watch *watch, int rank)
{
    poe_part_receive(&watch->part, rank, POE_CHANNEL_BEAT, watch->peers[rank].in, POE_BEAT_BYTES,
                     in_operation(watch, rank));
}

static void take_beat(poe_watch *watch, int rank, double now)
{
    poe_comm *comm = watch->part.comm;
    peer *p = &watch->peers[rank];
    uint32_t flags;
    char why[POE_WHY_BYTES];
    if (!poe_beat_decode(p->in, &flags, p->text, why)) {
        poe_comm_lose(comm, "rank %d refuses a heartbeat from rank %d: %s", poe_comm_rank(comm), rank, why);
        return;
    }
    p->heard = now;
    poe_presence presence = flags & GONE ? POE_GONE : flags & LEAVING ? POE_LEAVING : POE_HERE;
    if (presence != p->presence)
        p->presence_since = now;
    p->presence = presence;
    if (flags & STOP)
        atomic_store(&comm->stop, true);
    atomic_store(&p->watched, true);
    if (presence != POE_GONE)
        listen_to(watch, rank);
}

static bool take_beats(poe_watch *watch, double now)
{
    bool moved = false;
    for (int rank = 0; rank < poe_comm_size(watch->part.comm); rank++)
        if (rank != poe_comm_rank(watch->part.comm) && watch->peers[rank].presence != POE_GONE &&
            poe_part_done(&watch->part, in_operation(watch, rank))) {
            take_beat(watch, rank, now);
            moved = true;
        }
    return moved;
}

/* --- judgement ---------------------------------------------------------------------------------------------------- */
/* What the rank's thread is in, copied, as it may leave it at any time. */
typedef struct view {
    bool waiting, line_due;
    poe_wait wait;
    int rank; /* waited for */
    poe_comm_settings settings;
} view;

static view look_at(poe_comm *comm, double now)
{
    view v = {0};
    pthread_mutex_lock(&comm->lock);
    v.settings = comm->settings;
    v.waiting = comm->wait != NULL;
    if (v.waiting) {
        v.line_due = now - comm->wait->said >= v.settings.patience;
        if (v.line_due)
            comm->wait->said = now;
        v.wait = *comm->wait;
        v.rank = atomic_load(comm->wait->peer);
    }
    pthread_mutex_unlock(&comm->lock);
    return v;
}

static void judge(poe_watch *watch, const view *v, double now)
{
    poe_comm *comm = watch->part.comm;
    const poe_wait *wait = &v->wait;
    const peer *p = &watch->peers[v->rank];
    char since[16];
    format_time(wait->since_wall, since);
    bool left = p->presence == POE_GONE || (p->presence == POE_LEAVING && !wait->end);
    if (left && now - p->presence_since > grace && now - wait->since > grace)
        poe_comm_lose(comm, "rank %d has ended %s: rank %d waits for %s since %s", v->rank,
                      p->presence == POE_GONE ? "early" : "its part of the job", poe_comm_rank(comm), wait->text,
                      since);
    else if (now - p->heard > v->settings.deadline)
        poe_comm_lose(comm, "rank %d has given no sign of life for %.3g s (--deadline %g): rank %d waits for %s since %s",
                      v->rank, now - p->heard, v->settings.deadline, poe_comm_rank(comm), wait->text, since);
    else if (v->line_due)
        poe_info("still waiting for %s from rank %d (%.0f s); rank %d is alive: %s", wait->text, v->rank,
                 now - wait->since, v->rank, p->text);
    if (p->presence != POE_HERE)
        comm->due = fmin(comm->due, now + grace / 4);
    comm->due = fmin(comm->due, wait->said + v->settings.patience);
    comm->due = fmin(comm->due, p->heard + v->settings.deadline + 1e-3);
}

static void report(poe_comm *comm)
{
    char text[POE_BEAT_TEXT];
    describe(comm, text);
    poe_info("%s", text);
}

/* Time in which this process itself was stopped is nobody else's silence. */
static void forgive(poe_watch *watch, double now, double period)
{
    double gap = now - watch->looked;
    watch->looked = now;
    if (gap < 2 * period)
        return;
    for (int rank = 0; rank < poe_comm_size(watch->part.comm); rank++)
        watch->peers[rank].heard += gap;
}

static bool advance(poe_part *part)
{
    poe_watch *watch = (poe_watch *)part;
    poe_comm *comm = part->comm;
    double now = poe_now();
    view v = look_at(comm, now);
    forgive(watch, now, v.settings.heartbeat);
    comm->due = now + v.settings.heartbeat;
    for (int r = 0; r < poe_comm_size(comm) && !watch->listening; r++)
        if (r != poe_comm_rank(comm))
            listen_to(watch, r);
    watch->listening = true;
    bool moved = take_beats(watch, now);
    if (atomic_load(&comm->stop) && !watch->stop_known) {
        watch->stop_known = true;
        atomic_fetch_add(&watch->news, 1);
    }
    moved |= send_beats(watch, now, v.settings.heartbeat);
    if (atomic_exchange(&comm->report, false))
        report(comm);
    if (v.waiting && !poe_comm_lost(comm))
        judge(watch, &v, now);
    return moved;
}

void poe_watch_heard(poe_comm *comm, int rank, double now)
{
    comm->watch->peers[rank].heard = now;
}

/* --- the rank's thread -------------------------------------------------------------------------------------------- */
void poe_watch_add(poe_comm *comm, int rank)
{
    atomic_store(&comm->watch->peers[rank].watched, true);
    poe_comm_wake(comm);
}

void poe_watch_leave(poe_comm *comm, poe_presence presence)
{
    poe_watch *watch = comm->watch;
    atomic_store(&watch->presence, presence);
    unsigned news = atomic_fetch_add(&watch->news, 1) + 1;
    poe_comm_wake(comm);
    if (presence != POE_GONE)
        return;
    const struct timespec moment = {.tv_nsec = 1000000};
    for (double until = poe_now() + farewell; poe_now() < until && atomic_load(&watch->told) != news;)
        nanosleep(&moment, NULL);
}

poe_status poe_watch_create(poe_comm *comm)
{
    int rank = poe_comm_rank(comm), size = poe_comm_size(comm);
    poe_watch *watch = calloc(1, sizeof(*watch));
    peer *peers = calloc((size_t)size, sizeof(*peers));
    poe_operation *operations = calloc(2 * (size_t)size, sizeof(*operations));
    if (!watch || !peers || !operations) {
        poe_error("out of memory for the connection to the other ranks");
        free(operations);
        free(peers);
        free(watch);
        return POE_FAILED;
    }
    watch->peers = peers;
    watch->looked = poe_now();
    for (int r = 0; r < size; r++) {
        peers[r].heard = watch->looked;
        strcpy(peers[r].text, "nothing heard yet");
    }
    if (rank > 0)
        peers[rank - 1].watched = true;
    if (rank + 1 < size)
        peers[rank + 1].watched = true;
    watch->part = (poe_part){.comm = comm, .advance = advance, .operations = operations, .n_operations = 2 * size};
    comm->watch = watch;
    poe_part_attach(&watch->part);
    return POE_OK;
}

void poe_watch_destroy(poe_comm *comm)
{
    poe_watch *watch = comm->watch;
    if (!watch || !poe_part_detach(&watch->part))
        return;
    comm->watch = NULL;
    free(watch->part.operations);
    free(watch->peers);
    free(watch);
}
