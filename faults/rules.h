/* SPDX-License-Identifier: MIT
 * Rules that a flag gives: in its value, separated by ';', or one or more a line in the file that it names, where # begins
 * a comment. */
#ifndef POE_FAULTS_RULES_H
#define POE_FAULTS_RULES_H

#include <stdarg.h>
#include <stdbool.h>

#include "src/status.h"

typedef struct poe_rules {
    const char *flag; /* "--net" */
    char mark;        /* every rule has it, and so has no name of a file that is not there */
    const char *example;
    const char **file; /* set to the file's name, or NULL */
    int *line;         /* counted up before each */
    poe_status (*read)(void *context, char *rule); /* one that is not blank, trimmed; it may be written to */
    void *context;
} poe_rules;

/* NULL and "none" have no rules. Ends with the first that read() refuses, and returns what that did. */
poe_status poe_rules_read(const poe_rules *rules, const char *value);

/* Says what is wrong with the rule at hand, and where it stands (`file` NULL: in the flag's own value); POE_BAD_INPUT. */
poe_status poe_rules_refuse(const char *flag, const char *file, int line, const char *rule, const char *format, va_list args);

/* A number that is not negative, with one of the units behind it, which multiply it. */
bool poe_rules_number(const char *text, const char *const *units, const double *factors, double *value);
/* A time of at most `longest` seconds, in us, ms or s. */
bool poe_rules_seconds(const char *text, double longest, double *seconds);

/* Without white space at its ends; written to. */
char *poe_rules_trim(char *text);

#endif
