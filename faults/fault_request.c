/* SPDX-License-Identifier: MIT
 * What a stage process asks of its agent, through one word of the board: bit 63 is set, then the kind (15 bits), the
 * argument (16) and microseconds (32). */
#include <math.h>
#include <time.h>

#include "faults/fault_impl.h"
#include "src/clock.h"
#include "src/log.h"

static const double longest_answer = 5; /* seconds */

uint64_t poe_fault_request_encode(poe_fault_request request)
{
    uint64_t us = (uint64_t)fmin(round(request.seconds * 1e6), UINT32_MAX);
    return UINT64_C(1) << 63 | (uint64_t)request.kind << 48 | (uint64_t)request.argument << 32 | us;
}

poe_fault_request poe_fault_request_decode(uint64_t word)
{
    return (poe_fault_request){.kind = (poe_fault_kind)(word >> 48 & 0x7fff),
                               .argument = (int)(word >> 32 & 0xffff),
                               .seconds = 1e-6 * (double)(word & UINT32_MAX)};
}

/* Until the word is lowered. */
static bool await(const poe_board *board, double until)
{
    while (atomic_load(&board->fault_request) != 0) {
        if (poe_now() > until)
            return false;
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    return true;
}

bool poe_fault_ask(poe_fault_state *s, poe_fault_request request)
{
    double until = poe_now() + longest_answer;
    if (!await(s->board, until)) /* an earlier one, of a stage process that died */
        return false;
    atomic_store(&s->board->fault_request, poe_fault_request_encode(request));
    if (s->hooks.wake)
        s->hooks.wake(s->hooks.context);
    return await(s->board, until);
}

/* Who is on the other side. */
static void find_peers(const poe_fault_plan *plan, int rank, int argument, bool *peers)
{
    for (int peer = 0; peer < plan->size; peer++)
        peers[peer] = argument < POE_FAULT_ALONE
                          ? plan->rules[argument].ranks[peer] != plan->rules[argument].ranks[rank]
                          : (peer == argument - POE_FAULT_ALONE) != (rank == argument - POE_FAULT_ALONE);
}

static bool act(const poe_fault_plan *plan, int rank, const poe_fault_request *request, const poe_fault_actions *a)
{
    bool peers[POE_BOARD_RANKS];
    switch (request->kind) {
    case POE_FAULT_CUT:
        return a->cut && a->cut(a->context, request->argument);
    case POE_FAULT_CORRUPT:
        if (a->corrupt)
            a->corrupt(a->context, request->argument);
        return a->corrupt != NULL;
    case POE_FAULT_PARTITION:
        find_peers(plan, rank, request->argument, peers);
        if (a->block)
            a->block(a->context, peers, request->seconds);
        return a->block != NULL;
    case POE_FAULT_KILL_KEEPER:
        if (a->kill_keeper)
            a->kill_keeper(a->context);
        return a->kill_keeper != NULL;
    default:
        if (a->kill_agent)
            a->kill_agent(a->context);
        return a->kill_agent != NULL;
    }
}

void poe_fault_serve(const poe_fault_plan *plan, poe_board *board, const poe_fault_actions *actions)
{
    uint64_t word = atomic_load(&board->fault_request);
    if (word == 0)
        return;
    poe_fault_request request = poe_fault_request_decode(word);
    if (request.kind == POE_FAULT_KILL_AGENT) /* nobody is left to lower it */
        atomic_store(&board->fault_request, 0);
    if (!act(plan, board->rank, &request, actions))
        poe_warn("%s of --fault does not happen: the transport, or the agent of this rank, cannot do it",
                 poe_fault_kinds[request.kind].name);
    atomic_store(&board->fault_request, 0);
}
