/* SPDX-License-Identifier: MIT
 * A rank moves to another process. Its peers and it let go of each other, which is no more than a connection that
 * breaks; what the two sides know of each other's messages goes into a parcel; and the next connections are made with
 * who has unpacked it. */
#include <assert.h>
#include <stdlib.h>

#include "comm/fabric/impl.h"
#include "src/clock.h"

static fabric *fabric_of(poe_transport *transport)
{
    return (fabric *)transport;
}

poe_status poe_fabric_hold(poe_transport *transport, int rank)
{
    peer *p = poe_peer_of(fabric_of(transport), rank);
    if (!p)
        return POE_FAILED;
    p->parked = true;
    if (p->line)
        poe_line_drop(p);
    p->due = HUGE_VAL;
    return POE_OK;
}

/* Both sides are about to call: the lower rank at once. */
static void call_soon(peer *p)
{
    double pause = p->rank < p->fabric->base.rank ? 0.03 : 0;
    p->parked = false;
    p->moved = p->state != JOINED;
    p->backoff = p->refused_since = 0;
    if (p->state == APART && !p->ended && !p->failed)
        p->due = p->epoch || p->pending ? poe_now() + pause : HUGE_VAL;
}

void poe_fabric_release(poe_transport *transport, int rank, int place)
{
    fabric *f = fabric_of(transport);
    peer *p = f->peers[rank];
    assert(place < f->n_directory);
    f->names[rank] = f->directory[place];
    if (!p)
        return;
    if (p->state == DIALLING)
        poe_line_drop(p);
    call_soon(p);
}

/* --- what there is with a peer ------------------------------------------------------------------------------------ */
#define PASS(parcel, field) poe_parcel_pass(parcel, &(field), sizeof(field))

/* What was posted is posted anew. */
static void pass_windows(channel *c, poe_parcel *parcel)
{
    uint64_t offered = c->offered;
    for (const transfer *t = c->receives.first; t; t = t->next)
        offered -= t->bytes + OVERHEAD;
    PASS(parcel, offered);
    if (parcel->unpacks)
        c->offered = offered;
    PASS(parcel, c->spent);
    PASS(parcel, c->allowed);
    PASS(parcel, c->taken);
    PASS(parcel, c->told);
}

static void pack_kept(const channel *c, poe_parcel *parcel)
{
    bool more = true;
    for (message *m = c->kept; m; m = m->next) {
        bool arriving = c->into == m;
        PASS(parcel, more);
        PASS(parcel, arriving);
        PASS(parcel, m->bytes);
        PASS(parcel, m->got);
        poe_parcel_pass(parcel, m->data, m->got);
    }
    more = false;
    PASS(parcel, more);
}

static void unpack_kept(channel *c, poe_parcel *parcel)
{
    bool more = false, arriving;
    size_t bytes, got;
    for (PASS(parcel, more); more; PASS(parcel, more)) {
        PASS(parcel, arriving);
        PASS(parcel, bytes);
        PASS(parcel, got);
        if (got > bytes || !poe_stream_keep(c, bytes)) {
            parcel->failed = true;
            return;
        }
        message *m = c->kept_last;
        m->got = got;
        c->into = arriving ? m : NULL;
        poe_parcel_pass(parcel, m->data, got);
    }
}

static void pass_channel(channel *c, poe_parcel *parcel)
{
    assert(!c->sends.first);
    pass_windows(c, parcel);
    PASS(parcel, c->begun);
    PASS(parcel, c->dropped);
    PASS(parcel, c->total);
    PASS(parcel, c->got);
    if (parcel->unpacks)
        unpack_kept(c, parcel);
    else
        pack_kept(c, parcel);
}

/* Units that are not acknowledged; all of them are short, and here as they travel. */
static void pass_slots(peer *p, poe_parcel *parcel)
{
    for (uint64_t s = p->acknowledged; s < p->next && !parcel->failed; s++) {
        slot *at = &p->slots[s % SLOTS];
        assert(!at->owner);
        PASS(parcel, at->unit);
        if (at->unit.bytes > POE_UNIT_SHORT)
            parcel->failed = true;
        else
            poe_parcel_pass(parcel, p->wires + (size_t)(s % SLOTS) * POE_UNIT_SLOT + POE_UNIT_HEADER, at->unit.bytes);
    }
}

static void pass_peer(peer *p, poe_parcel *parcel)
{
    PASS(parcel, p->epoch);
    PASS(parcel, p->ended);
    PASS(parcel, p->failed);
    PASS(parcel, p->acknowledged);
    PASS(parcel, p->next);
    PASS(parcel, p->received);
    PASS(parcel, p->last_channel);
    if (p->next - p->acknowledged > SLOTS)
        parcel->failed = true;
    pass_slots(p, parcel);
    for (int number = 0; number < POE_CHANNELS && !parcel->failed; number++)
        pass_channel(&p->channels[number], parcel);
    if (!parcel->unpacks)
        return;
    p->retired = p->acknowledged;
    p->cursor = p->next; /* all of it may have arrived */
    p->apart_since = p->epoch ? poe_now() : 0;
    call_soon(p);
}

void poe_fabric_pass(poe_transport *transport, poe_parcel *parcel)
{
    fabric *f = fabric_of(transport);
    for (int rank = 0; rank < f->base.size && !parcel->failed; rank++) {
        bool there = f->peers[rank] != NULL;
        PASS(parcel, there);
        peer *p = there ? poe_peer_of(f, rank) : NULL;
        if (p)
            pass_peer(p, parcel);
        else if (there)
            parcel->failed = true;
    }
}

poe_status poe_fabric_take_rank(poe_transport *transport, int rank, int size, const int *places)
{
    fabric *f = fabric_of(transport);
    unsigned char secret[POE_SECRET_BYTES];
    int host_ranks = f->base.host_ranks;
    memcpy(secret, f->secret, sizeof(secret));
    poe_status status = poe_fabric_join(f, rank, size, f->directory, secret);
    if (status != POE_OK)
        return status;
    f->base.host_ranks = host_ranks;
    for (int k = 0; k < size; k++) {
        assert(places[k] < f->n_directory);
        f->names[k] = f->directory[places[k]];
    }
    return POE_OK;
}
