/* SPDX-License-Identifier: MIT
 * Where options come from, and which source wins. */
#include "src/options.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "src/log.h"
#include "src/manifest.h"
#include "src/options_table.h"
#include "src/shipped.h"

/* One flag of the command line, checked for its name only. */
typedef struct assignment {
    const poe_option *option;
    const char *value;
} assignment;

typedef struct sources {
    poe_command command;
    assignment *flags;
    int n_flags;
    json_t *config; /* --config; may be NULL */
    json_t *run;    /* config.json of a resumed run; may be NULL */
    const char *config_path;
    char run_path[POE_PATH_MAX];
    char run_folder[POE_PATH_MAX]; /* of the resumed run; "" when unknown */
} sources;

static void mark_given(poe_options *options, const poe_option *option)
{
    size_t bit = (size_t)(option - poe_option_table);
    options->given[bit / 64] |= UINT64_C(1) << bit % 64;
}

bool poe_options_given(const poe_options *options, const char *flag)
{
    const poe_option *option = poe_option_find(flag, strlen(flag));
    if (!option)
        return false;
    size_t bit = (size_t)(option - poe_option_table);
    return options->given[bit / 64] >> bit % 64 & 1;
}

void poe_options_free(poe_options *options)
{
    for (int i = 0; i < poe_option_count; i++)
        poe_option_clear(options, &poe_option_table[i]);
}

static poe_status set_defaults(poe_options *options)
{
    poe_status status = POE_OK;
    memset(options, 0, sizeof(*options));
    for (int i = 0; i < poe_option_count && status == POE_OK; i++) {
        const poe_option *option = &poe_option_table[i];
        if (option->fallback)
            status = poe_option_set(options, option, option->fallback, option->name);
    }
    return status;
}

/* --- the command line ------------------------------------------------------------------------------------------------
 */

static poe_status find_command(const char *word, poe_command *command)
{
    static const char *const words[] = {"generate", "inspect", "export", "data", "plan"};
    const int n = sizeof(words) / sizeof(words[0]);
    for (int i = 0; i < n; i++) {
        if (strcmp(word, words[i]) == 0) {
            *command = (poe_command)(POE_COMMAND_GENERATE + i);
            return POE_OK;
        }
    }
    const char *near = poe_nearest_word(word, strlen(word), words, n);
    poe_error("found the argument \"%.60s\", allowed are flags or a command: generate, inspect, export, data or plan%s%s%s",
              word, near ? "; did you mean " : "", near ? near : "", near ? "?" : "");
    return POE_BAD_INPUT;
}

static poe_status unknown_flag(const char *name, size_t length, poe_command command)
{
    const char *near = poe_option_nearest(name, length, command);
    const char *title = poe_command_title(command);
    if (near)
        poe_error("%s has no flag --%.*s; did you mean --%s?", title, (int)length, name, near);
    else
        poe_error("%s has no flag --%.*s; %s --help lists them", title, (int)length, name, title);
    return POE_BAD_INPUT;
}

/* Reads argv[*i], and argv[*i + 1] when that is its value. */
static poe_status read_flag(int argc, char **argv, int *i, poe_command command, assignment *flag)
{
    const char *name = argv[*i] + 2;
    size_t length = strcspn(name, "=");
    flag->option = poe_option_find(name, length);
    if (!flag->option || !(flag->option->commands & (1u << command)) || memchr(name, '_', length))
        return unknown_flag(name, length, command);
    if (name[length] == '=') {
        flag->value = name + length + 1;
    } else if (flag->option->type == POE_OPTION_TYPE_BOOL) {
        flag->value = "true";
    } else if (*i + 1 < argc && strncmp(argv[*i + 1], "--", 2) != 0) {
        flag->value = argv[++*i];
    } else {
        poe_error("--%s needs a value: --%s %s", flag->option->name, flag->option->name, flag->option->argument);
        return POE_BAD_INPUT;
    }
    return POE_OK;
}

static poe_status read_command_line(int argc, char **argv, sources *from)
{
    bool path_wanted;
    poe_status status = POE_OK;
    int i = 1;
    if (argc > 1 && argv[1][0] != '-')
        status = find_command(argv[i++], &from->command);
    path_wanted = from->command == POE_COMMAND_INSPECT;
    for (; i < argc && status == POE_OK; i++) {
        assignment *flag = &from->flags[from->n_flags];
        if (strncmp(argv[i], "--", 2) == 0 && argv[i][2]) {
            status = read_flag(argc, argv, &i, from->command, flag);
        } else if (path_wanted && argv[i][0] != '-') {
            *flag = (assignment){poe_option_find("checkpoint", strlen("checkpoint")), argv[i]};
            path_wanted = false;
        } else if (strcmp(argv[i], "-h") == 0) {
            *flag = (assignment){poe_option_find("help", strlen("help")), "true"};
        } else {
            poe_error("found the argument \"%.60s\", allowed are flags: --name value", argv[i]);
            return POE_BAD_INPUT;
        }
        from->n_flags++;
    }
    return status;
}

/* The last value of a flag on the command line; NULL when it is not there. */
static const char *last_value(const sources *from, const char *name)
{
    const char *value = NULL;
    for (int i = 0; i < from->n_flags; i++) {
        if (strcmp(from->flags[i].option->name, name) == 0)
            value = from->flags[i].value;
    }
    return value;
}

static poe_status apply_flags(poe_options *options, const sources *from)
{
    uint64_t seen[2] = {0};
    for (int i = 0; i < from->n_flags; i++) {
        const poe_option *option = from->flags[i].option;
        size_t bit = (size_t)(option - poe_option_table);
        char where[POE_OPTION_TEXT];
        snprintf(where, sizeof(where), "--%s", option->name);
        if (!(seen[bit / 64] >> bit % 64 & 1))
            poe_option_clear(options, option);
        seen[bit / 64] |= UINT64_C(1) << bit % 64;
        poe_status status = poe_option_set(options, option, from->flags[i].value, where);
        if (status != POE_OK)
            return status;
        mark_given(options, option);
    }
    return POE_OK;
}

/* --- JSON sources ----------------------------------------------------------------------------------------------------
 */

static bool in_files(const poe_option *option, poe_command command)
{
    static const char *const never[] = {"config", "help", "version"};
    for (int i = 0; i < 3; i++) {
        if (strcmp(option->name, never[i]) == 0)
            return false;
    }
    return option->commands & (1u << command);
}

static poe_status unknown_key(const char *path, const char *key, poe_command command)
{
    char near[POE_OPTION_TEXT] = "";
    const char *name = poe_option_nearest(key, strlen(key), command);
    for (size_t i = 0; name && name[i]; i++)
        near[i] = name[i] == '-' ? '_' : name[i];
    if (*near)
        poe_error("%s: unknown key \"%.60s\"; did you mean \"%s\"?", path, key, near);
    else
        poe_error("%s: unknown key \"%.60s\"; the keys are the names that %s --help lists, with _ for -", path, key,
                  poe_command_title(command));
    return POE_BAD_INPUT;
}

static poe_status apply_json(poe_options *options, json_t *object, const char *path, poe_command command, bool given)
{
    const char *key;
    json_t *value;
    json_object_foreach(object, key, value)
    {
        const poe_option *option = poe_option_find(key, strlen(key));
        char where[POE_PATH_MAX + POE_OPTION_TEXT];
        if (!option || !in_files(option, command))
            return unknown_key(path, key, command);
        if (!given && (option->traits & POE_OPTION_ONCE))
            continue;
        snprintf(where, sizeof(where), "%s: %s", path, key);
        poe_option_clear(options, option);
        poe_status status = poe_option_set_json(options, option, value, where);
        if (status != POE_OK)
            return status;
        if (given)
            mark_given(options, option);
    }
    return POE_OK;
}

/* --- the resumed run -------------------------------------------------------------------------------------------------
 */

/* The configuration that a checkpoint's manifest carries, for checkpoints that were moved out of their run. */
static poe_status read_manifest_config(sources *from)
{
    json_t *manifest;
    poe_status status = poe_options_read_json(from->run_path, "--resume", &manifest);
    if (status != POE_OK)
        return status;
    from->run = json_incref(json_object_get(manifest, "config"));
    json_decref(manifest);
    if (json_is_object(from->run))
        return POE_OK;
    poe_error("%s: has no \"config\", so the run cannot be resumed", from->run_path);
    return POE_BAD_INPUT;
}

static poe_status try_run_folder(sources *from, const char *folder, bool *found)
{
    poe_status status = poe_path(from->run_path, "%s/config.json", folder);
    *found = status == POE_OK && access(from->run_path, F_OK) == 0;
    if (!*found)
        return status;
    if (folder != from->run_folder)
        status = poe_path(from->run_folder, "%s", folder);
    return status == POE_OK ? poe_options_read_json(from->run_path, "--resume", &from->run) : status;
}

static poe_status read_resumed(sources *from, const char *what, const char *out)
{
    bool found, latest = strcmp(what, "latest") == 0;
    if (latest && !out)
        return POE_OK; /* the check of the flags says it */
    poe_status status = try_run_folder(from, latest ? out : what, &found);
    if (status != POE_OK || found)
        return status;
    if (latest) {
        poe_error("--resume latest: %s/config.json is missing, so no run was started in --out %s; if it was lost, copy the "
                  "folder from a host that has it (docs/recovery.md)", out, out);
        return POE_BAD_INPUT;
    }
    char manifest[POE_PATH_MAX];
    status = poe_path(manifest, "%s/manifest.json", what);
    if (status == POE_OK && access(manifest, F_OK) != 0) {
        poe_error("%s is neither a run folder (with config.json) nor a checkpoint (with manifest.json)",
                  what);
        return POE_BAD_INPUT;
    }
    if (status == POE_OK)
        status = poe_checkpoint_run(what, from->run_folder);
    if (status == POE_OK && from->run_folder[0])
        status = try_run_folder(from, from->run_folder, &found);
    if (status != POE_OK || found)
        return status;
    from->run_folder[0] = '\0';
    strcpy(from->run_path, manifest);
    return read_manifest_config(from);
}

/* What decides a run's numbers must stay as it was: `before` has the run's own values. */
static poe_status check_unchanged(const sources *from, const json_t *before, const json_t *after)
{
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)after, key, value)
    {
        json_t *old = json_object_get(before, key);
        if (poe_options_resumable(key) || (old && json_equal(old, value)))
            continue;
        char *new_text = json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT);
        char *old_text = old ? json_dumps(old, JSON_ENCODE_ANY | JSON_COMPACT) : NULL;
        poe_error("--%s: found %s, but the run of %s has %s, and resuming cannot change it",
                  poe_option_find(key, strlen(key))->name, new_text, from->run_path, old_text ? old_text : "none");
        free(new_text);
        free(old_text);
        return POE_BAD_INPUT;
    }
    return POE_OK;
}

/* --- all together ----------------------------------------------------------------------------------------------------
 */

static poe_status apply_user(poe_options *options, const sources *from)
{
    poe_status status = POE_OK;
    if (from->config)
        status = apply_json(options, from->config, from->config_path, from->command, true);
    return status == POE_OK ? apply_flags(options, from) : status;
}

/* Defaults and preset, the resumed run, then the user; `size` as the user gave it. */
static poe_status apply_all(poe_options *options, const sources *from, const char *size)
{
    json_t *before = NULL, *after = NULL;
    poe_status status = set_defaults(options);
    if (status == POE_OK && *size)
        status = poe_preset_apply(options, size);
    if (status == POE_OK && from->run)
        status = apply_json(options, from->run, from->run_path, from->command, false);
    before = poe_options_json(options);
    if (status == POE_OK)
        status = apply_user(options, from);
    after = poe_options_json(options);
    if (status == POE_OK && from->run)
        status = check_unchanged(from, before, after);
    json_decref(before);
    json_decref(after);
    if (status == POE_OK && !options->out && from->run_folder[0])
        status = poe_option_set(options, poe_option_find("out", 3), from->run_folder, "--out");
    return status;
}

/* A run without --data trains on the text that ships. */
static poe_status add_shipped_text(poe_options *options)
{
    char path[POE_PATH_MAX];
    poe_status status = options->data.count ? POE_OK : poe_shipped_text(path);
    if (status != POE_OK || options->data.count)
        return status;
    return poe_option_set(options, poe_option_find("data", 4), path, "--data");
}

static poe_status parse(int argc, char **argv, sources *from, poe_options *options)
{
    char size[POE_OPTION_TEXT];
    poe_status status = read_command_line(argc, argv, from);
    if (status != POE_OK)
        return status;
    options->help = last_value(from, "help") != NULL;
    options->version = last_value(from, "version") != NULL;
    if (options->help || options->version)
        return POE_OK;
    from->config_path = last_value(from, "config");
    if (from->config_path)
        status = poe_options_read_json(from->config_path, "--config", &from->config);
    if (status == POE_OK)
        status = apply_user(options, from);
    if (status == POE_OK && options->resume)
        status = read_resumed(from, options->resume, options->out);
    if (status == POE_OK && (*options->size || from->run)) {
        strcpy(size, options->size);
        poe_options_free(options);
        status = apply_all(options, from, size);
    }
    if (status == POE_OK)
        status = poe_options_check(options, from->command);
    if (status == POE_OK && from->command == POE_COMMAND_TRAIN)
        status = add_shipped_text(options);
    return status;
}

poe_status poe_options_parse(int argc, char **argv, poe_command *command, poe_options *options)
{
    sources *from = calloc(1, sizeof(*from));
    poe_status status = set_defaults(options);
    if (from)
        from->flags = calloc((size_t)argc + 1, sizeof(*from->flags));
    if (!from || !from->flags) {
        poe_error("out of memory while reading the flags");
        status = POE_FAILED;
    }
    if (status == POE_OK)
        status = parse(argc, argv, from, options);
    *command = from ? from->command : POE_COMMAND_TRAIN;
    if (from) {
        json_decref(from->config);
        json_decref(from->run);
        free(from->flags);
    }
    free(from);
    return status;
}
