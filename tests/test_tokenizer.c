/* SPDX-License-Identifier: MIT
 * The tokenizer: training and encoding against plain quadratic versions, tokenizer.json written, read, refused and
 * damaged at random, and the golden tokenizer's ids. */
#include "src/tokenizer_private.h"

#include <jansson.h>
#include <stdarg.h>
#include <unistd.h>

#include "src/files.h"
#include "src/log.h"
#include "src/rng.h"
#include "tests/check.h"

static const char prose[] =
    "the cat sat on the mat; that cat's hat, they'll say, is the hat of a cat.\n\n"
    "Na\u00efve caf\u00e9s \u2014 \u201cthe th\u00e9\u201d \u65e5\u672c\u8a9e \u65e5\u672c 1234 12\n"
    "aaaaaaa aaaa aaa\t\tbanana bananas   \r\n  cabana";

typedef struct texts {
    const char *const *text;
    size_t count, next;
} texts;

static poe_status next_text(void *arg, const char **text, size_t *bytes) {
    texts *t = arg;
    if (t->next == t->count)
        return POE_END;
    *text = t->text[t->next++];
    *bytes = strlen(*text);
    return POE_OK;
}

static poe_tokenizer *train(const char *text, int vocab_size) {
    poe_tokenizer *t = NULL;
    CHECK_INT(poe_tokenizer_train(next_text, &(texts){&text, 1, 0}, vocab_size, &t), POE_OK);
    return t;
}

/* What `call` says on standard error. */
static char said[4096];
static int saved_stderr;
static FILE *capture;

static void listen_begin(void) {
    fflush(stderr);
    saved_stderr = dup(2);
    capture = tmpfile();
    dup2(fileno(capture), 2);
}

static void listen_end(void) {
    fflush(stderr);
    dup2(saved_stderr, 2);
    close(saved_stderr);
    rewind(capture);
    said[fread(said, 1, sizeof(said) - 1, capture)] = '\0';
    fclose(capture);
}

static void check_said(const char *part) {
    if (!strstr(said, part)) {
        fprintf(stderr, "said \"%s\", not \"%s\"\n", said, part);
        check_failures++;
    }
}

/* ---- Training against a plain version: counts all pairs of all pieces anew for each merge ---- */

enum { PLAIN_MAX = 1024 };

typedef struct plain {
    int id[PLAIN_MAX]; /* pieces, each followed by -1 */
    int n;
} plain;

static void plain_init(plain *p, const char *text, const poe_tokenizer *t) {
    poe_splitter *splitter;
    const char *piece;
    size_t length;
    CHECK_INT(poe_splitter_create(t->pattern, &splitter), POE_OK);
    poe_splitter_start(splitter, text, strlen(text));
    p->n = 0;
    while (poe_splitter_next(splitter, &piece, &length) == POE_OK) {
        for (size_t i = 0; i < length; i++)
            p->id[p->n++] = (unsigned char)piece[i];
        p->id[p->n++] = -1;
    }
    poe_splitter_destroy(splitter);
}

static int plain_count(const plain *p, int left, int right) {
    int count = 0;
    for (int i = 0; i + 1 < p->n; i++)
        count += p->id[i] == left && p->id[i + 1] == right;
    return count;
}

static void plain_merge(plain *p, int left, int right, int result) {
    int n = 0;
    for (int i = 0; i < p->n; i++) {
        bool here = i + 1 < p->n && p->id[i] == left && p->id[i + 1] == right;
        p->id[n++] = here ? result : p->id[i];
        i += here;
    }
    p->n = n;
}

static void check_training(void) {
    poe_tokenizer *t = train(prose, 400);
    plain p;
    plain_init(&p, prose, t);
    size_t learned = 0;
    for (;; learned++) {
        int best = 0, left = 0, right = 0;
        for (int i = 0; i + 1 < p.n; i++) {
            int a = p.id[i], b = p.id[i + 1], count = a < 0 || b < 0 ? 0 : plain_count(&p, a, b);
            if (count > best || (count && count == best && (a < left || (a == left && b < right)))) {
                best = count;
                left = a;
                right = b;
            }
        }
        if (!best || learned == t->n_merges)
            break;
        CHECK_INT(t->merges[learned].left, left);
        CHECK_INT(t->merges[learned].right, right);
        plain_merge(&p, left, right, 256 + (int)learned);
    }
    CHECK_INT(t->n_merges, learned);
    CHECK_INT(poe_tokenizer_size(t), POE_VOCAB_MIN + learned);
    size_t length;
    CHECK_INT(*poe_tokenizer_bytes(t, 'x', &length), 'x');
    CHECK_INT(poe_tokenizer_bos(t), 256 + learned);
    CHECK_STRING(poe_tokenizer_special(t, poe_tokenizer_bos(t)), "<|bos|>");
    CHECK(poe_tokenizer_special(t, 'x') == NULL);
    poe_tokenizer_bytes(t, poe_tokenizer_bos(t), &length);
    CHECK_INT(length, 0);
    poe_tokenizer_destroy(t);
    poe_tokenizer_destroy(NULL);
}

static void check_training_limits(void) {
    poe_tokenizer *t = NULL;
    const char *const bad[] = {"good", "", "ab\xc3(d"};
    const int sizes[] = {POE_VOCAB_MIN - 1, 65537};
    for (int i = 0; i < 2; i++) {
        listen_begin();
        CHECK_INT(poe_tokenizer_train(next_text, &(texts){bad, 1, 0}, sizes[i], &t), POE_BAD_INPUT);
        listen_end();
        check_said("a tokenizer has 265 to 65536 tokens");
    }
    listen_begin();
    CHECK_INT(poe_tokenizer_train(next_text, &(texts){bad, 3, 0}, 300, &t), POE_BAD_INPUT);
    listen_end();
    check_said("document 3 of the text to train the tokenizer on is not UTF-8 at its byte 2");
    CHECK(t == NULL);
    t = train("", 300);
    CHECK_INT(poe_tokenizer_size(t), POE_VOCAB_MIN);
    poe_tokenizer_destroy(t);
    t = train("ab ab", POE_VOCAB_MIN);
    CHECK_INT(t->n_merges, 0);
    poe_tokenizer_destroy(t);
    t = train("ab", 300); /* fewer pairs than asked for */
    CHECK_INT(t->n_merges, 1);
    poe_tokenizer_destroy(t);
}

/* ---- Encoding ---- */

/* The ids of `text`, and whether their bytes are the text again. */
static size_t encode(poe_encoder *e, const poe_tokenizer *t, const char *text, size_t bytes, const int32_t **ids) {
    size_t count = 0, at = 0, length;
    CHECK_INT(poe_encoder_encode(e, text, bytes, ids, &count, NULL), POE_OK);
    for (size_t i = 0; i < count; i++) {
        const char *token = poe_tokenizer_bytes(t, (*ids)[i], &length);
        bool same = length > 0 && length <= bytes - at && memcmp(token, text + at, length) == 0;
        CHECK(same);
        if (!same)
            return count;
        at += length;
    }
    CHECK_INT(at, bytes);
    return count;
}

static void check_against_plain(poe_encoder *e, const poe_tokenizer *t, const char *text) {
    plain p;
    plain_init(&p, text, t);
    for (size_t m = 0; m < t->n_merges; m++)
        plain_merge(&p, t->merges[m].left, t->merges[m].right, t->merges[m].result);
    const int32_t *ids;
    size_t count = encode(e, t, text, strlen(text), &ids), k = 0;
    for (int i = 0; i < p.n; i++)
        if (p.id[i] >= 0) {
            CHECK_INT(k < count ? ids[k] : -1, p.id[i]);
            k++;
        }
    CHECK_INT(count, k);
}

/* Twice, so that the second time finds pieces in the encoder's cache. */
static void check_encoding(void) {
    static const char letters[] = "aabnct he's \n12\xc3\xa9";
    poe_tokenizer *t = train(prose, 400);
    poe_encoder *e = NULL;
    poe_rng rng;
    char text[80];
    CHECK_INT(poe_encoder_create(t, &e), POE_OK);
    poe_rng_init(&rng, 1, "texts");
    for (int i = 0; i < 300; i++) {
        size_t n = 0;
        while (n < sizeof(text) - 4) {
            uint64_t pick = poe_rng_next(&rng) % (sizeof(letters) - 2);
            text[n++] = letters[pick];
            if (letters[pick] == '\xc3')
                text[n++] = '\xa9';
        }
        text[n] = '\0';
        check_against_plain(e, t, text);
        check_against_plain(e, t, text);
    }
    check_against_plain(e, t, prose);
    poe_encoder_destroy(e);
    poe_encoder_destroy(NULL);
    poe_tokenizer_destroy(t);
}

/* Pieces and blanks without end take time in proportion, and no limit of PCRE2 stops them. */
static void check_long_pieces(void) {
    static const char *const units[] = {"a", " ", "\n ", "cab", "\u65e5", "1", "?", "\t"};
    enum { BYTES = 300000 };
    poe_tokenizer *t = train(prose, 400);
    poe_encoder *e = NULL;
    CHECK_INT(poe_encoder_create(t, &e), POE_OK);
    char *text = malloc(BYTES);
    for (size_t u = 0; u < sizeof(units) / sizeof(*units); u++) {
        size_t unit = strlen(units[u]), bytes = BYTES / unit * unit;
        for (size_t i = 0; i < bytes; i++)
            text[i] = units[u][i % unit];
        const int32_t *ids;
        CHECK(encode(e, t, text, bytes, &ids) <= bytes);
    }
    free(text);
    poe_encoder_destroy(e);
    poe_tokenizer_destroy(t);
}

static void check_invalid_text(void) {
    static const struct {
        const char *text;
        size_t bytes, bad;
    } cases[] = {{"\xff", 1, 0},           {"abc\x80", 4, 3},          {"a\xe2\x82", 3, 1},
                 {"x \xed\xa0\x80", 5, 2}, {"\xf4\x90\x80\x80", 4, 0}, {"\0\xc0\x80", 3, 1}};
    poe_tokenizer *t = train("", POE_VOCAB_MIN);
    poe_encoder *e = NULL;
    CHECK_INT(poe_encoder_create(t, &e), POE_OK);
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        const int32_t *ids;
        size_t count, bad = 99;
        CHECK_INT(poe_encoder_encode(e, cases[i].text, cases[i].bytes, &ids, &count, &bad), POE_BAD_INPUT);
        CHECK_INT(bad, cases[i].bad);
        CHECK_INT(poe_encoder_encode(e, cases[i].text, cases[i].bytes, &ids, &count, NULL), POE_BAD_INPUT);
        CHECK_INT(encode(e, t, "a\0b", 3, &ids), 3); /* and it goes on */
        CHECK_INT(encode(e, t, NULL, 0, &ids), 0);
    }
    poe_encoder_destroy(e);
    poe_tokenizer_destroy(t);
}

/* ---- Files ---- */

static char folder[] = "/tmp/poe-test-tokenizer-XXXXXX";
static char path[POE_PATH_MAX];

/* A small tokenizer's file, as text; the caller frees it. */
static char *written_file(size_t *size) {
    char *data = NULL;
    poe_tokenizer *t = train("the cat the hat\xc3\xa9", 270);
    CHECK_INT(poe_tokenizer_write(t, path), POE_OK);
    CHECK_INT(poe_read_file(path, "test", &data, size), POE_OK);
    poe_tokenizer_destroy(t);
    return data;
}

static void check_round_trip(void) {
    poe_tokenizer *t = train(prose, 400), *back = NULL, *other = train(prose, 300);
    CHECK_INT(poe_tokenizer_write(t, path), POE_OK);
    CHECK_INT(poe_tokenizer_read(path, &back), POE_OK);
    CHECK(back && poe_tokenizer_hash(t) == poe_tokenizer_hash(back));
    CHECK(poe_tokenizer_hash(t) != poe_tokenizer_hash(other));
    CHECK_INT(poe_tokenizer_bos(back), poe_tokenizer_bos(t));
    poe_tokenizer_destroy(t);
    poe_tokenizer_destroy(back);
    poe_tokenizer_destroy(other);
    t = NULL;
    listen_begin();
    CHECK_INT(poe_tokenizer_read("/nowhere/tokenizer.json", &t), POE_BAD_INPUT);
    CHECK(poe_tokenizer_write(t = train("", 265), "/nowhere/tokenizer.json") != POE_OK);
    listen_end();
    check_said("/nowhere/tokenizer.json");
    poe_tokenizer_destroy(t);
}

/* Replaces the first `from` in `data` by `to`. */
static char *replaced(const char *data, const char *from, const char *to) {
    const char *at = strstr(data, from);
    char *out = malloc(strlen(data) + strlen(to) + 1);
    CHECK(at != NULL);
    if (at)
        sprintf(out, "%.*s%s%s", (int)(at - data), data, to, at + strlen(from));
    else
        strcpy(out, data);
    return out;
}

static void check_refusals(void) {
    static const struct {
        const char *from, *to, *said;
    } cases[] = {
        {"\"version\": \"1.0\",", "\"version\": \"1.0\"", "it is not JSON: line 3: "},
        {"\"model\"", "\"mode\"", "there is no \"model\""},
        {"\"BPE\"", "\"Unigram\"", "must be \"BPE\""},
        {"\"ignore_merges\": false", "\"ignore_merges\": true", "uses \"ignore_merges\""},
        {"\"dropout\": null", "\"dropout\": 0.1", "uses \"dropout\""},
        {"\"normalizer\": null", "\"normalizer\": {\"type\": \"NFC\"}", "normalizer"},
        {"\"merges\"", "\"merge\"", "no \"merges\" list"},
        {"\"vocab\"", "\"vocabulary\"", "no \"vocab\" object"},
        {"\"pre_tokenizer\"", "\"pre\"", "must be the sequence Split, ByteLevel"},
        {"\"Isolated\"", "\"Removed\"", "behavior \"Isolated\""},
        {"\"use_regex\": false", "\"use_regex\": true", "\"use_regex\""},
        {"\"Regex\"", "\"String\"", "\"Regex\""},
        {"?!\\\\S)", "?!\\\\S", "the split pattern is wrong at byte"},
        {"?!\\\\S)|\\\\s+", "?!\\\\S)|\\\\s*", "may match an empty piece"},
        {"<|bos|>", "<|boss|>", "no special token <|bos|>"},
        {"\"a\": 97", "\"a\": 98", "two tokens have id 98"},
        {"\"a\": 97", "\"a\": 4097", "the id of token \"a\" is not one of 0 to 269"},
        {"\"a\": 97", "\"a\": \"97\"", "the id of token \"a\""},
        {"\"Z\": 90", "\"Zx\": 90", "no token for byte 90"},
        {"\"a\": 97", "\"\": 97", "token 97 is empty"},
        {"\"a\": 97", "\"\u65e5\": 97", "token 97, \"\u65e5\", is not spelled"},
        {"\"a\": 97", "\"b\": 97", "it is not JSON: line "},
        {"\"a\",\n", "\"b\",\n", "which is not a token"},
        {"\"a\",\n", "\"\u65e5\",\n", "\"\u65e5\" is not a token"},
        {"\"a\",\n", "", "is not a pair of tokens"},
        {"\"content\"", "\"contents\"", "has no \"content\""},
    };
    size_t size;
    char *data = written_file(&size);
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        char *bad = replaced(data, cases[i].from, cases[i].to);
        poe_tokenizer *t = NULL;
        listen_begin();
        CHECK_INT(poe_tokenizer_parse("bad.json", bad, strlen(bad), &t), POE_BAD_INPUT);
        listen_end();
        check_said("tokenizer bad.json: ");
        check_said(cases[i].said);
        poe_tokenizer_destroy(t);
        free(bad);
    }
    free(data);
}

/* Other spellings of the same tokenizer: merges as strings, special tokens in the vocabulary too. */
static void check_other_forms(void) {
    size_t size;
    char *data = written_file(&size), *text;
    poe_tokenizer *plain_form = NULL, *other_form = NULL;
    CHECK_INT(poe_tokenizer_parse("plain", data, size, &plain_form), POE_OK);
    json_t *root = json_loads(data, 0, NULL), *model = json_object_get(root, "model"), *pair;
    size_t i;
    json_array_foreach(json_object_get(model, "merges"), i, pair) {
        json_t *joined = json_sprintf("%s %s", json_string_value(json_array_get(pair, 0)),
                                      json_string_value(json_array_get(pair, 1)));
        json_array_set_new(json_object_get(model, "merges"), i, joined);
    }
    json_object_set_new(json_object_get(model, "vocab"), "<|bos|>", json_integer(poe_tokenizer_bos(plain_form)));
    text = json_dumps(root, 0);
    CHECK_INT(poe_tokenizer_parse("other", text, strlen(text), &other_form), POE_OK);
    CHECK(other_form && poe_tokenizer_hash(plain_form) == poe_tokenizer_hash(other_form));
    poe_tokenizer_destroy(plain_form);
    poe_tokenizer_destroy(other_form);
    json_decref(root);
    free(text);
    free(data);
}

/* Damages a few bytes: changes, cuts, repeats. */
static size_t mutate(poe_rng *rng, const char *data, size_t size, char *out) {
    static const char alphabet[] = "\"{}[]:,0129-\\u|*+?() \n\xc4\x80truenl";
    memcpy(out, data, size);
    for (uint64_t edits = 1 + poe_rng_next(rng) % 4; edits; edits--) {
        size_t at = poe_rng_next(rng) % size, n = 1 + poe_rng_next(rng) % 16;
        if (n > size - at)
            n = size - at;
        switch (poe_rng_next(rng) % 4) {
        case 0:
            out[at] = (char)poe_rng_next(rng);
            break;
        case 1:
            out[at] = alphabet[poe_rng_next(rng) % (sizeof(alphabet) - 1)];
            break;
        case 2:
            memmove(out + at, out + at + n, size - at - n);
            size = size - n ? size - n : 1;
            break;
        default: /* over what is there: the size stays */
            memmove(out + at, out + poe_rng_next(rng) % (size - n + 1), n);
        }
    }
    return size;
}

/* Digits of ids and letters of keys, so that damage gets past the JSON parser. */
static size_t mutate_mildly(poe_rng *rng, const char *data, size_t size, char *out) {
    memcpy(out, data, size);
    for (int edits = 0; edits < 2;) {
        size_t at = poe_rng_next(rng) % size;
        if (strchr("\"{}[]:,\\ \n", out[at]) || (unsigned char)out[at] >= 0x80)
            continue;
        out[at] =
            (char)(out[at] >= '0' && out[at] <= '9' ? '0' + poe_rng_next(rng) % 10 : 'a' + poe_rng_next(rng) % 26);
        edits++;
    }
    return size;
}

static void check_fuzz(void) {
    size_t size;
    char *data = written_file(&size), *bad = malloc(size + 1);
    poe_log *log = poe_log_create(0, 1);
    poe_rng rng;
    int accepted = 0;
    poe_rng_init(&rng, 1, "fuzz");
    poe_log_attach(log);
    for (int i = 0; i < 4000; i++) {
        poe_tokenizer *t = NULL;
        poe_encoder *e = NULL;
        const int32_t *ids;
        size_t n = i % 2 ? mutate(&rng, data, size, bad) : mutate_mildly(&rng, data, size, bad), count;
        poe_log_hold();
        poe_status status = poe_tokenizer_parse("fuzz", bad, n, &t);
        CHECK(status == POE_OK || status == POE_BAD_INPUT);
        CHECK((status == POE_OK) == (t != NULL));
        if (t && poe_encoder_create(t, &e) == POE_OK) {
            CHECK_INT(poe_encoder_encode(e, prose, strlen(prose), &ids, &count, NULL), POE_OK);
            accepted++;
        }
        poe_encoder_destroy(e);
        poe_tokenizer_destroy(t);
        poe_log_settle(false);
    }
    poe_log_destroy(log);
    CHECK(accepted > 50 && accepted < 3500); /* the damage is neither all fatal nor all harmless */
    free(bad);
    free(data);
}

/* ---- The golden tokenizer ---- */

static void check_cases(poe_encoder *e, const poe_tokenizer *t, const char *shared) {
    char *lines, *save = NULL;
    size_t size;
    CHECK_INT(poe_path(path, "%s/golden/tokenizer/cases.jsonl", shared), POE_OK);
    if (poe_read_file(path, "cases", &lines, &size) != POE_OK) {
        check_failures++;
        return;
    }
    for (char *line = strtok_r(lines, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        json_t *c = json_loads(line, JSON_ALLOW_NUL, NULL), *text = json_object_get(c, "text");
        json_t *expected = json_object_get(c, "ids");
        const int32_t *ids;
        size_t count = encode(e, t, json_string_value(text), json_string_length(text), &ids);
        CHECK_INT(count, json_array_size(expected));
        for (size_t i = 0; i < count && i < json_array_size(expected); i++)
            CHECK_INT(ids[i], json_integer_value(json_array_get(expected, i)));
        json_decref(c);
    }
    free(lines);
}

/* Texts between blank lines. */
static poe_status next_paragraph(void *arg, const char **text, size_t *bytes) {
    const char **at = arg;
    if (!*at)
        return POE_END;
    const char *end = strstr(*at, "\n\n");
    *text = *at;
    *bytes = end ? (size_t)(end - *at) : strlen(*at);
    *at = end ? end + 2 : NULL;
    return POE_OK;
}

/* The golden tokenizer learned from the paragraphs of this text: the same training gives the same file. */
static void check_same_file(const char *text, const char *golden_path) {
    poe_tokenizer *t = NULL;
    char *ours = NULL, *golden = NULL;
    size_t our_size = 0, golden_size = 0;
    CHECK_INT(poe_tokenizer_train(next_paragraph, &text, 1024, &t), POE_OK);
    CHECK_INT(poe_path(path, "%s/tokenizer.json", folder), POE_OK);
    CHECK_INT(poe_tokenizer_write(t, path), POE_OK);
    CHECK_INT(poe_read_file(path, "test", &ours, &our_size), POE_OK);
    CHECK_INT(poe_read_file(golden_path, "golden", &golden, &golden_size), POE_OK);
    CHECK_INT(our_size, golden_size);
    CHECK(our_size == golden_size && memcmp(ours, golden, our_size) == 0);
    free(golden);
    free(ours);
    poe_tokenizer_destroy(t);
}

/* From the whole text as one document, which is as compact as the golden tokenizer within 0.5 %. */
static void check_compactness(poe_encoder *golden, const poe_tokenizer *t, const char *text) {
    const int32_t *ids;
    poe_tokenizer *own = train(text, poe_tokenizer_size(t));
    poe_encoder *e = NULL;
    CHECK_INT(poe_encoder_create(own, &e), POE_OK);
    size_t theirs = encode(golden, t, text, strlen(text), &ids), ours = encode(e, own, text, strlen(text), &ids);
    printf("tinyshakespeare: %zu tokens, golden %zu, ratio %.5f\n", ours, theirs, (double)ours / (double)theirs);
    CHECK((double)ours <= 1.005 * (double)theirs);
    poe_encoder_destroy(e);
    poe_tokenizer_destroy(own);
}

static void check_golden(const char *shared) {
    poe_tokenizer *t = NULL;
    poe_encoder *e = NULL;
    char file[POE_PATH_MAX], *text = NULL;
    size_t size;
    CHECK_INT(poe_path(file, "%s/golden/tokenizer/tokenizer.json", shared), POE_OK);
    CHECK_INT(poe_path(path, "%s/data/tinyshakespeare.txt", shared), POE_OK);
    if (poe_tokenizer_read(file, &t) != POE_OK || poe_encoder_create(t, &e) != POE_OK ||
        poe_read_file(path, "text", &text, &size) != POE_OK) {
        check_failures++;
    } else {
        CHECK_INT(poe_tokenizer_size(t), 1024);
        CHECK_INT(poe_tokenizer_bos(t), 1015);
        check_cases(e, t, shared);
        check_compactness(e, t, text);
        check_same_file(text, file);
    }
    free(text);
    poe_encoder_destroy(e);
    poe_tokenizer_destroy(t);
}

int main(void) {
    if (!mkdtemp(folder))
        return 1;
    CHECK_INT(poe_path(path, "%s/tokenizer.json", folder), POE_OK);
    check_training();
    check_training_limits();
    check_encoding();
    check_long_pieces();
    check_invalid_text();
    check_round_trip();
    check_refusals();
    check_other_forms();
    check_fuzz();
    if (poe_test_shared())
        check_golden(poe_test_shared());
    poe_remove_tree(folder);
    if (!poe_test_shared() && !check_failures)
        poe_test_skip("no golden tokenizer; the cases of its own held");
    return check_result();
}
