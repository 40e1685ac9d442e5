/* SPDX-License-Identifier: MIT
 * Tensors in safetensors files (8 bytes of header length, JSON header, data). Values are float in memory and F32 or
 * BF16 in the file. */
#ifndef POE_SRC_SAFETENSORS_H
#define POE_SRC_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#include "src/status.h"

typedef enum poe_dtype { POE_F32, POE_BF16 } poe_dtype;

typedef struct poe_safetensor {
    char name[128];
    int ndim;        /* 1 or 2; 0-dimensional ones are read as (1) */
    size_t shape[2]; /* ndim 1, read from a file: shape[1] is 1 */
    poe_dtype dtype;
} poe_safetensor;

/* Reading: the file is mapped; every offset is checked against the file's size before it is used. POE_BAD_INPUT: said,
 * naming the file and what is wrong. */
typedef struct poe_safetensors poe_safetensors;
poe_status poe_safetensors_open(const char *path, poe_safetensors **file);
void poe_safetensors_close(poe_safetensors *file); /* NULL is legal */
size_t poe_safetensors_count(const poe_safetensors *file);
const poe_safetensor *poe_safetensors_at(const poe_safetensors *file, size_t i);
const poe_safetensor *poe_safetensors_find(const poe_safetensors *file, const char *name); /* NULL: not there */
/* Elements first..first+n-1 (row-major) of a tensor, as floats. */
void poe_safetensors_read(const poe_safetensors *file, const poe_safetensor *tensor, size_t first, size_t n,
                          float *values);

/* Writing: all names and shapes first, then values in any order and in pieces; written under a temporary name, synced,
 * read back and compared by CRC, renamed by finish. POE_FAILED: said, nothing is left behind. bf16: round to nearest
 * even. */
typedef struct poe_safetensors_writer poe_safetensors_writer;
poe_status poe_safetensors_writer_create(const char *path, const poe_safetensor *tensors, size_t count,
                                         poe_safetensors_writer **writer);
poe_status poe_safetensors_writer_write(poe_safetensors_writer *writer, const char *name, size_t first, size_t n,
                                        const float *values);
/* Frees the writer, also on failure. Elements that were never written: POE_FAILED, said. */
poe_status poe_safetensors_writer_finish(poe_safetensors_writer *writer);
void poe_safetensors_writer_discard(poe_safetensors_writer *writer);

#endif
