/* SPDX-License-Identifier: MIT
 * A rank of an MPI job as an agent (pipeline/agent.h) whose stage process runs the body; and what ranks.c shares with
 * that. */
#ifndef POE_TOOLS_AGENTS_H
#define POE_TOOLS_AGENTS_H

#include "comm/transport.h"
#include "pipeline/keeper.h"
#include "tools/ranks.h"

typedef struct poe_spares poe_spares;

typedef struct poe_rank_job {
    poe_transport *transport;
    poe_transport *fabric;  // the same without decorators; used where ranks can move
    poe_transport *letters; // between all agents; NULL unless there are spares
    const poe_options *options;
    poe_rank_body body;
    int rank, size;
    poe_status status;
    poe_board *board;   // of an agent; may be NULL
    poe_keeper *keeper; // the same
    poe_spares *spares; // with spares; else NULL
} poe_rank_job;

/* Whether this process, which a launcher started, is to be an agent. */
bool poe_agents_wanted(const poe_options *options);
/* Makes board and keeper. The process must have one thread, and not have started MPI; the job's options and body are
 * final. POE_FAILED: said. */
poe_status poe_agents_prepare(poe_rank_job *job);
/* Ends the keeper and forgets the board, if there are any. */
void poe_agents_dismiss(poe_rank_job *job);
/* The rank's part of the run, from the meeting of the ranks on. Returns POE_OK, POE_BAD_INPUT or POE_INTERRUPTED; after
 * anything else the job is ended here. */
poe_status poe_agents_run(poe_rank_job *job);

/* --- ranks.c ---------------------------------------------------------------------------------------------------- */
/* This rank cannot go on, and the others cannot without it: the launcher ends them when it sees this status. */
_Noreturn void poe_ranks_end_job(int exit_status);
/* The ranks of an MPI job meet and agree. job->transport is what carries the run from then on; *comm is NULL when
 * nothing has been made of it yet, or owns it. On failure all ranks return the same, and there is neither. */
poe_status poe_ranks_join(poe_rank_job *job, const poe_comm_settings *settings, poe_status parse_status,
                          poe_comm **comm);

#endif
