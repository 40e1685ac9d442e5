/* SPDX-License-Identifier: MIT
 * Requests travel to the agent under a tag each, of which there are as many as a ring has room for, so that neither
 * ring is ever full. Those that get no tag, or no room in the outbox, wait in order. What was asked for between two calls
 * of progress() is handed over as one: a message and its header, which a next process might write otherwise, both or
 * neither. */
#include "comm/agent/proxy.h"

#include <assert.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "comm/agent/space.h"
#include "src/log.h"

/* Free memory of the outbox that is held on to, for the next messages. */
enum { KEEP = 16 << 20 };

typedef struct request {
    struct request *next; /* waiting, or spare */
    poe_operation *op;    /* NULL: cancelled */
    unsigned char *data;
    bool copied; /* a send that takes room in the outbox */
    poe_board_command command;
} request;

typedef struct proxy {
    poe_transport base;
    pthread_mutex_t lock; /* guards the next one, which the rank's thread takes room in, too */
    poe_space outbox;
    unsigned char *log;
    request *waiting, *last, *spare;
    request *with_agent[POE_BOARD_COMMANDS]; /* by tag */
    uint32_t free_tags[POE_BOARD_COMMANDS];
    int n_free;
    atomic_bool rung;
    bool completed; /* an operation ended outside progress() */
} proxy;

static proxy *proxy_of(poe_transport *transport)
{
    return (proxy *)transport;
}

static void finish(proxy *p, poe_operation *op, poe_status status)
{
    op->status = status;
    op->done = true;
    p->completed = true;
}

static void make_spare(proxy *p, request *r)
{
    r->next = p->spare;
    p->spare = r;
}

/* --- the outbox --------------------------------------------------------------------------------------------------- */
static bool take_room(proxy *p, uint64_t bytes, uint64_t *offset)
{
    pthread_mutex_lock(&p->lock);
    bool taken = poe_space_take(&p->outbox, bytes, offset);
    pthread_mutex_unlock(&p->lock);
    return taken;
}

static void give_room(proxy *p, uint64_t offset, uint64_t bytes)
{
    pthread_mutex_lock(&p->lock);
    poe_space_give(&p->outbox, offset, bytes);
    pthread_mutex_unlock(&p->lock);
}

static void *proxy_allocate(poe_transport *transport, size_t bytes)
{
    proxy *p = proxy_of(transport);
    uint64_t offset;
    return take_room(p, bytes, &offset) ? p->outbox.area + offset : NULL;
}

static void proxy_release(poe_transport *transport, void *memory, size_t bytes)
{
    proxy *p = proxy_of(transport);
    give_room(p, (uint64_t)((unsigned char *)memory - p->outbox.area), bytes);
}

static bool lies_in_outbox(const proxy *p, const unsigned char *data)
{
    uintptr_t area = (uintptr_t)p->outbox.area, at = (uintptr_t)data;
    return at >= area && at - area < POE_BOARD_AREA;
}

/* False: there is no room for a copy now. */
static bool place(proxy *p, request *r)
{
    poe_board_command *command = &r->command;
    if (lies_in_outbox(p, r->data)) {
        command->offset = (uint64_t)(r->data - p->outbox.area);
        return true;
    }
    r->copied = take_room(p, command->bytes, &command->offset);
    if (r->copied && command->bytes)
        memcpy(p->outbox.area + command->offset, r->data, command->bytes);
    return r->copied;
}

/* --- requests ----------------------------------------------------------------------------------------------------- */
/* A header that is sent has its message's tag beside its own. */
static int tags_for(const poe_board_command *command)
{
    bool header = command->channel < POE_CHANNEL_PAYLOAD || command->channel == POE_CHANNEL_COLLECTIVE;
    return command->sends && header ? 2 : 1;
}

/* False: not now. */
static bool hand_over(proxy *p, request *r)
{
    poe_board_command *command = &r->command;
    if (p->n_free < tags_for(command) || (command->sends && !place(p, r)))
        return false;
    command->tag = p->free_tags[--p->n_free];
    p->with_agent[command->tag] = r;
    bool put = poe_ring_put(&p->base.board->to_agent, command);
    assert(put);
    (void)put;
    return true;
}

static void hand_over_waiting(proxy *p)
{
    for (request *r; (r = p->waiting) && hand_over(p, r);)
        p->waiting = r->next;
}

static void start(proxy *p, const poe_board_command *command, unsigned char *data, poe_operation *op)
{
    request *r = p->spare ? p->spare : malloc(sizeof(*r));
    if (!r) {
        poe_error("out of memory for a message between ranks");
        finish(p, op, POE_FAILED);
        return;
    }
    if (r == p->spare)
        p->spare = r->next;
    *r = (request){.op = op, .data = data, .command = *command};
    op->backend[0] = r;
    if (!p->waiting && hand_over(p, r))
        return;
    if (p->waiting)
        p->last->next = r;
    else
        p->waiting = r;
    p->last = r;
}

static void proxy_send(poe_transport *transport, int peer, int channel, const void *data, size_t bytes,
                       poe_operation *op)
{
    poe_board_command command = {.peer = peer, .channel = (int16_t)channel, .sends = true, .bytes = bytes};
    start(proxy_of(transport), &command, (unsigned char *)(uintptr_t)data, op); /* it is only read */
}

static void proxy_receive(poe_transport *transport, int peer, int channel, void *data, size_t bytes, poe_operation *op)
{
    poe_board_command command = {.peer = peer, .channel = (int16_t)channel, .bytes = bytes};
    start(proxy_of(transport), &command, data, op);
}

/* --- answers ------------------------------------------------------------------------------------------------------ */
static void take_answer(proxy *p, const poe_board_command *answer)
{
    request *r = p->with_agent[answer->tag];
    const poe_board_command *command = &r->command;
    if (r->copied)
        give_room(p, command->offset, command->bytes);
    if (!command->sends && r->op && answer->status == POE_OK && command->bytes)
        memcpy(r->data, p->log + answer->offset, command->bytes);
    if (r->op)
        finish(p, r->op, answer->status);
    p->with_agent[answer->tag] = NULL;
    p->free_tags[p->n_free++] = answer->tag;
    make_spare(p, r);
}

static void act(proxy *p)
{
    poe_ring *ring = &p->base.board->to_stage;
    for (const poe_board_command *answer; (answer = poe_ring_peek(ring)); poe_ring_pop(ring))
        take_answer(p, answer);
    hand_over_waiting(p);
}

static void sleep_for(proxy *p, double wait)
{
    poe_ring *ring = &p->base.board->to_stage;
    struct pollfd fd = {.fd = ring->fd, .events = POLLIN};
    struct timespec t = {.tv_sec = (time_t)wait, .tv_nsec = (long)((wait - (double)(time_t)wait) * 1e9)};
    if (atomic_load(&p->rung) || !poe_ring_may_sleep(ring))
        return;
    ppoll(&fd, 1, &t, NULL);
    poe_ring_awake(ring);
}

static bool proxy_progress(poe_transport *transport, double wait)
{
    proxy *p = proxy_of(transport);
    act(p);
    poe_ring_publish(&p->base.board->to_agent);
    if (!p->completed && wait > 0) {
        sleep_for(p, wait);
        atomic_exchange(&p->rung, false); /* after the bell was silenced: who rings from now on is heard next time */
        act(p);
        poe_ring_publish(&p->base.board->to_agent);
    }
    bool any = p->completed;
    p->completed = false;
    return any;
}

static void proxy_wake(poe_transport *transport)
{
    if (!atomic_exchange(&proxy_of(transport)->rung, true))
        poe_ring_wake(&transport->board->to_stage);
}

/* --- the rest of the table ---------------------------------------------------------------------------------------- */
static bool withdraw(proxy *p, const request *r)
{
    request *before = NULL;
    for (request **at = &p->waiting; *at; at = &(*at)->next) {
        if (*at == r) {
            *at = r->next;
            if (p->last == r)
                p->last = before;
            return true;
        }
        before = *at;
    }
    return false;
}

/* What the agent has of it goes on, and its answer is nobody's; but memory that the agent sends from stays in use. */
static void proxy_cancel(poe_transport *transport, poe_operation *op)
{
    proxy *p = proxy_of(transport);
    request *r = op->backend[0];
    if (withdraw(p, r))
        make_spare(p, r);
    else if (r->command.sends && !r->copied)
        return;
    else
        r->op = NULL;
    finish(p, op, POE_PEER_LOST);
}

static bool proxy_settled(const poe_transport *transport)
{
    const poe_ring *ring = &transport->board->to_agent;
    return !((const proxy *)transport)->waiting && ring->put == atomic_load(&ring->head);
}

static void free_list(request *list)
{
    for (request *next; list; list = next) {
        next = list->next;
        free(list);
    }
}

static void proxy_destroy(poe_transport *transport)
{
    proxy *p = proxy_of(transport);
    for (int tag = 0; tag < POE_BOARD_COMMANDS; tag++)
        free(p->with_agent[tag]);
    free_list(p->waiting);
    free_list(p->spare);
    poe_space_finish(&p->outbox);
    pthread_mutex_destroy(&p->lock);
    free(p);
}

static const poe_transport_ops proxy_ops = {
    .name = "agent",
    .send = proxy_send,
    .receive = proxy_receive,
    .progress = proxy_progress,
    .wake = proxy_wake,
    .cancel = proxy_cancel,
    .destroy = proxy_destroy,
    .settled = proxy_settled,
    .allocate = proxy_allocate,
    .release = proxy_release,
};

poe_status poe_proxy_create(poe_board *board, poe_transport **transport)
{
    proxy *p = calloc(1, sizeof(*p));
    unsigned char *outbox = poe_board_outbox(board, atomic_load(&board->incarnation));
    if (!p || poe_space_init(&p->outbox, outbox, board->outbox_from, KEEP) != POE_OK) {
        poe_error("out of memory for the way to the other ranks");
        free(p);
        return POE_FAILED;
    }
    pthread_mutex_init(&p->lock, NULL);
    p->base = (poe_transport){.ops = &proxy_ops,
                              .rank = board->rank,
                              .size = board->size,
                              .host_ranks = board->host_ranks,
                              .host = board->host,
                              .board = board,
                              .emulated = board->emulated[0] ? board->emulated : NULL};
    p->log = poe_board_log(board);
    for (int tag = 0; tag < POE_BOARD_COMMANDS; tag++)
        p->free_tags[p->n_free++] = (uint32_t)tag;
    *transport = &p->base;
    return POE_OK;
}
