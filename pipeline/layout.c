/* SPDX-License-Identifier: MIT */
#include "pipeline/layout.h"

#include <string.h>

#include "pipeline/settings.h"

enum { LEAST_WINDOW = 4, RING_WINDOW = 2 };

static int larger(int a, int b)
{
    return a > b ? a : b;
}

void poe_layout_init(poe_layout *l, const poe_options *o, int n_ranks)
{
    *l = (poe_layout){.order = {.n_ranks = n_ranks,
                                .n_virtual = poe_options_virtual(o),
                                .n_micro = poe_settings_micro_batches(o)},
                      .delay = o->sync_delay,
                      .link_window = o->link_window};
    if (!poe_schedule_parse(o->schedule, &l->order.schedule)) /* auto */
        l->order.schedule = strcmp(o->objective, "poe") == 0 ? POE_SCHEDULE_POE : POE_SCHEDULE_1F1B;
}

bool poe_layout_replicated(const poe_layout *l)
{
    return l->order.schedule == POE_SCHEDULE_DDP;
}

int poe_layout_stages(const poe_layout *l)
{
    return poe_layout_replicated(l) ? 1 : l->order.n_ranks;
}

int poe_layout_stage(const poe_layout *l, int rank)
{
    return poe_layout_replicated(l) ? 0 : rank;
}

int poe_layout_slots(const poe_layout *l, int stage)
{
    return poe_schedule_slots(&l->order, stage);
}

/* Micro-batches that a link's share of the delay covers. */
static int delay_share(const poe_layout *l)
{
    int links = larger(l->order.n_ranks - 1, 1);
    int64_t share = ((int64_t)l->delay * l->order.n_micro + links - 1) / links;
    return share < 65536 ? (int)share : 65536;
}

int poe_layout_window(const poe_layout *l, int stage)
{
    if (poe_layout_replicated(l))
        return larger(RING_WINDOW, l->link_window);
    int needed = poe_schedule_chained(l->order.schedule)
                     ? larger(poe_layout_slots(l, stage), poe_layout_slots(l, stage + 1)) + 1
                     : 1;
    int wanted = poe_schedule_chained(l->order.schedule) ? LEAST_WINDOW : LEAST_WINDOW + delay_share(l);
    return larger(needed, l->link_window ? l->link_window : wanted);
}
