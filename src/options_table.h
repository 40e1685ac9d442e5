/* SPDX-License-Identifier: MIT
 * Private to src/options*.c and src/presets.c: the table of flags and what works on one row of it. */
#ifndef POE_SRC_OPTIONS_TABLE_H
#define POE_SRC_OPTIONS_TABLE_H

#include "src/options.h"

typedef enum poe_option_type {
    POE_OPTION_TYPE_INT,
    POE_OPTION_TYPE_INT64,
    POE_OPTION_TYPE_SIZE,   /* bytes, an int64_t; read also with a unit */
    POE_OPTION_TYPE_REAL,
    POE_OPTION_TYPE_BOOL,
    POE_OPTION_TYPE_WORD,   /* one of `words` */
    POE_OPTION_TYPE_STRING, /* of fewer than POE_OPTION_TEXT bytes */
    POE_OPTION_TYPE_PATH,   /* owned text of any length */
    POE_OPTION_TYPE_FILES,
    POE_OPTION_TYPE_STAGES,
} poe_option_type;

typedef enum poe_option_trait {
    POE_OPTION_RUN = 1,       /* decides numbers or files of a run: in its config.json */
    POE_OPTION_RESUMABLE = 2, /* a resumed run may change it */
    POE_OPTION_LOCAL = 4,     /* ranks may differ in it */
    POE_OPTION_ONCE = 8,      /* a resumed run does not take it over */
} poe_option_trait;

typedef struct poe_option {
    const char *name;     /* without the dashes */
    const char *argument; /* its name in the help; NULL: none */
    const char *group;    /* heading in the help */
    poe_option_type type;
    size_t offset;        /* of the field in poe_options */
    const char *fallback; /* default, written as a value; NULL: none */
    double low, high;     /* allowed range of numbers */
    const char *words;    /* allowed words, "a|b|c" */
    unsigned commands;    /* bit 1 << poe_command: who knows it */
    unsigned traits;
    const char *help;
} poe_option;

extern const poe_option poe_option_table[];
extern const int poe_option_count;

/* By flag name; `_` and `-` are the same. NULL when there is none. */
const poe_option *poe_option_find(const char *name, size_t length);
/* The known name nearest to a wrong one, among those of `command`, or NULL when none is near. */
const char *poe_option_nearest(const char *name, size_t length, poe_command command);
/* The same among `n` words. */
const char *poe_nearest_word(const char *word, size_t length, const char *const *words, int n);
/* "poe-pipe", "poe-pipe generate", ... */
const char *poe_command_title(poe_command command);

/* Reads `text` into the option's field; FILES are appended. `where` names the flag, or file and key. */
poe_status poe_option_set(poe_options *options, const poe_option *option, const char *text, const char *where);
poe_status poe_option_set_json(poe_options *options, const poe_option *option, const json_t *value, const char *where);
/* Empties a list before it is given anew. */
void poe_option_clear(poe_options *options, const poe_option *option);

/* Reads a JSON object from a file; syntax errors name the line. *object: new reference. */
poe_status poe_options_read_json(const char *path, const char *what, json_t **object);

poe_status poe_preset_apply(poe_options *options, const char *name);
/* What needs no model to be checked; derives sync_delay, sync_every and the ports. */
poe_status poe_options_check(poe_options *options, poe_command command);

#endif
