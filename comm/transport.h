/* SPDX-License-Identifier: MIT
 * For authors of transports and of decorators on them: the table that moves bytes between ranks. All calls but wake()
 * come from the comm's helper thread. Messages between the same two ranks on the same channel arrive in order and
 * whole; a receive is posted with exactly the length that is sent. Nothing blocks but progress(). */
#ifndef POE_COMM_TRANSPORT_H
#define POE_COMM_TRANSPORT_H

#include <stdbool.h>
#include <stddef.h>

#include "comm/comm.h"

/* Links and reduces have 0..15 for frames; the others are derived. */
enum {
    POE_CHANNEL_PAYLOAD = 16,
    POE_CHANNEL_CREDIT = 32,
    POE_CHANNEL_BEAT = 48,
    POE_CHANNEL_COLLECTIVE = 49,
    POE_CHANNEL_COLLECTIVE_PAYLOAD = 50,
    POE_CHANNELS = 64,
};

typedef struct poe_transport poe_transport;

/* One send or receive under way; owned by who started it, untouched until done. */
typedef struct poe_operation {
    bool done;
    poe_status status;   /* valid when done; the transport has said why it is not POE_OK */
    void *backend[4];    /* the transport's own */
} poe_operation;

typedef struct poe_transport_ops {
    const char *name;
    /* Start; the memory must stay until the operation is done. A failing start is an operation that is done, failed. */
    void (*send)(poe_transport *transport, int peer, int channel, const void *data, size_t bytes, poe_operation *op);
    void (*receive)(poe_transport *transport, int peer, int channel, void *data, size_t bytes, poe_operation *op);
    /* Completes operations. Sleeps at most `wait` seconds when there is nothing to do; ends early on any completion or
     * wake(). Returns true when something was completed. */
    bool (*progress)(poe_transport *transport, double wait);
    void (*wake)(poe_transport *transport); /* from any thread or signal handler */
    /* Ends an operation that will never be matched. It is done after it; if not, the transport may still touch its
     * memory, which therefore must never be freed. */
    void (*cancel)(poe_transport *transport, poe_operation *op);
    void (*destroy)(poe_transport *transport);
    /* For tests: breaks the connection with `peer` as a failing network would. NULL: there are none of its own. */
    void (*cut)(poe_transport *transport, int peer);
    /* progress() also ends while `fd` is readable, from then on; -1: no more. NULL: it cannot. */
    void (*watch)(poe_transport *transport, int fd);
    /* True when all that was sent would reach its peers even if this process died now. NULL: it never would. */
    bool (*settled)(const poe_transport *transport);
    /* Memory, aligned to 64, that send() takes no copy of, where it does of other memory; until it is given back. From
     * any thread. NULL: there is no room, not said. The functions are NULL where send() never takes a copy. */
    void *(*allocate)(poe_transport *transport, size_t bytes);
    void (*release)(poe_transport *transport, void *memory, size_t bytes);
} poe_transport_ops;

struct poe_transport {
    const poe_transport_ops *ops;
    int rank, size, host_ranks;
    const char *host;
    const char *emulated; /* lines that say how a decorator changes the network; NULL: the network is real */
    struct poe_board *board; /* of a stage process that its agent can start again (comm/agent/board.h); else NULL */
};

/* A comm on a transport, which it owns from then on, also on failure. Starts the helper thread, which speaks for the
 * calling thread's log context. */
poe_status poe_comm_create(poe_transport *transport, const poe_comm_settings *settings, poe_comm **comm);

#endif
