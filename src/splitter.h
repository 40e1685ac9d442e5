/* SPDX-License-Identifier: MIT
 * Cuts text into the pieces within which tokens are merged: the matches of a regular expression (PCRE2, UTF and UCP)
 * and what lies between matches. The pieces, one after the other, are the text. */
#ifndef POE_SRC_SPLITTER_H
#define POE_SRC_SPLITTER_H

#include <stddef.h>

#include "src/status.h"

typedef struct poe_pattern poe_pattern; /* read-only: may be shared by threads */

/* POE_BAD_INPUT, said and naming `owner`, when `expression` does not compile or may match nothing. */
poe_status poe_pattern_compile(const char *expression, const char *owner, poe_pattern **pattern);
void poe_pattern_destroy(poe_pattern *pattern); /* NULL is legal */

typedef struct poe_splitter poe_splitter;

poe_status poe_splitter_create(const poe_pattern *pattern, poe_splitter **splitter); /* borrows the pattern */
void poe_splitter_destroy(poe_splitter *splitter);                                   /* NULL is legal */

/* Starts on `text`, borrowed until its last piece is out. */
void poe_splitter_start(poe_splitter *splitter, const char *text, size_t bytes);

/* The next piece, never empty; POE_END after the last one. POE_BAD_INPUT, not said, before the first one when the text
 * is not UTF-8: *length is the offset of the first wrong byte. */
poe_status poe_splitter_next(poe_splitter *splitter, const char **piece, size_t *length);

#endif
