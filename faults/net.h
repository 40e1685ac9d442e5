/* SPDX-License-Identifier: MIT
 * An emulated network: rules that say what each directed link between two ranks is like, and a decorator on comm's
 * transport table that makes real messages over the real transport keep to them. Decisions are drawn from a seed and
 * the number of the message on its channel; they change when messages arrive, never what is computed. What is modelled,
 * and what is not, is on docs/networks.md. */
#ifndef POE_FAULTS_NET_H
#define POE_FAULTS_NET_H

#include <stdbool.h>
#include <stdint.h>

#include "comm/transport.h"

enum {
    POE_NET_RANKS = 128,
    POE_NET_OUTAGES = 16,
};

/* Seconds since the transport was wrapped, which is when the rank starts to talk. */
typedef struct poe_net_outage {
    double from, to; /* to: INFINITY when it never ends */
} poe_net_outage;

/* From one rank to another. All zero: the real transport's own behaviour. */
typedef struct poe_net_link {
    double delay;             /* one way, seconds */
    double jitter;            /* seconds: the delay is uniform in delay -+ jitter, never negative */
    double bandwidth;         /* bits per second, of all messages together; 0: not limited */
    double loss;              /* share of packets that are lost and sent again */
    double corrupt;           /* share of messages in which a byte is changed */
    uint64_t corrupt_message; /* the message, from 1, in which a byte is changed; 0: none */
    double cut;               /* seconds since the start when the connection is broken; 0: never */
    int n_outages;
    poe_net_outage outages[POE_NET_OUTAGES]; /* in order of their beginnings */
} poe_net_link;

typedef struct poe_net {
    int size;
    uint64_t seed;
    poe_net_link *links; /* (size, size), [from * size + to]; the diagonal is unused */
} poe_net;

/* Reads `text`, the value of --net: a file of rules if there is one of that name, or else rules separated by ';'. NULL
 * and "none" leave the network real. POE_BAD_INPUT: said, naming the rule. The caller frees *net in any case. */
poe_status poe_net_read(const char *text, int size, poe_net *net);
void poe_net_free(poe_net *net);
/* Ranks k, k + size/V, ... share a processor (--schedule interleaved with V = n_virtual; divides size): between them there
 * is no network. POE_BAD_INPUT: said, when another link is to have a bandwidth, of which a processor's ranks would have
 * one each. */
poe_status poe_net_share(poe_net *net, int n_virtual);

static inline const poe_net_link *poe_net_link_of(const poe_net *net, int from, int to)
{
    return &net->links[from * net->size + to];
}

/* True when the rule asks for nothing. */
bool poe_net_is_real(const poe_net_link *link);

/* Lines for people: the rules by link, as far as a screen holds them. NULL when the whole network is real, or out of
 * memory. The caller frees it. */
char *poe_net_describe(const poe_net *net);

/* Puts the decorator in front of *transport, unless the whole network is real; it owns the one below from then on.
 * `net` is not needed afterwards. On failure *transport is as before: POE_BAD_INPUT when a link is to be cut and the transport cannot
 * do that, POE_FAILED when out of memory; both said. Not collective: a rank delays what it sends.
 *
 * What a sender sees: an operation is done once the message has its place in an emulated send buffer of 4 MiB (Linux's
 * largest by default), which empties at the link's bandwidth: small messages at once, as with a socket. The memory is
 * the sender's again from then on. destroy() first delivers what others may still wait for: collective calls and signs
 * of life. */
poe_status poe_net_wrap(const poe_net *net, poe_transport **transport);

#endif
