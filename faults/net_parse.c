/* SPDX-License-Identifier: MIT
 * Reading --net. A rule is LINKS:CHANGE,CHANGE,... with LINKS a set of ranks, '-' (both directions) or '>' (one), and
 * another set. Rules change what rules before them have set. */
#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "faults/net.h"
#include "faults/net_presets.h"
#include "faults/rules.h"
#include "src/log.h"

enum { MAX_CHANGES = 24 };

static const char all_keys[] = "rtt, delay, jitter, bw, loss, preset, corrupt, cut, down, from and to; seed stands alone";
static const char times[] = "a time from 0 to 3600 s with its unit, as in 200us, 80ms or 1.5s";
static const char shares[] = "a share from 0% to 50%, as in 0.1%";

typedef struct change {
    void (*apply)(const struct change *change, int from, int to, poe_net_link *link);
    size_t offset; /* of the field that is set */
    double value;
    uint64_t number;
} change;

typedef struct reader {
    poe_net *net;
    const char *file; /* NULL: the rules are on the command line */
    int line;
    const char *rule;
    bool senders[POE_NET_RANKS], receivers[POE_NET_RANKS], both;
    change changes[MAX_CHANGES];
    int n_changes;
    bool down, interval;
    poe_net_outage outage;
} reader;

static poe_status refuse(const reader *r, const char *format, ...) __attribute__((format(printf, 2, 3)));
static poe_status refuse(const reader *r, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    poe_status status = poe_rules_refuse("--net", r->file, r->line, r->rule, format, args);
    va_end(args);
    return status;
}

/* --- values --------------------------------------------------------------------------------------------------------- */
static bool read_time(const char *text, double *seconds)
{
    return poe_rules_seconds(text, 3600, seconds);
}

static bool read_rate(const char *text, double *bits)
{
    static const char *const units[] = {"kbit", "Mbit", "Gbit", NULL};
    return poe_rules_number(text, units, (const double[]){1e3, 1e6, 1e9}, bits) && *bits >= 1e3 && *bits <= 1e13;
}

static bool read_share(const char *text, double *share)
{
    static const char *const units[] = {"%", NULL};
    return poe_rules_number(text, units, (const double[]){0.01}, share) && *share <= 0.5;
}

static bool read_count(const char *text, uint64_t *count)
{
    char *end;
    errno = 0;
    *count = isdigit((unsigned char)*text) ? strtoull(text, &end, 10) : 0;
    return isdigit((unsigned char)*text) && *end == '\0' && errno == 0;
}

/* --- changes -------------------------------------------------------------------------------------------------------- */
static void set_field(const change *c, int from, int to, poe_net_link *link)
{
    (void)from, (void)to;
    *(double *)(void *)((char *)link + c->offset) = c->value;
}

static void set_corrupt_message(const change *c, int from, int to, poe_net_link *link)
{
    (void)from, (void)to;
    link->corrupt_message = c->number;
}

static void set_preset(const change *c, int from, int to, poe_net_link *link)
{
    poe_net_preset_apply((int)c->number, from, to, link);
}

static poe_status add(reader *r, change c)
{
    if (r->n_changes == MAX_CHANGES)
        return refuse(r, "found more than %d changes, give some of them in a rule of their own", MAX_CHANGES);
    r->changes[r->n_changes++] = c;
    return POE_OK;
}

static poe_status wrong(const reader *r, const char *key, const char *value, const char *allowed)
{
    return refuse(r, "found \"%.60s\" for %s, allowed is %s", value, key, allowed);
}

static poe_status read_preset(reader *r, const char *value)
{
    int preset = poe_net_preset_find(value);
    if (preset < 0)
        return wrong(r, "preset", value, poe_net_preset_names);
    return add(r, (change){.apply = set_preset, .number = (uint64_t)preset});
}

static poe_status read_corrupt(reader *r, const char *value)
{
    change c = {.apply = set_field, .offset = offsetof(poe_net_link, corrupt)};
    if (read_share(value, &c.value))
        return add(r, c);
    c.apply = set_corrupt_message;
    if (read_count(value, &c.number) && c.number > 0)
        return add(r, c);
    return wrong(r, "corrupt", value, "a share of the messages, as in 0.1%, or the number of one message, from 1");
}

static poe_status read_interval(reader *r, const char *key, const char *value)
{
    double *end = strcmp(key, "from") == 0 ? &r->outage.from : &r->outage.to;
    r->interval = true;
    return read_time(value, end) ? POE_OK : wrong(r, key, value, times);
}

/* The keys whose value is a number that goes into a field. */
static const struct number_key {
    const char *name;
    bool (*read)(const char *text, double *value);
    size_t offset;
    double factor;
    const char *allowed;
} number_keys[] = {
    {"rtt", read_time, offsetof(poe_net_link, delay), 0.5, times},
    {"delay", read_time, offsetof(poe_net_link, delay), 1, times},
    {"jitter", read_time, offsetof(poe_net_link, jitter), 1, times},
    {"bw", read_rate, offsetof(poe_net_link, bandwidth), 1, "a rate from 1kbit to 10000Gbit, as in 500kbit, 20Mbit or 1Gbit"},
    {"loss", read_share, offsetof(poe_net_link, loss), 1, shares},
    {"cut", read_time, offsetof(poe_net_link, cut), 1, times},
};

static poe_status read_change(reader *r, char *text)
{
    char *value = strchr(text, '=');
    if (strcmp(text, "down") == 0) {
        r->down = true;
        return POE_OK;
    }
    if (value)
        *value++ = '\0';
    else
        value = text + strlen(text);
    for (size_t i = 0; i < sizeof(number_keys) / sizeof(*number_keys); i++) {
        const struct number_key *key = &number_keys[i];
        change c = {.apply = set_field, .offset = key->offset};
        if (strcmp(text, key->name) != 0)
            continue;
        if (!key->read(value, &c.value))
            return wrong(r, text, value, key->allowed);
        c.value *= key->factor;
        return add(r, c);
    }
    if (strcmp(text, "preset") == 0)
        return read_preset(r, value);
    if (strcmp(text, "corrupt") == 0)
        return read_corrupt(r, value);
    if (strcmp(text, "from") == 0 || strcmp(text, "to") == 0)
        return read_interval(r, text, value);
    return refuse(r, "there is no key \"%.60s\"; keys are %s", text, all_keys);
}

static poe_status read_changes(reader *r, char *text)
{
    poe_status status = POE_OK;
    r->n_changes = 0;
    r->down = r->interval = false;
    r->outage = (poe_net_outage){.to = INFINITY};
    for (char *rest = text, *item; status == POE_OK && (item = strsep(&rest, ", \t"));)
        if (*item)
            status = read_change(r, item);
    if (status != POE_OK)
        return status;
    if (r->interval && !r->down)
        return refuse(r, "from and to say when a link is down, as in down,from=10s,to=20s");
    if (!(r->outage.from < r->outage.to))
        return refuse(r, "the link is down from %g s to %g s, but the end must be later", r->outage.from, r->outage.to);
    if (r->n_changes == 0 && !r->down)
        return refuse(r, "says nothing about these links; keys are %s", all_keys);
    return POE_OK;
}

/* --- links ---------------------------------------------------------------------------------------------------------- */
static poe_status read_set(reader *r, char *text, bool *set)
{
    uint64_t rank;
    memset(set, 0, POE_NET_RANKS * sizeof(*set));
    if (strcmp(text, "*") == 0) {
        memset(set, 1, (size_t)r->net->size * sizeof(*set));
        return POE_OK;
    }
    for (char *rest = text, *item; (item = strsep(&rest, ","));) {
        item = poe_rules_trim(item);
        if (!read_count(item, &rank))
            return refuse(r, "found \"%.60s\" for a rank; links are named as in 0-1 (both ways), 0>1 (one way), 0,1-2,3 "
                          "or *", item);
        if (rank >= (uint64_t)r->net->size)
            return refuse(r, "there is no rank %llu; ranks are 0 to %d", (unsigned long long)rank, r->net->size - 1);
        set[rank] = true;
    }
    return POE_OK;
}

static poe_status read_links(reader *r, char *text)
{
    char *between = strpbrk(text, "->");
    char every[] = "*";
    bool all = strcmp(text, "*") == 0;
    r->both = all || (between && *between == '-');
    if (!between && !all)
        return refuse(r, "found \"%.60s\" for links; they are named as in 0-1 (both ways), 0>1 (one way), 0,1-2,3 or *",
                      text);
    if (between)
        *between++ = '\0';
    poe_status status = read_set(r, poe_rules_trim(text), r->senders);
    return status == POE_OK ? read_set(r, all ? every : poe_rules_trim(between), r->receivers) : status;
}

static bool concerns(const reader *r, int from, int to)
{
    return from != to && ((r->senders[from] && r->receivers[to]) || (r->both && r->senders[to] && r->receivers[from]));
}

/* Both ends of a connection feel its cut: one of them makes it. */
static bool skips(const reader *r, const change *c, int from, int to)
{
    return r->both && from > to && c->apply == set_field && c->offset == offsetof(poe_net_link, cut);
}

static poe_status add_outage(reader *r, poe_net_link *link)
{
    int i = link->n_outages;
    if (i == POE_NET_OUTAGES)
        return refuse(r, "a link can be down at most %d times", POE_NET_OUTAGES);
    for (; i > 0 && link->outages[i - 1].from > r->outage.from; i--)
        link->outages[i] = link->outages[i - 1];
    link->outages[i] = r->outage;
    link->n_outages++;
    return POE_OK;
}

static poe_status apply_to(reader *r, int from, int to)
{
    poe_net_link *link = &r->net->links[from * r->net->size + to];
    for (int i = 0; i < r->n_changes; i++)
        if (!skips(r, &r->changes[i], from, to))
            r->changes[i].apply(&r->changes[i], from, to, link);
    return r->down ? add_outage(r, link) : POE_OK;
}

static poe_status apply(reader *r)
{
    bool any = r->net->size == 1;
    for (int from = 0; from < r->net->size; from++)
        for (int to = 0; to < r->net->size; to++) {
            if (!concerns(r, from, to))
                continue;
            any = true;
            poe_status status = apply_to(r, from, to);
            if (status != POE_OK)
                return status;
        }
    return any ? POE_OK : refuse(r, "names no link between two different ranks");
}

/* --- rules ---------------------------------------------------------------------------------------------------------- */
static poe_status read_rule(void *context, char *text)
{
    reader *r = context;
    static const char seed[] = "seed=";
    char copy[128]; /* for messages: reading cuts the text up */
    snprintf(copy, sizeof(copy), "%s", text);
    r->rule = copy;
    if (strncmp(text, seed, strlen(seed)) == 0)
        return read_count(text + strlen(seed), &r->net->seed)
                   ? POE_OK
                   : wrong(r, "seed", text + strlen(seed), "a whole number that is not negative");
    char *colon = strchr(text, ':');
    if (!colon)
        return refuse(r, "found no colon; a rule is LINKS:KEY=VALUE,..., as in 0-1:rtt=80ms,bw=1Gbit");
    *colon = '\0';
    poe_status status = read_links(r, poe_rules_trim(text));
    if (status == POE_OK)
        status = read_changes(r, colon + 1);
    return status == POE_OK ? apply(r) : status;
}

poe_status poe_net_read(const char *value, int size, poe_net *net)
{
    *net = (poe_net){.size = size, .links = calloc((size_t)size * (size_t)size, sizeof(*net->links))};
    if (!net->links) {
        poe_error("out of memory for the network of %d ranks", size);
        return POE_FAILED;
    }
    reader r = {.net = net};
    poe_rules rules = {.flag = "--net",
                       .mark = ':',
                       .example = "0-1:rtt=80ms,bw=1Gbit",
                       .file = &r.file,
                       .line = &r.line,
                       .read = read_rule,
                       .context = &r};
    return poe_rules_read(&rules, value);
}

poe_status poe_net_share(poe_net *net, int n_virtual)
{
    int processors = net->size / n_virtual;
    for (int from = 0; n_virtual > 1 && from < net->size; from++)
        for (int to = 0; to < net->size; to++) {
            poe_net_link *link = &net->links[from * net->size + to];
            if (from % processors == to % processors)
                *link = (poe_net_link){0};
            if (!(link->bandwidth > 0))
                continue;
            poe_error("--net: link %d>%d has a bandwidth, which the %d ranks of a processor under --schedule interleaved "
                      "would have to share; that is not emulated, but delays, jitter, loss and outages are", from, to,
                      n_virtual);
            return POE_BAD_INPUT;
        }
    return POE_OK;
}

void poe_net_free(poe_net *net)
{
    free(net->links);
    net->links = NULL;
}
