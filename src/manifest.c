/* SPDX-License-Identifier: MIT */
#include "src/manifest.h"

#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <libgen.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "src/crc32c.h"
#include "src/log.h"

enum { FORMAT = 1 };

__attribute__((format(printf, 2, 3))) static poe_status refuse(bool loud, const char *format, ...)
{
    char why[POE_PATH_MAX + 512];
    va_list args;
    va_start(args, format);
    vsnprintf(why, sizeof(why), format, args);
    va_end(args);
    if (loud)
        poe_error("%s", why);
    return POE_BAD_INPUT;
}

/* The CRC of what the manifest says, however it is laid out. */
static poe_status checksum(const json_t *manifest, uint32_t *crc)
{
    char *text = json_dumps(manifest, JSON_COMPACT | JSON_SORT_KEYS);
    if (!text) {
        poe_error("not enough memory for a manifest");
        return POE_FAILED;
    }
    *crc = poe_crc32c(0, text, strlen(text));
    free(text);
    return POE_OK;
}

static json_t *build(const json_t *facts, const poe_manifest_file *files, int n_files)
{
    json_t *manifest = json_copy((json_t *)facts), *table = json_object();
    int failures = json_object_set_new(manifest, "format", json_integer(FORMAT));
    for (int i = 0; i < n_files; i++)
        failures |= json_object_set_new(
            table, files[i].name,
            json_pack("{s:I, s:I}", "size", (json_int_t)files[i].size, "crc32c", (json_int_t)files[i].crc));
    failures |= json_object_set_new(manifest, "files", table);
    if (!failures)
        return manifest;
    json_decref(manifest);
    return NULL;
}

poe_status poe_manifest_write(const char *folder, const json_t *facts, const poe_manifest_file *files, int n_files)
{
    char path[POE_PATH_MAX], *text = NULL;
    uint32_t crc;
    poe_status status = poe_path(path, "%s/manifest.json", folder);
    if (status)
        return status;
    json_t *manifest = build(facts, files, n_files);
    if (manifest && checksum(manifest, &crc) == POE_OK && !json_object_set_new(manifest, "checksum", json_integer(crc)))
        text = json_dumps(manifest, JSON_INDENT(1));
    if (text) {
        status = poe_write_file(path, text, strlen(text));
    } else {
        poe_error("not enough memory to write %s", path);
        status = POE_FAILED;
    }
    free(text);
    json_decref(manifest);
    return status;
}

static poe_status check_manifest(const char *path, bool loud, json_t *manifest)
{
    json_t *format = json_object_get(manifest, "format"), *stored = json_object_get(manifest, "checksum");
    if (!json_is_integer(format))
        return refuse(loud, "%s is no manifest of a checkpoint", path);
    if (json_integer_value(format) != FORMAT)
        return refuse(loud, "%s has format %" JSON_INTEGER_FORMAT ", this program reads format %d", path,
                      json_integer_value(format), FORMAT);
    json_int_t expected = json_is_integer(stored) ? json_integer_value(stored) : -1;
    uint32_t crc;
    json_object_del(manifest, "checksum");
    poe_status status = checksum(manifest, &crc);
    if (status)
        return status;
    if (expected != crc || !json_is_object(json_object_get(manifest, "files")))
        return refuse(loud, "%s is damaged: its checksum is wrong", path);
    return POE_OK;
}

poe_status poe_manifest_read(const char *folder, bool loud, json_t **facts)
{
    char path[POE_PATH_MAX], *text;
    size_t size;
    json_error_t error;
    poe_status status = poe_path(path, "%s/manifest.json", folder);
    if (status)
        return status;
    if (access(path, R_OK))
        return refuse(loud, "cannot read %s: %s", path, strerror(errno));
    status = poe_read_file(path, "manifest of a checkpoint", &text, &size);
    if (status)
        return status;
    json_t *manifest = json_loadb(text, size, JSON_REJECT_DUPLICATES, &error);
    free(text);
    if (!json_is_object(manifest))
        status = refuse(loud, "%s is damaged: it is no JSON object", path);
    else
        status = check_manifest(path, loud, manifest);
    if (status)
        json_decref(manifest);
    else
        *facts = manifest;
    return status;
}

static poe_status check_file(const char *folder, const json_t *row, const char *name, bool loud)
{
    char path[POE_PATH_MAX];
    struct stat info;
    uint64_t size;
    uint32_t crc;
    json_int_t expected = json_integer_value(json_object_get(row, "size"));
    poe_status status = poe_path(path, "%s/%s", folder, name);
    if (status)
        return status;
    if (!row)
        return refuse(loud, "%s/manifest.json lists no file %s", folder, name);
    if (stat(path, &info))
        return refuse(loud, "cannot read %s: %s", path, strerror(errno));
    if (!S_ISREG(info.st_mode) || info.st_size != expected)
        return refuse(loud, "%s is damaged: it has %lld bytes, its manifest says %" JSON_INTEGER_FORMAT, path,
                      (long long)info.st_size, expected);
    status = poe_checksum_file(path, &size, &crc);
    if (status)
        return status;
    if (crc != json_integer_value(json_object_get(row, "crc32c")))
        return refuse(loud, "%s is damaged: its checksum is not the one in its manifest", path);
    return POE_OK;
}

poe_status poe_manifest_check(const char *folder, const json_t *facts, const char *name, bool loud)
{
    json_t *files = json_object_get(facts, "files"), *row;
    const char *key;
    if (name)
        return check_file(folder, json_object_get(files, name), name, loud);
    json_object_foreach(files, key, row) {
        poe_status status = check_file(folder, row, key, loud);
        if (status)
            return status;
    }
    return POE_OK;
}

int64_t poe_checkpoint_step(const char *name)
{
    int64_t step;
    char again[64];
    if (sscanf(name, "step-%" SCNd64, &step) != 1 || step < 0)
        return -1;
    snprintf(again, sizeof(again), "step-%08" PRId64, step);
    return strcmp(again, name) == 0 ? step : -1;
}

poe_status poe_checkpoint_run(const char *checkpoint, char folder[POE_PATH_MAX])
{
    char *whole = realpath(checkpoint, NULL), *parent = whole ? dirname(whole) : NULL;
    const char *name = parent ? strrchr(parent, '/') : NULL;
    bool in_run = name && strcmp(name, "/checkpoints") == 0;
    poe_status status = poe_path(folder, "%s", in_run ? dirname(parent) : "");
    free(whole);
    return status;
}

static int newest_first(const void *a, const void *b)
{
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x > y ? -1 : x < y;
}

/* Calls `entry` for every name in `folder`; a missing folder has none. */
static poe_status each_entry(const char *folder, poe_status (*entry)(void *arg, const char *name), void *arg)
{
    DIR *directory = opendir(folder);
    poe_status status = POE_OK;
    const struct dirent *found;
    if (!directory && errno == ENOENT)
        return POE_OK;
    if (!directory) {
        poe_error("cannot list %s: %s", folder, strerror(errno));
        return POE_BAD_INPUT;
    }
    while (!status && (found = readdir(directory)))
        status = entry(arg, found->d_name);
    closedir(directory);
    return status;
}

typedef struct step_list {
    int64_t *steps;
    int count;
} step_list;

static poe_status add_step(void *arg, const char *name)
{
    step_list *list = arg;
    int64_t step = poe_checkpoint_step(name);
    if (step < 0)
        return POE_OK;
    int64_t *steps = realloc(list->steps, ((size_t)list->count + 1) * sizeof(*steps));
    if (!steps) {
        poe_error("not enough memory to list checkpoints");
        return POE_FAILED;
    }
    list->steps = steps;
    list->steps[list->count++] = step;
    return POE_OK;
}

poe_status poe_checkpoint_list(const char *folder, int64_t **steps, int *count)
{
    step_list list = {NULL, 0};
    poe_status status = each_entry(folder, add_step, &list);
    if (status) {
        free(list.steps);
        return status;
    }
    if (list.count)
        qsort(list.steps, (size_t)list.count, sizeof(*list.steps), newest_first);
    *steps = list.steps;
    *count = list.count;
    return POE_OK;
}

static poe_status abandon(const char *folder, int64_t step)
{
    char path[POE_PATH_MAX], aside[POE_PATH_MAX];
    poe_status status = poe_path(path, "%s/step-%08" PRId64, folder, step);
    if (!status)
        status = poe_path(aside, "%s.abandoned", path);
    if (!status)
        status = poe_remove_tree(aside);
    if (status)
        return status;
    if (rename(path, aside) != 0) {
        poe_error("cannot rename %s to %s: %s", path, aside, strerror(errno));
        return POE_FAILED;
    }
    poe_info("%s is later than where the run goes on from; it is kept as %s", path, aside);
    return POE_OK;
}

poe_status poe_checkpoint_abandon(const char *folder, int64_t step)
{
    int64_t *steps;
    int count;
    poe_status status = poe_checkpoint_list(folder, &steps, &count);
    if (status)
        return status;
    for (int i = 0; i < count && steps[i] > step && !status; i++)
        status = abandon(folder, steps[i]);
    free(steps);
    return status;
}

static poe_status remove_temporary(void *arg, const char *name)
{
    char path[POE_PATH_MAX];
    size_t length = strlen(name);
    if (name[0] != '.' || length < 5 || strcmp(name + length - 4, ".tmp") != 0)
        return POE_OK;
    poe_status status = poe_path(path, "%s/%s", (const char *)arg, name);
    return status ? status : poe_remove_tree(path);
}

poe_status poe_checkpoint_clean(const char *folder, int64_t step, int keep)
{
    int64_t *steps;
    int count;
    poe_status status = each_entry(folder, remove_temporary, (void *)folder);
    if (status || keep == 0)
        return status;
    status = poe_checkpoint_list(folder, &steps, &count);
    if (status)
        return status;
    for (int i = 0, kept = 0; i < count && !status; i++) {
        char path[POE_PATH_MAX];
        if (steps[i] > step || kept++ < keep)
            continue;
        status = poe_path(path, "%s/step-%08" PRId64, folder, steps[i]);
        if (!status)
            status = poe_remove_tree(path);
    }
    free(steps);
    return status;
}
