/* SPDX-License-Identifier: MIT */
#include "src/documents.h"

#include <jansson.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "src/crc32c.h"
#include "src/files.h"
#include "src/log.h"

typedef struct source {
    char *path;
    const char *data; /* mapped */
    size_t size;
    bool json;
} source;

typedef struct entry {
    size_t source;
    size_t offset; /* of the text in a .txt, of the line in a .jsonl */
    size_t bytes;
} entry;

struct poe_documents {
    source *sources;
    size_t n_sources;
    entry *entries;
    size_t count, room;
    size_t text_bytes;
    json_t *parsed; /* owns the text that was given last, if it came from a .jsonl */
};

static size_t line_of(const source *file, size_t offset)
{
    size_t line = 1;
    for (size_t i = 0; i < offset; i++)
        line += file->data[i] == '\n';
    return line;
}

/* Length of the UTF-8 sequence that starts at p, 0 when it is none (Unicode 15, table 3-7). */
static size_t sequence_length(const unsigned char *p, size_t left)
{
    static const struct {
        unsigned char first, last, low, high; /* of the first byte, of the second */
        size_t length;
    } forms[] = {{0xC2, 0xDF, 0x80, 0xBF, 2}, {0xE0, 0xE0, 0xA0, 0xBF, 3}, {0xE1, 0xEC, 0x80, 0xBF, 3},
                 {0xED, 0xED, 0x80, 0x9F, 3}, {0xEE, 0xEF, 0x80, 0xBF, 3}, {0xF0, 0xF0, 0x90, 0xBF, 4},
                 {0xF1, 0xF3, 0x80, 0xBF, 4}, {0xF4, 0xF4, 0x80, 0x8F, 4}};
    if (p[0] < 0x80)
        return 1;
    for (size_t f = 0; f < sizeof(forms) / sizeof(forms[0]); f++) {
        if (p[0] < forms[f].first || p[0] > forms[f].last)
            continue;
        if (left < forms[f].length || p[1] < forms[f].low || p[1] > forms[f].high)
            return 0;
        for (size_t i = 2; i < forms[f].length; i++)
            if ((p[i] & 0xC0) != 0x80)
                return 0;
        return forms[f].length;
    }
    return 0;
}

static poe_status check_utf8(const source *file)
{
    const unsigned char *p = (const unsigned char *)file->data;
    for (size_t i = 0; i < file->size;) {
        uint64_t word;
        if (file->size - i >= sizeof(word)) {
            memcpy(&word, p + i, sizeof(word));
            if (!(word & 0x8080808080808080u)) {
                i += sizeof(word);
                continue;
            }
        }
        size_t length = sequence_length(p + i, file->size - i);
        if (!length) {
            poe_error("%s: byte %zu (line %zu), 0x%02x, is not valid UTF-8", file->path, i, line_of(file, i), p[i]);
            return POE_BAD_INPUT;
        }
        i += length;
    }
    return POE_OK;
}

static poe_status add_entry(poe_documents *documents, size_t offset, size_t bytes, size_t text_bytes)
{
    if (documents->count == documents->room) {
        size_t room = documents->room ? 2 * documents->room : 1024;
        entry *entries = realloc(documents->entries, room * sizeof(*entries));
        if (!entries) {
            poe_error("out of memory: an index of %zu documents", room);
            return POE_FAILED;
        }
        documents->entries = entries;
        documents->room = room;
    }
    documents->entries[documents->count++] = (entry){documents->n_sources - 1, offset, bytes};
    documents->text_bytes += text_bytes;
    return POE_OK;
}

/* End of the line that starts at `start`: where its '\n' is, or the end of the file. */
static size_t line_end(const source *file, size_t start)
{
    const char *newline = memchr(file->data + start, '\n', file->size - start);
    return newline ? (size_t)(newline - file->data) : file->size;
}

static bool is_blank(const char *line, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++)
        if (!memchr(" \t\v\f\r", line[i], 5))
            return false;
    return true;
}

static poe_status index_text(poe_documents *documents, const source *file)
{
    size_t first = SIZE_MAX, last = 0; /* the document that is open: start, end */
    poe_status status = POE_OK;
    for (size_t start = 0, end; start < file->size && status == POE_OK; start = end + 1) {
        end = line_end(file, start);
        if (!is_blank(file->data + start, end - start)) {
            if (first == SIZE_MAX)
                first = start;
            last = end - (file->data[end - 1] == '\r');
        } else if (first != SIZE_MAX) {
            status = add_entry(documents, first, last - first, last - first);
            first = SIZE_MAX;
        }
    }
    if (status == POE_OK && first != SIZE_MAX)
        status = add_entry(documents, first, last - first, last - first);
    return status;
}

/* The "text" of a line; *parsed owns it. `line_number` 0: to be counted, if it is needed. */
static poe_status parse_line(const source *file, size_t offset, size_t bytes, size_t line_number, json_t **parsed,
                             const char **text, size_t *text_bytes)
{
    json_error_t error;
    const char *reason = NULL;
    /* Numbers are not ours: as reals, integers of any size are taken. */
    json_t *root = json_loadb(file->data + offset, bytes, JSON_ALLOW_NUL | JSON_DECODE_INT_AS_REAL, &error);
    json_t *value = json_object_get(root, "text"); /* NULL when there is no object */
    if (!root)
        reason = error.text;
    else if (!json_is_string(value))
        reason = "no \"text\" string";
    else if (json_string_length(value) == 0)
        reason = "its \"text\" is empty";
    if (reason) {
        size_t line = line_number ? line_number : line_of(file, offset);
        poe_error("%s: line %zu %s: %s", file->path, line, root ? "cannot be used" : "is not JSON", reason);
        json_decref(root);
        return POE_BAD_INPUT;
    }
    *parsed = root;
    *text = json_string_value(value);
    *text_bytes = json_string_length(value);
    return POE_OK;
}

static poe_status index_json_lines(poe_documents *documents, const source *file)
{
    size_t line = 1;
    for (size_t start = 0, end; start < file->size; start = end + 1, line++) {
        end = line_end(file, start);
        if (is_blank(file->data + start, end - start))
            continue;
        json_t *parsed;
        const char *text;
        size_t bytes;
        poe_status status = parse_line(file, start, end - start, line, &parsed, &text, &bytes);
        if (status != POE_OK)
            return status;
        json_decref(parsed);
        status = add_entry(documents, start, end - start, bytes);
        if (status != POE_OK)
            return status;
    }
    return POE_OK;
}

static bool ends_with(const char *path, const char *ending)
{
    size_t length = strlen(path), tail = strlen(ending);
    return length > tail && strcmp(path + length - tail, ending) == 0;
}

static poe_status add_source(poe_documents *documents, const char *path, poe_split split)
{
    bool json = ends_with(path, ".jsonl");
    if (!json && !ends_with(path, ".txt")) {
        poe_error("the data file %s has an unknown ending: .txt, .jsonl and .bin are known", path);
        return POE_BAD_INPUT;
    }
    source *file = &documents->sources[documents->n_sources];
    poe_status status = poe_map_file(path, "data file (--data, --val-data)", &file->data, &file->size);
    if (status != POE_OK)
        return status;
    documents->n_sources++;
    file->json = json;
    file->path = strdup(path);
    if (!file->path) {
        poe_error("out of memory: the name of %s", path);
        return POE_FAILED;
    }
    size_t before = documents->count;
    status = check_utf8(file);
    if (status != POE_OK)
        return status;
    if (json)
        status = index_json_lines(documents, file);
    else if (split == POE_SPLIT_NONE)
        status = add_entry(documents, 0, file->size, file->size);
    else
        status = index_text(documents, file);
    if (status == POE_OK && documents->count == before) {
        poe_error("%s: no document in its %zu bytes, only blank lines", path, file->size);
        return POE_BAD_INPUT;
    }
    return status;
}

poe_status poe_documents_open(const char *const *paths, int n, poe_split split, poe_documents **documents)
{
    poe_documents *opened = calloc(1, sizeof(*opened));
    if (opened)
        opened->sources = calloc((size_t)n + 1, sizeof(*opened->sources));
    if (!opened || !opened->sources) {
        free(opened);
        poe_error("out of memory: an index of %d data files", n);
        return POE_FAILED;
    }
    poe_status status = POE_OK;
    for (int i = 0; i < n && status == POE_OK; i++)
        status = add_source(opened, paths[i], split);
    if (status == POE_OK)
        *documents = opened;
    else
        poe_documents_close(opened);
    return status;
}

void poe_documents_close(poe_documents *documents)
{
    if (!documents)
        return;
    for (size_t i = 0; i < documents->n_sources; i++) {
        munmap((void *)documents->sources[i].data, documents->sources[i].size);
        free(documents->sources[i].path);
    }
    json_decref(documents->parsed);
    free(documents->sources);
    free(documents->entries);
    free(documents);
}

size_t poe_documents_count(const poe_documents *documents)
{
    return documents->count;
}

size_t poe_documents_bytes(const poe_documents *documents)
{
    return documents->text_bytes;
}

uint32_t poe_documents_checksum(const poe_documents *documents)
{
    uint32_t crc = 0;
    for (size_t i = 0; i < documents->n_sources; i++) {
        uint64_t size = documents->sources[i].size;
        crc = poe_crc32c(crc, &size, sizeof(size));
        crc = poe_crc32c(crc, documents->sources[i].data, documents->sources[i].size);
    }
    return crc;
}

poe_status poe_documents_get(poe_documents *documents, size_t i, const char **text, size_t *bytes)
{
    const entry *e = &documents->entries[i];
    const source *file = &documents->sources[e->source];
    json_decref(documents->parsed);
    documents->parsed = NULL;
    if (file->json)
        return parse_line(file, e->offset, e->bytes, 0, &documents->parsed, text, bytes);
    *text = file->data + e->offset;
    *bytes = e->bytes;
    return POE_OK;
}
