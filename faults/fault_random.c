/* SPDX-License-Identifier: MIT
 * Random failures: a Poisson process over the whole job. Each failure takes the same number of draws whatever comes of
 * them, and no time of day has a part in it, so every rank finds the same sequence. */
#include <math.h>

#include "faults/fault_impl.h"

/* The n-th of the set bits, counted from 0. */
static int pick(const bool *set, int size, uint64_t draw)
{
    uint64_t n = 0;
    for (int i = 0; i < size; i++)
        n += set[i];
    draw %= n;
    int i = 0;
    for (;; i++)
        if (set[i] && draw-- == 0)
            return i;
}

static void draw_next(const poe_fault_rule *rule, int size, poe_fault_sequence *s, double from)
{
    bool kinds[POE_FAULT_KINDS], others[POE_BOARD_RANKS];
    poe_fault_event *e = &s->next;
    e->at = from - rule->mtbf * log1p(-poe_rng_uniform(&s->rng));
    for (int kind = 0; kind < POE_FAULT_KINDS; kind++)
        kinds[kind] = rule->kinds >> kind & 1;
    e->kind = (poe_fault_kind)pick(kinds, POE_FAULT_KINDS, poe_rng_next(&s->rng));
    e->rank = pick(rule->ranks, size, poe_rng_next(&s->rng));
    for (int rank = 0; rank < size; rank++)
        others[rank] = size == 1 || rank != e->rank;
    e->to = pick(others, size, poe_rng_next(&s->rng));
}

void poe_fault_sequence_begin(const poe_fault_rule *rule, int size, poe_fault_sequence *sequence)
{
    poe_rng_init(&sequence->rng, rule->seed, "faults");
    draw_next(rule, size, sequence, 0);
}

void poe_fault_sequence_step(const poe_fault_rule *rule, int size, poe_fault_sequence *sequence)
{
    draw_next(rule, size, sequence, sequence->next.at);
}

/* A partition has two sides, and every rank holds back what it sends to the other one. */
bool poe_fault_event_concerns(const poe_fault_event *event, int rank)
{
    return event->rank == rank || event->kind == POE_FAULT_PARTITION;
}
