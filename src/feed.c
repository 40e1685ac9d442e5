/* SPDX-License-Identifier: MIT
 * Chooses the kind of feed and checks what is common to both. */
#include "src/feed.h"

#include <string.h>

#include "src/crc32c.h"
#include "src/feed_impl.h"
#include "src/log.h"
#include "src/shard.h"

poe_status poe_feed_open(const poe_feed_settings *settings, poe_feed **feed)
{
    poe_feed_settings checked = *settings;
    if (checked.n_paths < 1) {
        poe_error("no data file: give --data one or more .txt, .jsonl or .bin files");
        return POE_BAD_INPUT;
    }
    bool shards = poe_shard_named(checked.paths[0]);
    for (int i = 1; i < checked.n_paths; i++) {
        if (poe_shard_named(checked.paths[i]) != shards) {
            poe_error("%s and %s cannot be read together: token shards and documents do not mix", checked.paths[0],
                      checked.paths[i]);
            return POE_BAD_INPUT;
        }
    }
    if (!checked.buffer_documents)
        checked.buffer_documents = 1000;
    if (!checked.batch_documents)
        checked.batch_documents = 128;
    return shards ? poe_shard_feed_open(&checked, feed) : poe_document_feed_open(&checked, feed);
}

void poe_feed_close(poe_feed *feed)
{
    if (feed)
        feed->ops->close(feed);
}

poe_status poe_feed_next(poe_feed *feed, int32_t *idx, int32_t *targets, size_t *rows)
{
    return feed->ops->next(feed, idx, targets, rows);
}

int64_t poe_feed_epoch(const poe_feed *feed)
{
    return feed->epoch;
}

uint64_t poe_feed_hash(const poe_feed *feed)
{
    uint64_t sizes[2] = {feed->documents, feed->tokens};
    uint32_t form = poe_crc32c(0, feed->ops->kind, strlen(feed->ops->kind));
    form = poe_crc32c(form, sizes, sizeof(sizes));
    return (uint64_t)form << 32 | feed->ops->checksum(feed);
}

size_t poe_feed_documents(const poe_feed *feed)
{
    return feed->documents;
}

size_t poe_feed_tokens(const poe_feed *feed)
{
    return feed->tokens;
}

json_t *poe_feed_position(const poe_feed *feed)
{
    json_t *position = feed->ops->position(feed);
    if (position && json_object_set_new(position, "kind", json_string(feed->ops->kind)) == 0)
        return position;
    poe_error("out of memory: the position in the data");
    json_decref(position);
    return NULL;
}

poe_status poe_feed_seek(poe_feed *feed, const json_t *position)
{
    const char *kind = json_string_value(json_object_get(position, "kind"));
    if (!kind || strcmp(kind, feed->ops->kind) != 0) {
        poe_error("the data position to resume from is one of %.40s, but the data is now %s", kind ? kind : "no kind",
                  feed->ops->kind);
        return POE_BAD_INPUT;
    }
    return feed->ops->seek(feed, position);
}

poe_status poe_position_get(const json_t *position, const char *key, int64_t limit, int64_t *value)
{
    const json_t *number = json_object_get(position, key);
    if (!json_is_integer(number)) {
        poe_error("the data position to resume from has no integer \"%s\"", key);
        return POE_BAD_INPUT;
    }
    int64_t found = json_integer_value(number);
    if (found < 0 || found > limit) {
        poe_error("the data position to resume from has %s %lld, outside 0 to %lld of this data", key, (long long)found,
                  (long long)limit);
        return POE_BAD_INPUT;
    }
    *value = found;
    return POE_OK;
}
