/* SPDX-License-Identifier: MIT
 * Ranks as processes, or threads, that reach each other over libfabric's connected endpoints (FI_EP_MSG). One
 * connection per pair of ranks, made on first use; one that breaks is made anew, and nothing is lost or delivered
 * twice: what is sent is kept until the other side has acknowledged it.
 *
 * When a send is done: one of at most POE_UNIT_SHORT bytes as soon as it is copied into the queue of units on their
 * way, of which there is room for a fixed number; a longer one when its receiver has acknowledged all of it, for until
 * then it may have to be sent again from the sender's own memory. Long messages go straight from there into the memory
 * of the posted receive. What comes before its receive is posted is kept, and a channel's sender is held back once that
 * is more than a few MiB; the other channels go on. */
#ifndef POE_COMM_FABRIC_FABRIC_H
#define POE_COMM_FABRIC_FABRIC_H

#include "comm/agent/parcel.h"
#include "comm/transport.h"

typedef struct poe_fabric_settings {
    const char *provider;  /* libfabric's name of it, with FI_EP_MSG; NULL or "": tcp */
    const char *interface; /* network interface to listen on and connect from; NULL or "": loopback when all ranks are
                              on one host, otherwise the first one that is up */
    int port_low, port_high; /* listen on one of these ports; 0: any */
    bool registers;          /* register memory even where the provider does not ask for it */
} poe_fabric_settings;

/* Collective over `over` (any transport), which serves to exchange addresses and a random secret, and is not needed
 * afterwards. POE_BAD_INPUT: unknown provider or interface, or no free port; said by one rank, the same at all. */
poe_status poe_fabric_create(poe_comm *over, const poe_fabric_settings *settings, poe_transport **transport);

/* --- ranks that move (tools/spares.h); the transports are of this kind, without decorators --------------------------- */
/* The same, but only the ranks of `over` below `members` are the transport's. Each of the others gets one that is good
 * for poe_fabric_take_rank() and to be destroyed. A place: a rank of `over`. */
poe_status poe_fabric_create_for(poe_comm *over, const poe_fabric_settings *settings, int members,
                                 poe_transport **transport);
/* From now on nothing is exchanged with the peer; what is sent waits. POE_FAILED: out of memory, said. */
poe_status poe_fabric_hold(poe_transport *transport, int peer);
/* The peer, held or not, is to be found at `place` from now on. */
void poe_fabric_release(poe_transport *transport, int peer, int place);
/* One that has no rank takes one; `places`: (size) of all ranks. POE_FAILED: out of memory, said. */
poe_status poe_fabric_take_rank(poe_transport *transport, int rank, int size, const int *places);
/* All that its rank has with its peers, but for the receives that are posted, which are to be posted again, in the same
 * order and with what has arrived of the first of a channel. Packing: all peers are held, all sends are done. Unpacking:
 * after poe_fabric_take_rank(). */
void poe_fabric_pass(poe_transport *transport, poe_parcel *parcel);

#endif
