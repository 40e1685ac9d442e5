/* SPDX-License-Identifier: MIT
 * A plan at work: at each moment of a rank, which of its rules strike. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "faults/fault_impl.h"
#include "src/clock.h"
#include "src/log.h"

/* --- the plan ----------------------------------------------------------------------------------------------------- */
poe_fault_rule poe_fault_rule_default(poe_fault_kind kind)
{
    poe_fault_rule rule = {.kind = kind,
                           .rank = -1,
                           .micro = -1,
                           .phase = -1,
                           .times = 1,
                           .duration = 2,
                           .duty = 0.5,
                           .code = 1,
                           .cap = (uint64_t)256 << 20};
    if (kind == POE_FAULT_NAN)
        rule.phase = POE_PHASE_BACKWARD; /* it is added to */
    if (kind == POE_FAULT_RANDOM) {
        rule.kinds = 1u << POE_FAULT_KILL | 1u << POE_FAULT_SEGFAULT | 1u << POE_FAULT_EXIT | 1u << POE_FAULT_STOP;
        memset(rule.ranks, 1, sizeof(rule.ranks));
    }
    return rule;
}

void poe_fault_plan_free(poe_fault_plan *plan)
{
    if (plan)
        free(plan->states);
    free(plan);
}

bool poe_fault_plan_is_empty(const poe_fault_plan *plan)
{
    return plan->n_rules == 0;
}

/* Bits 1 << poe_fault_kind of what a rule may do. */
static unsigned kinds_of(const poe_fault_rule *rule)
{
    return rule->kind == POE_FAULT_RANDOM ? rule->kinds : 1u << rule->kind;
}

bool poe_fault_plan_strikes_links(const poe_fault_plan *plan)
{
    for (int i = 0; i < plan->n_rules; i++)
        if (kinds_of(&plan->rules[i]) & (1u << POE_FAULT_CORRUPT | 1u << POE_FAULT_PARTITION))
            return true;
    return false;
}

bool poe_fault_plan_makes_absent(const poe_fault_plan *plan)
{
    for (int i = 0; i < plan->n_rules; i++)
        if (kinds_of(&plan->rules[i]) & 1u << POE_FAULT_ABSENT)
            return true;
    return false;
}

poe_status poe_fault_plan_check(const poe_fault_plan *plan, bool has_agents)
{
    for (int i = 0; i < plan->n_rules && !has_agents; i++)
        for (int kind = 0; kind < POE_FAULT_RANDOM; kind++) {
            char text[POE_FAULT_RULE_BYTES];
            if (!(kinds_of(&plan->rules[i]) >> kind & 1) || !poe_fault_kinds[kind].agent)
                continue;
            poe_fault_rule_print(&plan->rules[i], text);
            poe_error(
                "--fault '%.80s': %s is done by the agent that looks after a rank, and these ranks have none; allowed "
                "are kill, segfault, exit, stop, slow, memory, disk, nan and corrupt-checkpoint",
                text, poe_fault_kinds[kind].name);
            return POE_BAD_INPUT;
        }
    return POE_OK;
}

/* --- moments ------------------------------------------------------------------------------------------------------ */
/* Takes as long again as the duty cycle asks for since the last moment. */
static void slow_down(poe_fault_state *s)
{
    double now = poe_now(), pause = (now - s->slow_since) * (1 / s->duty - 1);
    pause = fmin(pause, s->slow_until - now);
    if (pause > 0) {
        struct timespec t = {.tv_sec = (time_t)pause, .tv_nsec = (long)((pause - floor(pause)) * 1e9)};
        while (nanosleep(&t, &t) != 0)
            ;
    }
    s->slow_since = poe_now();
    if (s->slow_since >= s->slow_until)
        s->slow_until = 0;
}

/* Seconds since the first moment of this rank's training, in whatever process that was. */
static double training_time(poe_fault_state *s)
{
    int64_t now = (int64_t)(1e9 * poe_now()), start = 0;
    if (atomic_compare_exchange_strong(s->start, &start, now))
        start = now;
    return 1e-9 * (double)(now - start);
}

/* One failure at a time: what is overdue comes at the moments that follow. */
static void strike_random(poe_fault_state *s, int index, const poe_fault_rule *moment)
{
    const poe_fault_rule *rule = &s->plan->rules[index];
    poe_fault_sequence *sequence = &s->sequences[index];
    const poe_fault_event event = sequence->next;
    if (training_time(s) < event.at)
        return;
    poe_fault_rule now = poe_fault_rule_default(event.kind);
    now.rank = s->rank;
    now.step = moment->step;
    now.micro = moment->micro;
    now.phase = moment->phase;
    now.life = moment->life;
    now.to = event.to;
    now.duration = rule->duration;
    if (event.kind == POE_FAULT_PARTITION)
        now.ranks[event.rank] = true;
    atomic_fetch_add(&s->fired[index], 1);
    do
        poe_fault_sequence_step(rule, s->plan->size, sequence);
    while (!poe_fault_event_concerns(&sequence->next, s->rank));
    poe_fault_strike(s, &now, -1);
}

/* A checkpoint can only be damaged once there is one: that rule waits. */
static bool is_time(const poe_fault_rule *rule, const poe_fault_rule *moment)
{
    bool step = rule->kind == POE_FAULT_CORRUPT_CHECKPOINT ? moment->step >= rule->step : moment->step == rule->step;
    return step && (rule->micro < 0 || rule->micro == moment->micro) &&
           (rule->phase < 0 || rule->phase == moment->phase);
}

static bool may_strike(const poe_fault_state *s, int index, const poe_fault_rule *moment)
{
    const poe_fault_rule *rule = &s->plan->rules[index];
    return (rule->rank < 0 || rule->rank == s->rank) && is_time(rule, moment) &&
           (!rule->life || rule->life == s->life) && atomic_load(&s->fired[index]) < rule->times;
}

static void observe(void *context, poe_phase phase, int64_t step, int micro)
{
    poe_fault_state *s = context;
    const poe_fault_rule moment = {.step = step,
                                   .micro = micro < 0 ? -1 : micro,
                                   .phase = (int)phase,
                                   .life = s->life > 1 ? s->life : 0}; /* the first is not worth a word */
    if (s->slow_until > 0)
        slow_down(s);
    for (int i = 0; i < s->plan->n_rules; i++) {
        if (s->plan->rules[i].kind == POE_FAULT_RANDOM) {
            strike_random(s, i, &moment);
            continue;
        }
        if (!may_strike(s, i, &moment))
            continue;
        poe_fault_rule now = s->plan->rules[i];
        now.rank = s->rank;
        now.step = step;
        now.micro = moment.micro;
        now.phase = moment.phase;
        now.life = moment.life;
        now.times = 1;
        poe_fault_strike(s, &now, i);
    }
}

/* Stands at the rank's first failure that has not happened. */
static void find_failure(poe_fault_state *s, int index)
{
    const poe_fault_rule *rule = &s->plan->rules[index];
    poe_fault_sequence *sequence = &s->sequences[index];
    unsigned passed = atomic_load(&s->fired[index]);
    for (poe_fault_sequence_begin(rule, s->plan->size, sequence);;
         poe_fault_sequence_step(rule, s->plan->size, sequence))
        if (poe_fault_event_concerns(&sequence->next, s->rank) && passed-- == 0)
            return;
}

/* Whether the rank will ever be struck by a random rule: if not, its sequence has no end. */
static bool has_turn(const poe_fault_rule *rule, int rank)
{
    return rule->ranks[rank] || rule->kinds >> POE_FAULT_PARTITION & 1;
}

poe_status poe_fault_plan_attach(poe_fault_plan *plan, int rank, poe_board *board)
{
    poe_fault_state *s = &plan->states[rank];
    poe_status status = poe_fault_plan_check(plan, board != NULL);
    if (status != POE_OK || !plan->n_rules)
        return status;
    s->plan = plan;
    s->rank = rank;
    s->life = board ? atomic_load(&board->incarnation) : 1;
    s->board = board;
    s->fired = board ? board->fired : s->own_fired;
    s->start = board ? &board->fault_start : &s->own_start;
    for (int i = 0; i < plan->n_rules; i++) {
        if (plan->rules[i].kind != POE_FAULT_RANDOM)
            continue;
        if (has_turn(&plan->rules[i], rank))
            find_failure(s, i);
        else
            s->sequences[i].next.at = INFINITY;
    }
    poe_moment_observe(observe, s);
    return POE_OK;
}

void poe_fault_plan_hook(poe_fault_plan *plan, int rank, const poe_fault_hooks *hooks)
{
    plan->states[rank].hooks = *hooks;
}
