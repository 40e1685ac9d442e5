/* SPDX-License-Identifier: MIT */
#include "src/shard.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "src/files.h"
#include "src/log.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "shards are little endian and read in place");

enum { MAGIC = 20240520, VERSION = 1, HEADER_WORDS = 256, HEADER_BYTES = 4 * HEADER_WORDS };

struct poe_shard_writer {
    char path[POE_PATH_MAX];
    char temporary[POE_PATH_MAX];
    FILE *file;
    size_t count;
};

static poe_status check_header(const char *path, const char *data, size_t bytes, size_t *count)
{
    int32_t header[3] = {0};
    memcpy(header, data, bytes < sizeof(header) ? bytes : sizeof(header));
    if (header[0] != MAGIC) {
        poe_error("%s is no token shard: it starts with %d, not %d (headerless files are given as raw:FILE)", path,
                  header[0], MAGIC);
        return POE_BAD_INPUT;
    }
    if (bytes < HEADER_BYTES) {
        poe_error("%s ends inside its header: %zu of %d bytes", path, bytes, HEADER_BYTES);
        return POE_BAD_INPUT;
    }
    if (header[1] != VERSION) {
        poe_error("%s is a token shard of version %d: only version %d is known", path, header[1], VERSION);
        return POE_BAD_INPUT;
    }
    size_t room = bytes - HEADER_BYTES;
    if (header[2] <= 0 || (size_t)header[2] * sizeof(uint16_t) != room) {
        poe_error("%s: its header counts %d tokens, but %zu bytes follow it (2 for each token)", path, header[2], room);
        return POE_BAD_INPUT;
    }
    *count = (size_t)header[2];
    return POE_OK;
}

static poe_status check_raw(const char *path, size_t bytes, size_t *count)
{
    if (bytes % sizeof(uint16_t)) {
        poe_error("%s has %zu bytes, an odd number: tokens have 2 bytes each", path, bytes);
        return POE_BAD_INPUT;
    }
    *count = bytes / sizeof(uint16_t);
    return POE_OK;
}

poe_status poe_shard_open(const char *path, bool raw, poe_shard *shard)
{
    const char *data;
    size_t bytes, count;
    poe_status status = poe_map_file(path, "data file (--data, --val-data)", &data, &bytes);
    if (status != POE_OK)
        return status;
    status = raw ? check_raw(path, bytes, &count) : check_header(path, data, bytes, &count);
    if (status != POE_OK) {
        munmap((void *)data, bytes);
        return status;
    }
    *shard = (poe_shard){.tokens = (const void *)(data + (raw ? 0 : HEADER_BYTES)),
                         .count = count,
                         .map = (void *)data,
                         .map_bytes = bytes};
    return POE_OK;
}

void poe_shard_close(poe_shard *shard)
{
    if (shard->map)
        munmap(shard->map, shard->map_bytes);
    *shard = (poe_shard){0};
}

static poe_status say_unwritten(const poe_shard_writer *writer)
{
    poe_error("cannot write %s: %s", writer->temporary, strerror(errno));
    return POE_FAILED;
}

static poe_status write_header(poe_shard_writer *writer)
{
    int32_t header[HEADER_WORDS] = {MAGIC, VERSION, (int32_t)writer->count};
    return fwrite(header, sizeof(header), 1, writer->file) == 1 ? POE_OK : say_unwritten(writer);
}

poe_status poe_shard_writer_create(const char *path, poe_shard_writer **writer)
{
    poe_shard_writer *created = calloc(1, sizeof(*created));
    if (!created) {
        poe_error("out of memory: a writer for %s", path);
        return POE_FAILED;
    }
    poe_status status = poe_path(created->path, "%s", path);
    if (status == POE_OK)
        status = poe_path(created->temporary, "%s.tmp", path);
    if (status != POE_OK) {
        free(created);
        return status;
    }
    poe_temporary_register(created->temporary);
    created->file = fopen(created->temporary, "wb");
    if (!created->file) {
        poe_error("cannot make %s: %s", created->temporary, strerror(errno));
        status = POE_BAD_INPUT;
    } else {
        status = write_header(created); /* holds the place: the count is known only at the end */
    }
    if (status == POE_OK)
        *writer = created;
    else
        poe_shard_writer_discard(created);
    return status;
}

poe_status poe_shard_writer_add(poe_shard_writer *writer, const int32_t *tokens, size_t n)
{
    if (n > (size_t)INT32_MAX - writer->count) {
        poe_error("%s: a shard holds at most %d tokens", writer->path, INT32_MAX);
        return POE_BAD_INPUT;
    }
    for (size_t i = 0; i < n; i++) {
        if (tokens[i] < 0 || tokens[i] > UINT16_MAX) {
            poe_error("%s: token %zu would be %d, but a shard's ids have 16 bits: 0 to %d", writer->path,
                      writer->count + i, tokens[i], UINT16_MAX);
            return POE_BAD_INPUT;
        }
        uint16_t token = (uint16_t)tokens[i];
        if (fwrite_unlocked(&token, sizeof(token), 1, writer->file) != 1)
            return say_unwritten(writer);
    }
    writer->count += n;
    return POE_OK;
}

poe_status poe_shard_writer_finish(poe_shard_writer *writer)
{
    bool at_start = fseek(writer->file, 0, SEEK_SET) == 0; /* writes what is still buffered */
    poe_status status = at_start ? write_header(writer) : say_unwritten(writer);
    if (status == POE_OK) {
        bool closed = fclose(writer->file) == 0;
        writer->file = NULL;
        status = closed ? poe_replace_file(writer->temporary, writer->path) : say_unwritten(writer);
    }
    poe_shard_writer_discard(writer);
    return status;
}

void poe_shard_writer_discard(poe_shard_writer *writer)
{
    if (!writer)
        return;
    if (writer->file)
        fclose(writer->file);
    unlink(writer->temporary);
    poe_temporary_forget(writer->temporary);
    free(writer);
}

bool poe_shard_named(const char *path)
{
    size_t length = strlen(path);
    return strncmp(path, "raw:", 4) == 0 || (length > 4 && strcmp(path + length - 4, ".bin") == 0);
}
