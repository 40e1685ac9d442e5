/* SPDX-License-Identifier: MIT
 * One rank's end: the helper thread, and how the rank's thread meets it. */
#include <assert.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>

#include "comm/comm_impl.h"
#include "src/clock.h"

int poe_comm_rank(const poe_comm *comm)
{
    return comm->transport->rank;
}

int poe_comm_size(const poe_comm *comm)
{
    return comm->transport->size;
}

int poe_comm_host_ranks(const poe_comm *comm)
{
    return comm->transport->host_ranks;
}

const char *poe_comm_transport(const poe_comm *comm)
{
    return comm->transport->ops->name;
}

struct poe_board *poe_comm_board(const poe_comm *comm)
{
    return comm->transport->board;
}

const char *poe_comm_emulated(const poe_comm *comm)
{
    return comm->transport->emulated;
}

void poe_comm_configure(poe_comm *comm, const poe_comm_settings *settings)
{
    poe_comm_settings s = settings ? *settings : (poe_comm_settings){0};
    if (!(s.deadline > 0))
        s.deadline = 120;
    if (!(s.patience > 0))
        s.patience = 30;
    if (!(s.heartbeat > 0))
        s.heartbeat = s.deadline < 4 ? s.deadline / 4 : 1;
    pthread_mutex_lock(&comm->lock);
    comm->settings = s;
    pthread_mutex_unlock(&comm->lock);
    poe_comm_wake(comm);
}

/* For the agent; NULL: the rank waits. */
static void note_doing(poe_comm *comm, const char *what)
{
    poe_board *board = comm->transport->board;
    if (!board)
        return;
    atomic_store(&board->place.doing, what);
    atomic_fetch_add(&board->place.entered, 1);
}

void poe_comm_doing(poe_comm *comm, const char *what, int64_t step, int micro)
{
    pthread_mutex_lock(&comm->lock);
    comm->doing = what;
    comm->doing_step = step;
    comm->doing_micro = micro;
    pthread_mutex_unlock(&comm->lock);
    poe_board *board = comm->transport->board;
    if (board) {
        atomic_store(&board->place.step, step);
        atomic_store(&board->place.micro, micro);
    }
    note_doing(comm, what);
}

void poe_comm_request_report(poe_comm *comm)
{
    atomic_store(&comm->report, true);
    poe_comm_wake(comm);
}

void poe_comm_request_stop(poe_comm *comm)
{
    atomic_store(&comm->stop, true);
    poe_comm_wake(comm);
}

bool poe_comm_stop_wanted(const poe_comm *comm)
{
    return atomic_load(&comm->stop);
}

void poe_comm_wake(poe_comm *comm)
{
    comm->transport->ops->wake(comm->transport);
}

/* The loss is published after its sentence, so that who sees it finds the sentence said. */
void poe_comm_lose(poe_comm *comm, const char *format, ...)
{
    if (atomic_exchange(&comm->blamed, true))
        return;
    if (format) {
        char text[1024];
        va_list args;
        va_start(args, format);
        vsnprintf(text, sizeof(text), format, args);
        va_end(args);
        poe_error("%s", text);
    }
    pthread_mutex_lock(&comm->lock);
    atomic_store(&comm->status, POE_PEER_LOST);
    pthread_cond_broadcast(&comm->changed);
    pthread_mutex_unlock(&comm->lock);
}

/* --- time spent --------------------------------------------------------------------------------------------------- */
/* Under the lock, before `sending` or `wait` changes. */
static void account(poe_comm *comm, double now)
{
    double passed = now - comm->accounted;
    comm->accounted = now;
    if (!comm->sending)
        return;
    comm->stats.transfer += passed;
    if (!comm->wait)
        comm->stats.transfer_busy += passed;
}

void poe_comm_get_stats(poe_comm *comm, poe_comm_stats *stats)
{
    pthread_mutex_lock(&comm->lock);
    account(comm, poe_now());
    *stats = comm->stats;
    pthread_mutex_unlock(&comm->lock);
}

void poe_comm_observe(poe_comm *comm, const poe_comm_observer *observer)
{
    comm->observer = observer ? *observer : (poe_comm_observer){0};
}

static poe_wait_kind kind_of(const poe_comm *comm, const poe_wait *wait)
{
    return wait->account == &comm->stats.receive_wait  ? POE_WAIT_RECEIVE
           : wait->account == &comm->stats.credit_wait ? POE_WAIT_CREDIT
           : wait->account == &comm->stats.shared_wait ? POE_WAIT_SHARED
                                                       : POE_WAIT_COLLECTIVE;
}

/* --- parts -------------------------------------------------------------------------------------------------------- */
void poe_part_send(poe_part *part, int peer, int channel, const void *data, size_t bytes, poe_operation *op)
{
    poe_transport *transport = part->comm->transport;
    *op = (poe_operation){0};
    part->comm->tally.messages_sent++;
    poe_traffic_of(part->comm->traffic, peer, channel)->sent++;
    part->comm->tally.bytes_sent += bytes;
    transport->ops->send(transport, peer, channel, data, bytes, op);
}

void poe_part_receive(poe_part *part, int peer, int channel, void *data, size_t bytes, poe_operation *op)
{
    poe_transport *transport = part->comm->transport;
    *op = (poe_operation){0};
    part->comm->tally.messages_received++;
    poe_traffic_of(part->comm->traffic, peer, channel)->received++;
    part->comm->tally.bytes_received += bytes;
    transport->ops->receive(transport, peer, channel, data, bytes, op);
}

void *poe_comm_allocate(poe_comm *comm, size_t bytes)
{
    poe_transport *transport = comm->transport;
    return transport->ops->allocate ? transport->ops->allocate(transport, bytes) : aligned_alloc(64, bytes);
}

void poe_comm_release(poe_comm *comm, void *memory, size_t bytes)
{
    poe_transport *transport = comm->transport;
    if (!transport->ops->release)
        free(memory);
    else if (memory)
        transport->ops->release(transport, memory, bytes);
}

bool poe_part_done(poe_part *part, const poe_operation *op)
{
    if (!op->done)
        return false;
    if (op->status == POE_OK)
        return true;
    poe_comm_lose(part->comm, NULL); /* the transport has said why */
    return false;
}

static void hand_over(poe_part **request, poe_part *part)
{
    poe_comm *comm = part->comm;
    pthread_mutex_lock(&comm->lock);
    *request = part;
    poe_comm_wake(comm);
    while (*request)
        pthread_cond_wait(&comm->changed, &comm->lock);
    pthread_mutex_unlock(&comm->lock);
}

void poe_part_attach(poe_part *part)
{
    for (int i = 0; i < part->n_operations; i++)
        part->operations[i].done = true;
    hand_over(&part->comm->attach, part);
}

bool poe_part_detach(poe_part *part)
{
    hand_over(&part->comm->detach, part);
    for (int i = 0; i < part->n_operations; i++)
        if (!part->operations[i].done)
            return false;
    return true;
}

poe_status poe_part_wait(poe_part *part, poe_wait *wait, bool (*ready)(const poe_part *part))
{
    poe_comm *comm = part->comm;
    wait->since = wait->said = poe_now();
    wait->since_wall = time(NULL);
    note_doing(comm, NULL);
    pthread_mutex_lock(&comm->lock);
    account(comm, wait->since);
    comm->wait = wait;
    while (!poe_comm_lost(comm) && !ready(part))
        pthread_cond_wait(&comm->changed, &comm->lock);
    double now = poe_now();
    account(comm, now);
    comm->wait = NULL;
    *wait->account += now - wait->since;
    pthread_mutex_unlock(&comm->lock);
    note_doing(comm, comm->doing);
    const poe_comm_observer *o = &comm->observer;
    if (o->waited)
        o->waited(o->context, kind_of(comm, wait), atomic_load(wait->peer), wait->channel, wait->since, now);
    return atomic_load(&comm->status);
}

/* --- the helper thread -------------------------------------------------------------------------------------------- */
static void remove_part(poe_comm *comm, poe_part *part)
{
    for (poe_part **at = &comm->parts; *at; at = &(*at)->next)
        if (*at == part) {
            *at = part->next;
            break;
        }
    for (int i = 0; i < part->n_operations; i++)
        if (!part->operations[i].done)
            comm->transport->ops->cancel(comm->transport, &part->operations[i]);
}

static void serve_requests(poe_comm *comm)
{
    pthread_mutex_lock(&comm->lock);
    poe_part *attach = comm->attach, *detach = comm->detach;
    pthread_mutex_unlock(&comm->lock);
    if (!attach && !detach)
        return;
    if (attach) {
        attach->next = comm->parts;
        comm->parts = attach;
    }
    if (detach)
        remove_part(comm, detach);
    pthread_mutex_lock(&comm->lock);
    comm->attach = comm->detach = NULL;
    pthread_cond_broadcast(&comm->changed);
    pthread_mutex_unlock(&comm->lock);
}

/* Tells the rank's thread what has happened since the last time. */
static void publish(poe_comm *comm, bool moved)
{
    pthread_mutex_lock(&comm->lock);
    account(comm, poe_now());
    comm->sending = false;
    for (const poe_part *part = comm->parts; part; part = part->next)
        comm->sending |= part->sending > 0;
    comm->stats.bytes_sent = comm->tally.bytes_sent;
    comm->stats.messages_sent = comm->tally.messages_sent;
    comm->stats.bytes_received = comm->tally.bytes_received;
    comm->stats.messages_received = comm->tally.messages_received;
    comm->stats.shared_sent = comm->tally.shared_sent;
    comm->stats.shared_dense = comm->tally.shared_dense;
    if (moved && comm->wait)
        pthread_cond_broadcast(&comm->changed);
    pthread_mutex_unlock(&comm->lock);
}

/* --- standing still --------------------------------------------------------------------------------------------------- */
static bool is_settled(const poe_comm *comm)
{
    for (const poe_part *part = comm->parts; part; part = part->next)
        if (part->settled && !part->settled(part))
            return false;
    return comm->transport->ops->settled(comm->transport);
}

/* The helper thread: stands still for as long as the rank's thread wishes. True when it is to, and cannot yet. */
static bool hold_still(poe_comm *comm)
{
    pthread_mutex_lock(&comm->lock);
    if (comm->hold == POE_HOLD_WANTED && is_settled(comm)) {
        comm->hold = POE_HELD;
        pthread_cond_broadcast(&comm->changed);
        while (comm->hold == POE_HELD)
            pthread_cond_wait(&comm->changed, &comm->lock);
    }
    bool wanted = comm->hold == POE_HOLD_WANTED;
    pthread_mutex_unlock(&comm->lock);
    return wanted;
}

static poe_status hold(poe_comm *comm)
{
    pthread_mutex_lock(&comm->lock);
    comm->hold = POE_HOLD_WANTED;
    poe_comm_wake(comm);
    while (comm->hold != POE_HELD && !poe_comm_lost(comm))
        pthread_cond_wait(&comm->changed, &comm->lock);
    bool held = comm->hold == POE_HELD;
    if (!held)
        comm->hold = POE_MOVING;
    pthread_mutex_unlock(&comm->lock);
    return held ? POE_OK : POE_PEER_LOST;
}

void poe_comm_resume(poe_comm *comm)
{
    pthread_mutex_lock(&comm->lock);
    comm->hold = POE_MOVING;
    pthread_cond_broadcast(&comm->changed);
    pthread_mutex_unlock(&comm->lock);
}

static size_t traffic_bytes(const poe_comm *comm)
{
    return (size_t)poe_comm_size(comm) * POE_CHANNELS * sizeof(poe_traffic);
}

poe_status poe_comm_pause(poe_comm *comm, poe_comm_state *state, poe_traffic *traffic)
{
    poe_status status = hold(comm);
    if (status != POE_OK)
        return status;
    state->n_parts = 0;
    memcpy(traffic, comm->traffic, traffic_bytes(comm));
    for (const poe_part *part = comm->parts; part; part = part->next)
        if (part->stand) {
            assert(state->n_parts < POE_COMM_PARTS);
            part->stand(part, &state->parts[state->n_parts++], traffic);
        }
    return POE_OK;
}

poe_status poe_comm_restore(poe_comm *comm, const poe_comm_state *state, const poe_traffic *traffic)
{
    poe_status status = hold(comm);
    if (status != POE_OK)
        return status;
    comm->restored = *state;
    for (size_t i = 0; i < (size_t)poe_comm_size(comm) * POE_CHANNELS; i++) {
        comm->traffic[i].sent += traffic[i].sent;
        comm->traffic[i].received += traffic[i].received;
    }
    poe_comm_resume(comm);
    return POE_OK;
}

const poe_part_state *poe_part_restored(const poe_comm *comm, int kind, int peer, int channel)
{
    for (int i = 0; i < comm->restored.n_parts; i++) {
        const poe_part_state *s = &comm->restored.parts[i];
        if (s->kind == kind && s->peer == peer && s->channel == channel)
            return s;
    }
    return NULL;
}

/* What the agent wishes to know and to tell. */
static void attend_agent(poe_comm *comm)
{
    poe_board *board = comm->transport->board;
    if (!board)
        return;
    atomic_fetch_add(&board->beats, 1);
    if (atomic_load(&board->stop))
        atomic_store(&comm->stop, true);
    if (atomic_exchange(&board->report, false))
        atomic_store(&comm->report, true);
}

static void *help(void *arg)
{
    poe_comm *comm = arg;
    poe_log_attach(comm->log);
    prctl(PR_SET_TIMERSLACK, 1000UL); /* short sleeps between tests must be short */
    bool moved = true;
    while (!atomic_load(&comm->quit)) {
        double pause = moved ? 0 : comm->due - poe_now();
        moved = comm->transport->ops->progress(comm->transport, pause > 0 ? pause : 0);
        serve_requests(comm);
        attend_agent(comm);
        /* After a loss only the watch goes on, which is always the last part: it tells the others. */
        for (poe_part *part = comm->parts; part; part = part->next)
            if (!part->next || !poe_comm_lost(comm))
                moved |= part->advance(part);
        publish(comm, moved);
        moved |= hold_still(comm);
    }
    poe_log_attach(NULL);
    return NULL;
}

/* Signals are for the rank's own thread. */
static poe_status start_helper(poe_comm *comm)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    comm->running = pthread_create(&comm->thread, NULL, help, comm) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (comm->running)
        return POE_OK;
    poe_error("the thread that talks to the other ranks cannot be started: too many threads, or out of memory");
    return POE_FAILED;
}

static void free_comm(poe_comm *comm)
{
    poe_chain_destroy(comm);
    poe_watch_destroy(comm);
    if (comm->running) {
        atomic_store(&comm->quit, true);
        poe_comm_wake(comm);
        pthread_join(comm->thread, NULL);
    }
    comm->transport->ops->destroy(comm->transport);
    free(comm->traffic);
    pthread_cond_destroy(&comm->changed);
    pthread_mutex_destroy(&comm->lock);
    free(comm);
}

poe_status poe_comm_create(poe_transport *transport, const poe_comm_settings *settings, poe_comm **comm)
{
    poe_comm *c = calloc(1, sizeof(*c));
    poe_traffic *traffic = calloc((size_t)transport->size * POE_CHANNELS, sizeof(*traffic));
    if (!c || !traffic) {
        poe_error("out of memory for the connection to the other ranks");
        free(traffic);
        free(c);
        transport->ops->destroy(transport);
        return POE_FAILED;
    }
    c->transport = transport;
    c->traffic = traffic;
    c->log = poe_log_current();
    c->accounted = poe_now();
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->changed, NULL);
    poe_comm_configure(c, settings);
    poe_status status = start_helper(c);
    if (status == POE_OK)
        status = poe_watch_create(c);
    if (status == POE_OK)
        status = poe_chain_create(c);
    if (status != POE_OK) {
        free_comm(c);
        return status;
    }
    *comm = c;
    return POE_OK;
}

void poe_comm_destroy(poe_comm *comm, bool orderly)
{
    if (!comm)
        return;
    if (orderly && !poe_comm_lost(comm)) {
        poe_watch_leave(comm, POE_LEAVING);
        poe_chain_end(comm);
    }
    if (!orderly || poe_comm_lost(comm))
        poe_watch_leave(comm, POE_GONE);
    free_comm(comm);
}
