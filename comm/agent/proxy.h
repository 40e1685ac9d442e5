/* SPDX-License-Identifier: MIT
 * A stage process's transport: every operation is carried out by its rank's agent (relay.h), over the board. */
#ifndef POE_COMM_AGENT_PROXY_H
#define POE_COMM_AGENT_PROXY_H

#include "comm/agent/board.h"

/* The board is borrowed. What is sent is copied into the outbox, unless it lies there (allocate()), what is received out
 * of the log. Sends are done when the agent's transport says so; other memory than the outbox is the caller's again from
 * the moment that settled() is true, as the copy is the agent's then, whatever becomes of this process. */
poe_status poe_proxy_create(poe_board *board, poe_transport **transport);

#endif
