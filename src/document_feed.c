/* SPDX-License-Identifier: MIT
 * Micro-batches of best-fit packed documents. Every row has t + 1 tokens; what a cropped document has left is dropped.
 * Training packs as it goes, from a buffer that is filled in batches, documents being encoded as they enter it.
 * `once` packs all its documents when it is opened and keeps the rows. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "src/crc32c.h"
#include "src/feed_impl.h"
#include "src/log.h"
#include "src/packing.h"

typedef struct slot {
    size_t number; /* of the document */
    size_t start;  /* of its tokens in the pool */
    size_t length; /* in tokens; the pool keeps at most a row of them */
} slot;

typedef struct document_feed {
    poe_feed base;
    const poe_tokenizer *tokenizer;
    poe_documents *documents;
    poe_encoder *encoder;
    size_t first, last; /* of the documents in use */
    size_t next;        /* document that enters the buffer next */
    size_t buffer_documents, batch_documents;
    poe_packer *packer;
    slot *slots;   /* by the packer's slot */
    int32_t *pool; /* tokens of the buffer's documents */
    size_t pool_room, pool_used;
    int32_t *row;    /* training: the row being packed */
    int32_t *packed; /* once: all rows */
    size_t n_packed, given;
} document_feed;

static poe_status out_of_memory(const document_feed *feed)
{
    poe_error("out of memory: packing %zu documents into rows of %zu tokens", feed->base.documents, feed->base.t + 1);
    return POE_FAILED;
}

/* Encodes document `number` into the buffer. Its place in the pool is fixed in training, the next free one in `once`,
 * where nothing leaves the buffer before everything is in it. */
static poe_status add_document(document_feed *feed, size_t number)
{
    const char *text;
    size_t bytes, count, bad_byte, row = feed->base.t + 1;
    const int32_t *ids;
    poe_status status = poe_documents_get(feed->documents, number, &text, &bytes);
    if (status != POE_OK)
        return status;
    status = poe_encoder_encode(feed->encoder, text, bytes, &ids, &count, &bad_byte);
    if (status != POE_OK) {
        if (status == POE_BAD_INPUT)
            poe_error("document %zu is not valid UTF-8 at byte %zu of its text", number, bad_byte);
        return status;
    }
    size_t kept = count + 1 < row ? count + 1 : row;
    if (feed->base.once && feed->pool_used + kept > feed->pool_room) {
        size_t room = 2 * (feed->pool_used + kept);
        int32_t *pool = realloc(feed->pool, room * sizeof(*pool));
        if (!pool)
            return out_of_memory(feed);
        feed->pool = pool;
        feed->pool_room = room;
    }
    size_t place = poe_packer_add(feed->packer, count + 1);
    size_t start = feed->base.once ? feed->pool_used : place * row;
    feed->slots[place] = (slot){number, start, count + 1};
    feed->pool[start] = poe_tokenizer_bos(feed->tokenizer);
    memcpy(feed->pool + start + 1, ids, (kept - 1) * sizeof(*ids));
    feed->pool_used += kept;
    feed->base.tokens += feed->base.once ? count + 1 : 0;
    return POE_OK;
}

/* Training: adds batches while the buffer is low. A batch ends where the documents end; then they start over. */
static poe_status refill(document_feed *feed)
{
    while (poe_packer_count(feed->packer) < feed->buffer_documents) {
        if (feed->next == feed->last) {
            feed->next = feed->first;
            feed->base.epoch++;
        }
        for (size_t i = 0; i < feed->batch_documents && feed->next < feed->last; i++) {
            poe_status status = add_document(feed, feed->next);
            if (status != POE_OK)
                return status;
            feed->next++;
        }
    }
    return POE_OK;
}

/* Packs t + 1 tokens into `row`. POE_END: the buffer is empty (`once`). */
static poe_status pack_row(document_feed *feed, int32_t *row)
{
    size_t room = feed->base.t + 1;
    while (room) {
        poe_status status = feed->base.once ? POE_OK : refill(feed);
        if (status != POE_OK)
            return status;
        size_t place = poe_packer_take(feed->packer, room);
        if (place == POE_NO_SLOT)
            return POE_END;
        const slot *taken = &feed->slots[place];
        size_t n = taken->length < room ? taken->length : room;
        memcpy(row, feed->pool + taken->start, n * sizeof(*row));
        row += n;
        room -= n;
    }
    return POE_OK;
}

static void split_row(const int32_t *row, size_t t, int32_t *idx, int32_t *targets)
{
    memcpy(idx, row, t * sizeof(*idx));
    memcpy(targets, row + 1, t * sizeof(*targets));
}

static poe_status training_next(poe_feed *base, int32_t *idx, int32_t *targets, size_t *rows)
{
    document_feed *feed = (document_feed *)base;
    for (size_t r = 0; r < base->rows; r++) {
        poe_status status = pack_row(feed, feed->row);
        if (status != POE_OK)
            return status;
        split_row(feed->row, base->t, idx + r * base->t, targets + r * base->t);
    }
    *rows = base->rows;
    return POE_OK;
}

static poe_status once_next(poe_feed *base, int32_t *idx, int32_t *targets, size_t *rows)
{
    document_feed *feed = (document_feed *)base;
    size_t left = feed->n_packed - feed->given, n = left < base->rows ? left : base->rows;
    if (!n)
        return POE_END;
    for (size_t r = 0; r < n; r++)
        split_row(feed->packed + (feed->given + r) * (base->t + 1), base->t, idx + r * base->t, targets + r * base->t);
    feed->given += n;
    *rows = n;
    return POE_OK;
}

static uint32_t document_checksum(const poe_feed *base)
{
    const document_feed *feed = (const document_feed *)base;
    uint64_t used[3] = {feed->first, feed->last, poe_documents_count(feed->documents)};
    uint32_t crc = poe_documents_checksum(feed->documents);
    return poe_crc32c(crc, used, sizeof(used));
}

static json_t *training_position(const poe_feed *base)
{
    const document_feed *feed = (const document_feed *)base;
    json_t *buffer = json_array();
    for (size_t i = poe_packer_next(feed->packer, POE_NO_SLOT); i != POE_NO_SLOT;
         i = poe_packer_next(feed->packer, i)) {
        if (json_array_append_new(buffer, json_integer((json_int_t)feed->slots[i].number)) != 0) {
            json_decref(buffer);
            return NULL;
        }
    }
    return json_pack("{s:I, s:I, s:o}", "epoch", (json_int_t)base->epoch, "next", (json_int_t)feed->next, "buffer",
                     buffer);
}

/* The buffer of a position, checked: document numbers in use, and no more of them than the buffer holds. */
static poe_status check_buffer(const document_feed *feed, const json_t *buffer)
{
    size_t capacity = feed->buffer_documents + feed->batch_documents - 1;
    if (!json_is_array(buffer) || json_array_size(buffer) > capacity) {
        poe_error("the data position to resume from has no \"buffer\" of at most %zu documents", capacity);
        return POE_BAD_INPUT;
    }
    for (size_t i = 0; i < json_array_size(buffer); i++) {
        const json_t *number = json_array_get(buffer, i);
        json_int_t n = json_is_integer(number) ? json_integer_value(number) : -1;
        if (n < 0 || (size_t)n < feed->first || (size_t)n >= feed->last) {
            poe_error("the data position to resume from has in its buffer what is no document of %zu to %zu",
                      feed->first, feed->last - 1);
            return POE_BAD_INPUT;
        }
    }
    return POE_OK;
}

static poe_status training_seek(poe_feed *base, const json_t *position)
{
    document_feed *feed = (document_feed *)base;
    const json_t *buffer = json_object_get(position, "buffer");
    int64_t epoch, next = 0;
    poe_status status = poe_position_get(position, "epoch", INT64_MAX - 1, &epoch);
    if (status == POE_OK)
        status = poe_position_get(position, "next", (int64_t)feed->last, &next);
    if (status == POE_OK && (size_t)next < feed->first) {
        poe_error("the data position to resume from has next %lld, before the first document %zu", (long long)next,
                  feed->first);
        status = POE_BAD_INPUT;
    }
    if (status == POE_OK)
        status = check_buffer(feed, buffer);
    if (status != POE_OK)
        return status;
    poe_packer_clear(feed->packer);
    for (size_t i = 0; i < json_array_size(buffer) && status == POE_OK; i++)
        status = add_document(feed, (size_t)json_integer_value(json_array_get(buffer, i)));
    base->epoch = epoch;
    feed->next = (size_t)next;
    return status;
}

static json_t *once_position(const poe_feed *base)
{
    return json_pack("{s:I}", "row", (json_int_t)((const document_feed *)base)->given);
}

static poe_status once_seek(poe_feed *base, const json_t *position)
{
    document_feed *feed = (document_feed *)base;
    int64_t given;
    poe_status status = poe_position_get(position, "row", (int64_t)feed->n_packed, &given);
    if (status == POE_OK)
        feed->given = (size_t)given;
    return status;
}

/* What packing needs, which `once` gives back when all rows are packed. */
static void free_buffer(document_feed *feed)
{
    poe_packer_destroy(feed->packer);
    free(feed->slots);
    free(feed->pool);
    feed->packer = NULL;
    feed->slots = NULL;
    feed->pool = NULL;
}

static void document_close(poe_feed *base)
{
    document_feed *feed = (document_feed *)base;
    poe_documents_close(feed->documents);
    poe_encoder_destroy(feed->encoder);
    free_buffer(feed);
    free(feed->row);
    free(feed->packed);
    free(feed);
}

static const poe_feed_ops training_ops = {"packed documents", training_next, document_checksum,
                                          training_position,  training_seek, document_close};
static const poe_feed_ops once_ops = {"documents packed once", once_next, document_checksum,
                                      once_position,           once_seek, document_close};

static poe_status create_buffer(document_feed *feed)
{
    size_t row = feed->base.t + 1;
    size_t capacity = feed->base.once ? feed->base.documents : feed->buffer_documents + feed->batch_documents - 1;
    feed->pool_room = feed->base.once ? 1 : capacity * row;
    feed->slots = calloc(capacity + 1, sizeof(*feed->slots));
    feed->pool = calloc(feed->pool_room, sizeof(*feed->pool));
    feed->row = calloc(row, sizeof(*feed->row));
    if (!feed->slots || !feed->pool || !feed->row)
        return out_of_memory(feed);
    return poe_packer_create(capacity, &feed->packer);
}

static poe_status pack_all(document_feed *feed)
{
    size_t row = feed->base.t + 1;
    poe_status status = POE_OK;
    for (size_t i = feed->first; i < feed->last && status == POE_OK; i++)
        status = add_document(feed, i);
    if (status != POE_OK)
        return status;
    size_t most = feed->pool_used / row; /* no row is made of fewer tokens */
    feed->packed = calloc(most * row + 1, sizeof(*feed->packed));
    if (!feed->packed)
        return out_of_memory(feed);
    while (feed->n_packed < most && status == POE_OK) {
        status = pack_row(feed, feed->packed + feed->n_packed * row);
        feed->n_packed += status == POE_OK;
    }
    free_buffer(feed);
    return status == POE_END ? POE_OK : status;
}

static poe_status open_documents(document_feed *feed, const poe_feed_settings *settings)
{
    poe_status status = poe_documents_open(settings->paths, settings->n_paths, settings->split, &feed->documents);
    if (status != POE_OK)
        return status;
    size_t count = poe_documents_count(feed->documents);
    feed->first = feed->next = (size_t)ceil(settings->first * (double)count);
    feed->last = (size_t)ceil(settings->last * (double)count);
    feed->base.documents = feed->last - feed->first;
    if (!feed->base.documents && !settings->once) {
        poe_error("%s: no document to train on: there are %zu, and the share from %g to %g of them is empty",
                  settings->paths[0], count, settings->first, settings->last);
        return POE_BAD_INPUT;
    }
    status = poe_encoder_create(settings->tokenizer, &feed->encoder);
    if (status == POE_OK)
        status = create_buffer(feed);
    if (status == POE_OK && settings->once)
        status = pack_all(feed);
    return status;
}

poe_status poe_document_feed_open(const poe_feed_settings *settings, poe_feed **feed)
{
    if (!settings->tokenizer) {
        poe_error("%s is text: it needs a tokenizer (--tokenizer)", settings->paths[0]);
        return POE_BAD_INPUT;
    }
    if (poe_tokenizer_size(settings->tokenizer) > settings->vocab_size) {
        poe_error("the tokenizer has %d ids, more than the vocabulary size of %d (--vocab-size)",
                  poe_tokenizer_size(settings->tokenizer), settings->vocab_size);
        return POE_BAD_INPUT;
    }
    document_feed *opened = calloc(1, sizeof(*opened));
    if (!opened) {
        poe_error("out of memory: a feed of documents");
        return POE_FAILED;
    }
    opened->base = (poe_feed){.ops = settings->once ? &once_ops : &training_ops,
                              .rows = settings->rows,
                              .t = settings->t,
                              .once = settings->once};
    opened->tokenizer = settings->tokenizer;
    opened->buffer_documents = settings->buffer_documents;
    opened->batch_documents = settings->batch_documents;
    poe_status status = open_documents(opened, settings);
    if (status == POE_OK)
        *feed = &opened->base;
    else
        document_close(&opened->base);
    return status;
}
