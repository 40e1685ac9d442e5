/* SPDX-License-Identifier: MIT */
#include "faults/rules.h"

#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "src/files.h"
#include "src/log.h"

enum { SHOWN = 80 }; /* characters of a rule that is refused */

poe_status poe_rules_refuse(const char *flag, const char *file, int line, const char *rule, const char *format,
                            va_list args)
{
    char text[512], place[256] = "";
    vsnprintf(text, sizeof(text), format, args);
    if (file)
        snprintf(place, sizeof(place), "%.200s, line %d, ", file, line);
    poe_error("%s %s'%.*s%s': %s", flag, place, SHOWN, rule, strlen(rule) > SHOWN ? "..." : "", text);
    return POE_BAD_INPUT;
}

bool poe_rules_number(const char *text, const char *const *units, const double *factors, double *value)
{
    char *end;
    if (!isdigit((unsigned char)*text) && *text != '.')
        return false;
    *value = strtod(text, &end);
    for (int i = 0; units[i]; i++)
        if (strcmp(end, units[i]) == 0) {
            *value *= factors[i];
            return isfinite(*value);
        }
    return false;
}

bool poe_rules_seconds(const char *text, double longest, double *seconds)
{
    static const char *const units[] = {"us", "ms", "s", NULL};
    return poe_rules_number(text, units, (const double[]){1e-6, 1e-3, 1}, seconds) && *seconds <= longest;
}

char *poe_rules_trim(char *text)
{
    while (isspace((unsigned char)*text))
        text++;
    for (char *end = text + strlen(text); end > text && isspace((unsigned char)end[-1]);)
        *--end = '\0';
    return text;
}

static poe_status read_lines(const poe_rules *rules, char *text)
{
    poe_status status = POE_OK;
    for (char *lines = text, *line; status == POE_OK && (line = strsep(&lines, "\n"));) {
        ++*rules->line;
        if (*rules->file)
            line[strcspn(line, "#")] = '\0';
        for (char *rule; status == POE_OK && (rule = strsep(&line, ";"));) {
            rule = poe_rules_trim(rule);
            if (*rule)
                status = rules->read(rules->context, rule);
        }
    }
    return status;
}

/* The rules as text of their own. */
static poe_status get_text(const poe_rules *rules, const char *value, bool is_file, char **text)
{
    size_t size;
    if (is_file) {
        poe_status status = poe_read_file(value, rules->flag, text, &size);
        if (status == POE_OK && memchr(*text, '\0', size)) {
            poe_error("%s: %s is no file of rules: it contains a zero byte", rules->flag, value);
            free(*text);
            return POE_BAD_INPUT;
        }
        return status;
    }
    if (!strchr(value, rules->mark)) {
        poe_error("%s: there is no file %.200s, and no rule in it, as in %s", rules->flag, value, rules->example);
        return POE_BAD_INPUT;
    }
    *text = strdup(value);
    if (!*text)
        poe_error("out of memory for %s", rules->flag);
    return *text ? POE_OK : POE_FAILED;
}

poe_status poe_rules_read(const poe_rules *rules, const char *value)
{
    char *text;
    if (!value || strcmp(value, "none") == 0)
        return POE_OK;
    bool is_file = access(value, F_OK) == 0;
    poe_status status = get_text(rules, value, is_file, &text);
    if (status != POE_OK)
        return status;
    *rules->file = is_file ? value : NULL;
    status = read_lines(rules, text);
    free(text);
    return status;
}
