/* SPDX-License-Identifier: MIT
 * Ranks as threads of one process: messages are copied from memory to memory. */
#ifndef POE_COMM_INPROC_INPROC_H
#define POE_COMM_INPROC_INPROC_H

#include "comm/transport.h"

/* `size` transports that reach each other, transports[rank], each to be used by its own rank's helper thread. */
poe_status poe_inproc_create(int size, poe_transport **transports);

#endif
