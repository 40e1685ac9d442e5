/* SPDX-License-Identifier: MIT
 * Micro-batches read in order from token shards. A micro-batch does not cross files: a file's last whole one ends it.
 */
#include <stdlib.h>
#include <string.h>

#include "src/crc32c.h"
#include "src/feed_impl.h"
#include "src/log.h"
#include "src/shard.h"

typedef struct file {
    char *path; /* as given, for messages */
    poe_shard shard;
} file;

typedef struct shard_feed {
    poe_feed base;
    int vocab_size;
    file *files;
    size_t n_files;
    size_t current, offset; /* the next micro-batch: file, token in it */
} shard_feed;

/* Rows that the current file still has, at most a micro-batch of them: all or, without `once`, nothing. */
static size_t rows_left(const shard_feed *feed)
{
    size_t left = feed->files[feed->current].shard.count - feed->offset; /* the last token is a target only */
    size_t whole = left ? (left - 1) / feed->base.t : 0;
    if (whole >= feed->base.rows)
        return feed->base.rows;
    return feed->base.once ? whole : 0;
}

static poe_status shard_next(poe_feed *base, int32_t *idx, int32_t *targets, size_t *rows)
{
    shard_feed *feed = (shard_feed *)base;
    size_t found;
    while ((found = rows_left(feed)) == 0) {
        if (feed->current + 1 == feed->n_files) {
            if (base->once)
                return POE_END;
            base->epoch++;
        }
        feed->current = (feed->current + 1) % feed->n_files;
        feed->offset = 0;
    }
    const uint16_t *tokens = feed->files[feed->current].shard.tokens + feed->offset;
    size_t n = found * base->t;
    for (size_t i = 0; i < n; i++) {
        idx[i] = tokens[i];
        targets[i] = tokens[i + 1];
    }
    feed->offset += n;
    *rows = found;
    return POE_OK;
}

static uint32_t shard_checksum(const poe_feed *base)
{
    const shard_feed *feed = (const shard_feed *)base;
    uint32_t crc = 0;
    for (size_t i = 0; i < feed->n_files; i++) {
        const poe_shard *shard = &feed->files[i].shard;
        uint64_t count = shard->count;
        crc = poe_crc32c(crc, &count, sizeof(count));
        crc = poe_crc32c(crc, shard->tokens, shard->count * sizeof(*shard->tokens));
    }
    return crc;
}

static json_t *shard_position(const poe_feed *base)
{
    const shard_feed *feed = (const shard_feed *)base;
    return json_pack("{s:I, s:I, s:I}", "epoch", (json_int_t)base->epoch, "file", (json_int_t)feed->current, "token",
                     (json_int_t)feed->offset);
}

static poe_status shard_seek(poe_feed *base, const json_t *position)
{
    shard_feed *feed = (shard_feed *)base;
    int64_t epoch, current, offset = 0;
    poe_status status = poe_position_get(position, "epoch", INT64_MAX - 1, &epoch);
    if (status == POE_OK)
        status = poe_position_get(position, "file", (int64_t)feed->n_files - 1, &current);
    if (status == POE_OK)
        status = poe_position_get(position, "token", (int64_t)feed->files[current].shard.count, &offset);
    if (status != POE_OK)
        return status;
    base->epoch = epoch;
    feed->current = (size_t)current;
    feed->offset = (size_t)offset;
    return POE_OK;
}

static void shard_close(poe_feed *base)
{
    shard_feed *feed = (shard_feed *)base;
    for (size_t i = 0; i < feed->n_files; i++) {
        poe_shard_close(&feed->files[i].shard);
        free(feed->files[i].path);
    }
    free(feed->files);
    free(feed);
}

static const poe_feed_ops shard_ops = {"token shards", shard_next, shard_checksum,
                                       shard_position, shard_seek, shard_close};

/* All at once, before anything is trained; the checksum will read them all too. */
static poe_status check_ids(const file *f, int vocab_size)
{
    const uint16_t *tokens = f->shard.tokens;
    int largest = 0;
    for (size_t i = 0; i < f->shard.count; i++)
        largest = tokens[i] > largest ? tokens[i] : largest;
    if (largest < vocab_size)
        return POE_OK;
    size_t i = 0;
    while (tokens[i] < vocab_size)
        i++;
    poe_error("%s: token %zu is id %d, but ids must be below the vocabulary size of %d (--vocab-size)", f->path, i,
              tokens[i], vocab_size);
    return POE_BAD_INPUT;
}

static poe_status add_file(shard_feed *feed, const char *path)
{
    bool raw = strncmp(path, "raw:", 4) == 0;
    file *added = &feed->files[feed->n_files];
    poe_status status = poe_shard_open(raw ? path + 4 : path, raw, &added->shard);
    if (status != POE_OK)
        return status;
    feed->n_files++;
    feed->base.tokens += added->shard.count;
    added->path = strdup(path);
    if (!added->path) {
        poe_error("out of memory: the name of %s", path);
        return POE_FAILED;
    }
    size_t needed = feed->base.rows * feed->base.t + 1;
    if (!feed->base.once && added->shard.count < needed) {
        poe_error("%s holds %zu tokens, but one micro-batch of %zu rows of %zu tokens needs %zu", path,
                  added->shard.count, feed->base.rows, feed->base.t, needed);
        return POE_BAD_INPUT;
    }
    return check_ids(added, feed->vocab_size);
}

poe_status poe_shard_feed_open(const poe_feed_settings *settings, poe_feed **feed)
{
    shard_feed *opened = calloc(1, sizeof(*opened));
    if (opened)
        opened->files = calloc((size_t)settings->n_paths, sizeof(*opened->files));
    if (!opened || !opened->files) {
        free(opened);
        poe_error("out of memory: %d token shards", settings->n_paths);
        return POE_FAILED;
    }
    opened->base = (poe_feed){.ops = &shard_ops, .rows = settings->rows, .t = settings->t, .once = settings->once};
    opened->vocab_size = settings->vocab_size;
    poe_status status = POE_OK;
    for (int i = 0; i < settings->n_paths && status == POE_OK; i++)
        status = add_file(opened, settings->paths[i]);
    if (status == POE_OK)
        *feed = &opened->base;
    else
        shard_close(&opened->base);
    return status;
}
