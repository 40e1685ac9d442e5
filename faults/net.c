/* SPDX-License-Identifier: MIT
 * The decorator. A message is copied, as a socket would, and its copy given to the transport below when it is due; so
 * what travels is real, and only its beginning is late. Each rank holds back what it sends; receives pass through. */
#include "faults/net.h"

#include <assert.h>
#include <inttypes.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "faults/net_model.h"
#include "src/clock.h"
#include "src/log.h"

/* Seconds that destroy() goes on delivering, and that it waits for a last sign of life to be heard. */
static const double longest_flush = 30, farewell = 0.2;

enum { SMALLEST = 256, CLASSES = 48 };

/* A message on its way. */
typedef struct held {
    struct held *next;
    poe_operation *op;     /* the sender's, until accepted; NULL afterwards */
    poe_operation sending; /* below */
    double accepted, due;
    int peer, channel, size_class;
    size_t bytes;
    _Alignas(64) unsigned char data[];
} held;

typedef struct lane {
    poe_net_link link;
    bool real, cut;
    double rtt;
    poe_net_state state;
    uint64_t sent;                   /* frames and payloads */
    uint64_t numbers[POE_CHANNELS];  /* messages on each */
    held *first, *last;              /* not yet given below, in order of `due` */
    held *refused;                   /* the first of them that is not accepted */
    poe_status status;               /* of sends from now on: the transport below failed, and has said why */
} lane;

typedef struct emulator {
    poe_transport base;
    poe_transport_ops ops;
    poe_transport *below;
    uint64_t seed;
    double start;
    lane *lanes;           /* (size), by peer */
    held *flying;          /* given below, not yet taken */
    held *spare[CLASSES];  /* by size */
    bool completed;        /* an operation ended outside progress() */
    char *description;
} emulator;

static emulator *emulator_of(poe_transport *transport)
{
    return (emulator *)transport;
}

static double clock_of(const emulator *e)
{
    return poe_now() - e->start;
}

static void finish(emulator *e, poe_operation *op, poe_status status)
{
    op->status = status;
    op->done = true;
    e->completed = true;
}

/* --- copies ------------------------------------------------------------------------------------------------------- */
static held *take_copy(emulator *e, const void *data, size_t bytes)
{
    int class = 0;
    while (((size_t)SMALLEST << class) < bytes)
        class++;
    held *h = e->spare[class];
    if (h) {
        e->spare[class] = h->next;
    } else {
        size_t whole = (offsetof(held, data) + ((size_t)SMALLEST << class) + 63) / 64 * 64;
        h = aligned_alloc(64, whole);
        if (!h)
            return NULL;
    }
    *h = (held){.size_class = class, .bytes = bytes};
    if (bytes)
        memcpy(h->data, data, bytes);
    return h;
}

static void give_back(emulator *e, held *h)
{
    h->next = e->spare[h->size_class];
    e->spare[h->size_class] = h;
}

static void free_list(held *list)
{
    for (held *next; list; list = next) {
        next = list->next;
        free(list);
    }
}

/* --- sending ------------------------------------------------------------------------------------------------------ */
/* Random numbers of one message, whatever else is sent and when. */
static poe_rng dice_of(const emulator *e, int peer, int channel, uint64_t number)
{
    poe_rng rng;
    char stream[64];
    snprintf(stream, sizeof(stream), "net %d>%d channel %d message %" PRIu64, e->base.rank, peer, channel, number);
    poe_rng_init(&rng, e->seed, stream);
    return rng;
}

static void damage(const lane *l, poe_rng *rng, held *h)
{
    bool chosen = h->channel < POE_CHANNEL_CREDIT && l->sent == l->link.corrupt_message;
    chosen |= poe_rng_uniform(rng) < l->link.corrupt;
    if (chosen && h->bytes)
        h->data[poe_rng_next(rng) % h->bytes] ^= (unsigned char)(1 + poe_rng_next(rng) % 255);
}

static void append(lane *l, held *h)
{
    if (l->first)
        l->last->next = h;
    else
        l->first = h;
    l->last = h;
}

static void net_send(poe_transport *transport, int peer, int channel, const void *data, size_t bytes,
                     poe_operation *op)
{
    emulator *e = emulator_of(transport);
    lane *l = &e->lanes[peer];
    if (l->real) {
        e->below->ops->send(e->below, peer, channel, data, bytes, op);
        return;
    }
    held *h = l->status == POE_OK ? take_copy(e, data, bytes) : NULL;
    if (!h) {
        if (l->status == POE_OK)
            poe_error("out of memory for a message of %zu bytes on the emulated network", bytes);
        finish(e, op, l->status == POE_OK ? POE_FAILED : l->status);
        return;
    }
    double now = clock_of(e);
    h->peer = peer;
    h->channel = channel;
    l->sent += channel < POE_CHANNEL_CREDIT;
    poe_rng rng = dice_of(e, peer, channel, l->numbers[channel]++);
    poe_net_times times = poe_net_next(&l->link, l->rtt, &l->state, &rng, now, bytes);
    h->accepted = times.accepted;
    h->due = times.due;
    if (l->link.corrupt > 0 || l->link.corrupt_message)
        damage(l, &rng, h);
    append(l, h);
    if (h->accepted <= now) {
        finish(e, op, POE_OK);
        return;
    }
    h->op = op;
    if (!l->refused)
        l->refused = h;
}

static void net_receive(poe_transport *transport, int peer, int channel, void *data, size_t bytes, poe_operation *op)
{
    poe_transport *below = emulator_of(transport)->below;
    below->ops->receive(below, peer, channel, data, bytes, op);
}

/* --- progress ----------------------------------------------------------------------------------------------------- */
static void accept_sends(emulator *e, lane *l, double now)
{
    while (l->refused && l->refused->accepted <= now) {
        held *h = l->refused;
        if (h->op)
            finish(e, h->op, POE_OK);
        h->op = NULL;
        l->refused = h->next;
    }
}

static bool deliver(emulator *e, int peer, double now)
{
    lane *l = &e->lanes[peer];
    bool any = false;
    for (held *h; (h = l->first) && h->due <= now; any = true) {
        l->first = h->next;
        h->next = e->flying;
        e->flying = h;
        e->below->ops->send(e->below, peer, h->channel, h->data, h->bytes, &h->sending);
    }
    return any;
}

/* A send that failed after its sender was told that it is done fails those that come later. */
static bool collect_taken(emulator *e)
{
    bool any = false;
    for (held **at = &e->flying, *h; (h = *at);) {
        if (!h->sending.done) {
            at = &h->next;
            continue;
        }
        if (h->sending.status != POE_OK)
            e->lanes[h->peer].status = h->sending.status;
        *at = h->next;
        give_back(e, h);
        any = true;
    }
    return any;
}

static bool act(emulator *e)
{
    double now = clock_of(e);
    bool any = false;
    for (int peer = 0; peer < e->base.size; peer++) {
        lane *l = &e->lanes[peer];
        if (l->real)
            continue;
        if (l->link.cut > 0 && !l->cut && l->link.cut <= now) {
            l->cut = true;
            e->below->ops->cut(e->below, peer);
        }
        accept_sends(e, l, now);
        any |= deliver(e, peer, now);
    }
    return any | collect_taken(e);
}

/* When something is to be done next. */
static double next_event(const emulator *e)
{
    double next = INFINITY;
    for (int peer = 0; peer < e->base.size; peer++) {
        const lane *l = &e->lanes[peer];
        if (l->real)
            continue;
        if (l->first)
            next = fmin(next, l->first->due);
        if (l->refused)
            next = fmin(next, l->refused->accepted);
        if (l->link.cut > 0 && !l->cut)
            next = fmin(next, l->link.cut);
    }
    return next;
}

static bool net_progress(poe_transport *transport, double wait)
{
    emulator *e = emulator_of(transport);
    bool any = act(e);
    any |= e->completed;
    if (!any)
        wait = fmin(wait, next_event(e) - clock_of(e));
    any |= e->below->ops->progress(e->below, !any && wait > 0 ? wait : 0);
    any |= act(e);
    any |= e->completed;
    e->completed = false;
    return any;
}

static void net_wake(poe_transport *transport)
{
    poe_transport *below = emulator_of(transport)->below;
    below->ops->wake(below);
}

/* The message itself goes on: its bytes are in the emulated buffer. */
static bool forget_sender(lane *l, const poe_operation *op)
{
    for (held *h = l->refused; h; h = h->next)
        if (h->op == op) {
            h->op = NULL;
            return true;
        }
    return false;
}

static void net_cancel(poe_transport *transport, poe_operation *op)
{
    emulator *e = emulator_of(transport);
    for (int peer = 0; peer < e->base.size; peer++)
        if (forget_sender(&e->lanes[peer], op)) {
            finish(e, op, POE_PEER_LOST);
            return;
        }
    e->below->ops->cancel(e->below, op);
}

static void net_cut(poe_transport *transport, int peer)
{
    poe_transport *below = emulator_of(transport)->below;
    below->ops->cut(below, peer);
}

static void net_watch(poe_transport *transport, int fd)
{
    poe_transport *below = emulator_of(transport)->below;
    below->ops->watch(below, fd);
}

/* --- the end ------------------------------------------------------------------------------------------------------ */
/* What others may still wait for when a rank leaves: its part of the last barrier, and the news that it is gone. Credits
 * and the like are for links that are closed. */
static bool has_last_words(const emulator *e, double now, double until)
{
    for (int peer = 0; peer < e->base.size; peer++)
        for (const held *h = e->lanes[peer].first; h; h = h->next)
            if (h->channel >= POE_CHANNEL_BEAT && h->due < until)
                return true;
    for (const held *h = e->flying; h; h = h->next)
        if (h->channel > POE_CHANNEL_BEAT || (h->channel == POE_CHANNEL_BEAT && now < h->due + farewell))
            return true;
    return false;
}

static void flush(emulator *e)
{
    double now = clock_of(e), until = now + longest_flush;
    for (; now < until && has_last_words(e, now, until); now = clock_of(e))
        net_progress(&e->base, 0.01);
}

static void end_flying(emulator *e)
{
    collect_taken(e);
    for (held *h = e->flying; h; h = h->next)
        e->below->ops->cancel(e->below, &h->sending);
    collect_taken(e); /* what is left is still the transport's, and never freed */
}

static void free_emulator(emulator *e)
{
    for (int peer = 0; e->lanes && peer < e->base.size; peer++)
        free_list(e->lanes[peer].first);
    for (int class = 0; class < CLASSES; class++)
        free_list(e->spare[class]);
    free(e->description);
    free(e->lanes);
    free(e);
}

static void net_destroy(poe_transport *transport)
{
    emulator *e = emulator_of(transport);
    flush(e);
    end_flying(e);
    e->below->ops->destroy(e->below);
    free_emulator(e);
}

/* --- the beginning ------------------------------------------------------------------------------------------------ */
static poe_status check_cuts(const poe_net *net, const poe_transport *transport)
{
    for (int peer = 0; peer < net->size && !transport->ops->cut; peer++)
        if (poe_net_link_of(net, transport->rank, peer)->cut > 0) {
            poe_error("--net: link %d>%d is to be cut, but the transport %s has no connections of its own to cut",
                      transport->rank, peer, transport->ops->name);
            return POE_BAD_INPUT;
        }
    return POE_OK;
}

static bool is_real(const poe_net *net)
{
    for (int i = 0; i < net->size * net->size; i++)
        if (i / net->size != i % net->size && !poe_net_is_real(&net->links[i]))
            return false;
    return true;
}

static void set_lanes(emulator *e, const poe_net *net)
{
    int rank = e->base.rank;
    for (int peer = 0; peer < net->size; peer++) {
        lane *l = &e->lanes[peer];
        l->link = *poe_net_link_of(net, rank, peer);
        l->real = peer == rank || poe_net_is_real(&l->link);
        l->rtt = l->link.delay + poe_net_link_of(net, peer, rank)->delay;
    }
}

static poe_transport_ops decorated(const poe_transport_ops *below)
{
    return (poe_transport_ops){.name = below->name,
                               .send = net_send,
                               .receive = net_receive,
                               .progress = net_progress,
                               .wake = net_wake,
                               .cancel = net_cancel,
                               .destroy = net_destroy,
                               .cut = below->cut ? net_cut : NULL,
                               .watch = below->watch ? net_watch : NULL};
}

poe_status poe_net_wrap(const poe_net *net, poe_transport **transport)
{
    poe_transport *below = *transport;
    if (is_real(net))
        return POE_OK;
    assert(net->size == below->size);
    poe_status status = check_cuts(net, below);
    if (status != POE_OK)
        return status;
    emulator *e = calloc(1, sizeof(*e));
    if (e) {
        *e = (emulator){.base = *below, .ops = decorated(below->ops), .below = below, .seed = net->seed};
        e->lanes = calloc((size_t)below->size, sizeof(*e->lanes));
        e->description = poe_net_describe(net);
    }
    if (!e || !e->lanes || !e->description) {
        poe_error("out of memory for the emulated network");
        if (e)
            free_emulator(e);
        return POE_FAILED;
    }
    e->base.ops = &e->ops;
    e->base.emulated = e->description;
    e->start = poe_now();
    set_lanes(e, net);
    *transport = &e->base;
    return POE_OK;
}
