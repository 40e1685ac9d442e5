/* SPDX-License-Identifier: MIT
 * Agents beyond those of the stages, and how a stage moves to one of them. A place is an agent's rank under mpiexec,
 * which stays; a rank is a stage's, and has an owner, which is a place.
 *
 * The agent at place 0 lets one stage move at a time, and says where to. The owner has its stage process take a
 * snapshot and end, sends what is to be sent, and asks all other agents to hold their connections with the rank; when
 * they all do, nothing can come or go, and what there is of the rank travels to the spare in one parcel. The spare
 * takes it over, and tells all where the rank is now. Until the parcel is on its way the owner can go on as if nothing
 * had been. */
#ifndef POE_TOOLS_SPARES_H
#define POE_TOOLS_SPARES_H

#include "comm/agent/relay.h"
#include "tools/agents.h"

/* Of every agent of the job. Owns job->letters from then on, also on failure; borrows the job. POE_FAILED: said. */
poe_status poe_spares_open(poe_rank_job *job, poe_spares **spares);
void poe_spares_close(poe_spares *spares); /* NULL is legal */

/* Any thread: the user wishes this agent to have no stage any more. False: there is nowhere to go. */
bool poe_spares_request_leave(poe_spares *spares);
/* With every wake-up of an agent that has a stage: what other agents ask for, and the user. When a place is there,
 * board->leave is raised. */
void poe_spares_attend(poe_spares *spares);
/* After the stage process has left. POE_OK: the stage is elsewhere, and the relay may be destroyed; POE_AGAIN: it has
 * to go on here, which is said; POE_FAILED: neither is certain, said. */
poe_status poe_spares_move(poe_spares *spares, poe_relay *relay);

/* An agent without a stage. POE_AGAIN: one is to move here: its rank, what there is of it, and since when it has been
 * on its way; anything else is the outcome of the job. */
poe_status poe_spares_wait(poe_spares *spares, int *rank, poe_parcel *luggage, double *since);
/* Who owns which rank, (number of stages). */
const int *poe_spares_owners(const poe_spares *spares);
/* The stage is here, and can be reached. */
void poe_spares_announce(poe_spares *spares, int rank);
/* By the owner of rank 0: agents without a stage may go. */
void poe_spares_end(poe_spares *spares, poe_status outcome);

#endif
