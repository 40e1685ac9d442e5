/* SPDX-License-Identifier: MIT
 * Documents of .txt and .jsonl files: what is in them, what is refused and with which words, and random mutations. */
#include "src/documents.h"

#include <unistd.h>

#include "src/clock.h"
#include "src/files.h"
#include "src/log.h"
#include "src/rng.h"
#include "tests/check.h"

static char root[] = "/tmp/poe-test-documents-XXXXXX";

#define TEXT(literal) literal, sizeof(literal) - 1

static poe_status open_bytes(const char *name, const char *data, size_t size, poe_split split,
                             poe_documents **documents)
{
    char path[POE_PATH_MAX];
    CHECK_INT(poe_path(path, "%s/%s", root, name), POE_OK);
    FILE *f = fopen(path, "wb");
    CHECK(f && fwrite(data, 1, size, f) == size && fclose(f) == 0);
    return poe_documents_open((const char *[]){path}, 1, split, documents);
}

/* The file holds just these documents, a list that ends with NULL. */
static void check_holds(const char *name, const char *data, size_t size, poe_split split, const char *const *expected)
{
    poe_documents *documents = NULL;
    CHECK_INT(open_bytes(name, data, size, split, &documents), POE_OK);
    if (!documents)
        return;
    size_t count = 0, total = 0;
    for (; expected[count]; count++) {
        const char *text = NULL;
        size_t bytes = 0;
        if (count >= poe_documents_count(documents))
            continue;
        CHECK_INT(poe_documents_get(documents, count, &text, &bytes), POE_OK);
        CHECK_INT(bytes, strlen(expected[count]));
        CHECK(text && memcmp(text, expected[count], bytes) == 0);
        total += bytes;
    }
    CHECK_INT(poe_documents_count(documents), count);
    CHECK_INT(poe_documents_bytes(documents), total);
    poe_documents_close(documents);
}

static void check_texts(void)
{
    const poe_split split = POE_SPLIT_BLANK_LINES;
    check_holds("a.txt", TEXT("one"), split, (const char *[]){"one", NULL});
    check_holds("a.txt", TEXT("one\n"), split, (const char *[]){"one", NULL});
    check_holds("a.txt", TEXT("\n \t\none\ntwo\n\n\nthree\n\r\n"), split, (const char *[]){"one\ntwo", "three", NULL});
    check_holds("a.txt", TEXT("one\r\ntwo\r\n\r\n  three \r\n"), split,
                (const char *[]){"one\r\ntwo", "  three ", NULL});
    check_holds("a.txt", TEXT("\xC3\xA9t\xC3\xA9\n\n\xF0\x9F\x98\x80"), split,
                (const char *[]){"\xC3\xA9t\xC3\xA9", "\xF0\x9F\x98\x80", NULL});
    check_holds("a.txt", TEXT("\none\n\ntwo\n\n"), POE_SPLIT_NONE, (const char *[]){"\none\n\ntwo\n\n", NULL});
}

static void check_json_lines(void)
{
    check_holds("a.jsonl",
                TEXT("{\"text\": \"one\\n\\ntwo\"}\n\n \r\n{\"id\": 12345678901234567890, \"x\": [1.5], \"text\": "
                     "\"\\u00e9\\ud83d\\ude00\"}\r\n{\"text\": \" \"}"),
                POE_SPLIT_BLANK_LINES, (const char *[]){"one\n\ntwo", "\xC3\xA9\xF0\x9F\x98\x80", " ", NULL});
    poe_documents *documents = NULL;
    const char *text = NULL;
    size_t bytes = 0;
    CHECK_INT(open_bytes("nul.jsonl", TEXT("{\"text\": \"a\\u0000b\"}"), POE_SPLIT_NONE, &documents), POE_OK);
    CHECK_INT(poe_documents_get(documents, 0, &text, &bytes), POE_OK);
    CHECK(bytes == 3 && memcmp(text, "a\0b", 3) == 0);
    poe_documents_close(documents);
}

static void check_several_files(void)
{
    char first[POE_PATH_MAX], second[POE_PATH_MAX];
    poe_path(first, "%s/first.txt", root);
    poe_path(second, "%s/second.jsonl", root);
    CHECK_INT(poe_write_file(first, TEXT("a\n\nb\n")), POE_OK);
    CHECK_INT(poe_write_file(second, TEXT("{\"text\": \"c\"}\n")), POE_OK);
    poe_documents *both = NULL, *turned = NULL;
    CHECK_INT(poe_documents_open((const char *[]){first, second}, 2, POE_SPLIT_BLANK_LINES, &both), POE_OK);
    CHECK_INT(poe_documents_open((const char *[]){second, first}, 2, POE_SPLIT_BLANK_LINES, &turned), POE_OK);
    CHECK_INT(poe_documents_count(both), 3);
    const char *text;
    size_t bytes;
    for (size_t i = 6; i-- > 0;) { /* in any order */
        CHECK_INT(poe_documents_get(both, i % 3, &text, &bytes), POE_OK);
        CHECK(bytes == 1 && *text == (char)('a' + i % 3));
    }
    CHECK(poe_documents_checksum(both) != poe_documents_checksum(turned));
    poe_documents_close(both);
    poe_documents_close(turned);
}

/* The bytes are refused. */
static void check_refused(const char *name, const char *data, size_t size)
{
    poe_documents *documents = NULL;
    CHECK_INT(open_bytes(name, data, size, POE_SPLIT_BLANK_LINES, &documents), POE_BAD_INPUT);
    CHECK(documents == NULL);
}

static void check_refusals(void)
{
    check_refused("a.txt", "", 0);
    check_refused("a.txt", TEXT(" \n\r\n\t"));
    check_refused("a.csv", TEXT("a"));
    check_refused(".txt", TEXT(""));
    static const char *const not_utf8[] = {"\x80",
                                           "\xC0\xAF",
                                           "\xC1\xBF",
                                           "\xE0\x9F\xBF",
                                           "\xED\xA0\x80",
                                           "\xF0\x8F\xBF\xBF",
                                           "\xF4\x90\x80\x80",
                                           "\xF5\x80\x80\x80",
                                           "\xFF",
                                           "\xC3",
                                           "\xE2\x82",
                                           "\xF0\x9F\x98",
                                           "\xC3(",
                                           "\xE2\x82(",
                                           "\xF0\x9F\x98("};
    for (size_t i = 0; i < sizeof(not_utf8) / sizeof(not_utf8[0]); i++) {
        check_refused("a.txt", not_utf8[i], strlen(not_utf8[i]));
        char line[64];
        int n = snprintf(line, sizeof(line), "{\"text\": \"twelve bytes %s\"}\n", not_utf8[i]);
        check_refused("a.jsonl", line, (size_t)n);
    }
    check_refused("a.jsonl", TEXT("\n\n"));
    check_refused("a.jsonl", TEXT("{\"text\": \"a\"}\n{\"text\": \"b\""));
    check_refused("a.jsonl", TEXT("{\"text\": \"a\"} {\"text\": \"b\"}"));
    check_refused("a.jsonl", TEXT("{\"text\": \"\"}"));
    check_refused("a.jsonl", TEXT("{\"text\": 1}"));
    check_refused("a.jsonl", TEXT("{\"txt\": \"a\"}"));
    check_refused("a.jsonl", TEXT("[\"text\", \"a\"]"));
    check_refused("a.jsonl", TEXT("\"text\""));
    check_refused("a.jsonl", TEXT("{\"text\": \"\\ud800\"}"));
    poe_documents *documents = NULL;
    CHECK_INT(poe_documents_open((const char *[]){"/nowhere/a.txt"}, 1, POE_SPLIT_NONE, &documents), POE_BAD_INPUT);
    CHECK_INT(poe_documents_open((const char *[]){root}, 1, POE_SPLIT_NONE, &documents), POE_BAD_INPUT);
}

/* What is said on standard error about a bad file. */
static void check_sentence(const char *name, const char *data, size_t size, const char *expected)
{
    char path[POE_PATH_MAX], *said = NULL;
    size_t length = 0;
    CHECK_INT(poe_path(path, "%s/said", root), POE_OK);
    fflush(stderr);
    int saved = dup(2);
    CHECK(freopen(path, "wb", stderr) != NULL);
    poe_documents *documents = NULL;
    poe_status status = open_bytes(name, data, size, POE_SPLIT_BLANK_LINES, &documents);
    fflush(stderr);
    dup2(saved, 2);
    close(saved);
    CHECK_INT(status, POE_BAD_INPUT);
    CHECK_INT(poe_read_file(path, "test", &said, &length), POE_OK);
    CHECK(said && strstr(said, name) != NULL);
    if (!said || !strstr(said, expected))
        CHECK_STRING(said, expected);
    free(said);
}

static void check_sentences(void)
{
    check_sentence("x.txt", TEXT("abc\nd\xFFq"), "byte 5 (line 2), 0xff, is not valid UTF-8");
    check_sentence("x.jsonl", TEXT("{\"text\": \"a\"}\n\n{}\n"), "line 3 cannot be used: no \"text\" string");
    check_sentence("x.jsonl", TEXT("{\"text\": \"a\"}\n{\"text\": \"\"}\n"),
                   "line 2 cannot be used: its \"text\" is empty");
    check_sentence("x.jsonl", TEXT("{\"text\": \"a\"}\n\nx\n"), "line 3 is not JSON");
    check_sentence("x.txt", TEXT(""), "it is empty");
}

/* Random changes of a good file: refused, or every document can be read. */
static void check_mutations(const char *name, const char *good, size_t size)
{
    poe_rng rng;
    poe_rng_init(&rng, 1, name);
    char bad[1024];
    for (int round = 0; round < 2000; round++) {
        memcpy(bad, good, size);
        for (int change = 0; change < 1 + round % 4; change++)
            bad[poe_rng_next(&rng) % size] =
                (char)(round % 2 ? "{}[]\":,\\u0\n\r \xC3\xF0"[poe_rng_next(&rng) % 15] : (int)poe_rng_next(&rng));
        size_t kept = round % 3 ? size : poe_rng_next(&rng) % (size + 1), total = 0;
        poe_documents *documents = NULL;
        poe_status status = open_bytes(name, bad, kept, POE_SPLIT_BLANK_LINES, &documents);
        CHECK(status == POE_OK || status == POE_BAD_INPUT);
        if (status != POE_OK)
            continue;
        for (size_t i = 0; i < poe_documents_count(documents); i++) {
            const char *text;
            size_t bytes;
            CHECK_INT(poe_documents_get(documents, i, &text, &bytes), POE_OK);
            CHECK(bytes > 0 && memchr(text, 0xFF, bytes) == NULL);
            total += bytes;
        }
        CHECK_INT(total, poe_documents_bytes(documents));
        poe_documents_close(documents);
    }
}

/* The larger data set is indexed at a pace of well under a second. Timing is printed, not judged. */
static void time_open(const char *shared)
{
    char path[POE_PATH_MAX];
    poe_path(path, "%s/data/train.jsonl", shared);
    if (access(path, R_OK) != 0)
        return;
    poe_documents *documents = NULL;
    double start = poe_now();
    CHECK_INT(poe_documents_open((const char *[]){path}, 1, POE_SPLIT_BLANK_LINES, &documents), POE_OK);
    printf("opened %zu documents of %zu bytes in %.3f s\n", poe_documents_count(documents),
           poe_documents_bytes(documents), poe_now() - start);
    poe_documents_close(documents);
}

int main(void)
{
    if (!mkdtemp(root))
        return 1;
    check_texts();
    check_json_lines();
    check_several_files();
    check_sentences();
    poe_log *log = poe_log_create(0, 1); /* holds the sentences that the refusals say */
    poe_log_attach(log);
    poe_log_hold();
    check_refusals();
    check_mutations("m.jsonl",
                    TEXT("{\"text\": \"one \\u00e9 \xC3\xA9\", \"n\": 1}\n{\"a\": [], \"text\": \"two\"}\n"));
    check_mutations("m.txt", TEXT("one \xC3\xA9\ntwo\n\n\xF0\x9F\x98\x80\n \nthree\r\n"));
    poe_log_settle(false);
    poe_log_destroy(log);
    if (poe_test_shared())
        time_open(poe_test_shared());
    CHECK_INT(poe_remove_tree(root), POE_OK);
    return check_result();
}
