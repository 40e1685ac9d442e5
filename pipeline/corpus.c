/* SPDX-License-Identifier: MIT */
#include "pipeline/corpus.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "src/documents.h"
#include "src/log.h"
#include "src/shard.h"

static const double held_out = 0.1; /* share of the documents that are evaluated, unless --val-data names others */

static poe_split split_of(const poe_options *o)
{
    return strcmp(o->documents, "file") == 0 ? POE_SPLIT_NONE : POE_SPLIT_BLANK_LINES;
}

typedef struct document_source {
    poe_documents *documents;
    size_t next, end;
} document_source;

static poe_status next_document(void *arg, const char **text, size_t *bytes)
{
    document_source *s = arg;
    if (s->next == s->end)
        return POE_END;
    return poe_documents_get(s->documents, s->next++, text, bytes);
}

/* From the documents that are trained on, so that nothing of the held-out text is in it. */
static poe_status train_tokenizer(poe_corpus *c, const poe_options *o)
{
    document_source source = {0};
    poe_status status = poe_documents_open((const char *const *)o->data.paths, o->data.count, split_of(o), &source.documents);
    if (status != POE_OK)
        return status;
    double share = o->val_data.count ? 1.0 : 1.0 - held_out;
    source.end = (size_t)ceil(share * (double)poe_documents_count(source.documents));
    int vocab = o->vocab_size ? o->vocab_size : POE_OPTION_VOCAB;
    status = poe_tokenizer_train(next_document, &source, vocab, &c->tokenizer);
    poe_documents_close(source.documents);
    c->trained = status == POE_OK;
    return status;
}

/* Who reads: the tokenizer, if there is one, and the vocabulary's size. */
static poe_status resolve_tokenizer(poe_corpus *c, const poe_options *o, const char *stored)
{
    poe_status status = POE_OK;
    const char *path = stored ? stored : o->tokenizer;
    bool shards = o->data.count && poe_shard_named(o->data.paths[0]);
    if (path)
        status = poe_tokenizer_read(path, &c->tokenizer);
    else if (o->data.count && !shards)
        status = train_tokenizer(c, o);
    if (status != POE_OK)
        return status;
    c->vocab_size = o->vocab_size ? o->vocab_size : c->tokenizer ? poe_tokenizer_size(c->tokenizer) : 0;
    if (!c->vocab_size) {
        poe_error("--vocab-size is missing: %s holds tokens, and no --tokenizer says how many there are",
                  o->data.count ? o->data.paths[0] : "--data");
        return POE_BAD_INPUT;
    }
    if (c->tokenizer && poe_tokenizer_size(c->tokenizer) > c->vocab_size) {
        poe_error("--vocab-size %d is too small for the tokenizer, which has %d tokens", c->vocab_size,
                  poe_tokenizer_size(c->tokenizer));
        return POE_BAD_INPUT;
    }
    c->has_tokenizer = c->tokenizer != NULL;
    return POE_OK;
}

static void fill_token_bytes(poe_corpus *c)
{
    for (int i = 0; i < c->vocab_size; i++) {
        size_t length = 1;
        if (c->tokenizer) {
            length = 0;
            if (i < poe_tokenizer_size(c->tokenizer) && !poe_tokenizer_special(c->tokenizer, i))
                poe_tokenizer_bytes(c->tokenizer, i, &length);
        }
        c->token_bytes[i] = (int32_t)length;
    }
}

poe_status poe_corpus_open_tokenizer(poe_corpus *c, poe_comm *comm, const poe_options *o, const char *stored,
                                     bool everywhere)
{
    *c = (poe_corpus){.reads = everywhere || poe_comm_rank(comm) == 0};
    poe_status status = POE_OK;
    if (c->reads)
        status = resolve_tokenizer(c, o, stored);
    status = poe_comm_agree(comm, status);
    int32_t facts[2] = {c->vocab_size, c->has_tokenizer};
    if (status == POE_OK)
        status = poe_comm_broadcast(comm, 0, facts, sizeof(facts));
    if (status != POE_OK)
        return status;
    c->vocab_size = facts[0];
    c->has_tokenizer = facts[1];
    c->token_bytes = calloc((size_t)c->vocab_size, sizeof(int32_t));
    if (!c->token_bytes) {
        poe_error("out of memory for the lengths of %d tokens", c->vocab_size);
        return POE_FAILED;
    }
    if (poe_comm_rank(comm) == 0)
        fill_token_bytes(c);
    return poe_comm_broadcast(comm, 0, c->token_bytes, (size_t)c->vocab_size * sizeof(int32_t));
}

static poe_feed_settings feed_settings(const poe_corpus *c, const poe_options *o, const poe_file_list *files)
{
    return (poe_feed_settings){.paths = (const char *const *)files->paths,
                               .n_paths = files->count,
                               .split = split_of(o),
                               .tokenizer = c->tokenizer,
                               .vocab_size = c->vocab_size,
                               .rows = (size_t)o->device_batch_size,
                               .t = (size_t)o->sequence_len,
                               .first = 0,
                               .last = 1};
}

static bool holds_out(const poe_options *o)
{
    return !o->val_data.count && o->data.count && !poe_shard_named(o->data.paths[0]);
}

/* Adds a micro-batch of `rows` rows to the evaluation. */
static poe_status add_eval_batch(poe_corpus *c, int64_t rows)
{
    int32_t *grown = realloc(c->eval_rows, ((size_t)c->n_eval + 1) * sizeof(int32_t));
    if (!grown) {
        poe_error("out of memory for %d micro-batches of evaluation", c->n_eval);
        return POE_FAILED;
    }
    c->eval_rows = grown;
    c->eval_rows[c->n_eval++] = (int32_t)rows;
    return POE_OK;
}

/* Goes once through the evaluation text to learn how many rows its micro-batches have. */
static poe_status count_eval_rows(poe_corpus *c, const poe_options *o)
{
    size_t tokens = (size_t)o->device_batch_size * (size_t)o->sequence_len, rows;
    int64_t left = o->eval_tokens ? o->eval_tokens / o->sequence_len : INT64_MAX;
    int32_t *buffer = malloc(2 * tokens * sizeof(int32_t));
    if (!buffer) {
        poe_error("out of memory for a micro-batch of %zu tokens", tokens);
        return POE_FAILED;
    }
    c->eval_start = poe_feed_position(c->eval);
    poe_status status = POE_OK;
    while (status == POE_OK && left > 0) {
        status = poe_feed_next(c->eval, buffer, buffer + tokens, &rows);
        if (status != POE_OK)
            break;
        int64_t used = (int64_t)rows < left ? (int64_t)rows : left;
        status = add_eval_batch(c, used);
        left -= used;
    }
    free(buffer);
    return status == POE_END ? POE_OK : status;
}

static poe_status open_feeds(poe_corpus *c, const poe_options *o, bool evaluation_only)
{
    poe_status status = POE_OK;
    poe_feed_settings train = feed_settings(c, o, &o->data);
    if (holds_out(o))
        train.last = 1 - held_out;
    if (!evaluation_only)
        status = poe_feed_open(&train, &c->train);
    if (status == POE_OK && c->train)
        c->train_hash = poe_feed_hash(c->train);
    if (status != POE_OK || o->emulate_compute || (!o->val_data.count && !holds_out(o)))
        return status;
    poe_feed_settings eval = feed_settings(c, o, o->val_data.count ? &o->val_data : &o->data);
    eval.once = true;
    eval.first = holds_out(o) ? 1 - held_out : 0;
    status = poe_feed_open(&eval, &c->eval);
    return status == POE_OK ? count_eval_rows(c, o) : status;
}

poe_status poe_corpus_open_feeds(poe_corpus *c, poe_comm *comm, const poe_options *o, bool evaluation_only)
{
    poe_status status = POE_OK;
    if (c->reads)
        status = open_feeds(c, o, evaluation_only);
    status = poe_comm_agree(comm, status);
    if (status == POE_OK)
        status = poe_comm_broadcast(comm, 0, &c->n_eval, sizeof(c->n_eval));
    if (status != POE_OK || !c->n_eval)
        return status;
    size_t bytes = (size_t)c->n_eval * sizeof(int32_t);
    if (!c->eval_rows)
        c->eval_rows = malloc(bytes);
    if (!c->eval_rows) {
        poe_error("out of memory for %d micro-batches of evaluation", c->n_eval);
        return POE_FAILED;
    }
    return poe_comm_broadcast(comm, 0, c->eval_rows, bytes);
}

void poe_corpus_close(poe_corpus *c)
{
    json_decref(c->eval_start);
    poe_feed_close(c->train);
    poe_feed_close(c->eval);
    poe_tokenizer_destroy(c->tokenizer);
    free(c->token_bytes);
    free(c->eval_rows);
    *c = (poe_corpus){0};
}
