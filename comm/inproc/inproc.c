/* SPDX-License-Identifier: MIT
 * Ranks as threads. A send leaves a note in the receiver's mailbox; the receiver finds the receive it belongs to,
 * copies, and leaves word in the sender's mailbox that it is done. Nothing is buffered in between. */
#include "comm/inproc/inproc.h"

#include <math.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "comm/alarm.h"
#include "src/clock.h"
#include "src/log.h"

/* A send that has not been taken, or a receive that has got nothing: `peer` is the other side. */
typedef struct note {
    poe_operation *op;
    void *data;
    size_t bytes;
    int peer, channel;
} note;

typedef struct notes {
    note *items;
    int n, capacity;
} notes;

typedef struct mailbox {
    pthread_mutex_t lock; /* guards the arrays */
    notes sends;          /* of others to this rank, in order */
    notes sent;           /* this rank's own, that have been taken */
    poe_alarm alarm;
} mailbox;

typedef struct world {
    atomic_int users;
    int size;
    char host[256];
    mailbox mailboxes[];
} world;

typedef struct inproc {
    poe_transport base;
    world *world;
    notes receives; /* this rank's, in order */
    int watched;    /* somebody else's file descriptor; -1: none */
} inproc;

static mailbox *mailbox_of(poe_transport *transport, int rank)
{
    return &((inproc *)transport)->world->mailboxes[rank];
}

static bool append(notes *list, note item)
{
    if (list->n == list->capacity) {
        int capacity = list->capacity ? 2 * list->capacity : 64;
        note *items = realloc(list->items, (size_t)capacity * sizeof(*items));
        if (!items)
            return false;
        list->items = items;
        list->capacity = capacity;
    }
    list->items[list->n++] = item;
    return true;
}

static note take(notes *list, int i)
{
    note item = list->items[i];
    list->n--;
    memmove(list->items + i, list->items + i + 1, (size_t)(list->n - i) * sizeof(item));
    return item;
}

static void finish(poe_operation *op, poe_status status)
{
    op->status = status;
    op->done = true;
}

static void fail_for_memory(poe_operation *op)
{
    poe_error("out of memory for a message between ranks");
    finish(op, POE_FAILED);
}

static void inproc_send(poe_transport *transport, int peer, int channel, const void *data, size_t bytes,
                        poe_operation *op)
{
    mailbox *to = mailbox_of(transport, peer);
    op->backend[0] = to;
    /* The receiver only reads. */
    note item = {.op = op, .data = (void *)(uintptr_t)data, .bytes = bytes, .peer = transport->rank,
                 .channel = channel};
    pthread_mutex_lock(&to->lock);
    bool noted = append(&to->sends, item);
    pthread_mutex_unlock(&to->lock);
    if (noted)
        poe_alarm_ring(&to->alarm);
    else
        fail_for_memory(op);
}

static void inproc_receive(poe_transport *transport, int peer, int channel, void *data, size_t bytes,
                           poe_operation *op)
{
    note item = {.op = op, .data = data, .bytes = bytes, .peer = peer, .channel = channel};
    if (!append(&((inproc *)transport)->receives, item))
        fail_for_memory(op);
}

/* The first receive that has a send, and that send, both taken off their lists. */
static bool match(notes *receives, notes *sends, note *receive, note *send)
{
    for (int i = 0; i < sends->n; i++)
        for (int j = 0; j < receives->n; j++)
            if (receives->items[j].peer == sends->items[i].peer &&
                receives->items[j].channel == sends->items[i].channel) {
                *send = take(sends, i);
                *receive = take(receives, j);
                return true;
            }
    return false;
}

static void deliver(poe_transport *transport, note receive, note send)
{
    poe_status status = POE_OK;
    if (receive.bytes == send.bytes) {
        memcpy(receive.data, send.data, send.bytes);
    } else {
        poe_error("rank %d expects a message of %zu bytes from rank %d on channel %d, but got one of %zu bytes",
                  transport->rank, receive.bytes, receive.peer, receive.channel, send.bytes);
        status = POE_PEER_LOST;
    }
    finish(receive.op, status);
    mailbox *from = mailbox_of(transport, send.peer);
    pthread_mutex_lock(&from->lock);
    append(&from->sent, send);
    pthread_mutex_unlock(&from->lock);
    poe_alarm_ring(&from->alarm);
}

static bool step(poe_transport *transport)
{
    mailbox *own = mailbox_of(transport, transport->rank);
    note receive, send;
    pthread_mutex_lock(&own->lock);
    bool any = own->sent.n > 0;
    for (int i = 0; i < own->sent.n; i++)
        finish(own->sent.items[i].op, POE_OK);
    own->sent.n = 0;
    bool matched = match(&((inproc *)transport)->receives, &own->sends, &receive, &send);
    pthread_mutex_unlock(&own->lock);
    if (matched)
        deliver(transport, receive, send);
    return any || matched;
}

/* An alarm cannot wait for a file descriptor: one that is watched is looked at from time to time. */
static void sleep_for(poe_transport *transport, double wait)
{
    const double glance = 1e-3;
    poe_alarm *alarm = &mailbox_of(transport, transport->rank)->alarm;
    struct pollfd watched = {.fd = ((inproc *)transport)->watched, .events = POLLIN};
    double until = poe_now() + wait;
    for (double left = wait; left > 0; left = until - poe_now()) {
        if (watched.fd >= 0 && poll(&watched, 1, 0) > 0)
            return;
        if (poe_alarm_sleep(alarm, watched.fd >= 0 ? fmin(left, glance) : left))
            return;
    }
}

static bool inproc_progress(poe_transport *transport, double wait)
{
    if (step(transport))
        return true;
    if (!(wait > 0))
        return false;
    sleep_for(transport, wait);
    return step(transport);
}

static void inproc_wake(poe_transport *transport)
{
    poe_alarm_ring(&mailbox_of(transport, transport->rank)->alarm);
}

static void inproc_watch(poe_transport *transport, int fd)
{
    ((inproc *)transport)->watched = fd;
}

static bool withdraw(notes *list, const poe_operation *op)
{
    for (int i = 0; i < list->n; i++)
        if (list->items[i].op == op) {
            take(list, i);
            return true;
        }
    return false;
}

/* A send that is no longer in the mailbox is being copied right now: it will be done in a moment. */
static void inproc_cancel(poe_transport *transport, poe_operation *op)
{
    mailbox *to = op->backend[0];
    bool withdrawn;
    if (to) {
        pthread_mutex_lock(&to->lock);
        withdrawn = withdraw(&to->sends, op);
        pthread_mutex_unlock(&to->lock);
    } else {
        withdrawn = withdraw(&((inproc *)transport)->receives, op);
    }
    if (withdrawn)
        finish(op, POE_PEER_LOST);
    while (!op->done)
        inproc_progress(transport, 0.01);
}

static void free_world(world *w)
{
    for (int rank = 0; rank < w->size; rank++) {
        mailbox *box = &w->mailboxes[rank];
        free(box->sends.items);
        free(box->sent.items);
        pthread_mutex_destroy(&box->lock);
    }
    free(w);
}

static void inproc_destroy(poe_transport *transport)
{
    inproc *t = (inproc *)transport;
    if (atomic_fetch_sub(&t->world->users, 1) == 1)
        free_world(t->world);
    free(t->receives.items);
    free(t);
}

static const poe_transport_ops inproc_ops = {
    .name = "inproc",
    .send = inproc_send,
    .receive = inproc_receive,
    .progress = inproc_progress,
    .wake = inproc_wake,
    .cancel = inproc_cancel,
    .destroy = inproc_destroy,
    .watch = inproc_watch,
};

static world *create_world(int size)
{
    world *w = calloc(1, sizeof(*w) + (size_t)size * sizeof(w->mailboxes[0]));
    if (!w)
        return NULL;
    w->size = size;
    gethostname(w->host, sizeof(w->host) - 1);
    for (int rank = 0; rank < size; rank++)
        pthread_mutex_init(&w->mailboxes[rank].lock, NULL);
    return w;
}

poe_status poe_inproc_create(int size, poe_transport **transports)
{
    world *w = create_world(size);
    int made = 0;
    for (; w && made < size; made++) {
        inproc *t = calloc(1, sizeof(*t));
        if (!t)
            break;
        t->base = (poe_transport){
            .ops = &inproc_ops, .rank = made, .size = size, .host_ranks = size, .host = w->host};
        t->world = w;
        t->watched = -1;
        atomic_fetch_add(&w->users, 1);
        transports[made] = &t->base;
    }
    if (made == size)
        return POE_OK;
    poe_error("out of memory for %d ranks in one process", size);
    for (int rank = 0; rank < made; rank++)
        free(transports[rank]);
    if (w)
        free_world(w);
    return POE_FAILED;
}
