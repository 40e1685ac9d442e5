/* SPDX-License-Identifier: MIT
 * poe-pipe data: a tokenizer and token shards from text. Every document starts with <|bos|>. Without --val-data the
 * last tenth of the documents is held out, the same documents that training holds out. */
#include <stdio.h>
#include <stdlib.h>

#include "src/clock.h"
#include "src/documents.h"
#include "src/files.h"
#include "src/log.h"
#include "src/shard.h"
#include "src/tokenizer.h"
#include "tools/programs.h"

/* Documents first <= i < last of one list of files. */
typedef struct part {
    poe_documents *documents;
    size_t first, last;
} part;

typedef struct counts {
    size_t documents, bytes, tokens;
} counts;

static poe_status open_documents(const poe_options *options, const poe_file_list *files, poe_documents **documents)
{
    poe_split split = options->documents[0] == 'f' ? POE_SPLIT_NONE : POE_SPLIT_BLANK_LINES;
    return poe_documents_open((const char *const *)files->paths, files->count, split, documents);
}

static poe_status next_text(void *arg, const char **text, size_t *bytes)
{
    part *rest = arg;
    if (rest->first == rest->last)
        return POE_END;
    return poe_documents_get(rest->documents, rest->first++, text, bytes);
}

static poe_status make_tokenizer(const poe_options *options, part train, poe_tokenizer **tokenizer)
{
    int vocab = options->vocab_size ? options->vocab_size : POE_OPTION_VOCAB;
    double start = poe_now();
    if (options->tokenizer)
        return poe_tokenizer_read(options->tokenizer, tokenizer);
    poe_status status = poe_tokenizer_train(next_text, &train, vocab, tokenizer);
    if (status == POE_OK)
        printf("tokenizer of %d tokens trained in %.1f s\n", poe_tokenizer_size(*tokenizer), poe_now() - start);
    return status;
}

static poe_status add_document(poe_shard_writer *shard, poe_encoder *encoder, int32_t bos, const char *text,
                               size_t bytes, counts *sum)
{
    const int32_t *ids;
    size_t n;
    poe_status status = poe_encoder_encode(encoder, text, bytes, &ids, &n, NULL);
    if (status == POE_BAD_INPUT)
        poe_error("--data: document %zu is not UTF-8", sum->documents);
    if (status == POE_OK)
        status = poe_shard_writer_add(shard, &bos, 1);
    if (status == POE_OK)
        status = poe_shard_writer_add(shard, ids, n);
    sum->documents++;
    sum->bytes += bytes;
    sum->tokens += n + 1;
    return status;
}

static poe_status fill_shard(part rest, poe_encoder *encoder, int32_t bos, poe_shard_writer *shard, counts *sum)
{
    const char *text;
    size_t bytes;
    poe_status status;
    while ((status = next_text(&rest, &text, &bytes)) == POE_OK) {
        status = add_document(shard, encoder, bos, text, bytes, sum);
        if (status != POE_OK)
            break;
    }
    return status == POE_END ? POE_OK : status;
}

/* OUT/NAME.bin of one part, and its row of the table. */
static poe_status write_part(const char *out, const char *name, part rest, const poe_tokenizer *tokenizer)
{
    char path[POE_PATH_MAX];
    counts sum = {0};
    poe_encoder *encoder = NULL;
    poe_shard_writer *shard = NULL;
    poe_status status = poe_path(path, "%s/%s.bin", out, name);
    if (status == POE_OK)
        status = poe_encoder_create(tokenizer, &encoder);
    if (status == POE_OK)
        status = poe_shard_writer_create(path, &shard);
    if (status == POE_OK) {
        status = fill_shard(rest, encoder, poe_tokenizer_bos(tokenizer), shard, &sum);
        if (status == POE_OK)
            status = poe_shard_writer_finish(shard);
        else
            poe_shard_writer_discard(shard);
    }
    poe_encoder_destroy(encoder);
    if (status == POE_OK)
        printf("%-8s %12zu %14zu %12zu %16.3f   %s\n", name, sum.documents, sum.bytes, sum.tokens,
               (double)sum.bytes / (double)(sum.tokens - sum.documents), path);
    return status;
}

static poe_status write_all(const char *out, part train, part val, const poe_tokenizer *tokenizer)
{
    char path[POE_PATH_MAX];
    poe_status status = poe_path(path, "%s/tokenizer.json", out);
    if (status == POE_OK)
        status = poe_tokenizer_write(tokenizer, path);
    if (status != POE_OK)
        return status;
    printf("%-8s %12s %14s %12s %16s   file\n", "part", "documents", "bytes", "tokens", "bytes per token");
    status = write_part(out, "train", train, tokenizer);
    if (status == POE_OK && val.first < val.last)
        status = write_part(out, "val", val, tokenizer);
    if (status == POE_OK)
        printf("tokenizer: %s\n", path);
    return status;
}

static poe_status make_shards(const poe_options *options)
{
    part train = {0}, val = {0};
    poe_tokenizer *tokenizer = NULL;
    bool own_val = options->val_data.count > 0;
    poe_status status = open_documents(options, &options->data, &train.documents);
    if (status == POE_OK && own_val)
        status = open_documents(options, &options->val_data, &val.documents);
    if (status == POE_OK) {
        size_t n = poe_documents_count(train.documents);
        train.last = own_val ? n : n - n / 10; /* ceil(0.9 n) */
        val.first = own_val ? 0 : train.last;
        val.last = own_val ? poe_documents_count(val.documents) : n;
        if (!own_val)
            val.documents = train.documents;
        status = poe_make_directories(options->out);
    }
    if (status == POE_OK)
        status = poe_check_writable(options->out, "--out");
    if (status == POE_OK)
        status = make_tokenizer(options, train, &tokenizer);
    if (status == POE_OK)
        status = write_all(options->out, train, val, tokenizer);
    poe_tokenizer_destroy(tokenizer);
    if (val.documents != train.documents)
        poe_documents_close(val.documents);
    poe_documents_close(train.documents);
    return status;
}

int poe_program_data(const poe_options *options)
{
    return poe_exit_status(make_shards(options));
}
