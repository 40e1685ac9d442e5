/* SPDX-License-Identifier: MIT
 * The transport's table: sleeping until something happens, and the end. */
#include "comm/fabric/fabric.h"

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "comm/fabric/impl.h"
#include "src/clock.h"
#include "src/log.h"

enum { BATCH = 16, STEPS_PER_LOOK = 16 };

/* How long a rank that leaves waits for the others to have got its last messages. */
static const double farewell = 0.5;

/* --- one step ----------------------------------------------------------------------------------------------------- */
static void end_token(token *t, size_t bytes, bool failed)
{
    line *l = t->line;
    if (!l->closed && failed)
        l->peer->broken |= l->peer->state == JOINED; /* otherwise an event will tell why */
    else if (!l->closed)
        poe_stream_completed(t, bytes);
    poe_line_return(t);
}

/* The failure of a short send is known by that of the connection. */
static void take_error(fabric *f)
{
    struct fi_cq_err_entry entry = {0};
    if (fi_cq_readerr(f->cq, &entry, 0) == 1 && entry.op_context)
        end_token(entry.op_context, 0, true);
}

/* One batch: its operations' successors are to be posted before more is read. */
static void take_completions(fabric *f)
{
    struct fi_cq_msg_entry entries[BATCH];
    ssize_t n = fi_cq_read(f->cq, entries, BATCH);
    f->quiet = n == -FI_EAGAIN;
    if (n == -FI_EAVAIL)
        take_error(f);
    for (ssize_t i = 0; i < n; i++)
        end_token(entries[i].op_context, entries[i].len, false);
}

static void free_closed(fabric *f)
{
    for (line **at = &f->closed; *at;) {
        line *l = *at;
        if (l->tokens) {
            at = &l->next;
            continue;
        }
        *at = l->next;
        free(l);
    }
}

/* `waits`: nothing else is to be done, so that the provider need not be asked again before it has something. */
static void step(fabric *f, bool waits)
{
    poe_line_listen(f);
    for (int rank = 0; rank < f->base.size; rank++)
        if (f->peers[rank]) {
            poe_stream_settle(f->peers[rank]);
            poe_stream_pump(f->peers[rank]);
        }
    if (!waits || !f->quiet)
        take_completions(f);
    if (f->look || f->steps++ % STEPS_PER_LOOK == 0)
        poe_line_events(f);
    f->look = false;
    poe_line_timers(f, poe_now());
    for (int rank = 0; rank < f->base.size; rank++)
        if (f->peers[rank])
            poe_stream_pump(f->peers[rank]);
    if (f->closed)
        free_closed(f);
}

/* Returns true when it was woken, or what is watched may be read. */
static bool sleep_until(fabric *f, double until)
{
    struct fid *fids[] = {&f->cq->fid, &f->eq->fid};
    struct pollfd fds[] = {{.fd = f->cq_fd, .events = POLLIN}, {.fd = f->eq_fd, .events = POLLIN},
                           {.fd = f->wake_fd, .events = POLLIN}, {.fd = f->watched, .events = POLLIN}};
    uint64_t rings;
    double left = until - poe_now();
    if (left <= 0 || !f->quiet)
        return false;
    if (fi_trywait(f->fid, fids, 2) != 0) {
        f->quiet = false;
        return false;
    }
    struct timespec t = {.tv_sec = (time_t)left, .tv_nsec = (long)((left - (double)(time_t)left) * 1e9)};
    if (ppoll(fds, 4, &t, NULL) < 0)
        return false;
    f->quiet = fds[0].revents == 0;
    f->look = fds[1].revents != 0;
    bool woken = fds[3].revents != 0;
    if (fds[2].revents && read(f->wake_fd, &rings, sizeof(rings)) > 0)
        woken |= atomic_exchange(&f->rung, false);
    return woken;
}

/* --- the table ---------------------------------------------------------------------------------------------------- */
static bool fabric_progress(poe_transport *transport, double wait)
{
    fabric *f = (fabric *)transport;
    double until = poe_now() + wait;
    bool woken = false;
    for (;;) {
        step(f, wait > 0);
        if (f->completed || woken || poe_now() >= until)
            break;
        woken = sleep_until(f, fmin(until, f->due));
    }
    bool any = f->completed > 0;
    f->completed = 0;
    return any;
}

static void fabric_wake(poe_transport *transport)
{
    fabric *f = (fabric *)transport;
    const uint64_t ring = 1;
    if (!atomic_exchange(&f->rung, true) && write(f->wake_fd, &ring, sizeof(ring)) < 0)
        atomic_store(&f->rung, false);
}

static peer *peer_for(fabric *f, int rank, poe_operation *op)
{
    peer *p = poe_peer_of(f, rank);
    if (p && !p->failed)
        return p;
    op->status = p ? POE_PEER_LOST : POE_FAILED;
    op->done = true;
    f->completed++;
    return NULL;
}

static void fabric_send(poe_transport *transport, int rank, int number, const void *data, size_t bytes,
                        poe_operation *op)
{
    peer *p = peer_for((fabric *)transport, rank, op);
    if (p)
        poe_stream_send(p, number, data, bytes, op);
}

static void fabric_receive(poe_transport *transport, int rank, int number, void *data, size_t bytes,
                           poe_operation *op)
{
    peer *p = peer_for((fabric *)transport, rank, op);
    if (p)
        poe_stream_receive(p, number, data, bytes, op);
}

static void fabric_cancel(poe_transport *transport, poe_operation *op)
{
    (void)transport;
    poe_stream_cancel(op->backend[0], op);
}

static void fabric_cut(poe_transport *transport, int rank)
{
    peer *p = ((fabric *)transport)->peers[rank];
    if (p && p->line)
        poe_line_drop(p);
}

static void fabric_watch(poe_transport *transport, int fd)
{
    ((fabric *)transport)->watched = fd;
}

static bool may_leave(const peer *p)
{
    bool never_met = p->state != JOINED && p->apart_since == 0;
    return p->failed || (p->ended && !p->bye_answer) || ((p->bye || never_met) && poe_stream_is_idle(p));
}

static void say_goodbye(fabric *f)
{
    bool all = false;
    f->leaving = true;
    for (double until = poe_now() + farewell; !all && poe_now() < until;) {
        all = true;
        for (int rank = 0; rank < f->base.size; rank++) {
            peer *p = f->peers[rank];
            if (!p)
                continue;
            p->bye |= p->state == JOINED;
            all &= may_leave(p);
        }
        step(f, true);
        if (!all)
            sleep_until(f, fmin(until, f->due));
    }
}

static void fabric_destroy(poe_transport *transport)
{
    fabric *f = (fabric *)transport;
    f->watched = -1;
    say_goodbye(f);
    for (int rank = 0; rank < f->base.size; rank++)
        if (f->peers[rank]) {
            f->peers[rank]->failed = true;
            poe_line_drop(f->peers[rank]);
            poe_stream_fail(f->peers[rank]);
        }
    do /* the provider returns what it had */
        take_completions(f);
    while (!f->quiet);
    free_closed(f);
    poe_line_listen(NULL);
    poe_fabric_close(f);
}

static const poe_transport_ops fabric_ops = {
    .name = "fabric",
    .send = fabric_send,
    .receive = fabric_receive,
    .progress = fabric_progress,
    .wake = fabric_wake,
    .cancel = fabric_cancel,
    .destroy = fabric_destroy,
    .cut = fabric_cut,
    .watch = fabric_watch,
};

/* --- starting ----------------------------------------------------------------------------------------------------- */
poe_status poe_fabric_join(fabric *f, int rank, int size, const fabric_name *names, const unsigned char *secret)
{
    free(f->names);
    free(f->peers);
    free(f->dump);
    f->names = calloc((size_t)size, sizeof(*names));
    f->peers = calloc((size_t)size, sizeof(*f->peers));
    f->dump = malloc(UNIT_BYTES);
    if (!f->names || !f->peers || !f->dump) {
        poe_error("out of memory for the connections to %d ranks", size);
        return POE_FAILED;
    }
    memcpy(f->names, names, (size_t)size * sizeof(*names));
    memcpy(f->secret, secret, sizeof(f->secret));
    gethostname(f->host, sizeof(f->host) - 1);
    f->watched = -1;
    f->base = (poe_transport){.ops = &fabric_ops, .rank = rank, .size = size, .host_ranks = 1, .host = f->host};
    return POE_OK;
}
