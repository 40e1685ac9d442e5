/* SPDX-License-Identifier: MIT */
#include "src/emulation.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "src/log.h"

enum { ITEM_BYTES = 64 };
static const double longest = 3600; /* seconds */

static const char *const names[] = {"forward", "backward", "backward-input", "backward-weight", "optimizer", "jitter"};

static poe_status refuse(const char *found, size_t length, const char *allowed)
{
    poe_error("--emulate-compute: found \"%.*s\", allowed is %s", (int)(length < 100 ? length : 100), found, allowed);
    return POE_BAD_INPUT;
}

static bool read_time(const char *text, double *seconds)
{
    static const struct {
        const char *name;
        double seconds;
    } units[] = {{"s", 1}, {"ms", 1e-3}, {"us", 1e-6}};
    char *end;
    if (text[0] < '0' || text[0] > '9' || text[strspn(text, "0123456789.")] == 'x')
        return false;
    double value = strtod(text, &end);
    for (int i = 0; i < 3; i++) {
        if (strcmp(end, units[i].name) != 0)
            continue;
        *seconds = value * units[i].seconds;
        return *seconds <= longest;
    }
    return false;
}

/* NAME=TIME, for the stages first..last. */
static poe_status read_item(const char *text, size_t length, int first, int last, poe_emulation *e)
{
    char item[ITEM_BYTES] = "";
    if (length < sizeof(item))
        memcpy(item, text, length);
    char *equals = strchr(item, '=');
    if (!equals)
        return refuse(text, length, "NAME=TIME, as in forward=20ms");
    *equals = '\0';
    int which = 0;
    while (which < POE_EMULATED_COUNT && strcmp(names[which], item) != 0)
        which++;
    if (which == POE_EMULATED_COUNT)
        return refuse(text, length, "forward, backward, backward-input, backward-weight, optimizer or jitter = TIME");
    double seconds;
    if (!read_time(equals + 1, &seconds))
        return refuse(text, length, "a time with its unit, s, ms or us, up to 3600s");
    for (int k = first; k <= last; k++)
        e->seconds[k][which] = seconds;
    return POE_OK;
}

/* Up to four digits; NULL when there are none. */
static const char *read_number(const char *text, int *value)
{
    size_t digits = strspn(text, "0123456789");
    *value = atoi(text);
    return digits > 0 && digits <= 4 ? text + digits : NULL;
}

/* "3:" or "1-3:"; *used: its length, 0 when there is none. */
static poe_status read_stages(const char *text, size_t length, int n_stages, int *first, int *last, size_t *used)
{
    const char *colon = memchr(text, ':', length);
    *first = 0;
    *last = n_stages - 1;
    *used = colon ? (size_t)(colon - text) + 1 : 0;
    if (!colon)
        return POE_OK;
    const char *end = read_number(text, first);
    *last = *first;
    if (end && *end == '-')
        end = read_number(end + 1, last);
    if (end == colon && *first <= *last && *last < n_stages)
        return POE_OK;
    char allowed[96];
    snprintf(allowed, sizeof(allowed), "a stage from 0 to %d, or FIRST-LAST, before the colon", n_stages - 1);
    return refuse(text, *used, allowed);
}

static poe_status read_group(const char *text, size_t length, int n_stages, poe_emulation *e)
{
    int first, last;
    size_t used;
    poe_status status = read_stages(text, length, n_stages, &first, &last, &used);
    const char *end = text + length;
    for (text += used; status == POE_OK && text <= end;) {
        size_t n = 0;
        while (text + n < end && text[n] != ',')
            n++;
        status = read_item(text, n, first, last, e);
        text += n + 1;
    }
    return status;
}

static poe_status complete(double *seconds, int stage)
{
    for (int i = POE_EMULATED_FORWARD; i <= POE_EMULATED_BACKWARD; i++) {
        if (seconds[i] > 0)
            continue;
        poe_error("--emulate-compute: stage %d has no time for %s; allowed is more than 0, as in forward=20ms,backward=40ms",
                  stage, names[i]);
        return POE_BAD_INPUT;
    }
    for (int i = POE_EMULATED_BACKWARD_INPUT; i <= POE_EMULATED_BACKWARD_WEIGHT; i++)
        if (seconds[i] < 0)
            seconds[i] = seconds[POE_EMULATED_BACKWARD] / 2;
    for (int i = POE_EMULATED_FORWARD; i < POE_EMULATED_JITTER; i++) {
        if (seconds[i] == 0 || seconds[i] >= seconds[POE_EMULATED_JITTER])
            continue;
        poe_error("--emulate-compute: found a jitter of %g ms at stage %d, allowed is at most its shortest time, %s of %g ms",
                  1e3 * seconds[POE_EMULATED_JITTER], stage, names[i], 1e3 * seconds[i]);
        return POE_BAD_INPUT;
    }
    return POE_OK;
}

poe_status poe_emulation_parse(const char *text, int n_stages, poe_emulation *e)
{
    *e = (poe_emulation){0};
    for (int k = 0; k < n_stages; k++)
        e->seconds[k][POE_EMULATED_BACKWARD_INPUT] = e->seconds[k][POE_EMULATED_BACKWARD_WEIGHT] = -1;
    poe_status status = POE_OK;
    for (const char *end; status == POE_OK; text = end + 1) {
        end = strchrnul(text, ';');
        status = read_group(text, (size_t)(end - text), n_stages, e);
        if (!*end)
            break;
    }
    for (int k = 0; status == POE_OK && k < n_stages; k++)
        status = complete(e->seconds[k], k);
    return status;
}
