/* SPDX-License-Identifier: MIT
 * What flows on a connection. Channels take turns, unit by unit, and little is handed to the provider ahead, so that a
 * short message waits behind at most two bodies. One receive is posted at a time: of a header, or of the body that it
 * announced. The counters of units outlive a connection: they tell what must be sent again on the next one. */
#include <assert.h>
#include <stdlib.h>

#include "comm/fabric/impl.h"
#include "src/log.h"

enum { FEW_UNITS = SLOTS / 2, PATIENCE = 32, SMALLEST_PART = 64 << 10 };

static uint64_t bit(int number)
{
    return (uint64_t)1 << number;
}

static slot *slot_of(peer *p, uint64_t sequence)
{
    return &p->slots[sequence % SLOTS];
}

static unsigned char *wire_of(peer *p, const slot *s)
{
    return p->wires + (size_t)(s - p->slots) * POE_UNIT_SLOT;
}

/* --- transfers ---------------------------------------------------------------------------------------------------- */
static void end_operation(fabric *f, poe_operation *op, poe_status status)
{
    op->status = status;
    op->done = true;
    f->completed++;
}

static void end_transfer(fabric *f, transfer *t, poe_status status)
{
    if (t->op)
        end_operation(f, t->op, status);
    else
        free(t->data);
    t->next = f->transfers;
    f->transfers = t;
}

static transfer *new_transfer(fabric *f, void *data, size_t bytes, poe_operation *op)
{
    transfer *t = f->transfers;
    if (t)
        f->transfers = t->next;
    else
        t = malloc(sizeof(*t));
    if (!t) {
        poe_error("out of memory for a message between ranks");
        end_operation(f, op, POE_FAILED);
        return NULL;
    }
    *t = (transfer){.op = op, .data = data, .bytes = bytes};
    return t;
}

static void append(queue *q, transfer *t)
{
    if (q->first)
        q->last->next = t;
    else
        q->first = t;
    q->last = t;
}

static transfer *take(queue *q)
{
    transfer *t = q->first;
    q->first = t->next;
    return t;
}

static void unlink_transfer(queue *q, transfer *t)
{
    transfer *before = NULL;
    for (transfer *at = q->first; at != t; at = at->next)
        before = at;
    if (before)
        before->next = t->next;
    else
        q->first = t->next;
    if (q->last == t)
        q->last = before;
}

/* --- sending: units ----------------------------------------------------------------------------------------------- */
static size_t room(const channel *c)
{
    uint64_t left = c->allowed - c->spent, cost = c->sent ? 0 : OVERHEAD;
    return left < cost ? 0 : (size_t)(left - cost);
}

/* Bytes of the channel's first send that may go as the next unit; false: the window is used up. */
static bool next_part(const channel *c, size_t *bytes)
{
    size_t left = c->sends.first->bytes - c->sent, wanted = left < UNIT_BYTES ? left : UNIT_BYTES;
    size_t least = wanted < SMALLEST_PART ? wanted : SMALLEST_PART, free_bytes = room(c);
    if (c->allowed - c->spent < (c->sent ? 0 : OVERHEAD) || free_bytes < least)
        return false;
    *bytes = wanted < free_bytes ? wanted : free_bytes;
    return true;
}

/* An acknowledgement is asked for when memory waits for it, and from time to time when few slots are left. */
static bool is_urgent(const peer *p, bool ends_long)
{
    return ends_long || (p->next - p->retired >= FEW_UNITS && p->next % PATIENCE == 0);
}

static void make_unit(peer *p, int number, size_t bytes)
{
    channel *c = &p->channels[number];
    transfer *t = c->sends.first;
    slot *s = slot_of(p, p->next);
    bool ends = c->sent + bytes == t->bytes, is_long = t->bytes > POE_UNIT_SHORT;
    *s = (slot){.owner = is_long ? t : NULL,
                .unit = {.type = POE_UNIT_DATA, .channel = number, .urgent = is_urgent(p, ends && is_long),
                         .sequence = p->next, .total = t->bytes, .offset = c->sent, .bytes = (uint32_t)bytes}};
    if (poe_unit_is_short(&s->unit) && bytes)
        memcpy(wire_of(p, s) + POE_UNIT_HEADER, t->data + c->sent, bytes);
    c->spent += bytes + (c->sent ? 0 : OVERHEAD);
    c->sent += bytes;
    p->next++;
    if (!ends)
        return;
    take(&c->sends);
    c->sent = 0;
    if (!c->sends.first)
        p->pending &= ~bit(number);
    if (!is_long)
        end_transfer(p->fabric, t, POE_OK);
}

/* The next channel in turn that may send. */
static bool fill(peer *p)
{
    if (p->next - p->retired == SLOTS || !p->pending)
        return false;
    for (int i = 1; i <= POE_CHANNELS; i++) {
        int number = (p->last_channel + i) % POE_CHANNELS;
        size_t bytes;
        if (!(p->pending & bit(number)) || !next_part(&p->channels[number], &bytes))
            continue;
        make_unit(p, number, bytes);
        p->last_channel = number;
        return true;
    }
    return false;
}

/* --- sending: the provider ---------------------------------------------------------------------------------------- */
static bool post_body(peer *p)
{
    slot *s = p->half;
    if (!poe_line_post(p, SENT_BODY, s, s->owner->data + s->unit.offset, s->unit.bytes))
        return false;
    p->half = NULL;
    return true;
}

/* The units that go in the next message, up to a long one; more are made while there is room. */
static int gather(peer *p, struct iovec *parts, int limit)
{
    size_t bytes = 0;
    int n = 0;
    while (n < limit && (p->cursor + (uint64_t)n < p->next || fill(p))) {
        slot *s = slot_of(p, p->cursor + (uint64_t)n);
        size_t length = poe_unit_length(&s->unit);
        bytes += length;
        if (bytes > POE_UNIT_SLOT)
            break;
        s->unit.received = p->received;
        poe_unit_encode(&s->unit, wire_of(p, s));
        parts[n++] = (struct iovec){.iov_base = wire_of(p, s), .iov_len = length};
        if (!poe_unit_is_short(&s->unit))
            break;
    }
    return n;
}

static bool transmit(peer *p)
{
    struct iovec parts[MAX_PARTS];
    int n = gather(p, parts, p->fabric->parts);
    if (n == 0 || !poe_line_say(p, parts, n))
        return false;
    p->news = false;
    p->cursor += (uint64_t)n;
    slot *last = slot_of(p, p->cursor - 1);
    if (poe_unit_is_short(&last->unit))
        return true;
    p->half = last;
    return post_body(p);
}

static bool say(peer *p, poe_unit unit)
{
    unsigned char *wire = p->wires + (size_t)SLOTS * POE_UNIT_SLOT;
    unit.received = p->received;
    poe_unit_encode(&unit, wire);
    return poe_line_say(p, &(struct iovec){.iov_base = wire, .iov_len = POE_UNIT_HEADER}, 1);
}

static bool say_windows(peer *p)
{
    for (int number = 0; p->windows; number++) {
        channel *c = &p->channels[number];
        if (!(p->windows & bit(number)))
            continue;
        if (!say(p, (poe_unit){.type = POE_UNIT_WINDOW, .channel = number, .total = c->offered}))
            return false;
        c->told = c->offered;
        p->windows &= ~bit(number);
        p->news = false;
    }
    return true;
}

static void say_controls(peer *p)
{
    if (!say_windows(p))
        return;
    if (p->bye_answer && say(p, (poe_unit){.type = POE_UNIT_BYE_ANSWER}))
        p->bye_answer = p->news = false;
    if (p->bye && !p->bye_said && say(p, (poe_unit){.type = POE_UNIT_BYE})) {
        p->bye_said = true;
        p->news = false;
    }
    if (p->news && say(p, (poe_unit){.type = POE_UNIT_NEWS}))
        p->news = false;
}

void poe_stream_pump(peer *p)
{
    if (p->state != JOINED)
        return;
    while (!p->broken && p->under_way < UNIT_BYTES)
        if (p->half ? !post_body(p) : !transmit(p))
            break;
    if (!p->broken && !p->half)
        say_controls(p);
    poe_line_sent(p);
}

/* --- acknowledgements --------------------------------------------------------------------------------------------- */
static void retire(peer *p)
{
    while (p->retired < p->acknowledged && !slot_of(p, p->retired)->posted) {
        slot *s = slot_of(p, p->retired++);
        if (s->owner && s->unit.offset + s->unit.bytes == s->unit.total)
            end_transfer(p->fabric, s->owner, POE_OK);
    }
}

static bool acknowledge(peer *p, uint64_t received)
{
    if (received < p->acknowledged || received > p->cursor)
        return false;
    p->acknowledged = received;
    retire(p);
    return true;
}

bool poe_stream_is_idle(const peer *p)
{
    return p->acknowledged == p->next && !p->pending && p->bye_said == p->bye && p->released == p->bye;
}

/* --- receiving: where it goes ------------------------------------------------------------------------------------- */
static void refuse_length(peer *p, int number, transfer *t, size_t came)
{
    poe_error("rank %d expects a message of %zu bytes from rank %d on channel %d, but got one of %zu bytes",
              p->fabric->base.rank, t->bytes, p->rank, number, came);
    end_transfer(p->fabric, t, POE_PEER_LOST);
}

static void drop_kept(channel *c)
{
    message *m = c->kept;
    c->kept = m->next;
    if (c->into == m)
        c->into = NULL;
    free(m);
}

/* Gives kept messages to receives. One that is still arriving goes on into the receive's own memory. */
static void match_kept(peer *p, int number)
{
    channel *c = &p->channels[number];
    while (c->kept && !c->kept->busy && c->receives.first) {
        message *m = c->kept;
        transfer *t = c->receives.first;
        bool arriving = c->into == m;
        if (t->bytes != m->bytes) {
            refuse_length(p, number, take(&c->receives), m->bytes);
            c->dropped |= arriving;
        } else {
            memcpy(t->data, m->data, m->got);
            if (!arriving)
                end_transfer(p->fabric, take(&c->receives), POE_OK);
        }
        drop_kept(c);
    }
}

bool poe_stream_keep(channel *c, size_t bytes)
{
    message *m = malloc(sizeof(*m) + bytes); /* the window bounds what of it is ever touched */
    if (!m)
        return false;
    *m = (message){.bytes = bytes};
    if (c->kept)
        c->kept_last->next = m;
    else
        c->kept = m;
    c->kept_last = c->into = m;
    return true;
}

static bool begin_message(peer *p, const poe_unit *unit)
{
    channel *c = &p->channels[unit->channel];
    c->begun = true;
    c->dropped = false;
    c->into = NULL;
    c->total = unit->total;
    c->got = 0;
    if (c->kept || !c->receives.first)
        return poe_stream_keep(c, c->total);
    if (c->receives.first->bytes != c->total) {
        refuse_length(p, unit->channel, take(&c->receives), c->total);
        c->dropped = true;
    }
    return true;
}

static unsigned char *place(peer *p, const poe_unit *unit)
{
    channel *c = &p->channels[unit->channel];
    if (!c->begun && !begin_message(p, unit)) {
        poe_line_fail(p, "out of memory for a message of %llu bytes from rank %d", (unsigned long long)unit->total,
                      p->rank);
        return NULL;
    }
    if (c->dropped)
        return p->fabric->dump;
    return (c->into ? c->into->data : c->receives.first->data) + unit->offset;
}

static void got_unit(peer *p)
{
    const poe_unit *unit = &p->unit;
    channel *c = &p->channels[unit->channel];
    c->taken += unit->bytes + (unit->offset ? 0 : OVERHEAD);
    c->got += unit->bytes;
    p->received++;
    p->damaged = 0;
    p->news |= unit->urgent;
    message *m = c->into;
    if (m) {
        m->got = c->got;
        m->busy = false;
    }
    if (c->got == c->total) {
        c->begun = false;
        c->into = NULL;
        if (!m && !c->dropped)
            end_transfer(p->fabric, take(&c->receives), POE_OK);
    }
    match_kept(p, unit->channel);
}

/* --- receiving: headers ------------------------------------------------------------------------------------------- */
static void listen(peer *p)
{
    if (p->broken || p->held || p->body || p->listening)
        return;
    p->listening = poe_line_post(p, GOT_HEADER, NULL, p->line->heard, POE_UNIT_SLOT);
    p->broken |= !p->listening;
}

/* What no sound sender sends. */
static void damaged(peer *p, const char *why)
{
    p->broken = true;
    if (++p->damaged > 8)
        poe_line_fail(p, "what comes from rank %d is damaged, again and again: %s", p->rank, why);
    else
        poe_warn("what comes from rank %d is damaged (%s): the connection is made anew", p->rank, why);
}

static bool fits(const peer *p, const poe_unit *unit)
{
    const channel *c = &p->channels[unit->channel];
    size_t cost = unit->bytes + (unit->offset ? 0 : OVERHEAD);
    return unit->sequence == p->received && unit->offset == (c->begun ? c->got : 0) &&
           (!c->begun || unit->total == c->total) && unit->bytes <= UNIT_BYTES && c->taken + cost <= c->offered;
}

static void hear_data(peer *p, const poe_unit *unit, const unsigned char *body)
{
    if (!fits(p, unit)) {
        damaged(p, "a part of a message that is not the next one");
        return;
    }
    p->unit = *unit;
    if (!poe_unit_is_short(unit)) {
        p->held = true;
        if (p->channels[unit->channel].receives.first)
            poe_stream_settle(p);
        return;
    }
    unsigned char *to = place(p, unit);
    if (!to)
        return;
    if (unit->bytes)
        memcpy(to, body, unit->bytes);
    got_unit(p);
}

static void hear_unit(peer *p, const poe_unit *unit, const unsigned char *body)
{
    channel *c = &p->channels[unit->channel];
    bool sensible = acknowledge(p, unit->received);
    poe_line_heard(p);
    if (!sensible)
        damaged(p, "it acknowledges what was not sent");
    else if (unit->type == POE_UNIT_DATA)
        hear_data(p, unit, body);
    else if (unit->type == POE_UNIT_WINDOW && unit->total > c->allowed)
        c->allowed = unit->total;
    else if (unit->type == POE_UNIT_BYE)
        p->ended = p->bye_answer = true;
    else if (unit->type == POE_UNIT_BYE_ANSWER)
        p->released = true;
}

static void hear(peer *p, size_t bytes)
{
    const unsigned char *wire = p->line->heard;
    poe_unit unit;
    char why[POE_WIRE_WHY];
    p->listening = false;
    for (size_t at = 0; at < bytes && !p->broken && !p->failed; at += poe_unit_length(&unit)) {
        if (poe_unit_decode(wire + at, bytes - at, &unit, why)) {
            hear_unit(p, &unit, wire + at + POE_UNIT_HEADER);
        } else {
            damaged(p, why);
            break;
        }
    }
    if (!p->failed)
        listen(p);
}

void poe_stream_settle(peer *p)
{
    if (!p->held)
        return;
    unsigned char *to = place(p, &p->unit);
    if (!to)
        return;
    p->held = false;
    p->body = poe_line_post(p, GOT_BODY, NULL, to, p->unit.bytes);
    p->broken |= !p->body;
    message *m = p->channels[p->unit.channel].into;
    if (m)
        m->busy = p->body;
}

static void hear_body(peer *p, size_t bytes)
{
    p->body = false;
    if (bytes != p->unit.bytes) {
        damaged(p, "a body of another length than announced");
        return;
    }
    got_unit(p);
    listen(p);
}

void poe_stream_completed(const token *t, size_t bytes)
{
    peer *p = t->line->peer;
    switch (t->kind) {
    case SENT_BODY:
        p->under_way -= t->bytes;
        t->slot->posted = false;
        retire(p);
        break;
    case GOT_HEADER:
        hear(p, bytes);
        break;
    case GOT_BODY:
        hear_body(p, bytes);
        break;
    }
}

/* --- connections come and go -------------------------------------------------------------------------------------- */
void poe_stream_joined(peer *p, uint64_t received)
{
    p->cursor = p->next; /* all of it may have arrived */
    if (!acknowledge(p, received)) {
        poe_line_fail(p, "rank %d has got %llu messages, it says, of %llu to %llu", p->rank,
                      (unsigned long long)received, (unsigned long long)p->acknowledged, (unsigned long long)p->next);
        return;
    }
    p->cursor = p->acknowledged;
    for (int number = 0; number < POE_CHANNELS; number++)
        if (p->channels[number].offered > SLACK)
            p->windows |= bit(number);
    p->bye_said = false;
    poe_stream_pump(p);
}

void poe_stream_apart(peer *p)
{
    for (int i = 0; i < SLOTS; i++)
        p->slots[i].posted = false;
    p->half = NULL;
    p->under_way = 0;
    p->news = p->bye_answer = false;
    message *m = p->body ? p->channels[p->unit.channel].into : NULL;
    p->listening = p->held = p->body = false;
    if (m) {
        m->busy = false;
        match_kept(p, p->unit.channel);
    }
    retire(p);
}

void poe_stream_fail(peer *p)
{
    p->pending = 0;
    for (; p->retired < p->next; p->retired++) {
        slot *s = slot_of(p, p->retired);
        if (s->owner && s->unit.offset + s->unit.bytes == s->unit.total)
            end_transfer(p->fabric, s->owner, POE_PEER_LOST);
    }
    p->acknowledged = p->cursor = p->next;
    for (int number = 0; number < POE_CHANNELS; number++) {
        channel *c = &p->channels[number];
        while (c->sends.first)
            end_transfer(p->fabric, take(&c->sends), POE_PEER_LOST);
        while (c->receives.first)
            end_transfer(p->fabric, take(&c->receives), POE_PEER_LOST);
        while (c->kept)
            drop_kept(c);
    }
}

/* --- operations --------------------------------------------------------------------------------------------------- */
/* backend: the peer, the transfer, the channel and its direction. */
static void remember(poe_operation *op, peer *p, transfer *t, int number, bool sends)
{
    op->backend[0] = p;
    op->backend[1] = t;
    op->backend[2] = (void *)(uintptr_t)(2 * number + sends);
}

void poe_stream_send(peer *p, int number, const void *data, size_t bytes, poe_operation *op)
{
    /* Only cancelling writes to a send's memory, and then to a copy. */
    transfer *t = new_transfer(p->fabric, (void *)(uintptr_t)data, bytes, op);
    if (!t)
        return;
    remember(op, p, t, number, true);
    append(&p->channels[number].sends, t);
    p->pending |= bit(number); /* to be sent with what else there is by the next progress */
    poe_line_want(p);
}

/* The window is told anew when it has grown by much, or when the sender may soon need it. */
static bool is_window_due(const channel *c)
{
    return c->offered - c->told >= SLACK / 2 || (c->offered > c->told && c->told - c->taken < SLACK / 2);
}

void poe_stream_receive(peer *p, int number, void *data, size_t bytes, poe_operation *op)
{
    channel *c = &p->channels[number];
    transfer *t = new_transfer(p->fabric, data, bytes, op);
    if (!t)
        return;
    remember(op, p, t, number, false);
    append(&c->receives, t);
    c->offered += bytes + OVERHEAD;
    match_kept(p, number);
    if (is_window_due(c))
        p->windows |= bit(number);
}

/* A message that is arriving in this receive's memory goes nowhere from now on. */
static void cancel_receive(peer *p, int number, transfer *t)
{
    channel *c = &p->channels[number];
    bool arriving = c->receives.first == t && c->begun && !c->into && !c->dropped;
    unlink_transfer(&c->receives, t);
    if (arriving) {
        c->dropped = true;
        if (p->body && p->unit.channel == number)
            poe_line_drop(p);
    }
    end_transfer(p->fabric, t, POE_PEER_LOST);
}

static bool is_posted(const peer *p, const transfer *t)
{
    for (uint64_t s = p->retired; s < p->next; s++)
        if (p->slots[s % SLOTS].owner == t && p->slots[s % SLOTS].posted)
            return true;
    return false;
}

/* The rest of a message that has begun must follow: from a copy. */
static void cancel_send(peer *p, int number, transfer *t)
{
    channel *c = &p->channels[number];
    bool queued = false;
    for (const transfer *at = c->sends.first; at; at = at->next)
        queued |= at == t;
    if (queued && !(c->sends.first == t && c->sent)) {
        unlink_transfer(&c->sends, t);
        if (!c->sends.first)
            p->pending &= ~bit(number);
        end_transfer(p->fabric, t, POE_PEER_LOST);
        return;
    }
    unsigned char *copy = malloc(t->bytes);
    if (!copy)
        return;
    memcpy(copy, t->data, t->bytes);
    t->data = copy;
    end_operation(p->fabric, t->op, POE_PEER_LOST);
    t->op = NULL;
    if (is_posted(p, t))
        poe_line_drop(p);
}

void poe_stream_cancel(peer *p, poe_operation *op)
{
    uintptr_t which = (uintptr_t)op->backend[2];
    if (which % 2)
        cancel_send(p, (int)(which / 2), op->backend[1]);
    else
        cancel_receive(p, (int)(which / 2), op->backend[1]);
}
