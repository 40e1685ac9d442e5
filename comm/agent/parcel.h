/* SPDX-License-Identifier: MIT
 * Memory packed up to be taken to another process of the same build: one function per object passes its fields, in the
 * same order when it packs and when it unpacks. */
#ifndef POE_COMM_AGENT_PARCEL_H
#define POE_COMM_AGENT_PARCEL_H

#include <stdbool.h>
#include <stddef.h>

typedef struct poe_parcel {
    unsigned char *data; /* owned; NULL while empty */
    size_t bytes, room;  /* filled, allocated */
    size_t read;         /* taken out so far */
    bool unpacks;        /* or packs */
    bool failed; /* out of memory, or more was taken out than is in it: what was passed since is not to be used */
} poe_parcel;

/* Into the parcel, or out of it: from then on `memory` is zero when the parcel has failed. */
void poe_parcel_pass(poe_parcel *parcel, void *memory, size_t bytes);
void poe_parcel_free(poe_parcel *parcel); /* what it holds */

#endif
