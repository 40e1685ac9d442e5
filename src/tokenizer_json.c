/* SPDX-License-Identifier: MIT
 * Tokenizers as Hugging Face's tokenizer.json. A file that would give other ids there than here is refused. */
#include "src/tokenizer_private.h"

#include <jansson.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "src/files.h"
#include "src/log.h"

/* Says what is wrong with the file. */
static poe_status __attribute__((format(printf, 2, 3))) reject(const char *path, const char *format, ...) {
    char why[512];
    va_list args;
    va_start(args, format);
    vsnprintf(why, sizeof(why), format, args);
    va_end(args);
    poe_error("tokenizer %s: %s", path, why);
    return POE_BAD_INPUT;
}

static poe_status out_of_memory(const char *path) {
    poe_error("out of memory for tokenizer %s", path);
    return POE_FAILED;
}

/* ---- Bytes as characters: printable ones of Latin-1 stand for themselves, the others for U+0100 onwards ---- */

enum { ALPHABET_END = 0x144 };

typedef struct alphabet {
    uint16_t of_byte[256];
    int16_t byte_of[ALPHABET_END]; /* -1: stands for no byte */
} alphabet;

static void alphabet_init(alphabet *a) {
    memset(a->byte_of, 0xff, sizeof(a->byte_of));
    uint16_t next = 0x100;
    for (int byte = 0; byte < 256; byte++) {
        bool printable = (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte != 0xad);
        a->of_byte[byte] = printable ? (uint16_t)byte : next++;
        a->byte_of[a->of_byte[byte]] = (int16_t)byte;
    }
}

/* Spells `length` bytes as UTF-8 at `out`, which takes two bytes for each and a NUL; returns its end. */
static char *spell(const alphabet *a, const char *bytes, size_t length, char *out) {
    for (size_t i = 0; i < length; i++) {
        unsigned c = a->of_byte[(unsigned char)bytes[i]];
        if (c >= 0x80) {
            *out++ = (char)(0xc0 | c >> 6);
            *out++ = (char)(0x80 | (c & 0x3f));
        } else {
            *out++ = (char)c;
        }
    }
    *out = '\0';
    return out;
}

/* Undoes spell() on a string that is UTF-8; false when a character stands for no byte. */
static bool unspell(const alphabet *a, const char *spelled, char *bytes, size_t *length) {
    size_t n = 0;
    for (const unsigned char *p = (const unsigned char *)spelled; *p; p++) {
        unsigned c = *p;
        if (c >= 0xe0)
            return false;
        if (c >= 0x80)
            c = (c & 0x1f) << 6 | (*++p & 0x3f);
        if (c >= ALPHABET_END || a->byte_of[c] < 0)
            return false;
        bytes[n++] = (char)a->byte_of[c];
    }
    *length = n;
    return true;
}

/* ---- Reading ---- */

typedef struct reader {
    const char *path;
    const json_t *vocab;        /* object: spelling -> id */
    const json_t *added_tokens; /* array, or NULL */
    const json_t *merges;       /* array */
    const char *expression;
    alphabet alphabet;
    char *scratch; /* for two strings of the file at once: as long as the file */
} reader;

static bool is_set(const json_t *value) {
    return value && !json_is_null(value) && !json_is_false(value) &&
           !(json_is_string(value) && json_string_length(value) == 0);
}

static bool has_type(const json_t *object, const char *type) {
    const char *found = json_string_value(json_object_get(object, "type"));
    return found && strcmp(found, type) == 0;
}

/* The model must merge by rank and do nothing else. */
static poe_status read_model(reader *r, const json_t *model) {
    static const char *const unsupported[] = {"dropout", "continuing_subword_prefix", "end_of_word_suffix",
                                              "ignore_merges"};
    if (!json_is_object(model))
        return reject(r->path, "there is no \"model\"");
    if (!has_type(model, "BPE"))
        return reject(r->path, "the model's \"type\" must be \"BPE\"");
    for (size_t i = 0; i < sizeof(unsupported) / sizeof(*unsupported); i++)
        if (is_set(json_object_get(model, unsupported[i])))
            return reject(r->path, "the model uses \"%s\", which is not supported", unsupported[i]);
    r->vocab = json_object_get(model, "vocab");
    r->merges = json_object_get(model, "merges");
    if (!json_is_object(r->vocab))
        return reject(r->path, "the model has no \"vocab\" object");
    if (!json_is_array(r->merges))
        return reject(r->path, "the model has no \"merges\" list");
    return POE_OK;
}

/* Split by a pattern, then ByteLevel without a pattern of its own. */
static poe_status read_pre_tokenizer(reader *r, const json_t *pre) {
    const json_t *list = json_object_get(pre, "pretokenizers");
    const json_t *split = json_array_get(list, 0), *bytes = json_array_get(list, 1);
    if (!has_type(pre, "Sequence") || json_array_size(list) != 2 || !has_type(split, "Split") ||
        !has_type(bytes, "ByteLevel"))
        return reject(r->path, "\"pre_tokenizer\" must be the sequence Split, ByteLevel");
    const char *behavior = json_string_value(json_object_get(split, "behavior"));
    if (!behavior || strcmp(behavior, "Isolated") != 0 || is_set(json_object_get(split, "invert")))
        return reject(r->path, "Split must have the behavior \"Isolated\" and not invert");
    if (!json_is_false(json_object_get(bytes, "use_regex")) ||
        !json_is_false(json_object_get(bytes, "add_prefix_space")))
        return reject(r->path, "ByteLevel must have \"use_regex\" and \"add_prefix_space\" false");
    r->expression = json_string_value(json_object_get(json_object_get(split, "pattern"), "Regex"));
    if (!r->expression)
        return reject(r->path, "Split has no \"pattern\" with a \"Regex\"");
    return POE_OK;
}

static poe_status read_structure(reader *r, const json_t *root) {
    if (!json_is_object(root))
        return reject(r->path, "it must hold a JSON object");
    if (is_set(json_object_get(root, "normalizer")))
        return reject(r->path, "it has a normalizer, which is not supported");
    r->added_tokens = json_object_get(root, "added_tokens");
    if (r->added_tokens && !json_is_array(r->added_tokens))
        return reject(r->path, "\"added_tokens\" must be a list");
    poe_status status = read_model(r, json_object_get(root, "model"));
    return status == POE_OK ? read_pre_tokenizer(r, json_object_get(root, "pre_tokenizer")) : status;
}

/* Sets a token, unless its id is out of range, taken, or its name empty. */
static poe_status read_token(const reader *r, poe_tokenizer *t, const char *name, const json_t *id, bool special) {
    size_t length = strlen(name);
    if (!json_is_integer(id) || json_integer_value(id) < 0 || json_integer_value(id) >= t->size)
        return reject(r->path, "the id of token \"%s\" is not one of 0 to %d, as many as there are tokens", name,
                      t->size - 1);
    int i = (int)json_integer_value(id);
    if (length == 0)
        return reject(r->path, "token %d is empty", i);
    if (t->tokens[i].bytes)
        return reject(r->path, "two tokens have id %d", i);
    if (special)
        return poe_tokenizer_set(t, i, name, length, true);
    if (!unspell(&r->alphabet, name, r->scratch, &length))
        return reject(r->path, "token %d, \"%s\", is not spelled in the byte-level alphabet", i, name);
    return poe_tokenizer_set(t, i, r->scratch, length, false);
}

/* Added tokens first: the vocabulary may list them again. */
static poe_status read_tokens(const reader *r, poe_tokenizer *t) {
    poe_status status = POE_OK;
    size_t i;
    const json_t *added, *id;
    const char *name;
    json_array_foreach(r->added_tokens, i, added) {
        name = json_string_value(json_object_get(added, "content"));
        if (!name)
            return reject(r->path, "entry %zu of \"added_tokens\" has no \"content\"", i);
        status = read_token(r, t, name, json_object_get(added, "id"), true);
        if (status != POE_OK)
            return status;
    }
    json_object_foreach((json_t *)r->vocab, name, id) {
        json_int_t n = json_is_integer(id) ? json_integer_value(id) : -1;
        if (n >= 0 && n < t->size && t->tokens[n].special && strcmp(t->tokens[n].bytes, name) == 0)
            continue;
        status = read_token(r, t, name, id, false);
        if (status != POE_OK)
            return status;
    }
    for (int n = 0; n < t->size; n++)
        if (!t->tokens[n].bytes)
            return reject(r->path, "no token has id %d", n);
    return status;
}

/* The number of tokens: those of the vocabulary, and added ones that it does not list. */
static size_t count_tokens(const reader *r) {
    size_t n = json_object_size(r->vocab), i;
    const json_t *added;
    json_array_foreach(r->added_tokens, i, added) {
        const char *name = json_string_value(json_object_get(added, "content"));
        n += !name || !json_object_get(r->vocab, name);
    }
    return n;
}

/* Finds the two names of a merge, ["a", "b"] or "a b", in `scratch`: "a" NUL "b" NUL. */
static bool merge_names(const reader *r, const json_t *merge, const char **left, const char **right) {
    char *space;
    *left = r->scratch;
    if (json_is_string(merge)) {
        strcpy(r->scratch, json_string_value(merge));
        space = strchr(r->scratch, ' ');
        if (!space)
            return false;
        *space = '\0';
        *right = space + 1;
        return !strchr(*right, ' ');
    }
    const char *a = json_string_value(json_array_get(merge, 0)), *b = json_string_value(json_array_get(merge, 1));
    if (!a || !b || json_array_size(merge) != 2)
        return false;
    strcpy(r->scratch, a);
    *right = strcpy(r->scratch + strlen(a) + 1, b);
    return true;
}

/* The id of an ordinary token, or -1. Ids are known to be in range. */
static int32_t find_token(const reader *r, const poe_tokenizer *t, const char *name) {
    const json_t *id = json_object_get(r->vocab, name);
    return id && !t->tokens[json_integer_value(id)].special ? (int32_t)json_integer_value(id) : -1;
}

static poe_status read_merges(const reader *r, poe_tokenizer *t) {
    size_t i;
    const json_t *entry;
    json_array_foreach(r->merges, i, entry) {
        const char *left, *right;
        if (!merge_names(r, entry, &left, &right))
            return reject(r->path, "merge %zu (counted from 0) is not a pair of tokens", i);
        poe_merge *merge = &t->merges[i];
        merge->left = find_token(r, t, left);
        merge->right = find_token(r, t, right);
        if (merge->left < 0 || merge->right < 0)
            return reject(r->path, "merge %zu (counted from 0): \"%s\" is not a token", i,
                          merge->left < 0 ? left : right);
        memmove(r->scratch + strlen(left), right, strlen(right) + 1);
        merge->result = find_token(r, t, left);
        if (merge->result < 0)
            return reject(r->path, "merge %zu (counted from 0) gives \"%s\", which is not a token", i, left);
    }
    return POE_OK;
}

static poe_status read_tokenizer(reader *r, const json_t *root, poe_tokenizer **tokenizer) {
    poe_status status = read_structure(r, root);
    if (status != POE_OK)
        return status;
    char owner[POE_PATH_MAX + 16];
    snprintf(owner, sizeof(owner), "tokenizer %s", r->path);
    poe_tokenizer *t = NULL;
    /* A file that jansson could read has fewer than 2^31 tokens. */
    status = poe_tokenizer_create(r->expression, (int)count_tokens(r), json_array_size(r->merges), owner, &t);
    if (status == POE_OK)
        status = read_tokens(r, t);
    if (status == POE_OK)
        status = read_merges(r, t);
    if (status == POE_OK)
        status = poe_tokenizer_complete(t, owner);
    if (status == POE_OK)
        *tokenizer = t;
    else
        poe_tokenizer_destroy(t);
    return status;
}

poe_status poe_tokenizer_parse(const char *path, const char *data, size_t size, poe_tokenizer **tokenizer) {
    json_error_t error;
    json_t *root = json_loadb(data, size, JSON_REJECT_DUPLICATES, &error);
    if (!root)
        return reject(path, "it is not JSON: line %d: %s", error.line, error.text);
    reader r = {.path = path, .scratch = malloc(size + 2)};
    alphabet_init(&r.alphabet);
    poe_status status = r.scratch ? read_tokenizer(&r, root, tokenizer) : out_of_memory(path);
    free(r.scratch);
    json_decref(root);
    return status;
}

poe_status poe_tokenizer_read(const char *path, poe_tokenizer **tokenizer) {
    char *data;
    size_t size;
    poe_status status = poe_read_file(path, "tokenizer", &data, &size);
    if (status != POE_OK)
        return status;
    status = poe_tokenizer_parse(path, data, size, tokenizer);
    free(data);
    return status;
}

/* ---- Writing: jansson passes a NULL from any of these calls on, up to the root ---- */

static json_t *spelled(const alphabet *a, const poe_token *token) {
    char *name = malloc(2 * token->length + 1);
    if (!name)
        return NULL;
    char *end = spell(a, token->bytes, token->length, name);
    json_t *string = json_stringn(name, (size_t)(end - name));
    free(name);
    return string;
}

static json_t *make_vocab(const poe_tokenizer *t, const alphabet *a) {
    json_t *vocab = json_object();
    for (int id = 0; id < t->size; id++) {
        if (t->tokens[id].special)
            continue;
        json_t *name = spelled(a, &t->tokens[id]);
        if (!name || json_object_set_new(vocab, json_string_value(name), json_integer(id)) != 0) {
            json_decref(name);
            json_decref(vocab);
            return NULL;
        }
        json_decref(name);
    }
    return vocab;
}

static json_t *make_merges(const poe_tokenizer *t, const alphabet *a) {
    json_t *merges = json_array();
    for (size_t i = 0; i < t->n_merges; i++) {
        const poe_merge *merge = &t->merges[i];
        json_t *pair = json_pack("[o, o]", spelled(a, &t->tokens[merge->left]), spelled(a, &t->tokens[merge->right]));
        if (json_array_append_new(merges, pair) != 0) {
            json_decref(merges);
            return NULL;
        }
    }
    return merges;
}

static json_t *make_added_tokens(const poe_tokenizer *t) {
    json_t *added = json_array();
    for (int id = 0; id < t->size; id++) {
        if (!t->tokens[id].special)
            continue;
        json_t *token = json_pack("{s:i, s:s, s:b, s:b, s:b, s:b, s:b}", "id", id, "content", t->tokens[id].bytes,
                                  "single_word", 0, "lstrip", 0, "rstrip", 0, "normalized", 0, "special", 1);
        if (json_array_append_new(added, token) != 0) {
            json_decref(added);
            return NULL;
        }
    }
    return added;
}

static json_t *make_pre_tokenizer(const poe_tokenizer *t) {
    json_t *split = json_pack("{s:s, s:{s:s}, s:s, s:b}", "type", "Split", "pattern", "Regex", t->expression,
                              "behavior", "Isolated", "invert", 0);
    json_t *bytes = json_pack("{s:s, s:b, s:b, s:b}", "type", "ByteLevel", "add_prefix_space", 0, "trim_offsets", 1,
                              "use_regex", 0);
    return json_pack("{s:s, s:[o, o]}", "type", "Sequence", "pretokenizers", split, bytes);
}

static json_t *make_root(const poe_tokenizer *t) {
    alphabet a;
    alphabet_init(&a);
    json_t *model =
        json_pack("{s:s, s:n, s:n, s:n, s:n, s:b, s:b, s:b, s:o, s:o}", "type", "BPE", "dropout", "unk_token",
                  "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", 0, "byte_fallback", 0, "ignore_merges",
                  0, "vocab", make_vocab(t, &a), "merges", make_merges(t, &a));
    json_t *decoder = json_pack("{s:s, s:b, s:b, s:b}", "type", "ByteLevel", "add_prefix_space", 1, "trim_offsets", 1,
                                "use_regex", 1);
    return json_pack("{s:s, s:n, s:n, s:o, s:n, s:o, s:n, s:o, s:o}", "version", "1.0", "truncation", "padding",
                     "added_tokens", make_added_tokens(t), "normalizer", "pre_tokenizer", make_pre_tokenizer(t),
                     "post_processor", "decoder", decoder, "model", model);
}

poe_status poe_tokenizer_write(const poe_tokenizer *tokenizer, const char *path) {
    json_t *root = make_root(tokenizer);
    char *text = root ? json_dumps(root, JSON_INDENT(2)) : NULL;
    poe_status status = text ? poe_write_file(path, text, strlen(text)) : out_of_memory(path);
    free(text);
    json_decref(root);
    return status;
}
