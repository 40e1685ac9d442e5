/* SPDX-License-Identifier: MIT
 * What the kinds of feeds share: private to src/feed.c, src/shard_feed.c and src/document_feed.c. */
#ifndef POE_SRC_FEED_IMPL_H
#define POE_SRC_FEED_IMPL_H

#include "src/feed.h"

typedef struct poe_feed_ops {
    const char *kind; /* names positions of this kind */
    poe_status (*next)(poe_feed *feed, int32_t *idx, int32_t *targets, size_t *rows);
    uint32_t (*checksum)(const poe_feed *feed); /* of the contents */
    json_t *(*position)(const poe_feed *feed);  /* without kind; NULL when out of memory */
    poe_status (*seek)(poe_feed *feed, const json_t *position);
    void (*close)(poe_feed *feed); /* frees the feed too */
} poe_feed_ops;

/* The first member of every kind of feed. */
struct poe_feed {
    const poe_feed_ops *ops;
    size_t rows, t;
    bool once;
    int64_t epoch;
    size_t documents, tokens;
};

/* `settings` are checked, their zeros replaced; paths of shards may start with "raw:". */
poe_status poe_shard_feed_open(const poe_feed_settings *settings, poe_feed **feed);
poe_status poe_document_feed_open(const poe_feed_settings *settings, poe_feed **feed);

/* An integer `key` of a position, 0 to `limit`. POE_BAD_INPUT: said. */
poe_status poe_position_get(const json_t *position, const char *key, int64_t limit, int64_t *value);

#endif
