/* SPDX-License-Identifier: MIT
 * One stream per peer and channel. Its receives are posted where the stage process will read them: in the log, in order
 * of arrival of the requests. A stage process stands at a place in each stream, which is only moved back when the next
 * one starts; what was posted for its predecessor is found there, arrived or not. */
#include "comm/agent/relay.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "comm/agent/space.h"
#include "comm/message.h"
#include "src/clock.h"
#include "src/log.h"

enum { OUTBOX_UNIT = 1 << 16 }; /* a multiple of every page size in use */

/* The limit of what the log holds unless stated, bytes; of it, freed memory that is held on to for the next messages. */
enum { LOG_LIMIT = 256 << 20, KEPT_SHARE = 4 };

/* How long a relay that leaves waits for its last messages to be gone. */
static const double farewell = 0.5;

typedef struct stream stream;

/* A send or a receive on the transport below. */
typedef struct item {
    struct item *next;  /* under way, spent or spare */
    struct item *later; /* of the stream's receives */
    poe_operation op;
    stream *stream;
    bool sends, wanted; /* wanted: the stage process waits for it, under `tag` */
    uint32_t tag;
    int outbox;             /* a send: of which parity; -1: a heartbeat of the relay's own ... */
    unsigned char *beat;    /* ... which is here */
    uint64_t offset, bytes; /* in the outbox, or the log */
    uint64_t answered;      /* where the ring to the stage process stood after its answer */
} item;

struct stream {
    int peer, channel;
    bool live;              /* messages stand for themselves */
    bool met;               /* something was sent or has come */
    bool beating;           /* a heartbeat of the relay's own is under way */
    uint64_t sent, sending; /* messages sent since the beginning; number of the next one of this stage process */
    item *first, *last;     /* receives: posted, or logged and not dropped; live: posted */
    item *cursor;           /* the first of them that this stage process has not asked for */
    uint64_t dropped;       /* number of `first` */
    uint64_t needless;      /* receives below this number may be dropped */
    item *kept;             /* live: the last message, ... */
    bool unseen;            /* ... which this stage process has not got */
};

struct poe_relay {
    poe_board *board;
    poe_transport *below;
    stream **streams; /* (size, POE_CHANNELS); NULL: never used */
    poe_space log;
    uint64_t log_limit, logged;
    item *under_way, *last; /* in order */
    item *spent, *spare;    /* spent: live messages that the stage process may still be reading */
    int sends;              /* under way for the stage process */
    int epoll, watched;
    int valid;          /* the snapshot that was last looked at ... */
    int64_t valid_step; /* ... and its step */
    bool asked;         /* for a snapshot, since the log was last trimmed */
    poe_status status;
};

/* --- streams and items -------------------------------------------------------------------------------------------- */
static bool is_live(int channel)
{
    return channel >= POE_CHANNEL_CREDIT && channel <= POE_CHANNEL_BEAT;
}

static void lose(poe_relay *relay, poe_status status)
{
    if (relay->status == POE_OK)
        relay->status = status;
}

static void lose_for_memory(poe_relay *relay)
{
    if (relay->status == POE_OK)
        poe_error("out of memory for messages between rank %d and the others", relay->board->rank);
    lose(relay, POE_FAILED);
}

static stream *stream_of(poe_relay *relay, int peer, int channel)
{
    assert(peer >= 0 && peer < relay->board->size && channel >= 0 && channel < POE_CHANNELS);
    stream **s = &relay->streams[peer * POE_CHANNELS + channel];
    if (!*s)
        *s = calloc(1, sizeof(**s));
    if (!*s) {
        lose_for_memory(relay);
        return NULL;
    }
    (*s)->peer = peer;
    (*s)->channel = channel;
    (*s)->live = is_live(channel);
    return *s;
}

static item *new_item(poe_relay *relay, stream *s)
{
    item *i = relay->spare ? relay->spare : malloc(sizeof(*i));
    if (!i) {
        lose_for_memory(relay);
        return NULL;
    }
    if (i == relay->spare)
        relay->spare = i->next;
    *i = (item){.stream = s};
    return i;
}

static void make_spare(poe_relay *relay, item *i)
{
    free(i->beat);
    i->beat = NULL;
    i->next = relay->spare;
    relay->spare = i;
}

static void free_receive(poe_relay *relay, item *i)
{
    poe_space_give(&relay->log, i->offset, i->bytes);
    make_spare(relay, i);
}

static void append(poe_relay *relay, item *i)
{
    if (relay->under_way)
        relay->last->next = i;
    else
        relay->under_way = i;
    relay->last = i;
}

static void answer(poe_relay *relay, uint32_t tag, poe_status status, uint64_t offset)
{
    poe_board_command command = {.tag = tag, .status = (int8_t)status, .offset = offset};
    bool written = poe_ring_write(&relay->board->to_stage, &command);
    assert(written); /* it has room for an answer to every command under way */
    (void)written;
}

static void answer_receive(poe_relay *relay, item *i, uint32_t tag)
{
    answer(relay, tag, i->op.status == POE_OK ? POE_OK : POE_PEER_LOST, i->offset);
    i->wanted = false;
    i->answered = atomic_load(&relay->board->to_stage.head);
}

/* --- what the stage process asks for ------------------------------------------------------------------------------ */
static void send_on(poe_relay *relay, stream *s, const poe_board_command *command)
{
    s->sending++;
    if (!s->live && s->sending <= s->sent) {
        answer(relay, command->tag, POE_OK, 0); /* its predecessor has sent it */
        return;
    }
    item *i = new_item(relay, s);
    if (!i) {
        answer(relay, command->tag, POE_FAILED, 0);
        return;
    }
    unsigned incarnation = atomic_load(&relay->board->incarnation);
    i->sends = i->wanted = s->met = true;
    i->tag = command->tag;
    i->outbox = (int)(incarnation % 2);
    atomic_store(&relay->board->sent[s->peer][s->channel], ++s->sent);
    i->offset = command->offset;
    i->bytes = command->bytes;
    relay->sends++;
    append(relay, i);
    relay->below->ops->send(relay->below, s->peer, s->channel,
                            poe_board_outbox(relay->board, incarnation) + command->offset, command->bytes, &i->op);
}

/* With room in the log. NULL: out of memory. */
static item *new_receive(poe_relay *relay, stream *s, uint64_t bytes)
{
    item *i = new_item(relay, s);
    if (i && !poe_space_take(&relay->log, bytes, &i->offset)) {
        lose_for_memory(relay);
        make_spare(relay, i);
        i = NULL;
    }
    if (i)
        i->bytes = bytes;
    return i;
}

static void append_receive(stream *s, item *i)
{
    if (s->first)
        s->last->later = i;
    else
        s->first = i;
    s->last = i;
}

static void start_receive(poe_relay *relay, item *i)
{
    append(relay, i);
    relay->below->ops->receive(relay->below, i->stream->peer, i->stream->channel,
                               poe_board_log(relay->board) + i->offset, i->bytes, &i->op);
}

static void post_receive(poe_relay *relay, stream *s, const poe_board_command *command)
{
    item *i = new_receive(relay, s, command->bytes);
    if (!i) {
        answer(relay, command->tag, POE_FAILED, 0);
        return;
    }
    i->wanted = true;
    i->tag = command->tag;
    append_receive(s, i);
    start_receive(relay, i);
}

static bool is_same(poe_relay *relay, const item *i, const poe_board_command *command)
{
    if (i->bytes == command->bytes)
        return true;
    poe_error("the stage process of rank %d that was started again asks for a message of %" PRIu64
              " bytes from rank %d on channel %d, where the one before had asked for %" PRIu64 " bytes",
              relay->board->rank, command->bytes, i->stream->peer, i->stream->channel, i->bytes);
    lose(relay, POE_PEER_LOST);
    answer(relay, command->tag, POE_PEER_LOST, 0);
    return false;
}

static void receive_on(poe_relay *relay, stream *s, const poe_board_command *command)
{
    if (s->kept && s->unseen) {
        s->unseen = false;
        if (is_same(relay, s->kept, command))
            answer_receive(relay, s->kept, command->tag);
        return;
    }
    item *i = s->cursor;
    if (!i) {
        post_receive(relay, s, command);
        return;
    }
    s->cursor = i->later;
    if (!is_same(relay, i, command))
        return;
    i->wanted = true;
    i->tag = command->tag;
    if (!s->live && i->op.done)
        answer_receive(relay, i, i->tag);
}

static bool take_commands(poe_relay *relay)
{
    poe_ring *ring = &relay->board->to_agent;
    bool any = false;
    for (const poe_board_command *command; (command = poe_ring_peek(ring)); poe_ring_pop(ring), any = true) {
        stream *s = stream_of(relay, command->peer, command->channel);
        if (!s)
            answer(relay, command->tag, POE_FAILED, 0);
        else if (command->sends)
            send_on(relay, s, command);
        else
            receive_on(relay, s, command);
    }
    return any;
}

/* --- what is done ------------------------------------------------------------------------------------------------- */
static void end_send(poe_relay *relay, item *i)
{
    if (i->wanted)
        answer(relay, i->tag, i->op.status == POE_OK ? POE_OK : POE_PEER_LOST, 0);
    if (i->beat)
        i->stream->beating = false;
    else
        relay->sends--;
    make_spare(relay, i);
}

/* Takes the place of the last message, which may just be read. */
static void end_live(poe_relay *relay, item *i)
{
    stream *s = i->stream;
    assert(s->first == i);
    s->first = i->later;
    if (s->cursor == i)
        s->cursor = i->later;
    s->unseen = !i->wanted;
    if (i->wanted)
        answer_receive(relay, i, i->tag);
    if (s->kept) {
        s->kept->next = relay->spent;
        relay->spent = s->kept;
    }
    s->kept = i;
}

static void end_receive(poe_relay *relay, item *i)
{
    i->stream->met = true;
    if (i->stream->live) {
        end_live(relay, i);
        return;
    }
    relay->logged += i->bytes;
    if (i->wanted)
        answer_receive(relay, i, i->tag);
}

static bool collect(poe_relay *relay)
{
    bool any = false;
    item *before = NULL;
    for (item **at = &relay->under_way, *i; (i = *at);) {
        if (!i->op.done) {
            before = i;
            at = &i->next;
            continue;
        }
        *at = i->next;
        if (i->op.status != POE_OK)
            lose(relay, POE_PEER_LOST);
        if (i->sends)
            end_send(relay, i);
        else
            end_receive(relay, i);
        any = true;
    }
    relay->last = before;
    return any;
}

/* --- what is needless --------------------------------------------------------------------------------------------- */
static void free_spent(poe_relay *relay)
{
    uint64_t read = atomic_load(&relay->board->to_stage.tail);
    for (item **at = &relay->spent, *i; (i = *at);) {
        if (i->answered > read) {
            at = &i->next;
            continue;
        }
        *at = i->next;
        free_receive(relay, i);
    }
}

/* Whether the stage process has read it; all that is done has been collected. */
static bool is_read(const poe_relay *relay, const stream *s, const item *i)
{
    return i != s->cursor && !i->wanted && i->answered <= atomic_load(&relay->board->to_stage.tail);
}

static void drop(poe_relay *relay, stream *s, bool over)
{
    for (item *i; (i = s->first) && i->op.done && (s->dropped < s->needless || (over && is_read(relay, s, i)));
         s->dropped++) {
        assert(i != s->cursor);
        s->first = i->later;
        relay->logged -= i->bytes;
        free_receive(relay, i);
    }
}

/* The stage process may make the next snapshot, and yet another one in this one's place, meanwhile: then what was read
 * is not believed. */
static bool read_snapshot(poe_relay *relay)
{
    poe_board *board = relay->board;
    int valid = atomic_load(&board->valid);
    if (valid < 0)
        return false;
    const poe_board_snapshot *snapshot = &board->snapshots[valid];
    int64_t step = snapshot->step;
    if (valid == relay->valid && step == relay->valid_step)
        return false;
    atomic_thread_fence(memory_order_acquire);
    for (int i = 0; i < board->size * POE_CHANNELS; i++)
        if (relay->streams[i])
            relay->streams[i]->needless = snapshot->traffic[i / POE_CHANNELS][i % POE_CHANNELS].received;
    atomic_thread_fence(memory_order_acquire);
    if (atomic_load(&board->valid) != valid || snapshot->step != step)
        return false;
    relay->valid = valid;
    relay->valid_step = step;
    return true;
}

static void trim(poe_relay *relay)
{
    poe_board *board = relay->board;
    if (relay->spent)
        free_spent(relay);
    bool over = atomic_load(&board->over);
    if (read_snapshot(relay) || over) {
        for (int i = 0; i < board->size * POE_CHANNELS; i++)
            if (relay->streams[i] && !relay->streams[i]->live)
                drop(relay, relay->streams[i], over);
        relay->asked = false;
    }
    if (relay->logged > relay->log_limit && !relay->asked && !over) {
        atomic_store(&board->snapshot_wanted, true);
        relay->asked = true;
    }
}

/* --- going on ----------------------------------------------------------------------------------------------------- */
poe_status poe_relay_progress(poe_relay *relay, double wait)
{
    poe_ring *ring = &relay->board->to_agent;
    bool moved = take_commands(relay);
    moved |= collect(relay);
    bool sleeps = !moved && wait > 0 && poe_ring_may_sleep(ring);
    relay->below->ops->progress(relay->below, sleeps ? wait : 0);
    if (sleeps)
        poe_ring_awake(ring);
    take_commands(relay);
    collect(relay);
    trim(relay);
    return relay->status;
}

void poe_relay_watch(poe_relay *relay, int fd)
{
    struct epoll_event event = {.events = EPOLLIN};
    if (relay->watched >= 0)
        epoll_ctl(relay->epoll, EPOLL_CTL_DEL, relay->watched, NULL);
    relay->watched = fd;
    if (fd >= 0 && epoll_ctl(relay->epoll, EPOLL_CTL_ADD, fd, &event) != 0)
        poe_error("file descriptor %d cannot be waited for: %s", fd, strerror(errno));
}

static void beat_to(poe_relay *relay, stream *s, const char *text)
{
    unsigned char *wire = malloc(POE_BEAT_BYTES);
    item *i = wire ? new_item(relay, s) : NULL;
    if (!i) { /* the peer waits for the next one */
        free(wire);
        return;
    }
    i->sends = s->beating = true;
    i->beat = wire;
    i->outbox = -1;
    poe_beat_encode(text, 0, wire);
    append(relay, i);
    relay->below->ops->send(relay->below, s->peer, s->channel, wire, POE_BEAT_BYTES, &i->op);
}

void poe_relay_beat(poe_relay *relay, const char *text)
{
    for (int peer = 0; peer < relay->board->size; peer++) {
        stream *s = relay->streams[peer * POE_CHANNELS + POE_CHANNEL_BEAT];
        if (s && s->met && !s->beating)
            beat_to(relay, s, text);
    }
}

bool poe_relay_idle(const poe_relay *relay)
{
    return relay->sends == 0 && !poe_ring_peek(&relay->board->to_agent);
}

uint64_t poe_relay_logged(const poe_relay *relay)
{
    return relay->logged;
}

bool poe_relay_cut(poe_relay *relay, int peer)
{
    if (!relay->below->ops->cut)
        return false;
    relay->below->ops->cut(relay->below, peer);
    return true;
}

/* --- stage processes come and go ---------------------------------------------------------------------------------- */
static void stand_at(stream *s, const poe_traffic *traffic)
{
    s->sending = traffic->sent;
    s->unseen = true;
    s->cursor = s->first;
    if (s->kept)
        s->kept->answered = 0;
    if (s->live)
        return;
    assert(s->sending <= s->sent && s->dropped <= traffic->received);
    for (uint64_t number = s->dropped; number < traffic->received; number++) {
        assert(s->cursor);
        s->cursor = s->cursor->later;
    }
}

/* Where the outbox is nobody's: what an earlier stage process had sent from it may still be on its way. */
static uint64_t end_of_sends(const poe_relay *relay, unsigned incarnation)
{
    uint64_t end = 0;
    for (const item *i = relay->under_way; i; i = i->next)
        if (i->sends && i->outbox == (int)(incarnation % 2) && end < i->offset + i->bytes)
            end = i->offset + i->bytes;
    return (end + OUTBOX_UNIT - 1) / OUTBOX_UNIT * OUTBOX_UNIT;
}

poe_status poe_relay_begin(poe_relay *relay)
{
    static const poe_traffic beginning;
    poe_board *board = relay->board;
    unsigned incarnation = atomic_load(&board->incarnation) + 1;
    int valid = atomic_load(&board->valid);
    collect(relay);
    for (int i = 0; i < board->size * POE_CHANNELS; i++)
        if (relay->streams[i])
            stand_at(relay->streams[i],
                     valid < 0 ? &beginning : &board->snapshots[valid].traffic[i / POE_CHANNELS][i % POE_CHANNELS]);
    board->outbox_from = end_of_sends(relay, incarnation);
    poe_board_forget(poe_board_outbox(board, incarnation) + board->outbox_from, POE_BOARD_AREA - board->outbox_from);
    poe_ring_reset(&board->to_agent);
    poe_ring_reset(&board->to_stage);
    relay->asked = false;
    atomic_store(&board->incarnation, incarnation);
    return relay->status;
}

/* Commands that it had given are carried out: its snapshot may count on them. */
void poe_relay_end(poe_relay *relay)
{
    take_commands(relay);
    for (item *i = relay->under_way; i; i = i->next)
        i->wanted = false;
    while (relay->spent) {
        item *i = relay->spent;
        relay->spent = i->next;
        free_receive(relay, i);
    }
}

/* --- moving ------------------------------------------------------------------------------------------------------- */
bool poe_relay_is_quiet(poe_relay *relay)
{
    collect(relay);
    for (const item *i = relay->under_way; i; i = i->next)
        if (i->sends)
            return false;
    return true;
}

static void pass_message(poe_relay *relay, const item *i, poe_parcel *parcel)
{
    poe_parcel_pass(parcel, poe_board_log(relay->board) + i->offset, i->bytes);
}

/* The first of a stream that is not done may have arrived in part. */
static void pack_receives(poe_relay *relay, const stream *s, poe_parcel *parcel)
{
    bool more = true, before = true;
    for (item *i = s->first; i; i = i->later) {
        bool done = i->op.done;
        poe_parcel_pass(parcel, &more, sizeof(more));
        poe_parcel_pass(parcel, &i->bytes, sizeof(i->bytes));
        poe_parcel_pass(parcel, &done, sizeof(done));
        if (done || before)
            pass_message(relay, i, parcel);
        before = done;
    }
    more = false;
    poe_parcel_pass(parcel, &more, sizeof(more));
}

static void unpack_receives(poe_relay *relay, stream *s, poe_parcel *parcel)
{
    bool more = false, done, before = true;
    uint64_t bytes;
    for (poe_parcel_pass(parcel, &more, sizeof(more)); more; poe_parcel_pass(parcel, &more, sizeof(more))) {
        poe_parcel_pass(parcel, &bytes, sizeof(bytes));
        poe_parcel_pass(parcel, &done, sizeof(done));
        item *i = new_receive(relay, s, bytes);
        if (!i)
            return;
        if (done || before)
            pass_message(relay, i, parcel);
        before = done;
        append_receive(s, i);
        i->op.done = done;
        if (done)
            relay->logged += bytes;
        else
            start_receive(relay, i);
    }
}

static void pass_kept(poe_relay *relay, stream *s, poe_parcel *parcel)
{
    bool there = s->kept != NULL;
    uint64_t bytes = there ? s->kept->bytes : 0;
    poe_parcel_pass(parcel, &there, sizeof(there));
    poe_parcel_pass(parcel, &bytes, sizeof(bytes));
    if (there && parcel->unpacks) {
        s->kept = new_receive(relay, s, bytes);
        if (s->kept)
            s->kept->op.done = true;
    }
    if (s->kept)
        pass_message(relay, s->kept, parcel);
}

static void pass_stream(poe_relay *relay, stream *s, poe_parcel *parcel)
{
    poe_parcel_pass(parcel, &s->met, sizeof(s->met));
    poe_parcel_pass(parcel, &s->sent, sizeof(s->sent));
    poe_parcel_pass(parcel, &s->dropped, sizeof(s->dropped));
    poe_parcel_pass(parcel, &s->needless, sizeof(s->needless));
    pass_kept(relay, s, parcel);
    if (parcel->unpacks)
        unpack_receives(relay, s, parcel);
    else
        pack_receives(relay, s, parcel);
}

void poe_relay_pass(poe_relay *relay, poe_parcel *parcel)
{
    collect(relay);
    for (int i = 0; i < relay->board->size * POE_CHANNELS && relay->status == POE_OK && !parcel->failed; i++) {
        bool used = relay->streams[i] != NULL;
        poe_parcel_pass(parcel, &used, sizeof(used));
        stream *s = used ? stream_of(relay, i / POE_CHANNELS, i % POE_CHANNELS) : NULL;
        if (s)
            pass_stream(relay, s, parcel);
    }
}

/* --- creating and destroying -------------------------------------------------------------------------------------- */
static poe_status open_epoll(poe_relay *relay)
{
    struct epoll_event event = {.events = EPOLLIN};
    relay->epoll = epoll_create1(EPOLL_CLOEXEC);
    if (relay->epoll < 0 || epoll_ctl(relay->epoll, EPOLL_CTL_ADD, relay->board->to_agent.fd, &event) != 0) {
        poe_error("rank %d cannot wait for its stage process: %s", relay->board->rank, strerror(errno));
        return POE_FAILED;
    }
    relay->below->ops->watch(relay->below, relay->epoll);
    return POE_OK;
}

static void free_items(item *list)
{
    for (item *next; list; list = next) {
        next = list->next;
        free(list->beat);
        free(list);
    }
}

static void free_streams(poe_relay *relay)
{
    for (int i = 0; relay->streams && i < relay->board->size * POE_CHANNELS; i++) {
        stream *s = relay->streams[i];
        for (item *next, *at = s ? s->first : NULL; at; at = next) {
            next = at->later;
            free(at);
        }
        free(s ? s->kept : NULL);
        free(s);
    }
    free(relay->streams);
}

static void free_relay(poe_relay *relay)
{
    relay->below->ops->destroy(relay->below);
    if (relay->epoll >= 0)
        close(relay->epoll);
    free_streams(relay);
    free_items(relay->spent);
    free_items(relay->spare);
    poe_space_finish(&relay->log);
    free(relay);
}

poe_status poe_relay_create(poe_board *board, poe_transport *below, const poe_relay_settings *settings,
                            poe_relay **relay)
{
    poe_relay *r = NULL;
    poe_status status = POE_BAD_INPUT;
    assert(board->size <= POE_BOARD_RANKS);
    if (!below->ops->watch) {
        poe_error("the transport %s cannot serve stage processes that are started again: it waits for messages only",
                  below->ops->name);
        goto no_relay;
    }
    status = POE_FAILED;
    r = calloc(1, sizeof(*r));
    uint64_t log_limit = settings && settings->log_limit ? settings->log_limit : LOG_LIMIT;
    if (!r || poe_space_init(&r->log, poe_board_log(board), 0, log_limit / KEPT_SHARE) != POE_OK) {
        poe_error("out of memory for the way to the other ranks");
        goto no_relay;
    }
    r->board = board;
    r->below = below;
    r->log_limit = log_limit;
    r->watched = r->valid = r->epoll = -1;
    r->streams = calloc((size_t)board->size * POE_CHANNELS, sizeof(stream *));
    if (!r->streams)
        lose_for_memory(r);
    status = r->streams ? open_epoll(r) : POE_FAILED;
    if (status != POE_OK) {
        free_relay(r);
        return status;
    }
    *relay = r;
    return POE_OK;

no_relay:
    free(r);
    below->ops->destroy(below);
    return status;
}

static void finish_sends(poe_relay *relay)
{
    double until = poe_now() + farewell;
    relay->below->ops->watch(relay->below, -1);
    for (double left = farewell; relay->sends && relay->status == POE_OK && left > 0; left = until - poe_now()) {
        relay->below->ops->progress(relay->below, left);
        collect(relay);
    }
}

/* Ends what will never be matched. The transport touches nothing once it is destroyed, done or not. */
static void cancel_all(poe_relay *relay)
{
    for (item *i = relay->under_way; i; i = i->next)
        if (!i->op.done)
            relay->below->ops->cancel(relay->below, &i->op);
}

void poe_relay_destroy(poe_relay *relay)
{
    if (!relay)
        return;
    poe_relay_end(relay);
    finish_sends(relay);
    cancel_all(relay);
    collect(relay);
    free_relay(relay);
}
