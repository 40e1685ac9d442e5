/* SPDX-License-Identifier: MIT
 * Letters between agents, which have a transport of their own for them and a thread that sleeps on it: so an agent
 * hears of what concerns its rank while the rank's own transport is held, and where it has no rank at all. Letters from
 * one agent to another arrive in order. */
#ifndef POE_COMM_AGENT_POST_H
#define POE_COMM_AGENT_POST_H

#include "comm/transport.h"
#include "src/status.h"

typedef struct poe_post poe_post;

typedef struct poe_letter {
    int from; /* the post's */
    int kind; /* this and the next three: whatever sender and receiver agree on */
    int rank, place;
    double seconds;
    unsigned char *data; /* malloc()ed, owned by who has the letter; NULL: none */
    size_t bytes;
} poe_letter;

/* Owns `below` from then on, also on failure. `ring` (may be NULL) is called in the post's thread after a letter has
 * come. POE_FAILED: said. */
poe_status poe_post_create(poe_transport *below, void (*ring)(void *context), void *context, poe_post **post);
/* What was sent is sent off first. NULL is legal. */
void poe_post_destroy(poe_post *post);

/* Any thread. To oneself, too. The letter's data is the post's from then on. */
void poe_post_send(poe_post *post, int to, const poe_letter *letter);
/* The oldest letter that is here; does not wait. Its data is the caller's. */
bool poe_post_next(poe_post *post, poe_letter *letter);
/* Sleeps until there is one, `seconds` at most. */
void poe_post_wait(poe_post *post, double seconds);
/* Nobody is told any more. */
void poe_post_silence(poe_post *post);

#endif
