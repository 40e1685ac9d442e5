/* SPDX-License-Identifier: MIT
 * Documents in files: .txt (split at blank lines, or the whole file as one) and .jsonl ("text" fields). Files are
 * mapped, and only an index of where documents start is held in memory. */
#ifndef POE_SRC_DOCUMENTS_H
#define POE_SRC_DOCUMENTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "src/status.h"

typedef struct poe_documents poe_documents;

typedef enum poe_split { POE_SPLIT_BLANK_LINES, POE_SPLIT_NONE } poe_split; /* of .txt */

/* Indexes `n` files in order. POE_BAD_INPUT: unreadable, unknown ending, invalid UTF-8, a line that is not JSON or has
 * no "text" string, an empty document, no document: said, naming file and place (line or byte). Blank lines of a
 * .jsonl are skipped. */
poe_status poe_documents_open(const char *const *paths, int n, poe_split split, poe_documents **documents);
void poe_documents_close(poe_documents *documents); /* NULL is legal */
size_t poe_documents_count(const poe_documents *documents);
size_t poe_documents_bytes(const poe_documents *documents); /* of text, in all documents */
/* CRC-32C of the files' sizes and contents, in order. Reads them all. */
uint32_t poe_documents_checksum(const poe_documents *documents);
/* Text of document i, borrowed until the next call. Blank lines between documents belong to none, nor does the line
 * break that ends a document. */
poe_status poe_documents_get(poe_documents *documents, size_t i, const char **text, size_t *bytes);

#endif
