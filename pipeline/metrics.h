/* SPDX-License-Identifier: MIT
 * metrics.jsonl: one JSON object per line, for each step and each evaluation; written by the last rank. */
#ifndef POE_PIPELINE_METRICS_H
#define POE_PIPELINE_METRICS_H

#include <jansson.h>
#include <stdint.h>
#include <stdio.h>

#include "pipeline/image.h"
#include "src/files.h"
#include "src/status.h"

typedef struct poe_metrics {
    FILE *file;
    char path[POE_PATH_MAX];
    const char *emulated; /* borrowed; what of the run is emulated: stands in every line; NULL: nothing */
} poe_metrics;

/* Opens OUT's metrics for steps `first` on. `previous` (NULL: none; may be `path` itself): the file of the run that is
 * resumed: its lines of earlier steps are kept, and its evaluations after up to `evaluated` updates, so that each is
 * there once. POE_FAILED: said. */
poe_status poe_metrics_open(poe_metrics *metrics, const char *path, const char *previous, int64_t first,
                            int64_t evaluated);

/* Opens the metrics of a process that was killed, to be cut back by poe_metrics_image(). */
poe_status poe_metrics_reopen(poe_metrics *metrics, const char *path);
/* For snapshots: how much has been written; restoring drops what came after. POE_FAILED: said. */
poe_status poe_metrics_image(poe_metrics *metrics, poe_image *image);

/* Writes one line, whole or not at all to a reader; takes the reference of `object`, whose own `emulated` stays, with
 * the file's beside it. */
poe_status poe_metrics_write(poe_metrics *metrics, json_t *object);
void poe_metrics_close(poe_metrics *metrics);

#endif
