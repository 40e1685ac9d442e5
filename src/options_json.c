/* SPDX-License-Identifier: MIT
 * Options as JSON: --config files, and the config.json that every run leaves. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "src/log.h"
#include "src/options_table.h"

poe_status poe_options_read_json(const char *path, const char *what, json_t **object)
{
    char *text;
    size_t size;
    json_error_t error;
    poe_status status = poe_read_file(path, what, &text, &size);
    if (status != POE_OK)
        return status;
    json_t *value = json_loadb(text, size, JSON_REJECT_DUPLICATES, &error);
    free(text);
    if (!value) {
        poe_error("%s: line %d: %s", path, error.line, error.text);
        return POE_BAD_INPUT;
    }
    if (!json_is_object(value)) {
        json_decref(value);
        poe_error("%s: found a JSON value that is not an object, allowed is {\"flag\": value, ...}", path);
        return POE_BAD_INPUT;
    }
    *object = value;
    return POE_OK;
}

static poe_status wrong_type(const json_t *value, const char *allowed, const char *where)
{
    char *found = json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT);
    poe_error("%s: found %.200s, allowed is %s", where, found ? found : "a value", allowed);
    free(found);
    return POE_BAD_INPUT;
}

static poe_status set_stage_list(poe_options *options, const poe_option *option, const json_t *list, const char *where)
{
    char text[8 * POE_OPTION_LAYERS] = "";
    size_t i, used = 0;
    json_t *layers;
    json_array_foreach(list, i, layers)
    {
        if (!json_is_integer(layers) || i >= POE_OPTION_LAYERS || llabs(json_integer_value(layers)) > 99999)
            return wrong_type(layers, "a list of whole numbers from 1 to 1024", where);
        used += (size_t)snprintf(text + used, sizeof(text) - used, "%s%lld", i ? "," : "", json_integer_value(layers));
    }
    return poe_option_set(options, option, text, where);
}

static poe_status set_file_list(poe_options *options, const poe_option *option, const json_t *list, const char *where)
{
    size_t i;
    json_t *path;
    poe_status status = POE_OK;
    json_array_foreach(list, i, path)
    {
        if (!json_is_string(path))
            return wrong_type(path, "a text or a list of texts", where);
        status = poe_option_set(options, option, json_string_value(path), where);
        if (status != POE_OK)
            return status;
    }
    return status;
}

/* The JSON types that suit the option's type; NULL when `value` is one of them. */
static const char *unsuitable(const poe_option *option, const json_t *value)
{
    switch (option->type) {
    case POE_OPTION_TYPE_INT:
    case POE_OPTION_TYPE_INT64:
        return json_is_integer(value) ? NULL : "a whole number";
    case POE_OPTION_TYPE_SIZE:
        return json_is_integer(value) || json_is_string(value) ? NULL : "a whole number of bytes or a text";
    case POE_OPTION_TYPE_REAL:
        return json_is_number(value) ? NULL : "a number";
    case POE_OPTION_TYPE_BOOL:
        return json_is_boolean(value) ? NULL : "true or false";
    case POE_OPTION_TYPE_STAGES:
        return json_is_array(value) || json_is_string(value) ? NULL : "a list of whole numbers";
    case POE_OPTION_TYPE_FILES:
        return json_is_array(value) || json_is_string(value) ? NULL : "a text or a list of texts";
    case POE_OPTION_TYPE_WORD:
        if (json_is_boolean(value) && strstr(option->words, "on|off"))
            return NULL;
        return json_is_string(value) ? NULL : "a text";
    default:
        return json_is_string(value) ? NULL : "a text";
    }
}

poe_status poe_option_set_json(poe_options *options, const poe_option *option, const json_t *value, const char *where)
{
    char number[64];
    const char *allowed = unsuitable(option, value);
    if (allowed)
        return wrong_type(value, allowed, where);
    if (json_is_array(value))
        return option->type == POE_OPTION_TYPE_STAGES ? set_stage_list(options, option, value, where)
                                                      : set_file_list(options, option, value, where);
    if (json_is_string(value))
        return poe_option_set(options, option, json_string_value(value), where);
    if (json_is_boolean(value)) {
        bool yes = json_is_true(value);
        const char *word = option->type == POE_OPTION_TYPE_BOOL ? (yes ? "true" : "false") : (yes ? "on" : "off");
        return poe_option_set(options, option, word, where);
    }
    if (json_is_integer(value))
        snprintf(number, sizeof(number), "%lld", json_integer_value(value));
    else
        snprintf(number, sizeof(number), "%.17g", json_real_value(value));
    return poe_option_set(options, option, number, where);
}

static json_t *files_json(const poe_file_list *files)
{
    json_t *list = json_array();
    for (int i = 0; i < files->count; i++)
        json_array_append_new(list, json_string(files->paths[i]));
    return list;
}

static json_t *stages_json(const poe_stage_list *stages)
{
    json_t *list = json_array();
    for (int i = 0; i < stages->count; i++)
        json_array_append_new(list, json_integer(stages->layers[i]));
    return list;
}

/* New reference; NULL for what is not given. */
static json_t *value_json(const poe_options *options, const poe_option *option)
{
    const void *field = (const char *)options + option->offset;
    const char *text;
    switch (option->type) {
    case POE_OPTION_TYPE_INT:
        return json_integer(*(const int *)field);
    case POE_OPTION_TYPE_INT64:
    case POE_OPTION_TYPE_SIZE:
        return json_integer(*(const int64_t *)field);
    case POE_OPTION_TYPE_REAL:
        return json_real(*(const double *)field);
    case POE_OPTION_TYPE_BOOL:
        return json_boolean(*(const bool *)field);
    case POE_OPTION_TYPE_PATH:
        text = *(char *const *)field;
        return text ? json_string(text) : NULL;
    case POE_OPTION_TYPE_FILES:
        return ((const poe_file_list *)field)->count ? files_json(field) : NULL;
    case POE_OPTION_TYPE_STAGES:
        return stages_json(field);
    default:
        text = field;
        return *text ? json_string(text) : NULL;
    }
}

/* n-embd -> n_embd */
static void key_of(const poe_option *option, char key[POE_OPTION_TEXT])
{
    snprintf(key, POE_OPTION_TEXT, "%s", option->name);
    for (char *c = key; *c; c++) {
        if (*c == '-')
            *c = '_';
    }
}

json_t *poe_options_json(const poe_options *options)
{
    json_t *object = json_object();
    for (int i = 0; i < poe_option_count; i++) {
        const poe_option *option = &poe_option_table[i];
        char key[POE_OPTION_TEXT];
        if (!(option->traits & POE_OPTION_RUN))
            continue;
        json_t *value = value_json(options, option);
        key_of(option, key);
        if (value)
            json_object_set_new(object, key, value);
    }
    return object;
}

static bool has_trait(const char *key, unsigned trait)
{
    const poe_option *option = poe_option_find(key, strlen(key));
    return option && (option->traits & trait);
}

bool poe_options_resumable(const char *key)
{
    return has_trait(key, POE_OPTION_RESUMABLE);
}

static void render(const json_t *value, char text[256])
{
    char *dump = value ? json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT) : NULL;
    snprintf(text, 256, "%s", dump ? dump : "nothing");
    free(dump);
}

/* First key of x whose value in y is another one; with `only_missing`, none at all. */
static const char *first_difference(const json_t *x, const json_t *y, bool only_missing)
{
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)x, key, value)
    {
        json_t *other = json_object_get(y, key);
        bool differs = only_missing ? !other : !other || !json_equal(value, other);
        if (differs && !has_trait(key, POE_OPTION_LOCAL))
            return key;
    }
    return NULL;
}

const char *poe_options_difference(const json_t *x, const json_t *y, char a[256], char b[256])
{
    const char *key = first_difference(x, y, false);
    if (!key)
        key = first_difference(y, x, true);
    if (!key)
        return NULL;
    render(json_object_get(x, key), a);
    render(json_object_get(y, key), b);
    return key;
}
