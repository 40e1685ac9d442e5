/* SPDX-License-Identifier: MIT */
#include "pipeline/replicas.h"

#include <string.h>

#include "pipeline/streams.h"

static size_t part_of(int n_ranks, size_t floats)
{
    return (floats + (size_t)n_ranks - 1) / (size_t)n_ranks;
}

size_t poe_replicas_memory(int n_ranks, size_t floats, int window)
{
    return n_ranks > 1 ? 2 * (size_t)window * part_of(n_ranks, floats) * sizeof(float) : 0;
}

static poe_status open_link(const poe_replicas *s, poe_comm *comm, bool outgoing, int window, uint64_t run,
                            poe_link **link)
{
    int peer = (s->rank + (outgoing ? 1 : s->size - 1)) % s->size;
    return poe_channel_open(comm, peer, POE_CHANNEL_REPLICAS, outgoing, s->part * sizeof(float), window, run, link);
}

poe_status poe_replicas_open(poe_replicas *s, poe_comm *comm, size_t floats, int window, uint64_t run)
{
    *s = (poe_replicas){.rank = poe_comm_rank(comm), .size = poe_comm_size(comm), .floats = floats};
    s->part = part_of(s->size, floats);
    if (s->size == 1)
        return POE_OK;
    poe_status status = open_link(s, comm, true, window, run, &s->out);
    if (status == POE_OK)
        status = open_link(s, comm, false, window, run, &s->in);
    if (status != POE_OK)
        poe_replicas_close(s);
    return status;
}

void poe_replicas_close(poe_replicas *s)
{
    poe_link_close(s->out);
    poe_link_close(s->in);
    *s = (poe_replicas){0};
}

static size_t first_of(const poe_replicas *s, int part)
{
    size_t first = (size_t)part * s->part;
    return first < s->floats ? first : s->floats;
}

static size_t length_of(const poe_replicas *s, int part)
{
    return first_of(s, part + 1) - first_of(s, part);
}

/* What is on its way in round `round`: part `part`, from `sender`. */
static poe_message message_of(const poe_replicas *s, int64_t step, int round, int part, int sender)
{
    return (poe_message){.kind = POE_KIND_REPLICAS,
                         .step = step,
                         .micro = round,
                         .stage = sender,
                         .shape = {(uint32_t)part, (uint32_t)s->size, 0, 0},
                         .bytes = length_of(s, part) * sizeof(float)};
}

static poe_status send_part(poe_replicas *s, int64_t step, int round, int part, const float *values, uint32_t flags)
{
    poe_message message = message_of(s, step, round, part, s->rank);
    message.flags = flags;
    return poe_link_send_copy(s->out, &message, values + first_of(s, part));
}

static void add(float *restrict sum, const float *restrict more, size_t n)
{
    for (size_t i = 0; i < n; i++)
        sum[i] += more[i];
}

static poe_status receive_part(poe_replicas *s, int64_t step, int round, int part, float *values, uint32_t *flags)
{
    poe_message expected = message_of(s, step, round, part, (s->rank + s->size - 1) % s->size), got;
    void *payload;
    poe_status status = poe_link_receive(s->in, &expected, &got, &payload);
    if (status != POE_OK)
        return status;
    if (round < s->size - 1)
        add(values + first_of(s, part), payload, length_of(s, part));
    else
        memcpy(values + first_of(s, part), payload, expected.bytes);
    if (s->rank > 0)
        *flags = got.flags;
    poe_link_release(s->in);
    return POE_OK;
}

/* In round i rank r sends part r - i and gets part r - i - 1; after P - 1 rounds it has the whole of part r + 1. What
 * rank 0 says in every round has by then come to all. */
poe_status poe_replicas_sum(poe_replicas *s, int64_t step, float *values, uint32_t *flags)
{
    poe_status status = POE_OK;
    if (s->rank > 0)
        *flags = 0;
    for (int round = 0; status == POE_OK && round < 2 * (s->size - 1); round++) {
        int part = (s->rank + 2 * s->size - round) % s->size;
        status = send_part(s, step, round, part, values, *flags);
        if (status == POE_OK)
            status = receive_part(s, step, round, (part + s->size - 1) % s->size, values, flags);
    }
    return status;
}
