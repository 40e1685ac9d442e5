/* SPDX-License-Identifier: MIT
 * Links. A message is a frame on the link's channel and its payload on a channel beside it. The receiver has `window`
 * receives of frames posted, and posts that of a payload once its frame has told the length; credits go back as the
 * number of messages released so far, so that several may travel as one. */
#include <assert.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "comm/comm_impl.h"
#include "src/clock.h"
#include "src/crc32c.h"

enum { ALIGNMENT = 64 };

struct poe_link {
    poe_part part;
    char name[64];
    atomic_int peer;
    int channel;
    bool outgoing;
    size_t max_bytes, stride;
    int window;
    uint64_t run;
    poe_frame *frames;       /* (window) */
    unsigned char *wires;    /* (window + 1, POE_FRAME_BYTES), the last one for credits */
    unsigned char *payloads; /* (window, stride) */

    /* Messages are numbered from 0; message i lives in slot i % window. */
    _Atomic uint64_t given; /* by the rank's thread: handed over, or released */
    _Atomic uint64_t ready; /* by the helper thread: slots free again, or messages that may be lent */
    _Atomic uint64_t sent;  /* by the helper thread: sends completed */
    uint64_t lent;          /* the rank's thread's: messages lent */
    uint64_t begun;         /* the helper thread's: sends started, or receives of frames posted */
    uint64_t framed;        /* ... frames read, and receives of their payloads posted */
    uint64_t credited;      /* ... credits received, or returned */
    bool listening;         /* ... the receive of a credit is posted */
    bool resumed;           /* a process before this one has sent more than it knows of: credits may be ahead */
};

static poe_link *link_of(poe_part *part)
{
    return (poe_link *)part;
}

static int slot_of(const poe_link *link, uint64_t i)
{
    return (int)(i % (uint64_t)link->window);
}

static unsigned char *wire_of(poe_link *link, int slot)
{
    return link->wires + (size_t)slot * POE_FRAME_BYTES;
}

static unsigned char *payload_of(poe_link *link, int slot)
{
    return link->payloads + (size_t)slot * link->stride;
}

static poe_operation *frame_operation(poe_link *link, int slot)
{
    return &link->part.operations[slot];
}

static poe_operation *payload_operation(poe_link *link, int slot)
{
    return &link->part.operations[link->window + slot];
}

static poe_operation *credit_operation(poe_link *link)
{
    return &link->part.operations[2 * link->window];
}

static void refuse(poe_link *link, const char *why)
{
    poe_comm_lose(link->part.comm, "link %s: rank %d refuses a message from rank %d: %s", link->name,
                  poe_comm_rank(link->part.comm), link->peer, why);
}

/* --- the sender's helper thread ----------------------------------------------------------------------------------- */
static void start_send(poe_link *link)
{
    int slot = slot_of(link, link->begun++);
    poe_frame *frame = &link->frames[slot];
    size_t bytes = (size_t)frame->message.bytes;
    frame->payload_crc = poe_crc32c(0, payload_of(link, slot), bytes);
    poe_frame_encode(frame, wire_of(link, slot));
    poe_part_send(&link->part, link->peer, link->channel, wire_of(link, slot), POE_FRAME_BYTES,
                  frame_operation(link, slot));
    if (bytes)
        poe_part_send(&link->part, link->peer, link->channel + POE_CHANNEL_PAYLOAD, payload_of(link, slot), bytes,
                      payload_operation(link, slot));
    link->part.sending++;
}

static bool finish_send(poe_link *link)
{
    int slot = slot_of(link, link->sent);
    if (link->sent == link->begun || !poe_part_done(&link->part, frame_operation(link, slot)) ||
        !poe_part_done(&link->part, payload_operation(link, slot)))
        return false;
    atomic_fetch_add(&link->sent, 1);
    link->part.sending--;
    return true;
}

static void listen_for_credit(poe_link *link)
{
    poe_part_receive(&link->part, link->peer, link->channel + POE_CHANNEL_CREDIT, wire_of(link, link->window),
                     POE_FRAME_BYTES, credit_operation(link));
    link->listening = true;
}

static bool take_credit(poe_link *link)
{
    if (!poe_part_done(&link->part, credit_operation(link)))
        return false;
    poe_frame got, expected = {.type = POE_FRAME_CREDIT, .run = link->run};
    char why[POE_WHY_BYTES];
    if (!poe_frame_decode(wire_of(link, link->window), &got, why) || !poe_frame_matches(&got, &expected, why)) {
        refuse(link, why);
        return false;
    }
    uint64_t released = got.message.data_hash;
    if (released > link->begun && !link->resumed) {
        snprintf(why, sizeof(why), "it returns %" PRIu64 " credits, of %" PRIu64 " given", released, link->begun);
        refuse(link, why);
        return false;
    }
    if (released > link->credited) /* a receiver that had to start again counts up once more */
        link->credited = released;
    poe_watch_heard(link->part.comm, link->peer, poe_now());
    listen_for_credit(link);
    return true;
}

static bool advance_sender(poe_part *part)
{
    poe_link *link = link_of(part);
    bool moved = false;
    if (!link->listening)
        listen_for_credit(link);
    if (link->begun < atomic_load(&link->given)) {
        start_send(link);
        moved = true;
    }
    while (finish_send(link))
        moved = true;
    moved |= take_credit(link);
    /* A credit may overtake the news that its message has left. */
    atomic_store(&link->ready, link->credited < link->sent ? link->credited : link->sent);
    return moved;
}

/* --- the receiver's helper thread --------------------------------------------------------------------------------- */
static void post_frame(poe_link *link)
{
    int slot = slot_of(link, link->begun++);
    poe_part_receive(&link->part, link->peer, link->channel, wire_of(link, slot), POE_FRAME_BYTES,
                     frame_operation(link, slot));
}

/* Believes the length only of a frame that is whole and of this run. */
static bool read_frame(poe_link *link)
{
    int slot = slot_of(link, link->framed);
    if (link->framed == link->begun || !poe_part_done(&link->part, frame_operation(link, slot)))
        return false;
    poe_frame *frame = &link->frames[slot];
    char why[POE_WHY_BYTES];
    if (!poe_frame_decode(wire_of(link, slot), frame, why)) {
        refuse(link, why);
        return false;
    }
    if (frame->message.bytes > link->max_bytes) {
        snprintf(why, sizeof(why), "its length is %" PRIu64 ", expected at most %zu", frame->message.bytes,
                 link->max_bytes);
        refuse(link, why);
        return false;
    }
    if (frame->message.bytes)
        poe_part_receive(&link->part, link->peer, link->channel + POE_CHANNEL_PAYLOAD, payload_of(link, slot),
                         (size_t)frame->message.bytes, payload_operation(link, slot));
    link->framed++;
    return true;
}

static bool check_payload(poe_link *link)
{
    int slot = slot_of(link, link->ready);
    if (link->ready == link->framed || !poe_part_done(&link->part, payload_operation(link, slot)))
        return false;
    char why[POE_WHY_BYTES];
    if (!poe_frame_payload_whole(&link->frames[slot], payload_of(link, slot), why)) {
        refuse(link, why);
        return false;
    }
    poe_watch_heard(link->part.comm, link->peer, poe_now());
    atomic_fetch_add(&link->ready, 1);
    return true;
}

static void return_credits(poe_link *link, uint64_t released)
{
    poe_frame frame = {.type = POE_FRAME_CREDIT, .run = link->run, .message.data_hash = released};
    poe_frame_encode(&frame, wire_of(link, link->window));
    poe_part_send(&link->part, link->peer, link->channel + POE_CHANNEL_CREDIT, wire_of(link, link->window),
                  POE_FRAME_BYTES, credit_operation(link));
    link->credited = released;
}

static bool advance_receiver(poe_part *part)
{
    poe_link *link = link_of(part);
    bool moved = false;
    uint64_t released = atomic_load(&link->given);
    while (link->begun < released + (uint64_t)link->window)
        post_frame(link);
    while (read_frame(link))
        moved = true;
    moved |= check_payload(link);
    if (released > link->credited && poe_part_done(part, credit_operation(link)))
        return_credits(link, released);
    return moved;
}

/* --- going on in another process ---------------------------------------------------------------------------------- */
static bool is_settled(const poe_part *part)
{
    const poe_link *link = (const poe_link *)part;
    return !link->outgoing || link->begun == atomic_load(&link->given);
}

static void stand(const poe_part *part, poe_part_state *state, poe_traffic *traffic)
{
    const poe_link *link = (const poe_link *)part;
    uint64_t given = atomic_load(&link->given);
    *state = (poe_part_state){.kind = link->outgoing ? POE_PART_SENDER : POE_PART_RECEIVER,
                              .peer = atomic_load(&link->peer),
                              .channel = link->channel,
                              .counts = {given}};
    if (link->outgoing)
        return;
    assert(link->lent == given);
    poe_traffic_of(traffic, link->peer, link->channel)->received -= link->begun - given;
    for (uint64_t i = given; i < link->framed; i++)
        if (link->frames[slot_of(link, i)].message.bytes)
            poe_traffic_of(traffic, link->peer, link->channel + POE_CHANNEL_PAYLOAD)->received--;
}

/* Credits are asked for, and returned, anew: they say how many there have been in all. */
static void resume(poe_link *link)
{
    int kind = link->outgoing ? POE_PART_SENDER : POE_PART_RECEIVER;
    const poe_part_state *state = poe_part_restored(link->part.comm, kind, link->peer, link->channel);
    if (!state)
        return;
    link->resumed = true;
    link->given = link->begun = state->counts[0];
    if (link->outgoing)
        link->sent = link->given;
    else
        link->ready = link->lent = link->framed = link->given;
}

/* --- opening and closing ------------------------------------------------------------------------------------------ */
static size_t payload_bytes(const poe_link *link)
{
    return (size_t)link->window * link->stride;
}

static unsigned char *allocate_payloads(poe_link *link)
{
    if (link->stride > SIZE_MAX / (size_t)link->window)
        return NULL;
    return link->outgoing ? poe_comm_allocate(link->part.comm, payload_bytes(link))
                          : aligned_alloc(ALIGNMENT, payload_bytes(link));
}

static void free_link(poe_link *link)
{
    if (link->outgoing)
        poe_comm_release(link->part.comm, link->payloads, payload_bytes(link));
    else
        free(link->payloads);
    free(link->wires);
    free(link->frames);
    free(link->part.operations);
    free(link);
}

static bool allocate(poe_link *link)
{
    size_t window = (size_t)link->window;
    link->part.n_operations = 2 * link->window + 1;
    link->part.operations = calloc(2 * window + 1, sizeof(*link->part.operations));
    link->frames = calloc(window, sizeof(*link->frames));
    link->wires = calloc(window + 1, POE_FRAME_BYTES);
    link->payloads = allocate_payloads(link);
    return link->part.operations && link->frames && link->wires && link->payloads;
}

/* NULL: out of memory, not said. */
static poe_link *new_link(poe_comm *comm, const poe_link_settings *settings)
{
    poe_link *l = calloc(1, sizeof(*l));
    if (!l)
        return NULL;
    snprintf(l->name, sizeof(l->name), "%s", settings->name);
    l->peer = settings->peer;
    l->channel = settings->channel;
    l->outgoing = settings->outgoing;
    l->max_bytes = settings->max_bytes;
    l->stride = (settings->max_bytes + ALIGNMENT) / ALIGNMENT * ALIGNMENT;
    l->window = settings->window;
    l->run = settings->run;
    l->part.comm = comm;
    l->part.advance = l->outgoing ? advance_sender : advance_receiver;
    l->part.settled = is_settled;
    l->part.stand = stand;
    if (allocate(l))
        return l;
    free_link(l);
    return NULL;
}

poe_status poe_link_open(poe_comm *comm, const poe_link_settings *settings, poe_link **link)
{
    assert(settings->channel >= 0 && settings->channel < 16 && settings->window >= 1);
    assert(settings->peer >= 0 && settings->peer < poe_comm_size(comm) && settings->peer != poe_comm_rank(comm));
    if (poe_comm_lost(comm))
        return POE_PEER_LOST;
    poe_link *l = new_link(comm, settings);
    if (!l) {
        poe_error("out of memory for link %s: %d buffers of %zu bytes", settings->name, settings->window,
                  settings->max_bytes);
        return POE_FAILED;
    }
    resume(l);
    poe_watch_add(comm, settings->peer);
    poe_part_attach(&l->part);
    *link = l;
    return POE_OK;
}

static bool all_sent(const poe_part *part)
{
    const poe_link *link = (const poe_link *)part;
    return atomic_load(&link->sent) == atomic_load(&link->given);
}

void poe_link_close(poe_link *link)
{
    if (!link)
        return;
    if (link->outgoing && !all_sent(&link->part)) {
        poe_wait wait = {.peer = &link->peer, .account = &link->part.comm->stats.credit_wait};
        snprintf(wait.text, sizeof(wait.text), "its last messages to be taken on link %s", link->name);
        poe_part_wait(&link->part, &wait, all_sent);
    }
    if (poe_part_detach(&link->part))
        free_link(link);
}

/* --- the rank's thread -------------------------------------------------------------------------------------------- */
static bool has_credit(const poe_part *part)
{
    const poe_link *link = (const poe_link *)part;
    return atomic_load(&link->given) - atomic_load(&link->ready) < (uint64_t)link->window;
}

static bool has_message(const poe_part *part)
{
    const poe_link *link = (const poe_link *)part;
    return link->lent < atomic_load(&link->ready);
}

poe_status poe_link_send_copy(poe_link *link, const poe_message *message, const void *payload)
{
    void *copy;
    poe_status status = poe_link_acquire(link, message, &copy);
    if (status != POE_OK)
        return status;
    memcpy(copy, payload, message->bytes);
    return poe_link_send(link, message);
}

poe_status poe_link_receive_copy(poe_link *link, const poe_message *expected, void *payload)
{
    void *lent;
    poe_status status = poe_link_receive(link, expected, NULL, &lent);
    if (status != POE_OK)
        return status;
    memcpy(payload, lent, expected->bytes);
    poe_link_release(link);
    return POE_OK;
}

bool poe_link_ready(const poe_link *link)
{
    return link->outgoing ? has_credit(&link->part) : has_message(&link->part);
}

static poe_status wait_for(poe_link *link, const poe_message *message, const char *what, double *account,
                           bool (*ready)(const poe_part *part))
{
    poe_comm *comm = link->part.comm;
    if (poe_comm_lost(comm))
        return POE_PEER_LOST;
    if (ready(&link->part))
        return POE_OK;
    poe_wait wait = {.peer = &link->peer, .account = account, .channel = link->channel};
    snprintf(wait.text, sizeof(wait.text), "%sstep %" PRId64 ", micro-batch %" PRId32 " on link %s", what,
             message->step, message->micro, link->name);
    return poe_part_wait(&link->part, &wait, ready);
}

poe_status poe_link_acquire(poe_link *link, const poe_message *message, void **payload)
{
    assert(link->outgoing);
    poe_status status = wait_for(link, message, "a credit for ", &link->part.comm->stats.credit_wait, has_credit);
    if (status == POE_OK)
        *payload = payload_of(link, slot_of(link, link->given));
    return status;
}

poe_status poe_link_send(poe_link *link, const poe_message *message)
{
    assert(link->outgoing && message->bytes <= link->max_bytes && has_credit(&link->part));
    if (poe_comm_lost(link->part.comm))
        return POE_PEER_LOST;
    poe_frame *frame = &link->frames[slot_of(link, link->given)];
    *frame = (poe_frame){.type = POE_FRAME_DATA, .run = link->run, .message = *message};
    const poe_comm_observer *o = &link->part.comm->observer;
    if (o->sent)
        o->sent(o->context, link->peer, link->channel, message);
    atomic_fetch_add(&link->given, 1);
    poe_comm_wake(link->part.comm);
    return POE_OK;
}

poe_status poe_link_receive(poe_link *link, const poe_message *expected, poe_message *got, void **payload)
{
    assert(!link->outgoing && link->lent - link->given < (uint64_t)link->window);
    poe_status status = wait_for(link, expected, "", &link->part.comm->stats.receive_wait, has_message);
    if (status != POE_OK)
        return status;
    int slot = slot_of(link, link->lent);
    poe_frame want = {.type = POE_FRAME_DATA, .run = link->run, .message = *expected};
    char why[POE_WHY_BYTES];
    if (!poe_frame_matches(&link->frames[slot], &want, why)) {
        poe_comm_lose(link->part.comm,
                      "link %s: rank %d waits for step %" PRId64 ", micro-batch %" PRId32
                      " and refuses the message that came from rank %d: %s",
                      link->name, poe_comm_rank(link->part.comm), expected->step, expected->micro, link->peer, why);
        return POE_PEER_LOST;
    }
    link->lent++;
    const poe_comm_observer *o = &link->part.comm->observer;
    if (o->received)
        o->received(o->context, link->peer, link->channel, &link->frames[slot].message);
    if (got)
        *got = link->frames[slot].message;
    *payload = payload_of(link, slot);
    return POE_OK;
}

void poe_link_release(poe_link *link)
{
    assert(!link->outgoing && link->given < link->lent);
    atomic_fetch_add(&link->given, 1);
    poe_comm_wake(link->part.comm);
}
