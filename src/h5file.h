/* SPDX-License-Identifier: MIT
 * Arrays of float and small facts in HDF5 files. Calls are serialised: not every HDF5 is built for threads. A file is
 * only opened for reading after its length and checksum were found right (manifest.h): HDF5 1.10 crashes on damaged
 * ones. Every return code of HDF5 counts, closing included: a full disk may show there first. */
#ifndef POE_SRC_H5FILE_H
#define POE_SRC_H5FILE_H

#include <stddef.h>
#include <stdint.h>

#include "src/status.h"

enum { POE_H5_DIMENSIONS = 4 }; /* the most of an array */

typedef struct poe_h5 poe_h5;

poe_status poe_h5_create(const char *path, poe_h5 **file); /* truncates; POE_FAILED: said */
poe_status poe_h5_open(const char *path, poe_h5 **file);   /* for reading; POE_BAD_INPUT: said */
/* Frees `file` in any case; the first failure of all calls on it, if any, is returned again. A written file is synced,
 * and its arrays are read back and compared. */
poe_status poe_h5_close(poe_h5 *file);

/* `path` within the file: groups are made as needed. Little-endian IEEE on disk; attribute "crc32c" of the values. */
poe_status poe_h5_write(poe_h5 *file, const char *path, int ndim, const size_t *shape, const float *values);
/* Shape must match; the CRC is checked. POE_BAD_INPUT: said, naming file and dataset. */
poe_status poe_h5_read(poe_h5 *file, const char *path, int ndim, const size_t *shape, float *values);
poe_status poe_h5_write_integer(poe_h5 *file, const char *path, const char *attribute,
                                int64_t value); /* of a group or dataset */
poe_status poe_h5_read_integer(poe_h5 *file, const char *path, const char *attribute, int64_t *value);
poe_status poe_h5_write_text(poe_h5 *file, const char *path, const char *attribute, const char *value);
/* Calls visit for every dataset in name order; it may read from the file. */
typedef void (*poe_h5_visit)(void *arg, const char *path, int ndim, const size_t *shape);
poe_status poe_h5_each(poe_h5 *file, poe_h5_visit visit, void *arg);

#endif
