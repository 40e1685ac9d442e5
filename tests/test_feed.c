/* SPDX-License-Identifier: MIT
 * Micro-batches of shards and of packed documents against plain restatements of their rules and the golden rows;
 * going back to every position; what is refused. */
#include "src/feed.h"

#include <unistd.h>

#include "src/clock.h"
#include "src/files.h"
#include "src/log.h"
#include "src/rng.h"
#include "src/shard.h"
#include "tests/check.h"

enum { ROWS = 3, T = 16, DOCUMENTS = 40, LONGEST = 40, BATCHES = 30 };

static char root[] = "/tmp/poe-test-feed-XXXXXX";
static poe_tokenizer *bytes_tokenizer; /* one token per byte */

static const char *in_root(const char *name)
{
    static char paths[4][POE_PATH_MAX];
    static int next;
    char *path = paths[next++ % 4];
    CHECK_INT(poe_path(path, "%s/%s", root, name), POE_OK);
    return path;
}

typedef struct batch {
    int32_t idx[ROWS * T], targets[ROWS * T];
    size_t rows;
} batch;

static poe_status next_batch(poe_feed *feed, batch *b)
{
    memset(b, 0, sizeof(*b));
    return poe_feed_next(feed, b->idx, b->targets, &b->rows);
}

static poe_feed *open_feed(const poe_feed_settings *settings)
{
    poe_feed *feed = NULL;
    CHECK_INT(poe_feed_open(settings, &feed), POE_OK);
    if (!feed)
        exit(check_result());
    return feed;
}

static void check_refused(const poe_feed_settings *settings)
{
    poe_feed *feed = NULL;
    CHECK_INT(poe_feed_open(settings, &feed), POE_BAD_INPUT);
    CHECK(feed == NULL);
}

/* From every position the feed goes on as it did, in another feed of the same settings. */
static void check_positions(const poe_feed_settings *settings)
{
    static batch expected[BATCHES];
    json_t *positions[BATCHES];
    int64_t epochs[BATCHES];
    poe_feed *feed = open_feed(settings), *other = open_feed(settings);
    int n = 0;
    for (; n < BATCHES; n++) {
        positions[n] = poe_feed_position(feed);
        epochs[n] = poe_feed_epoch(feed);
        if (next_batch(feed, &expected[n]) == POE_END)
            break;
    }
    for (int from = n - 1; from >= 0; from--) {
        char *text = json_dumps(positions[from], JSON_COMPACT); /* as it comes back from a file */
        json_t *read = json_loads(text, 0, NULL);
        CHECK_INT(poe_feed_seek(other, read), POE_OK);
        CHECK_INT(poe_feed_epoch(other), epochs[from]);
        for (int i = from; i < n && i < from + 5; i++) {
            batch b;
            CHECK_INT(next_batch(other, &b), POE_OK);
            CHECK(memcmp(&b, &expected[i], sizeof(b)) == 0);
        }
        json_decref(read);
        free(text);
    }
    for (int i = 0; i < n + (n < BATCHES); i++)
        json_decref(positions[i]);
    CHECK(poe_feed_hash(feed) == poe_feed_hash(other));
    poe_feed_close(feed);
    poe_feed_close(other);
}

/* A position with one key replaced (removed where `value` is NULL) is refused, and the feed stays where it is. */
static void check_foreign(const poe_feed_settings *settings, const char *key, json_t *value)
{
    poe_feed *feed = open_feed(settings), *untouched = open_feed(settings);
    batch a, b;
    next_batch(feed, &a);
    next_batch(untouched, &a);
    json_t *position = poe_feed_position(feed);
    if (value)
        json_object_set_new(position, key, value);
    else
        json_object_del(position, key);
    CHECK_INT(poe_feed_seek(feed, position), POE_BAD_INPUT);
    CHECK_INT(next_batch(feed, &a), next_batch(untouched, &b));
    CHECK(memcmp(&a, &b, sizeof(a)) == 0);
    json_decref(position);
    poe_feed_close(feed);
    poe_feed_close(untouched);
}

static void write_shard(const char *path, int32_t first, size_t n)
{
    poe_shard_writer *writer;
    CHECK_INT(poe_shard_writer_create(path, &writer), POE_OK);
    for (size_t i = 0; i < n; i++) {
        int32_t token = first + (int32_t)i;
        CHECK_INT(poe_shard_writer_add(writer, &token, 1), POE_OK);
    }
    CHECK_INT(poe_shard_writer_finish(writer), POE_OK);
}

/* A micro-batch of consecutive ids from `first`. */
static void check_consecutive(poe_feed *feed, size_t rows, int32_t first)
{
    batch b;
    CHECK_INT(next_batch(feed, &b), POE_OK);
    CHECK_INT(b.rows, rows);
    for (size_t i = 0; i < rows * T; i++) {
        CHECK_INT(b.idx[i], first + (int32_t)i);
        CHECK_INT(b.targets[i], first + (int32_t)i + 1);
    }
}

static void check_shards(void)
{
    enum { BT = ROWS * T };
    const char *a = in_root("a.bin"), *b = in_root("b.bin");
    write_shard(a, 0, 2 * BT + 1);
    write_shard(b, 1000, 3 * BT);
    poe_feed_settings s = {
        .paths = (const char *[]){a, b}, .n_paths = 2, .vocab_size = 2000, .rows = ROWS, .t = T, .last = 1};
    poe_feed *feed = open_feed(&s);
    CHECK_INT(poe_feed_tokens(feed), 5 * BT + 1);
    CHECK_INT(poe_feed_documents(feed), 0);
    for (int epoch = 0; epoch < 3; epoch++) {
        for (int i = 0; i < 2; i++)
            check_consecutive(feed, ROWS, i * BT);
        for (int i = 0; i < 2; i++) /* a third would need one token more */
            check_consecutive(feed, ROWS, 1000 + i * BT);
        CHECK_INT(poe_feed_epoch(feed), epoch);
    }
    poe_feed_close(feed);
    check_positions(&s);
    check_foreign(&s, "kind", json_string("packed documents"));
    check_foreign(&s, "kind", NULL);
    check_foreign(&s, "file", json_integer(2));
    check_foreign(&s, "file", json_real(1));
    check_foreign(&s, "token", json_integer(2 * BT + 2));
    check_foreign(&s, "epoch", json_integer(-1));
    s.once = true;
    feed = open_feed(&s);
    batch last;
    for (int i = 0; i < 2; i++)
        check_consecutive(feed, ROWS, i * BT);
    for (int i = 0; i < 2; i++)
        check_consecutive(feed, ROWS, 1000 + i * BT);
    check_consecutive(feed, ROWS - 1, 1000 + 2 * BT);
    CHECK_INT(next_batch(feed, &last), POE_END);
    CHECK_INT(next_batch(feed, &last), POE_END);
    poe_feed_close(feed);
    check_positions(&s);
}

static void check_shard_refusals(void)
{
    const char *a = in_root("short.bin"), *raw = in_root("raw.dat");
    char named[POE_PATH_MAX];
    poe_path(named, "raw:%s", raw);
    write_shard(a, 0, ROWS * T);
    uint16_t tokens[3 * T] = {7, 8, 9};
    CHECK_INT(poe_write_file(raw, tokens, sizeof(tokens)), POE_OK);
    poe_feed_settings s = {.paths = &a, .n_paths = 1, .vocab_size = 100, .rows = ROWS, .t = T, .last = 1};
    check_refused(&s); /* one token short of a micro-batch */
    s.rows = ROWS - 1;
    poe_feed *feed = open_feed(&s);
    batch b;
    CHECK_INT(next_batch(feed, &b), POE_OK);
    CHECK_INT(b.rows, ROWS - 1);
    poe_feed_close(feed);
    s.vocab_size = ROWS * T - 1; /* the last token is too large */
    check_refused(&s);
    s.vocab_size = T * ROWS;
    feed = open_feed(&s);
    CHECK_INT(next_batch(feed, &b), POE_OK);
    poe_feed_close(feed);
    s.paths = (const char *[]){named};
    feed = open_feed(&s);
    CHECK_INT(next_batch(feed, &b), POE_OK);
    CHECK(b.idx[0] == 7 && b.targets[1] == 9);
    poe_feed_close(feed);
    s.paths = (const char *[]){a, "b.txt"};
    s.n_paths = 2;
    check_refused(&s);
    s.n_paths = 0;
    check_refused(&s);
}

/* Documents of random lengths as tokens, <|bos|> first, and as a .jsonl. */
typedef struct corpus {
    int32_t tokens[DOCUMENTS][LONGEST + 1];
    size_t length[DOCUMENTS];
} corpus;

static void make_corpus(corpus *c, const char *path)
{
    poe_rng rng;
    poe_rng_init(&rng, 5, "corpus");
    FILE *file = fopen(path, "w");
    CHECK(file != NULL);
    for (size_t d = 0; file && d < DOCUMENTS; d++) {
        size_t n = 1 + poe_rng_next(&rng) % LONGEST;
        c->length[d] = n + 1;
        c->tokens[d][0] = poe_tokenizer_bos(bytes_tokenizer);
        fputs("{\"text\": \"", file);
        for (size_t i = 1; i <= n; i++) {
            c->tokens[d][i] = (int32_t)('a' + poe_rng_next(&rng) % 26);
            fputc(c->tokens[d][i], file);
        }
        fputs("\"}\n", file);
    }
    CHECK(file && fclose(file) == 0);
}

/* The rule as it is told: of the documents in `buffer`, in order of age, the next goes into the row of T + 1. */
static void plain_pick(const corpus *c, size_t *buffer, size_t *n, int32_t *row, size_t *used)
{
    size_t room = T + 1 - *used, best = *n, shortest = 0;
    for (size_t i = 0; i < *n; i++) {
        size_t length = c->length[buffer[i]];
        if (length <= room && (best == *n || length > c->length[buffer[best]]))
            best = i;
        if (length < c->length[buffer[shortest]])
            shortest = i;
    }
    size_t chosen = best < *n ? best : shortest, document = buffer[chosen];
    for (size_t i = 0; i < c->length[document] && *used <= T; i++)
        row[(*used)++] = c->tokens[document][i];
    memmove(buffer + chosen, buffer + chosen + 1, (--*n - chosen) * sizeof(*buffer));
}

static void check_row(const batch *b, size_t r, const int32_t *row)
{
    for (size_t i = 0; i < T; i++) {
        CHECK_INT(b->idx[r * T + i], row[i]);
        CHECK_INT(b->targets[r * T + i], row[i + 1]);
    }
}

/* Documents [first, last) in batches of 3 into a buffer of 7, over and over. */
static void check_training(const poe_feed_settings *settings, const corpus *c, size_t first, size_t last)
{
    poe_feed *feed = open_feed(settings);
    CHECK_INT(poe_feed_documents(feed), last - first);
    size_t buffer[16], n = 0, next = first;
    int64_t epoch = 0;
    for (int i = 0; i < BATCHES; i++) {
        batch b;
        CHECK_INT(next_batch(feed, &b), POE_OK);
        CHECK_INT(b.rows, ROWS);
        for (size_t r = 0; r < ROWS; r++) {
            int32_t row[T + 1];
            size_t used = 0;
            while (used <= T) { /* one document at a time, as the buffer is looked at before each */
                while (n < 7) {
                    if (next == last) {
                        next = first;
                        epoch++;
                    }
                    for (int k = 0; k < 3 && next < last; k++)
                        buffer[n++] = next++;
                }
                plain_pick(c, buffer, &n, row, &used);
            }
            check_row(&b, r, row);
        }
        CHECK_INT(poe_feed_epoch(feed), epoch);
    }
    poe_feed_close(feed);
}

static void check_once(const poe_feed_settings *settings, const corpus *c, size_t first, size_t last)
{
    poe_feed *feed = open_feed(settings);
    size_t buffer[DOCUMENTS], n = 0, r = 0, used = 0, tokens = 0;
    for (size_t d = first; d < last; d++) {
        buffer[n++] = d;
        tokens += c->length[d];
    }
    CHECK_INT(poe_feed_tokens(feed), tokens);
    CHECK_INT(poe_feed_documents(feed), last - first);
    batch b = {.rows = 0};
    int32_t row[T + 1];
    while (n) {
        plain_pick(c, buffer, &n, row, &used);
        if (used <= T)
            continue;
        if (r == b.rows) {
            r = 0;
            CHECK_INT(next_batch(feed, &b), POE_OK);
        }
        check_row(&b, r++, row);
        used = 0;
    }
    CHECK_INT(r, b.rows);
    CHECK_INT(next_batch(feed, &b), POE_END);
    poe_feed_close(feed);
}

static void check_documents(void)
{
    static corpus c;
    const char *path = in_root("corpus.jsonl");
    make_corpus(&c, path);
    poe_feed_settings s = {.paths = &path,
                           .n_paths = 1,
                           .tokenizer = bytes_tokenizer,
                           .vocab_size = POE_VOCAB_MIN,
                           .rows = ROWS,
                           .t = T,
                           .last = 1,
                           .buffer_documents = 7,
                           .batch_documents = 3};
    poe_feed *whole = open_feed(&s);
    check_training(&s, &c, 0, DOCUMENTS);
    check_positions(&s);
    s.last = 0.9;
    poe_feed *part = open_feed(&s);
    CHECK(poe_feed_hash(whole) != poe_feed_hash(part));
    poe_feed_close(whole);
    poe_feed_close(part);
    check_training(&s, &c, 0, 36);
    check_positions(&s);
    check_foreign(&s, "kind", json_string("token shards"));
    check_foreign(&s, "next", json_integer(37));
    check_foreign(&s, "next", json_string("1"));
    check_foreign(&s, "epoch", NULL);
    check_foreign(&s, "buffer", NULL);
    check_foreign(&s, "buffer", json_pack("[i, i]", 1, 36));
    check_foreign(&s, "buffer", json_pack("[i, i]", 1, -1));
    check_foreign(&s, "buffer", json_pack("[i, f]", 1, 1.0));
    check_foreign(&s, "buffer", json_pack("[iiiiiiiiii]", 1, 1, 1, 1, 1, 1, 1, 1, 1, 1));
    s.first = 0.51;
    check_training(&s, &c, 21, 36);
    check_foreign(&s, "next", json_integer(20));
    s.once = true;
    check_once(&s, &c, 21, 36);
    check_positions(&s);
    check_foreign(&s, "row", json_integer(1000));
    s.first = 0;
    check_once(&s, &c, 0, 36);
}

/* The share of evaluation has no whole row, or nothing at all; training on nothing is refused. */
static void check_little_data(void)
{
    const char *path = in_root("little.txt");
    CHECK_INT(poe_write_file(path, "one\n\ntwo", 8), POE_OK);
    poe_feed_settings s = {.paths = &path,
                           .n_paths = 1,
                           .tokenizer = bytes_tokenizer,
                           .vocab_size = POE_VOCAB_MIN,
                           .rows = ROWS,
                           .t = T,
                           .last = 1,
                           .once = true};
    batch b;
    for (int i = 0; i < 2; i++) {
        poe_feed *feed = open_feed(&s);
        CHECK_INT(poe_feed_documents(feed), 2 - 2 * i);
        CHECK_INT(next_batch(feed, &b), POE_END);
        poe_feed_close(feed);
        s.first = 0.9;
    }
    s.once = false;
    check_refused(&s);
    s.first = 0;
    poe_feed *feed = open_feed(&s); /* over and over is enough for any row */
    CHECK_INT(next_batch(feed, &b), POE_OK);
    const int32_t bos = poe_tokenizer_bos(bytes_tokenizer), row[] = {bos, 'o', 'n', 'e', bos, 't', 'w', 'o'};
    CHECK(memcmp(b.idx, row, sizeof(row)) == 0);
    poe_feed_close(feed);
    s.vocab_size = POE_VOCAB_MIN - 1;
    check_refused(&s);
    s.tokenizer = NULL;
    check_refused(&s);
}

enum { GOLDEN_T = 128, EVAL_T = 160 };

/* Packed once, the golden documents make the rows, targets and bytes that the reference evaluates. */
static void check_golden_once(const char *shared, const char *docs, const poe_tokenizer *tokenizer)
{
    char name[POE_PATH_MAX];
    CHECK_INT(poe_path(name, "%s/golden/eval/eval.json", shared), POE_OK);
    json_t *golden = json_load_file(name, 0, NULL);
    poe_feed *feed = open_feed(&(poe_feed_settings){.paths = &docs,
                                                    .n_paths = 1,
                                                    .tokenizer = tokenizer,
                                                    .vocab_size = 1024,
                                                    .rows = 1,
                                                    .t = EVAL_T,
                                                    .last = 1,
                                                    .once = true});
    int32_t idx[EVAL_T], targets[EVAL_T];
    size_t n, rows = 0, counted = 0, bytes = 0;
    for (; poe_feed_next(feed, idx, targets, &n) == POE_OK; rows += n) {
        for (size_t i = 0; i < EVAL_T; i++) {
            size_t length;
            poe_tokenizer_bytes(tokenizer, targets[i], &length);
            counted += length > 0;
            bytes += length;
        }
    }
    CHECK_INT(rows, json_integer_value(json_object_get(golden, "rows")));
    CHECK_INT(counted, json_integer_value(json_object_get(golden, "targets")));
    CHECK_INT(bytes, json_integer_value(json_object_get(golden, "bytes")));
    poe_feed_close(feed);
    json_decref(golden);
}

/* The rows that packing the golden documents must give. */
static void check_golden(const char *shared)
{
    char docs[POE_PATH_MAX], name[POE_PATH_MAX];
    poe_tokenizer *tokenizer = NULL;
    CHECK_INT(poe_path(name, "%s/golden/tokenizer/tokenizer.json", shared), POE_OK);
    CHECK_INT(poe_tokenizer_read(name, &tokenizer), POE_OK);
    CHECK_INT(poe_path(name, "%s/golden/packing/rows.json", shared), POE_OK);
    CHECK_INT(poe_path(docs, "%s/golden/packing/docs.jsonl", shared), POE_OK);
    json_t *golden = json_load_file(name, 0, NULL), *rows = json_object_get(golden, "rows");
    CHECK_INT(json_integer_value(json_object_get(golden, "sequence_len")), GOLDEN_T);
    poe_feed *feed = open_feed(&(poe_feed_settings){
        .paths = (const char *[]){docs},
        .n_paths = 1,
        .tokenizer = tokenizer,
        .vocab_size = 1024,
        .rows = 1,
        .t = GOLDEN_T,
        .last = 1,
        .buffer_documents = (size_t)json_integer_value(json_object_get(golden, "buffer_documents")),
        .batch_documents = (size_t)json_integer_value(json_object_get(golden, "batch_documents"))});
    CHECK(json_array_size(rows) > 0);
    for (size_t r = 0; r < json_array_size(rows); r++) {
        int32_t idx[GOLDEN_T], targets[GOLDEN_T];
        size_t n = 0;
        CHECK_INT(poe_feed_next(feed, idx, targets, &n), POE_OK);
        const json_t *row = json_array_get(rows, r);
        for (size_t i = 0; i < GOLDEN_T; i++) {
            CHECK_INT(idx[i], json_integer_value(json_array_get(row, i)));
            CHECK_INT(targets[i], json_integer_value(json_array_get(row, i + 1)));
        }
    }
    poe_feed_close(feed);
    json_decref(golden);
    check_golden_once(shared, docs, tokenizer);
    poe_tokenizer_destroy(tokenizer);
}

/* Pace of encoding and packing together. Printed, not judged. */
static void time_feed(const char *shared)
{
    enum { PACE_ROWS = 8, PACE_T = 1024, PACE_BATCHES = 30 };
    char path[POE_PATH_MAX];
    CHECK_INT(poe_path(path, "%s/data/val.jsonl", shared), POE_OK);
    if (access(path, R_OK) != 0)
        return;
    poe_feed *feed = open_feed(&(poe_feed_settings){.paths = (const char *[]){path},
                                                    .n_paths = 1,
                                                    .tokenizer = bytes_tokenizer,
                                                    .vocab_size = POE_VOCAB_MIN,
                                                    .rows = PACE_ROWS,
                                                    .t = PACE_T,
                                                    .last = 1});
    static int32_t idx[PACE_ROWS * PACE_T], targets[PACE_ROWS * PACE_T];
    size_t rows;
    double start = poe_now();
    CHECK_INT(poe_feed_next(feed, idx, targets, &rows), POE_OK);
    double filled = poe_now();
    for (int i = 0; i < PACE_BATCHES; i++)
        CHECK_INT(poe_feed_next(feed, idx, targets, &rows), POE_OK);
    printf("buffer filled in %.3f s; then %d tokens encoded and packed in %.3f s\n", filled - start,
           PACE_BATCHES * PACE_ROWS * PACE_T, poe_now() - filled);
    poe_feed_close(feed);
}

static poe_status one_text(void *arg, const char **text, size_t *bytes)
{
    int *given = arg;
    *text = "a";
    *bytes = 1;
    return (*given)++ ? POE_END : POE_OK;
}

int main(void)
{
    int given = 0;
    if (!mkdtemp(root))
        return 1;
    poe_log *log = poe_log_create(0, 1); /* holds the sentences that the refusals say */
    poe_log_attach(log);
    CHECK_INT(poe_tokenizer_train(one_text, &given, POE_VOCAB_MIN, &bytes_tokenizer), POE_OK);
    poe_log_hold();
    check_shards();
    check_shard_refusals();
    check_documents();
    check_little_data();
    poe_log_settle(false);
    poe_log_destroy(log);
    if (poe_test_shared()) {
        check_golden(poe_test_shared());
        time_feed(poe_test_shared());
    } else {
        printf("golden rows skipped: no POE_SHARED\n");
    }
    poe_tokenizer_destroy(bytes_tokenizer);
    CHECK_INT(poe_remove_tree(root), POE_OK);
    return check_result();
}
