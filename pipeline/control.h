/* SPDX-License-Identifier: MIT
 * Signals of a process that trains, taken by a thread of their own.
 *   SIGINT, SIGTERM, SIGUSR1: finish the step, write a checkpoint, end with status 130 (SIGTERM: 143); a second SIGINT
 *     or SIGTERM ends at once. Under a bare mpiexec, which kills its ranks within two seconds of a SIGTERM, SIGTERM
 *     removes temporary files and ends at once; poe-pipe --ranks sends SIGUSR1 instead.
 *   SIGUSR2: every rank of the process says what it waits for. */
#ifndef POE_PIPELINE_CONTROL_H
#define POE_PIPELINE_CONTROL_H

#include <stdbool.h>

#include "comm/comm.h"

/* Blocks the signals in this thread (and those it starts from now on) and starts the thread that takes them.
 * `killed_soon`: a SIGTERM means that there is no time to save. */
poe_status poe_control_start(bool killed_soon);
void poe_control_stop(void);

/* The comms that signals are passed to; of this process's ranks. */
void poe_control_add(poe_comm *comm);
void poe_control_remove(poe_comm *comm);

/* Status of an interrupted process: 130 or 143; 0 when none came. */
int poe_control_exit_status(void);

#endif
