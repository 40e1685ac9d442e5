/* SPDX-License-Identifier: MIT
 * An agent's half of a rank's communication: carries out what its stage process asks for (proxy.h), on a transport that
 * outlives stage processes, and remembers what a next one will need.
 *
 * Every message that arrives is logged, in the board, until a snapshot says that it is not wanted again. A stage process
 * that goes on from a snapshot asks for the same messages in the same order and gets them from the log; what it sends
 * again is dropped as long as its predecessors have sent it, so no other rank notices more than a pause. Channels whose
 * messages stand for themselves (credits, which say how many there have been in all, and signs of life) are never
 * dropped, and of what came on them only the last message is kept. */
#ifndef POE_COMM_AGENT_RELAY_H
#define POE_COMM_AGENT_RELAY_H

#include "comm/agent/board.h"

typedef struct poe_relay poe_relay;

typedef struct poe_relay_settings {
    uint64_t log_limit; /* bytes of messages that are wanted again; beyond it a snapshot is asked for. 0: 256 MiB */
} poe_relay_settings;

/* Owns `below` from then on, also on failure. The board, which has rank and size, is borrowed until
 * poe_relay_destroy(). POE_BAD_INPUT: `below` has no watch(); POE_FAILED: out of memory; said. */
poe_status poe_relay_create(poe_board *board, poe_transport *below, const poe_relay_settings *settings, poe_relay **relay);
/* Leaves as the transport does: what was sent is delivered first, where somebody may wait for it. NULL is legal. */
void poe_relay_destroy(poe_relay *relay);

/* Before a stage process starts: counts it (board->incarnation), empties the rings, and stands where the board's valid
 * snapshot does, or at the beginning. What earlier ones have sent and nobody has taken yet goes on. Returns as
 * poe_relay_progress() did last. */
poe_status poe_relay_begin(poe_relay *relay);
/* After a stage process has died: what it had asked for is carried out, as its snapshot may count on it, and what comes
 * of it is nobody's. */
void poe_relay_end(poe_relay *relay);

/* Carries on for at most `wait` seconds, or until something happened. POE_PEER_LOST: the transport has lost a peer, or
 * the stage process asks for something else than the one before; POE_FAILED: out of memory; said, and so from then on.
 * Once a snapshot has become valid, drops what it makes needless; when the board says that training is over, all that
 * the stage process has read. */
poe_status poe_relay_progress(poe_relay *relay, double wait);
/* progress() also ends when this is readable; -1: none. */
void poe_relay_watch(poe_relay *relay, int fd);
/* Says to every peer with which signs of life were exchanged that this rank lives, in the words of `text` (shown by those
 * that wait for it), while its stage process cannot. */
void poe_relay_beat(poe_relay *relay, const char *text);
/* Everything that the stage process has sent is delivered, or on its way for good. */
bool poe_relay_idle(const poe_relay *relay);
uint64_t poe_relay_logged(const poe_relay *relay); /* bytes of messages that may be wanted again */
/* Nothing is being sent, not even a sign of life. */
bool poe_relay_is_quiet(poe_relay *relay);
/* What it has of the messages, while there is no stage process and it is quiet. Unpacking: into one that is new, on a
 * transport that goes on where the other one's stood; poe_relay_begin() says if memory ran out. */
void poe_relay_pass(poe_relay *relay, poe_parcel *parcel);
/* Breaks the connection with `peer` as a failing network would; false: the transport cannot. */
bool poe_relay_cut(poe_relay *relay, int peer);

#endif
