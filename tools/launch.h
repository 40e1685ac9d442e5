/* SPDX-License-Identifier: MIT
 * poe-pipe --ranks N: starts mpiexec with what small machines need, and passes the user's signals on in the form that
 * reaches the ranks. */
#ifndef POE_TOOLS_LAUNCH_H
#define POE_TOOLS_LAUNCH_H

#include "src/status.h"

/* Runs `mpiexec -n ranks THIS-PROGRAM argv[1..]`, without --ranks, and waits for its end. The environment is that of
 * mpi.env (what the user has set himself stays) and:
 *   POE_PIPE_LAUNCHER=1   a launcher is there, which handles Ctrl-C
 *   POE_PIPE_TTY=0|1      whether standard output is a terminal, which ranks cannot see through mpiexec
 *   COLUMNS               its width, when it is one
 * Signals. First SIGINT, SIGTERM or SIGHUP: SIGUSR1 for every rank (finish the step, save, exit 130). Second: SIGTERM
 * for mpiexec, and SIGKILL 3 s later. SIGUSR2: SIGUSR2 for every rank (say what you wait for).
 * *exit_status: mpiexec's, or 128 + the signal when one stopped the run. POE_BAD_INPUT: no mpiexec, said; POE_FAILED:
 * it cannot be started, said. Call it while the process has one thread. */
poe_status poe_launch(int ranks, int argc, char **argv, int *exit_status);

#endif
