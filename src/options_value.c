/* SPDX-License-Identifier: MIT
 * Reading one value into its field, strictly: the whole text, inside the range, or a sentence. */
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "src/log.h"
#include "src/options_table.h"

static void *field(poe_options *options, const poe_option *option)
{
    return (char *)options + option->offset;
}

/* "a whole number from 1 to 8": what `option` allows. */
static const char *allowed(const poe_option *option, char text[256])
{
    const char *kind = option->type == POE_OPTION_TYPE_REAL ? "a number" : "a whole number";
    snprintf(text, 256, "%s from %.16g to %.16g", kind, option->low, option->high);
    return text;
}

static poe_status refuse(const char *where, const char *found, const char *allowed_values)
{
    poe_error("%s: found \"%.200s\", allowed is %s", where, found, allowed_values);
    return POE_BAD_INPUT;
}

/* No blanks, no plus, no trailing characters, no overflow. */
static bool read_integer(const char *text, long long *value)
{
    const char *digits = *text == '-' ? text + 1 : text;
    if (!*digits || strspn(digits, "0123456789") != strlen(digits))
        return false;
    errno = 0;
    *value = strtoll(text, NULL, 10);
    return errno == 0;
}

static bool read_real(const char *text, double *value)
{
    char *end;
    if (!*text || strspn(text, "0123456789+-.eE") != strlen(text))
        return false;
    *value = strtod(text, &end);
    return *end == '\0' && isfinite(*value);
}

static poe_status set_integer(poe_options *options, const poe_option *option, const char *text, const char *where)
{
    long long value;
    char range[256];
    if (!read_integer(text, &value) || (double)value < option->low || (double)value > option->high)
        return refuse(where, text, allowed(option, range));
    if (option->type == POE_OPTION_TYPE_INT)
        *(int *)field(options, option) = (int)value;
    else
        *(int64_t *)field(options, option) = value;
    return POE_OK;
}

static poe_status set_real(poe_options *options, const poe_option *option, const char *text, const char *where)
{
    double value;
    char range[256];
    if (!read_real(text, &value) || value < option->low || value > option->high)
        return refuse(where, text, allowed(option, range));
    *(double *)field(options, option) = value;
    return POE_OK;
}

static bool read_size(const char *text, double *bytes)
{
    static const char *const units[] = {"", "KiB", "MiB", "GiB", "TiB"};
    char number[32];
    size_t length = strspn(text, "0123456789.");
    if (length >= sizeof(number))
        return false;
    memcpy(number, text, length);
    number[length] = '\0';
    for (int i = 0; i < 5; i++) {
        if (strcmp(text + length, units[i]) != 0 || !read_real(number, bytes))
            continue;
        *bytes = floor(ldexp(*bytes, 10 * i));
        return i > 0 || !strchr(number, '.');
    }
    return false;
}

static poe_status set_size(poe_options *options, const poe_option *option, const char *text, const char *where)
{
    double bytes;
    if (!read_size(text, &bytes) || bytes < option->low || bytes > option->high)
        return refuse(where, text, "a whole number of bytes, or a number with KiB, MiB, GiB or TiB behind it");
    *(int64_t *)field(options, option) = (int64_t)bytes;
    return POE_OK;
}

static poe_status set_bool(poe_options *options, const poe_option *option, const char *text, const char *where)
{
    bool yes = strcmp(text, "true") == 0;
    if (!yes && strcmp(text, "false") != 0)
        return refuse(where, text, "true or false");
    *(bool *)field(options, option) = yes;
    return POE_OK;
}

/* "a, b or c" from "a|b|c". */
static const char *list_words(const char *words, char text[256])
{
    size_t used = 0;
    for (const char *word = words; *word && used < 200;) {
        size_t length = strcspn(word, "|");
        const char *next = word[length] ? word + length + 1 : word + length;
        const char *separator = word == words ? "" : *next ? ", " : " or ";
        used += (size_t)snprintf(text + used, 256 - used, "%s%.*s", separator, (int)length, word);
        word = next;
    }
    return text;
}

static poe_status set_word(poe_options *options, const poe_option *option, const char *text, const char *where)
{
    char list[256];
    size_t length = strlen(text);
    for (const char *word = option->words; *word;) {
        size_t n = strcspn(word, "|");
        if (n == length && memcmp(word, text, n) == 0) {
            memcpy(field(options, option), text, length + 1);
            return POE_OK;
        }
        word += word[n] ? n + 1 : n;
    }
    return refuse(where, text, list_words(option->words, list));
}

static poe_status set_string(poe_options *options, const poe_option *option, const char *text, const char *where)
{
    size_t length = strlen(text);
    if (length == 0 || length >= POE_OPTION_TEXT) {
        poe_error("%s: found a text of %zu bytes, allowed are 1 to %d", where, length, POE_OPTION_TEXT - 1);
        return POE_BAD_INPUT;
    }
    memcpy(field(options, option), text, length + 1);
    return POE_OK;
}

static poe_status copy_text(const char *text, const char *where, char **copy)
{
    *copy = strdup(text);
    if (!*copy)
        poe_error("%s: out of memory", where);
    return *copy ? POE_OK : POE_FAILED;
}

static poe_status set_path(poe_options *options, const poe_option *option, const char *text, const char *where)
{
    char *copy, **path = field(options, option);
    if (!*text) {
        poe_error("%s: found an empty text", where);
        return POE_BAD_INPUT;
    }
    poe_status status = copy_text(text, where, &copy);
    if (status != POE_OK)
        return status;
    free(*path);
    *path = copy;
    return POE_OK;
}

static poe_status add_file(poe_options *options, const poe_option *option, const char *text, const char *where)
{
    poe_file_list *files = field(options, option);
    if (files->count == POE_OPTION_FILES || !*text) {
        poe_error("%s: found %s, allowed are names of at most %d files", where, *text ? "more files" : "an empty name",
                  POE_OPTION_FILES);
        return POE_BAD_INPUT;
    }
    poe_status status = copy_text(text, where, &files->paths[files->count]);
    if (status == POE_OK)
        files->count++;
    return status;
}

/* "4", or "4x8": eight times four. */
static bool read_repeated(char *text, long long *value, long long *times)
{
    char *by = strchr(text, 'x');
    *times = 1;
    if (by)
        *by = '\0';
    return read_integer(text, value) && (!by || read_integer(by + 1, times));
}

static poe_status set_stages(poe_options *options, const poe_option *option, const char *text, const char *where)
{
    poe_stage_list list = {0};
    const char *rule = "whole numbers of at least 1, separated by commas; LxN means N times L";
    long long value, times, total = 0;
    for (const char *part = text;; part++) {
        char number[32] = "";
        size_t length = strcspn(part, ",");
        if (length < sizeof(number))
            memcpy(number, part, length);
        if (!read_repeated(number, &value, &times) || value < 1 || times < 1)
            return refuse(where, text, rule);
        if (times > POE_OPTION_STAGES - list.count)
            return refuse(where, text, "at most 128 stages");
        if (value > (POE_OPTION_LAYERS - total) / times)
            return refuse(where, text, "at most 1024 layers in all stages together");
        total += value * times;
        for (; times > 0; times--)
            list.layers[list.count++] = (int)value;
        part += length;
        if (!*part)
            break;
    }
    *(poe_stage_list *)field(options, option) = list;
    return POE_OK;
}

poe_status poe_option_set(poe_options *options, const poe_option *option, const char *text, const char *where)
{
    static poe_status (*const setters[])(poe_options *, const poe_option *, const char *, const char *) = {
        [POE_OPTION_TYPE_INT] = set_integer,   [POE_OPTION_TYPE_INT64] = set_integer,
        [POE_OPTION_TYPE_REAL] = set_real,     [POE_OPTION_TYPE_BOOL] = set_bool,
        [POE_OPTION_TYPE_WORD] = set_word,     [POE_OPTION_TYPE_STRING] = set_string,
        [POE_OPTION_TYPE_PATH] = set_path,     [POE_OPTION_TYPE_FILES] = add_file,
        [POE_OPTION_TYPE_STAGES] = set_stages, [POE_OPTION_TYPE_SIZE] = set_size,
    };
    return setters[option->type](options, option, text, where);
}

void poe_option_clear(poe_options *options, const poe_option *option)
{
    if (option->type == POE_OPTION_TYPE_FILES) {
        poe_file_list *files = field(options, option);
        while (files->count > 0)
            free(files->paths[--files->count]);
    } else if (option->type == POE_OPTION_TYPE_PATH) {
        char **path = field(options, option);
        free(*path);
        *path = NULL;
    }
}
