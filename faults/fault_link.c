/* SPDX-License-Identifier: MIT
 * The decorator. What is held back stays in its sender's memory, which a transport may ask for, so nothing is copied
 * but the message that is damaged. */
#include "faults/fault_link.h"

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "src/clock.h"
#include "src/log.h"

/* A send that waits has its place in its own operation's `backend`, which is nobody else's yet. */
enum { NEXT, DATA, BYTES, CHANNEL };

typedef struct lane {
    double blocked;              /* until then, by the monotonic clock; 0: it is not */
    bool corrupt;                /* the next message */
    poe_operation *first, *last; /* held back */
} lane;

/* A damaged copy under way. */
typedef struct damaged {
    struct damaged *next;
    poe_operation sending; /* below */
    poe_operation *op;     /* the sender's */
    unsigned char data[];
} damaged;

typedef struct fault_link {
    poe_transport base;
    poe_transport_ops ops;
    poe_transport *below;
    damaged *copies;
    bool completed; /* an operation ended outside progress() */
    lane lanes[];   /* (size), by peer */
} fault_link;

static fault_link *link_of(poe_transport *transport)
{
    return (fault_link *)transport;
}

static void finish(fault_link *l, poe_operation *op, poe_status status)
{
    op->status = status;
    op->done = true;
    l->completed = true;
}

/* --- sending ------------------------------------------------------------------------------------------------------ */
static void send_damaged(fault_link *l, int peer, int channel, const void *data, size_t bytes, poe_operation *op)
{
    damaged *d = malloc(sizeof(*d) + bytes);
    if (!d) {
        poe_error("out of memory for a damaged message of %zu bytes", bytes);
        finish(l, op, POE_FAILED);
        return;
    }
    *d = (damaged){.next = l->copies, .op = op};
    memcpy(d->data, data, bytes);
    d->data[bytes / 2] ^= 0x10;
    l->copies = d;
    l->below->ops->send(l->below, peer, channel, d->data, bytes, &d->sending);
}

static void hand_over(fault_link *l, int peer, int channel, const void *data, size_t bytes, poe_operation *op)
{
    lane *to = &l->lanes[peer];
    if (to->corrupt && channel < POE_CHANNEL_CREDIT && bytes > 0) {
        to->corrupt = false;
        send_damaged(l, peer, channel, data, bytes, op);
        return;
    }
    l->below->ops->send(l->below, peer, channel, data, bytes, op);
}

static void hold_back(lane *to, int channel, const void *data, size_t bytes, poe_operation *op)
{
    op->backend[NEXT] = NULL;
    op->backend[DATA] = (void *)data;
    op->backend[BYTES] = (void *)bytes;
    op->backend[CHANNEL] = (void *)(intptr_t)channel;
    if (to->first)
        to->last->backend[NEXT] = op;
    else
        to->first = op;
    to->last = op;
}

static void link_send(poe_transport *transport, int peer, int channel, const void *data, size_t bytes,
                      poe_operation *op)
{
    fault_link *l = link_of(transport);
    if (l->lanes[peer].blocked > 0)
        hold_back(&l->lanes[peer], channel, data, bytes, op);
    else
        hand_over(l, peer, channel, data, bytes, op);
}

static void link_receive(poe_transport *transport, int peer, int channel, void *data, size_t bytes, poe_operation *op)
{
    poe_transport *below = link_of(transport)->below;
    below->ops->receive(below, peer, channel, data, bytes, op);
}

/* --- progress ----------------------------------------------------------------------------------------------------- */
static void let_go(fault_link *l, int peer)
{
    lane *to = &l->lanes[peer];
    poe_operation *op = to->first;
    to->blocked = 0;
    to->first = to->last = NULL;
    for (poe_operation *next; op; op = next) {
        const void *data = op->backend[DATA];
        size_t bytes = (size_t)op->backend[BYTES];
        int channel = (int)(intptr_t)op->backend[CHANNEL];
        next = op->backend[NEXT];
        memset(op->backend, 0, sizeof(op->backend));
        hand_over(l, peer, channel, data, bytes, op);
    }
}

static bool collect_copies(fault_link *l)
{
    bool any = false;
    for (damaged **at = &l->copies, *d; (d = *at);) {
        if (!d->sending.done) {
            at = &d->next;
            continue;
        }
        finish(l, d->op, d->sending.status);
        *at = d->next;
        free(d);
        any = true;
    }
    return any;
}

/* Seconds until a peer can be reached again. */
static double act(fault_link *l)
{
    double now = poe_now(), left = INFINITY;
    for (int peer = 0; peer < l->base.size; peer++) {
        double blocked = l->lanes[peer].blocked;
        if (blocked > now)
            left = fmin(left, blocked - now);
        else if (blocked > 0)
            let_go(l, peer);
    }
    collect_copies(l);
    return left;
}

static bool link_progress(poe_transport *transport, double wait)
{
    fault_link *l = link_of(transport);
    wait = fmin(wait, act(l));
    bool any = l->below->ops->progress(l->below, l->completed ? 0 : wait);
    any |= collect_copies(l) | l->completed;
    l->completed = false;
    return any;
}

static void link_wake(poe_transport *transport)
{
    poe_transport *below = link_of(transport)->below;
    below->ops->wake(below);
}

/* --- ends --------------------------------------------------------------------------------------------------------- */
/* True when the operation was held back, and is no more. */
static bool take_back(lane *to, const poe_operation *op)
{
    poe_operation *before = NULL;
    for (poe_operation *at = to->first; at; before = at, at = at->backend[NEXT]) {
        if (at != op)
            continue;
        if (before)
            before->backend[NEXT] = at->backend[NEXT];
        else
            to->first = at->backend[NEXT];
        if (to->last == at)
            to->last = before;
        return true;
    }
    return false;
}

static void link_cancel(poe_transport *transport, poe_operation *op)
{
    fault_link *l = link_of(transport);
    for (int peer = 0; peer < l->base.size; peer++)
        if (take_back(&l->lanes[peer], op)) {
            finish(l, op, POE_PEER_LOST);
            return;
        }
    for (damaged *d = l->copies; d; d = d->next)
        if (d->op == op) {
            l->below->ops->cancel(l->below, &d->sending);
            collect_copies(l);
            return;
        }
    l->below->ops->cancel(l->below, op);
}

/* Copies that the transport does not give back are still its own, and never freed. */
static void end_copies(fault_link *l)
{
    collect_copies(l);
    for (damaged *d = l->copies; d; d = d->next)
        l->below->ops->cancel(l->below, &d->sending);
    collect_copies(l);
}

static void link_destroy(poe_transport *transport)
{
    fault_link *l = link_of(transport);
    for (int peer = 0; peer < l->base.size; peer++)
        for (poe_operation *op; (op = l->lanes[peer].first);) {
            take_back(&l->lanes[peer], op);
            finish(l, op, POE_PEER_LOST);
        }
    end_copies(l);
    l->below->ops->destroy(l->below);
    free(l);
}

static void link_cut(poe_transport *transport, int peer)
{
    poe_transport *below = link_of(transport)->below;
    below->ops->cut(below, peer);
}

static void link_watch(poe_transport *transport, int fd)
{
    poe_transport *below = link_of(transport)->below;
    below->ops->watch(below, fd);
}

static bool link_settled(const poe_transport *transport)
{
    const fault_link *l = (const fault_link *)transport;
    for (int peer = 0; peer < l->base.size; peer++)
        if (l->lanes[peer].first)
            return false;
    return !l->copies && l->below->ops->settled(l->below);
}

/* --- from outside ------------------------------------------------------------------------------------------------- */
poe_status poe_fault_link_wrap(poe_transport **transport)
{
    poe_transport *below = *transport;
    fault_link *l = calloc(1, sizeof(*l) + (size_t)below->size * sizeof(l->lanes[0]));
    if (!l) {
        poe_error("out of memory for the faults of %d links", below->size);
        return POE_FAILED;
    }
    l->base = *below;
    l->below = below;
    l->ops = (poe_transport_ops){.name = below->ops->name,
                                 .send = link_send,
                                 .receive = link_receive,
                                 .progress = link_progress,
                                 .wake = link_wake,
                                 .cancel = link_cancel,
                                 .destroy = link_destroy,
                                 .cut = below->ops->cut ? link_cut : NULL,
                                 .watch = below->ops->watch ? link_watch : NULL,
                                 .settled = below->ops->settled ? link_settled : NULL};
    l->base.ops = &l->ops;
    *transport = &l->base;
    return POE_OK;
}

void poe_fault_link_corrupt(poe_transport *link, int peer)
{
    link_of(link)->lanes[peer].corrupt = true;
}

void poe_fault_link_block(poe_transport *link, const bool *peers, double seconds)
{
    fault_link *l = link_of(link);
    double until = poe_now() + seconds;
    for (int peer = 0; peer < l->base.size; peer++)
        if (peers[peer])
            l->lanes[peer].blocked = fmax(l->lanes[peer].blocked, until);
}
