/* SPDX-License-Identifier: MIT
 * Fault plans: rules that say which rank is struck by what, and at which moment of training (src/moment.h), and random
 * failures drawn from a seed. The rules' syntax, what is real of each fault and what is emulated: docs/faults.md.
 *
 * A plan is read once per process, before ranks start, and attached by each rank in its own thread. How often a rule
 * has struck is counted where it survives the blow: in the rank's board (comm/agent/board.h) when it has one. */
#ifndef POE_FAULTS_FAULT_H
#define POE_FAULTS_FAULT_H

#include <stdbool.h>
#include <stdint.h>

#include "src/status.h"

struct poe_board; /* comm/agent/board.h */
typedef struct poe_fault_plan poe_fault_plan;

/* Reads `text`, the value of --fault: a file of rules if there is one of that name, or else rules separated by ';'.
 * NULL and "none": no rules. `mtbf` > 0 adds a random rule of that many seconds, and `seed`; 0 adds none.
 * POE_BAD_INPUT: said, naming the rule; POE_FAILED: out of memory, said. *plan is set on success only, the caller frees
 * it. Not collective. */
poe_status poe_fault_plan_read(const char *text, double mtbf, uint64_t seed, int size, poe_fault_plan **plan);
void poe_fault_plan_free(poe_fault_plan *plan); /* NULL is legal; no thread may still have it attached */

bool poe_fault_plan_is_empty(const poe_fault_plan *plan);
/* Some rule changes or holds back messages: the agent's transport must be wrapped (faults/fault_link.h). */
bool poe_fault_plan_strikes_links(const poe_fault_plan *plan);
/* Some rule takes a stage out of the run (absent): that needs --outage continue. */
bool poe_fault_plan_makes_absent(const poe_fault_plan *plan);
/* Lines for people: the rules, as far as a screen holds them. NULL when there are none, or out of memory. The caller
 * frees it. */
char *poe_fault_plan_describe(const poe_fault_plan *plan);
/* Without an agent for each rank some rules cannot be carried out. POE_BAD_INPUT: said, naming the first of them. */
poe_status poe_fault_plan_check(const poe_fault_plan *plan, bool has_agents);

/* What a plan cannot know by itself; everything may be NULL. Called in the rank's thread, within a moment. */
typedef struct poe_fault_hooks {
    void *context;
    void (*nan)(void *context);  /* puts a NaN into the gradients of the rank's own stage */
    void (*wake)(void *context); /* the agent has a request on its board and may be asleep */
    const char *run;             /* folder of the run, with checkpoints/ in it; borrowed */
    int stage;                   /* whose file in a checkpoint is the rank's */
} poe_fault_hooks;

/* From now on `rank`'s rules strike in the calling thread, which must be the rank's own; poe_moment_observe(NULL, NULL)
 * ends it. `board` may be NULL: there is no agent, and counts end with the process. It and the plan are borrowed until
 * then. POE_BAD_INPUT: as poe_fault_plan_check(). */
poe_status poe_fault_plan_attach(poe_fault_plan *plan, int rank, struct poe_board *board);
/* Copied; the rank's own thread, before or after attaching. */
void poe_fault_plan_hook(poe_fault_plan *plan, int rank, const poe_fault_hooks *hooks);

/* --- the agent's part --------------------------------------------------------------------------------------------- */
/* What an agent does for its stage process; NULL where it cannot, which is then said. */
typedef struct poe_fault_actions {
    void *context;
    bool (*cut)(void *context, int peer);                            /* false: the transport cannot */
    void (*corrupt)(void *context, int peer);                        /* a byte of the next message to it */
    void (*block)(void *context, const bool *peers, double seconds); /* peers: (size of the job) */
    void (*kill_keeper)(void *context);
    void (*kill_agent)(void *context);
} poe_fault_actions;

/* Carries out the board's request, if there is one, and lowers it. The agent's loop calls this after each wake-up. */
void poe_fault_serve(const poe_fault_plan *plan, struct poe_board *board, const poe_fault_actions *actions);

#endif
