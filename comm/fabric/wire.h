/* SPDX-License-Identifier: MIT
 * What travels on a connection of the fabric transport, little-endian. Messages are cut into units; a unit is a header
 * of 64 bytes, with a body behind it when that is short, or else in a message of libfabric's own. Several units travel
 * in one such message, one behind the other; that of a long body is the last. The greeting goes with the request for a
 * connection and with its acceptance. Nothing in either is believed before its checksum holds. */
#ifndef POE_COMM_FABRIC_WIRE_H
#define POE_COMM_FABRIC_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    POE_UNIT_HEADER = 64,
    POE_UNIT_SLOT = 8192,                             /* a header and what may be behind it */
    POE_UNIT_SHORT = POE_UNIT_SLOT - POE_UNIT_HEADER, /* longest body that is behind its header */
    POE_GREETING_BYTES = 48,                           /* RDMA connections carry 56 */
    POE_SECRET_BYTES = 32,                             /* each side shows the other half of it */
    POE_WIRE_WHY = 128,
};

typedef enum poe_unit_type {
    POE_UNIT_DATA = 1,   /* part of a message: counted, kept until it is acknowledged */
    POE_UNIT_NEWS,       /* nothing but the acknowledgement that every header carries */
    POE_UNIT_WINDOW,     /* `total`: what may have been sent on the channel, from the beginning */
    POE_UNIT_BYE,        /* the sender wants nothing more */
    POE_UNIT_BYE_ANSWER, /* ... which its receiver has heard */
} poe_unit_type;

typedef struct poe_unit {
    poe_unit_type type;
    int channel;
    bool urgent;       /* acknowledge at once */
    uint64_t sequence; /* of this unit of data, from 0 in each direction */
    uint64_t received; /* units of data that the sender of this header has got, in order */
    uint64_t total;    /* length of the message */
    uint64_t offset;   /* of this unit in it */
    uint32_t bytes;    /* of this unit */
} poe_unit;

static inline bool poe_unit_is_short(const poe_unit *unit)
{
    return unit->bytes <= POE_UNIT_SHORT;
}

/* Bytes of a header and what is behind it. */
static inline size_t poe_unit_length(const poe_unit *unit)
{
    return POE_UNIT_HEADER + (unit->type == POE_UNIT_DATA && poe_unit_is_short(unit) ? unit->bytes : 0);
}

/* The checksum covers a short body, which is behind the header already. */
void poe_unit_encode(const poe_unit *unit, unsigned char wire[POE_UNIT_SLOT]);
/* `bytes`: how many came, of which this unit and its short body take poe_unit_length(). False: not a whole unit; `why`
 * says so. */
bool poe_unit_decode(const unsigned char *wire, size_t bytes, poe_unit *unit, char why[POE_WIRE_WHY]);

typedef struct poe_greeting {
    int from, to;      /* ranks */
    uint32_t epoch;    /* connections that these two ranks have had, as far as the sender knows */
    uint64_t received; /* units of data that the sender has got */
} poe_greeting;

/* `secret`: the half that this side shows. */
void poe_greeting_encode(const poe_greeting *greeting, const unsigned char *secret, unsigned char *wire);
/* False unless the bytes are a whole greeting of one who knows the secret. */
bool poe_greeting_decode(const unsigned char *wire, size_t bytes, const unsigned char *secret, poe_greeting *greeting,
                         char why[POE_WIRE_WHY]);

#endif
