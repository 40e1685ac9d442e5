/* SPDX-License-Identifier: MIT */
#include "pipeline/metrics.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "src/files.h"
#include "src/log.h"

/* A training line says what step it is ("loss"), an evaluation how many updates came before it. */
static bool belongs_before(const char *line, int64_t first, int64_t evaluated)
{
    json_t *object = json_loads(line, 0, NULL);
    json_t *step = json_object_get(object, "step");
    bool training = json_object_get(object, "loss") != NULL;
    bool before = json_is_integer(step) && json_integer_value(step) <= (training ? first - 1 : evaluated);
    json_decref(object);
    return before;
}

/* The lines of `text` that poe_metrics_open() keeps, moved to its front; returns their length. A last line without
 * an end was cut short by a kill and is dropped. */
static size_t keep_lines(char *text, int64_t first, int64_t evaluated)
{
    size_t kept = 0;
    for (char *line = text, *end; (end = strchr(line, '\n')); line = end + 1) {
        *end = '\0';
        if (!belongs_before(line, first, evaluated))
            continue;
        size_t length = (size_t)(end - line);
        memmove(text + kept, line, length);
        text[kept + length] = '\n';
        kept += length + 1;
    }
    return kept;
}

poe_status poe_metrics_open(poe_metrics *metrics, const char *path, const char *previous, int64_t first,
                            int64_t evaluated)
{
    char *text = NULL;
    size_t size = 0;
    if (previous && access(previous, F_OK) == 0) {
        poe_status status = poe_read_file(previous, "metrics of the resumed run", &text, &size);
        if (status != POE_OK)
            return status;
        size = keep_lines(text, first, evaluated);
    }
    poe_status status = poe_write_file(path, text ? text : "", size);
    free(text);
    return status == POE_OK ? poe_metrics_reopen(metrics, path) : status;
}

poe_status poe_metrics_reopen(poe_metrics *metrics, const char *path)
{
    poe_status status = poe_path(metrics->path, "%s", path);
    if (status != POE_OK)
        return status;
    metrics->file = fopen(path, "a");
    if (!metrics->file) {
        poe_error("cannot write %s: %s", path, strerror(errno));
        return POE_FAILED;
    }
    return POE_OK;
}

poe_status poe_metrics_image(poe_metrics *metrics, poe_image *image)
{
    off_t end = image->restores ? 0 : lseek(fileno(metrics->file), 0, SEEK_END); /* the stream may know an older one */
    poe_image_pass(image, &end, sizeof(end));
    if (!image->restores || ftruncate(fileno(metrics->file), end) == 0)
        return POE_OK;
    poe_error("cannot cut back %s: %s", metrics->path, strerror(errno));
    return POE_FAILED;
}

poe_status poe_metrics_write(poe_metrics *metrics, json_t *object)
{
    const char *other = json_string_value(json_object_get(object, "emulated"));
    if (metrics->emulated)
        json_object_set_new(object, "emulated",
                            json_sprintf("%s%s%s", other ? other : "", other ? ", " : "", metrics->emulated));
    int bad = json_dumpf(object, metrics->file, JSON_COMPACT | JSON_REAL_PRECISION(9));
    json_decref(object);
    bad |= fputc('\n', metrics->file) == EOF;
    bad |= fflush(metrics->file);
    if (!bad)
        return POE_OK;
    poe_error("cannot write %s: %s", metrics->path, strerror(errno));
    return POE_FAILED;
}

void poe_metrics_close(poe_metrics *metrics)
{
    if (metrics->file)
        fclose(metrics->file);
    metrics->file = NULL;
}
