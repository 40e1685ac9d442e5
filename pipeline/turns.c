/* SPDX-License-Identifier: MIT */
#include "pipeline/turns.h"

#include <stdlib.h>

#include "pipeline/streams.h"
#include "src/log.h"

enum { WINDOW = 2 };

static poe_status open_link(poe_comm *comm, int peer, bool outgoing, uint64_t run, poe_link **link)
{
    return peer < 0 || *link ? POE_OK : poe_channel_open(comm, peer, POE_CHANNEL_TURN, outgoing, 0, WINDOW, run, link);
}

poe_status poe_turns_open(poe_turns *t, poe_comm *comm, const poe_layout *layout, int64_t first_step, uint64_t run)
{
    *t = (poe_turns){.rank = poe_comm_rank(comm), .first_step = first_step};
    if (layout->order.n_virtual == 1)
        return POE_OK;
    t->n = 2 * layout->order.n_micro + 1;
    t->turns = calloc((size_t)t->n, sizeof(*t->turns));
    if (!t->turns) {
        poe_error("out of memory for the turns of %d micro-batches", layout->order.n_micro);
        return POE_FAILED;
    }
    poe_schedule_turns(&layout->order, t->rank, t->turns);
    poe_status status = POE_OK;
    for (int i = 0; status == POE_OK && i < t->n; i++) {
        int before = t->turns[i].before, after = t->turns[i].after;
        status = open_link(comm, before, false, run, before < 0 ? NULL : &t->in[before]);
        if (status == POE_OK)
            status = open_link(comm, after, true, run, after < 0 ? NULL : &t->out[after]);
    }
    return status;
}

void poe_turns_close(poe_turns *t)
{
    for (int k = 0; k < POE_MAX_STAGES; k++) {
        poe_link_close(t->in[k]);
        poe_link_close(t->out[k]);
    }
    free(t->turns);
    *t = (poe_turns){0};
}

static poe_message message_of(int64_t step, int sender)
{
    return (poe_message){.kind = POE_KIND_TURN, .step = step, .micro = -1, .stage = sender};
}

poe_status poe_turns_take(poe_turns *t, int64_t step, int entry)
{
    int before = t->n ? t->turns[entry].before : -1;
    bool from_last_step = entry == 0 && before > t->rank; /* only the processor's first rank begins a step */
    if (before < 0 || (from_last_step && step == t->first_step))
        return POE_OK;
    poe_message expected = message_of(from_last_step ? step - 1 : step, before);
    void *payload;
    poe_status status = poe_link_receive(t->in[before], &expected, NULL, &payload);
    if (status == POE_OK)
        poe_link_release(t->in[before]);
    return status;
}

poe_status poe_turns_pass(poe_turns *t, int64_t step, int entry)
{
    int after = t->n ? t->turns[entry].after : -1;
    if (after < 0)
        return POE_OK;
    poe_message message = message_of(step, t->rank);
    void *payload;
    poe_status status = poe_link_acquire(t->out[after], &message, &payload);
    return status == POE_OK ? poe_link_send(t->out[after], &message) : status;
}

poe_status poe_turns_take_update(poe_turns *t, int64_t step)
{
    return poe_turns_take(t, step, t->n - 1);
}

poe_status poe_turns_pass_update(poe_turns *t, int64_t step, bool last)
{
    bool ends = last && t->n && t->turns[t->n - 1].after < t->rank;
    return ends ? POE_OK : poe_turns_pass(t, step, t->n - 1);
}
