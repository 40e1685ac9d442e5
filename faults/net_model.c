/* SPDX-License-Identifier: MIT */
#include "faults/net_model.h"

#include <math.h>

/* What Linux waits beyond the round trip before it sends again unasked, and how many packets must follow a lost one
 * for the receiver's answers to ask for it. */
static const double patience = 0.2;
enum { ENOUGH_BEHIND = 3 };

/* How many packets get through before one is lost. */
static double packets_between(double loss, poe_rng *rng)
{
    return floor(log1p(-poe_rng_uniform(rng)) / log1p(-loss));
}

/* How much later the last of the message's packets that were lost arrives: after a round trip when the packets behind
 * it gave it away, after a timeout, which doubles, at the message's end or when the packet is lost again. */
static double recovery(const poe_net_link *link, double rtt, poe_rng *rng, size_t bytes)
{
    double packets = fmax(1, ceil((double)bytes / POE_NET_PACKET)), worst = 0;
    if (!(link->loss > 0))
        return 0;
    for (double i = packets_between(link->loss, rng); i < packets; i += 1 + packets_between(link->loss, rng)) {
        double timeout = rtt + patience;
        double late = packets - 1 - i >= ENOUGH_BEHIND ? rtt : timeout;
        for (; poe_rng_uniform(rng) < link->loss; timeout *= 2)
            late += timeout;
        worst = fmax(worst, late);
    }
    return worst;
}

/* When to begin so that no part of it is under way while the link is down: what is, is lost and sent anew. */
static double after_outages(const poe_net_link *link, double begin, double takes)
{
    for (int i = 0; i < link->n_outages; i++)
        if (begin < link->outages[i].to && begin + takes >= link->outages[i].from)
            begin = link->outages[i].to;
    return begin;
}

poe_net_times poe_net_next(const poe_net_link *link, double rtt, poe_net_state *state, poe_rng *rng, double now,
                           size_t bytes)
{
    bool limited = link->bandwidth > 0;
    double serial = limited ? 8 * (double)bytes / link->bandwidth : 0;
    double room = limited ? 8 * (double)POE_NET_SEND_BUFFER / link->bandwidth : 0;
    double travel = link->delay;
    if (link->jitter > 0)
        travel = fmax(0, travel + link->jitter * (2 * poe_rng_uniform(rng) - 1));
    travel += recovery(link, rtt, rng, bytes);
    double begin = after_outages(link, fmax(now, state->free), serial + travel);
    state->free = begin + serial;
    state->drained = fmax(now, state->drained) + serial;
    state->arrival = fmax(state->arrival, state->free + travel);
    return (poe_net_times){.accepted = fmax(now, state->drained - room), .due = state->arrival};
}
