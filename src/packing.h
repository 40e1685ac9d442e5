/* SPDX-License-Identifier: MIT
 * Best-fit choice among buffered documents: the longest that fits the room, or else the shortest; among equally long
 * ones the one longest in the buffer. It knows lengths only: the caller keeps the tokens, by slot. */
#ifndef POE_SRC_PACKING_H
#define POE_SRC_PACKING_H

#include <stdbool.h>
#include <stddef.h>

#include "src/status.h"

typedef struct poe_packer poe_packer;

#define POE_NO_SLOT ((size_t)-1)

/* Room for `capacity` documents; nothing is allocated afterwards. POE_FAILED: said. */
poe_status poe_packer_create(size_t capacity, poe_packer **packer);
void poe_packer_destroy(poe_packer *packer); /* NULL is legal */
void poe_packer_clear(poe_packer *packer);
size_t poe_packer_count(const poe_packer *packer);

/* Adds a document of `length` tokens and gives its slot, below the capacity: 0, 1, ... in an empty packer; later, slots
 * of documents taken. There must be room. */
size_t poe_packer_add(poe_packer *packer, size_t length);
/* Takes the document to put into `room` tokens next and gives its slot, POE_NO_SLOT when there is none. */
size_t poe_packer_take(poe_packer *packer, size_t room);

/* The slots in use, in the order in which they were added: after `slot`, or the first after POE_NO_SLOT. */
size_t poe_packer_next(const poe_packer *packer, size_t slot);

#endif
