/* SPDX-License-Identifier: MIT
 * poe-pipe inspect: what a checkpoint (or its run, or one of its files, or a safetensors file) holds, and whether it is
 * whole. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "src/files.h"
#include "src/h5file.h"
#include "src/log.h"
#include "src/manifest.h"
#include "src/safetensors.h"
#include "tools/programs.h"

static bool exists(const char *folder, const char *name)
{
    char path[POE_PATH_MAX];
    return snprintf(path, sizeof(path), "%s/%s", folder, name) < (int)sizeof(path) && access(path, F_OK) == 0;
}

static void print_shape(const char *name, int ndim, const size_t *shape)
{
    if (ndim == 2)
        printf("  %-52s %zu x %zu\n", name, shape[0], shape[1]);
    else
        printf("  %-52s %zu\n", name, shape[0]);
}

static void print_dataset(void *arg, const char *path, int ndim, const size_t *shape)
{
    (void)arg;
    print_shape(path, ndim, shape);
}

/* One HDF5 file of `folder`, after its length and checksum were found right. */
static poe_status inspect_h5(const char *folder, const json_t *facts, const char *name)
{
    char path[POE_PATH_MAX];
    poe_h5 *file;
    poe_status status = poe_manifest_check(folder, facts, name, true);
    if (status == POE_OK)
        status = poe_path(path, "%s/%s", folder, name);
    if (status == POE_OK)
        status = poe_h5_open(path, &file);
    if (status != POE_OK)
        return status;
    printf("\n%s: length and checksum are right\n", name);
    status = poe_h5_each(file, print_dataset, NULL);
    poe_status closed = poe_h5_close(file);
    return status == POE_OK ? closed : status;
}

static void print_facts(const char *folder, const json_t *facts)
{
    const char *key;
    json_t *value;
    printf("checkpoint %s\n", folder);
    json_object_foreach((json_t *)facts, key, value)
    {
        if (strcmp(key, "files") == 0 || strcmp(key, "feed") == 0)
            continue;
        char *text = json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT | JSON_REAL_PRECISION(9));
        printf("  %-16s %s\n", key, text ? text : "?");
        free(text);
    }
}

/* The whole checkpoint, or with `only` one of its files. A damaged file does not keep the others from being shown. */
static poe_status inspect_checkpoint(const char *folder, const char *only)
{
    json_t *facts, *entry;
    poe_status result = poe_manifest_read(folder, true, &facts);
    if (result != POE_OK)
        return result;
    if (!only)
        print_facts(folder, facts);
    const char *name;
    json_object_foreach(json_object_get(facts, "files"), name, entry)
    {
        if (only && strcmp(name, only) != 0)
            continue;
        poe_status status = inspect_h5(folder, facts, name);
        result = result == POE_OK ? status : result;
    }
    json_decref(facts);
    return result;
}

/* The newest checkpoint of a run, and which others there are. */
static poe_status inspect_run(const char *folder)
{
    char checkpoints[POE_PATH_MAX], newest[POE_PATH_MAX];
    int64_t *steps;
    int count;
    poe_status status = poe_path(checkpoints, "%s/checkpoints", folder);
    if (status == POE_OK)
        status = poe_checkpoint_list(checkpoints, &steps, &count);
    if (status != POE_OK)
        return status;
    printf("run %s: checkpoints after steps", folder);
    for (int i = count - 1; i >= 0; i--)
        printf(" %lld", (long long)steps[i]);
    printf("%s\n", count ? "" : " (none)");
    if (count)
        status = poe_path(newest, "%s/step-%08lld", checkpoints, (long long)steps[0]);
    free(steps);
    return status == POE_OK && count ? inspect_checkpoint(newest, NULL) : status;
}

static poe_status inspect_safetensors(const char *path)
{
    poe_safetensors *file;
    poe_status status = poe_safetensors_open(path, &file);
    if (status != POE_OK)
        return status;
    size_t parameters = 0;
    for (size_t i = 0; i < poe_safetensors_count(file); i++) {
        const poe_safetensor *t = poe_safetensors_at(file, i);
        print_shape(t->name, t->ndim, t->shape);
        parameters += t->shape[0] * (t->ndim == 2 ? t->shape[1] : 1);
    }
    printf("%zu tensors, %zu parameters\n", poe_safetensors_count(file), parameters);
    poe_safetensors_close(file);
    return POE_OK;
}

/* A file of a checkpoint is checked against the manifest beside it. */
static poe_status inspect_file(const char *path)
{
    char folder[POE_PATH_MAX];
    size_t n = strlen(path);
    if (n > 12 && strcmp(path + n - 12, ".safetensors") == 0)
        return inspect_safetensors(path);
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    poe_status status = poe_path(folder, "%.*s", slash ? (int)(slash - path) : 1, slash ? path : ".");
    if (status != POE_OK)
        return status;
    n = strlen(name);
    if (n > 3 && strcmp(name + n - 3, ".h5") == 0 && exists(folder, "manifest.json"))
        return inspect_checkpoint(folder, name);
    poe_error("%s is neither a checkpoint, nor a file of one, nor a .safetensors", path);
    return POE_BAD_INPUT;
}

static poe_status inspect(const char *path)
{
    struct stat info;
    if (stat(path, &info) != 0) {
        poe_error("%s: there is no such file or folder", path);
        return POE_BAD_INPUT;
    }
    if (!S_ISDIR(info.st_mode))
        return inspect_file(path);
    return exists(path, "checkpoints") ? inspect_run(path) : inspect_checkpoint(path, NULL);
}

int poe_program_inspect(const poe_options *options)
{
    return poe_exit_status(inspect(options->checkpoint));
}
