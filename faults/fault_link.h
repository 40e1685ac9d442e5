/* SPDX-License-Identifier: MIT
 * A decorator on comm's transport table that damages or holds back what is sent, when told to at run time. Until then
 * everything passes through. All calls come from the transport's own thread. */
#ifndef POE_FAULTS_FAULT_LINK_H
#define POE_FAULTS_FAULT_LINK_H

#include <stdbool.h>

#include "comm/transport.h"

/* Puts the decorator in front of *transport; it owns the one below from then on. POE_FAILED: out of memory, said, and
 * *transport is as before. Sends that are held back when it is destroyed fail. */
poe_status poe_fault_link_wrap(poe_transport **transport);

/* A byte of the next frame or payload to `peer` is changed, above the transport, which cannot have it sent again. */
void poe_fault_link_corrupt(poe_transport *link, int peer);
/* For `seconds` from now on nothing leaves for the peers that are marked, (size) of them; afterwards it does, in order.
 * Of two such times for a peer the later end counts. */
void poe_fault_link_block(poe_transport *link, const bool *peers, double seconds);

#endif
