/* SPDX-License-Identifier: MIT
 * Rules as text: as they are written, and the start-up table's lines. */
#include <inttypes.h>
#include <stdarg.h>
#include <stdlib.h>

#include "faults/fault_impl.h"

enum { LINES = 8 }; /* rules that get a line */

typedef struct writer {
    char *text;
    size_t used;
} writer;

static void put(writer *w, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void put(writer *w, const char *format, ...)
{
    va_list args;
    size_t left = POE_FAULT_RULE_BYTES - w->used;
    va_start(args, format);
    int n = vsnprintf(w->text + w->used, left, format, args);
    va_end(args);
    w->used += n < (int)left ? (size_t)n : left - 1;
}

static void put_ranks(writer *w, const bool *ranks)
{
    const char *before = " ranks=";
    for (int rank = 0; rank < POE_BOARD_RANKS; rank++)
        if (ranks[rank]) {
            put(w, "%s%d", before, rank);
            before = ",";
        }
}

static void put_random(writer *w, const poe_fault_rule *rule)
{
    const char *before = " kinds=";
    put(w, " mtbf=%.9gs seed=%" PRIu64, rule->mtbf, rule->seed);
    for (int kind = 0; kind < POE_FAULT_RANDOM; kind++)
        if (rule->kinds >> kind & 1) {
            put(w, "%s%s", before, poe_fault_kinds[kind].name);
            before = ",";
        }
}

static void put_moment(writer *w, const poe_fault_rule *rule)
{
    put(w, " step=%" PRId64, rule->step);
    if (rule->micro >= 0)
        put(w, " micro=%d", rule->micro);
    if (rule->phase >= 0)
        put(w, " phase=%s", poe_phase_name((poe_phase)rule->phase));
    if (rule->life > 0)
        put(w, " life=%" PRId64, rule->life);
}

void poe_fault_rule_print(const poe_fault_rule *rule, char text[POE_FAULT_RULE_BYTES])
{
    const poe_fault_traits *traits = &poe_fault_kinds[rule->kind];
    unsigned takes = traits->needs | traits->takes;
    writer w = {.text = text};
    put(&w, "%s", traits->name);
    if (rule->rank >= 0)
        put(&w, " rank=%d", rule->rank);
    if (takes & POE_FAULT_KEY_TO)
        put(&w, " to=%d", rule->to);
    if (rule->kind == POE_FAULT_PARTITION)
        put_ranks(&w, rule->ranks);
    if (takes & POE_FAULT_KEY_STEP)
        put_moment(&w, rule);
    if (takes & POE_FAULT_KEY_CODE)
        put(&w, " code=%d", rule->code);
    if (takes & POE_FAULT_KEY_DUTY)
        put(&w, " duty=%.9g", rule->duty);
    if (takes & POE_FAULT_KEY_CAP)
        put(&w, " cap=%.9gMiB", (double)rule->cap / 0x1p20);
    if (rule->kind == POE_FAULT_RANDOM)
        put_random(&w, rule);
    if (rule->steps)
        put(&w, " steps=%" PRId64, rule->steps);
    else if (takes & POE_FAULT_KEY_FOR)
        put(&w, " for=%.9gs", rule->duration);
    if (rule->times > 1)
        put(&w, " times=%" PRId64, rule->times);
    if (rule->kind == POE_FAULT_RANDOM) /* last: it may be long */
        put_ranks(&w, rule->ranks);
}

char *poe_fault_plan_describe(const poe_fault_plan *plan)
{
    char *text = NULL;
    size_t size;
    FILE *to = plan->n_rules ? open_memstream(&text, &size) : NULL;
    if (!to)
        return NULL;
    for (int i = 0; i < plan->n_rules && i < LINES; i++) {
        char rule[POE_FAULT_RULE_BYTES];
        poe_fault_rule_print(&plan->rules[i], rule);
        fprintf(to, "%s\n", rule);
    }
    if (plan->n_rules > LINES)
        fprintf(to, "... and %d more\n", plan->n_rules - LINES);
    if (fclose(to) == 0)
        return text;
    free(text);
    return NULL;
}
