/* SPDX-License-Identifier: MIT
 * When a message arrives: the model of one directed link, apart from all clocks and queues. Private to faults/ and its
 * tests. Times are seconds on one clock, of which zero is the start. */
#ifndef POE_FAULTS_NET_MODEL_H
#define POE_FAULTS_NET_MODEL_H

#include <stddef.h>

#include "faults/net.h"
#include "src/rng.h"

enum {
    POE_NET_PACKET = 1448,          /* bytes of a message in a full Ethernet frame of TCP */
    POE_NET_SEND_BUFFER = 4 << 20,  /* bytes */
};

typedef struct poe_net_state {
    double free;    /* when the last byte given so far has left */
    double drained; /* the same, had the link never been down */
    double arrival; /* of the last message */
} poe_net_state;

typedef struct poe_net_times {
    double accepted; /* its last byte is in the send buffer; >= now */
    double due;      /* it arrives; >= accepted, and never before the message sent before it */
} poe_net_times;

/* The next message of `bytes` is given to the link at `now`. `rtt`: both directions' delays, which a retransmission
 * takes. `rng` is drawn from only where the link has jitter or loss. */
poe_net_times poe_net_next(const poe_net_link *link, double rtt, poe_net_state *state, poe_rng *rng, double now,
                           size_t bytes);

#endif
