/* SPDX-License-Identifier: MIT
 * Runs a collective body on every rank: this process is one rank of an MPI job, or all of them are its threads. */
#ifndef POE_TOOLS_RANKS_H
#define POE_TOOLS_RANKS_H

#include "comm/comm.h"
#include "faults/net.h"
#include "src/options.h"

/* One rank's work. POE_BAD_INPUT must be agreed on by all ranks, and ends them in order; any other failure ends the
 * process, and with it the job, at once. */
typedef poe_status (*poe_rank_body)(poe_comm *comm, const poe_options *options);

/* The network of --net between `size` ranks, placed as --schedule has them. POE_BAD_INPUT: said. The caller frees *net in any
 * case. */
poe_status poe_ranks_net(const poe_options *options, int size, poe_net *net);

/* `size` ranks as threads of this process. Returns the exit status. */
int poe_ranks_threads(int size, const poe_options *options, poe_rank_body body);

/* This process as one rank of `size` in an MPI job that was started by a launcher; `parse_status` is agreed on first.
 * A job of one process runs all stages as threads. */
int poe_ranks_mpi(const poe_options *options, poe_status parse_status, poe_rank_body body);

#endif
