/* SPDX-License-Identifier: MIT
 * A checkpoint is a folder NAME with files and a manifest.json that holds the length and CRC-32C of every one of them,
 * and its own CRC; it is complete once the folder has its final name. Names: step-%08d, temporary: .step-%08d.tmp. */
#ifndef POE_SRC_MANIFEST_H
#define POE_SRC_MANIFEST_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "src/files.h"
#include "src/status.h"

typedef struct poe_manifest_file {
    char name[64];
    uint64_t size;
    uint32_t crc;
} poe_manifest_file;

/* Writes manifest.json into `folder`: `facts` (an object, borrowed), the files' table, and its own checksum. */
poe_status poe_manifest_write(const char *folder, const json_t *facts, const poe_manifest_file *files, int n_files);

/* Reads and checks manifest.json alone; *facts is a new reference. POE_BAD_INPUT: said when `loud`. */
poe_status poe_manifest_read(const char *folder, bool loud, json_t **facts);
/* Checks length and CRC of one file, or with name NULL of all, against the manifest. Said when `loud`. A file that is
 * not in the manifest is POE_BAD_INPUT too. */
poe_status poe_manifest_check(const char *folder, const json_t *facts, const char *name, bool loud);

/* The steps of all finished checkpoints in `folder` (a run folder's checkpoints/), newest first; the caller frees. */
poe_status poe_checkpoint_list(const char *folder, int64_t **steps, int *count);
/* The step that the name of a checkpoint's folder tells, or -1. */
int64_t poe_checkpoint_step(const char *name);
/* The run folder of the checkpoint RUN/checkpoints/NAME, absolute; "" when that is not where it lies. */
poe_status poe_checkpoint_run(const char *checkpoint, char folder[POE_PATH_MAX]);
/* Renames the checkpoints after `step` to NAME.abandoned, says so, and removes what had such a name: a run that goes on
 * from `step` has left them behind, and nobody shall take them for its newest. */
poe_status poe_checkpoint_abandon(const char *folder, int64_t step);
/* Removes temporary folders that a killed process left, and of the checkpoints up to `step` all but the newest `keep`
 * (0: all stay). Later ones were left behind by resuming from before them, and stay. */
poe_status poe_checkpoint_clean(const char *folder, int64_t step, int keep);

#endif
