/* SPDX-License-Identifier: MIT
 * Reading --fault. A rule is a kind and KEY=VALUE words; a log's lines about faults are rules too. */
#include <ctype.h>
#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "faults/fault_impl.h"
#include "faults/rules.h"
#include "src/log.h"

enum { LONGEST = 3600 };

#define WHERE (POE_FAULT_KEY_RANK | POE_FAULT_KEY_STEP)
#define WHEN (POE_FAULT_KEY_MICRO | POE_FAULT_KEY_PHASE | POE_FAULT_KEY_TIMES | POE_FAULT_KEY_LIFE)

const poe_fault_traits poe_fault_kinds[POE_FAULT_KINDS] = {
    [POE_FAULT_KILL] = {"kill", WHERE, WHEN, false},
    [POE_FAULT_SEGFAULT] = {"segfault", WHERE, WHEN, false},
    [POE_FAULT_EXIT] = {"exit", WHERE, WHEN | POE_FAULT_KEY_CODE, false},
    [POE_FAULT_STOP] = {"stop", WHERE, WHEN | POE_FAULT_KEY_FOR, false},
    [POE_FAULT_SLOW] = {"slow", WHERE, WHEN | POE_FAULT_KEY_FOR | POE_FAULT_KEY_DUTY, false},
    [POE_FAULT_MEMORY] = {"memory", WHERE, WHEN | POE_FAULT_KEY_CAP, false},
    [POE_FAULT_DISK] = {"disk", WHERE, WHEN | POE_FAULT_KEY_FOR, false},
    [POE_FAULT_NAN] = {"nan", WHERE, WHEN, false},
    [POE_FAULT_CORRUPT] = {"corrupt", WHERE | POE_FAULT_KEY_TO, WHEN, true},
    [POE_FAULT_CUT] = {"cut", WHERE | POE_FAULT_KEY_TO, WHEN, true},
    [POE_FAULT_PARTITION] = {"partition", POE_FAULT_KEY_RANKS | POE_FAULT_KEY_STEP,
                             WHEN | POE_FAULT_KEY_RANK | POE_FAULT_KEY_FOR, true},
    [POE_FAULT_CORRUPT_CHECKPOINT] = {"corrupt-checkpoint", WHERE, WHEN, false},
    [POE_FAULT_KILL_AGENT] = {"kill-agent", WHERE, WHEN, true},
    [POE_FAULT_KILL_KEEPER] = {"kill-keeper", WHERE, WHEN, true},
    [POE_FAULT_ABSENT] = {"absent", WHERE, WHEN | POE_FAULT_KEY_FOR | POE_FAULT_KEY_STEPS, true},
    [POE_FAULT_RANDOM] = {"random", POE_FAULT_KEY_MTBF,
                          POE_FAULT_KEY_SEED | POE_FAULT_KEY_KINDS | POE_FAULT_KEY_RANKS | POE_FAULT_KEY_FOR, false},
};

typedef struct reader {
    poe_fault_plan *plan;
    const char *file; /* NULL: the rules are on the command line */
    int line;
    const char *rule;
    unsigned seen; /* keys of this rule */
    poe_fault_rule *into;
} reader;

static poe_status refuse(const reader *r, const char *format, ...) __attribute__((format(printf, 2, 3)));
static poe_status refuse(const reader *r, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    poe_status status = poe_rules_refuse("--fault", r->file, r->line, r->rule, format, args);
    va_end(args);
    return status;
}

static poe_status wrong(const reader *r, const char *key, const char *value, const char *allowed)
{
    return refuse(r, "found \"%.60s\" for %s, allowed is %s", value, key, allowed);
}

/* --- values ------------------------------------------------------------------------------------------------------- */
static bool read_count(const char *text, int64_t low, int64_t high, int64_t *count)
{
    char *end;
    if (!isdigit((unsigned char)*text))
        return false;
    errno = 0;
    long long value = strtoll(text, &end, 10);
    *count = value;
    return *end == '\0' && errno == 0 && value >= low && value <= high;
}

static bool read_time(const char *text, double longest, double *seconds)
{
    return poe_rules_seconds(text, longest, seconds) && *seconds >= 1e-3;
}

static poe_status read_rank_of(const reader *r, const char *key, const char *value, int *rank)
{
    int64_t number;
    char allowed[64];
    snprintf(allowed, sizeof(allowed), "a rank from 0 to %d", r->plan->size - 1);
    if (!read_count(value, 0, r->plan->size - 1, &number))
        return wrong(r, key, value, allowed);
    *rank = (int)number;
    return POE_OK;
}

/* --- keys --------------------------------------------------------------------------------------------------------- */
static poe_status read_rank(reader *r, char *value)
{
    return read_rank_of(r, "rank", value, &r->into->rank);
}

static poe_status read_to(reader *r, char *value)
{
    return read_rank_of(r, "to", value, &r->into->to);
}

static poe_status read_step(reader *r, char *value)
{
    return read_count(value, 0, INT64_MAX, &r->into->step) ? POE_OK
                                                           : wrong(r, "step", value, "the number of a step, from 0");
}

static poe_status read_micro(reader *r, char *value)
{
    int64_t number;
    if (!read_count(value, 0, INT32_MAX, &number))
        return wrong(r, "micro", value, "the number of a micro-batch in its step, from 0");
    r->into->micro = (int)number;
    return POE_OK;
}

static poe_status read_phase(reader *r, char *value)
{
    char names[256];
    size_t used = 0;
    for (int phase = 0; phase < POE_PHASE_COUNT; phase++) {
        const char *name = poe_phase_name((poe_phase)phase);
        if (strcmp(value, name) == 0) {
            r->into->phase = phase;
            return POE_OK;
        }
        used += (size_t)snprintf(names + used, sizeof(names) - used, "%s%s", phase ? ", " : "", name);
    }
    return wrong(r, "phase", value, names);
}

static poe_status read_times(reader *r, char *value)
{
    return read_count(value, 1, 1000000, &r->into->times)
               ? POE_OK
               : wrong(r, "times", value, "how often it happens, from 1 to 1000000");
}

static poe_status read_life(reader *r, char *value)
{
    return read_count(value, 1, 1000000, &r->into->life)
               ? POE_OK
               : wrong(r, "life", value, "the number of the rank's stage process, from 1");
}

static poe_status read_duration(reader *r, char *value)
{
    return read_time(value, LONGEST, &r->into->duration)
               ? POE_OK
               : wrong(r, "for", value, "a time from 1ms to 3600s with its unit, as in 500ms or 2s");
}

static poe_status read_steps(reader *r, char *value)
{
    return read_count(value, 1, 1000000000, &r->into->steps)
               ? POE_OK
               : wrong(r, "steps", value, "a number of steps from 1 to 1000000000");
}

static poe_status read_duty(reader *r, char *value)
{
    static const char *const units[] = {"", NULL};
    if (poe_rules_number(value, units, (const double[]){1}, &r->into->duty) && r->into->duty >= 0.01 && r->into->duty < 1)
        return POE_OK;
    return wrong(r, "duty", value, "the share of the time that is left, from 0.01 to below 1");
}

static poe_status read_code(reader *r, char *value)
{
    int64_t number;
    if (!read_count(value, 0, 255, &number))
        return wrong(r, "code", value, "an exit status from 0 to 255");
    r->into->code = (int)number;
    return POE_OK;
}

static poe_status read_cap(reader *r, char *value)
{
    static const char *const units[] = {"MiB", "GiB", NULL};
    double bytes;
    if (!poe_rules_number(value, units, (const double[]){0x1p20, 0x1p30}, &bytes) || bytes < 0x1p20 || bytes > 0x1p40)
        return wrong(r, "cap", value, "the memory taken at most, from 1MiB to 1024GiB");
    r->into->cap = (uint64_t)bytes;
    return POE_OK;
}

static poe_status read_ranks(reader *r, char *value)
{
    memset(r->into->ranks, 0, sizeof(r->into->ranks));
    for (char *rest = value, *item; (item = strsep(&rest, ","));) {
        int rank = 0;
        poe_status status = read_rank_of(r, "ranks", item, &rank);
        if (status != POE_OK)
            return status;
        r->into->ranks[rank] = true;
    }
    return POE_OK;
}

static poe_status read_mtbf(reader *r, char *value)
{
    return read_time(value, 1e6, &r->into->mtbf)
               ? POE_OK
               : wrong(r, "mtbf", value,
                       "the mean time between failures, from 1ms to 1000000s, with its unit, as in 20s");
}

static poe_status read_seed(reader *r, char *value)
{
    int64_t number;
    if (!read_count(value, 0, INT64_MAX, &number))
        return wrong(r, "seed", value, "a whole number that is not negative");
    r->into->seed = (uint64_t)number;
    return POE_OK;
}

static void list_kinds(int n, char names[256])
{
    size_t used = 0;
    for (int kind = 0; kind < n; kind++)
        used += (size_t)snprintf(names + used, 256 - used, "%s%s", kind ? ", " : "", poe_fault_kinds[kind].name);
}

/* "drop" is what breaking a connection is called elsewhere. POE_FAULT_KINDS: there is none. */
static poe_fault_kind find_kind(const char *name)
{
    int kind = 0;
    if (strcmp(name, "drop") == 0)
        return POE_FAULT_CUT;
    while (kind < POE_FAULT_KINDS && strcmp(name, poe_fault_kinds[kind].name) != 0)
        kind++;
    return (poe_fault_kind)kind;
}

static poe_status read_kinds(reader *r, char *value)
{
    char names[256];
    list_kinds(POE_FAULT_RANDOM, names);
    r->into->kinds = 0;
    for (char *rest = value, *item; (item = strsep(&rest, ","));) {
        poe_fault_kind kind = find_kind(item);
        if (kind >= POE_FAULT_RANDOM)
            return wrong(r, "kinds", item, names);
        r->into->kinds |= 1u << kind;
    }
    return POE_OK;
}

static const struct key {
    const char *name;
    poe_status (*read)(reader *r, char *value);
} keys[] = {
    /* in the order of their bits */
    {"rank", read_rank},    {"step", read_step}, {"micro", read_micro}, {"phase", read_phase}, {"times", read_times},
    {"for", read_duration}, {"duty", read_duty}, {"code", read_code},   {"cap", read_cap},     {"to", read_to},
    {"ranks", read_ranks},  {"mtbf", read_mtbf}, {"seed", read_seed},   {"kinds", read_kinds}, {"life", read_life},
    {"steps", read_steps},
};
enum { KEYS = sizeof(keys) / sizeof(*keys) };

static void list_keys(unsigned which, char names[256])
{
    size_t used = 0;
    names[0] = '\0';
    for (int i = 0; i < KEYS; i++)
        if (which >> i & 1)
            used += (size_t)snprintf(names + used, 256 - used, "%s%s", used ? ", " : "", keys[i].name);
}

/* --- rules -------------------------------------------------------------------------------------------------------- */
static poe_status read_word(reader *r, char *word)
{
    const poe_fault_traits *traits = &poe_fault_kinds[r->into->kind];
    char *value = strchr(word, '='), names[256];
    unsigned takes = traits->needs | traits->takes;
    if (value)
        *value++ = '\0';
    list_keys(takes, names);
    for (int i = 0; i < KEYS; i++) {
        if (!(takes >> i & 1) || strcmp(word, keys[i].name) != 0)
            continue;
        if (r->seen >> i & 1)
            return refuse(r, "says %s twice", word);
        r->seen |= 1u << i;
        return keys[i].read(r, value ? value : word + strlen(word));
    }
    return refuse(r, "%s has no key \"%.60s\"; keys are %s", traits->name, word, names);
}

static int count_ranks(const poe_fault_rule *rule, int size)
{
    int n = 0;
    for (int rank = 0; rank < size; rank++)
        n += rule->ranks[rank];
    return n;
}

/* What must hold between the words of a rule. */
static poe_status check_rule(const reader *r)
{
    const poe_fault_rule *rule = r->into;
    const poe_fault_traits *traits = &poe_fault_kinds[rule->kind];
    const unsigned links = 1u << POE_FAULT_CORRUPT | 1u << POE_FAULT_CUT | 1u << POE_FAULT_PARTITION;
    unsigned missing = traits->needs & ~r->seen;
    char names[256];
    int size = r->plan->size;
    list_keys(missing, names);
    if (missing)
        return refuse(r, "%s needs %s", traits->name, names);
    if ((r->seen & POE_FAULT_KEY_TO) && rule->to == rule->rank)
        return refuse(r, "rank %d has no connection with itself; allowed for to are the other ranks", rule->to);
    if (rule->kind == POE_FAULT_PARTITION && count_ranks(rule, size) == size)
        return refuse(r, "found all %d ranks for ranks, allowed are some of them: one side of the partition", size);
    if (rule->kind == POE_FAULT_ABSENT && rule->rank == 0)
        return refuse(r, "without the first stage there is nothing to train on; allowed for rank are the others");
    if ((r->seen & POE_FAULT_KEY_STEPS) && (r->seen & POE_FAULT_KEY_FOR))
        return refuse(r, "says steps and for; allowed is one of them");
    if (rule->kind == POE_FAULT_RANDOM && size == 1 && (rule->kinds & links))
        return refuse(r, "a single rank has no connections; corrupt, cut and partition need another one");
    return POE_OK;
}

static poe_status read_kind(const reader *r, const char *name, poe_fault_kind *kind)
{
    char names[256];
    list_kinds(POE_FAULT_KINDS, names);
    *kind = find_kind(name);
    return *kind < POE_FAULT_KINDS ? POE_OK : refuse(r, "there is no fault \"%.60s\"; allowed are %s", name, names);
}

/* Behind what a log puts in front of a rule: "poe-pipe: rank 2: fault: kill rank=2 ...". */
static char *skip_prefix(char *text)
{
    static const char mark[] = "fault: ";
    if (strncmp(text, mark, strlen(mark)) == 0)
        return text + strlen(mark);
    char *found = strstr(text, ": fault: ");
    return found ? found + 2 + strlen(mark) : text;
}

static poe_status read_rule(void *context, char *text)
{
    reader *r = context;
    text = skip_prefix(text);
    char copy[128]; /* for messages: reading cuts the text up */
    snprintf(copy, sizeof(copy), "%s", text);
    r->rule = copy;
    if (r->plan->n_rules == POE_BOARD_FAULTS)
        return refuse(r, "is rule %d, and a plan has at most %d", POE_BOARD_FAULTS + 1, POE_BOARD_FAULTS);
    r->into = &r->plan->rules[r->plan->n_rules];
    r->seen = 0;
    poe_status status = POE_OK;
    bool first = true;
    for (char *rest = text, *word; status == POE_OK && (word = strsep(&rest, " \t\r"));) {
        poe_fault_kind kind;
        if (!*word)
            continue;
        if (!first) {
            status = read_word(r, word);
            continue;
        }
        first = false;
        status = read_kind(r, word, &kind);
        if (status == POE_OK)
            *r->into = poe_fault_rule_default(kind);
    }
    if (status == POE_OK)
        status = check_rule(r);
    r->plan->n_rules += status == POE_OK;
    return status;
}

static poe_status read_text(const char *value, poe_fault_plan *plan)
{
    reader r = {.plan = plan};
    poe_rules rules = {.flag = "--fault",
                       .mark = '=',
                       .example = "'kill rank=2 step=20'",
                       .file = &r.file,
                       .line = &r.line,
                       .read = read_rule,
                       .context = &r};
    return poe_rules_read(&rules, value);
}

/* --mtbf is a random rule of its own. */
static poe_status add_random(poe_fault_plan *plan, double mtbf, uint64_t seed)
{
    if (!(mtbf > 0))
        return POE_OK;
    if (plan->n_rules == POE_BOARD_FAULTS) {
        poe_error("--mtbf: --fault has %d rules already, and that is all that a plan can have", POE_BOARD_FAULTS);
        return POE_BAD_INPUT;
    }
    poe_fault_rule *rule = &plan->rules[plan->n_rules++];
    *rule = poe_fault_rule_default(POE_FAULT_RANDOM);
    rule->mtbf = mtbf;
    rule->seed = seed;
    return POE_OK;
}

poe_status poe_fault_plan_read(const char *text, double mtbf, uint64_t seed, int size, poe_fault_plan **plan)
{
    poe_fault_plan *p = calloc(1, sizeof(*p));
    if (p)
        *p = (poe_fault_plan){.size = size, .states = calloc((size_t)size, sizeof(*p->states))};
    if (!p || !p->states) {
        poe_error("out of memory for the fault plan of %d ranks", size);
        poe_fault_plan_free(p);
        return POE_FAILED;
    }
    poe_status status = POE_OK;
    if (size > POE_BOARD_RANKS && (text || mtbf > 0)) {
        poe_error("--fault and --mtbf are for at most %d ranks; found %d", POE_BOARD_RANKS, size);
        status = POE_BAD_INPUT;
    }
    if (status == POE_OK)
        status = read_text(text, p);
    if (status == POE_OK)
        status = add_random(p, mtbf, seed);
    if (status == POE_OK)
        *plan = p;
    else
        poe_fault_plan_free(p);
    return status;
}
