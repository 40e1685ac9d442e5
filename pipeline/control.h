/* SPDX-License-Identifier: MIT
 * Signals of a process that trains, taken by a thread of their own.
 *   SIGINT, SIGTERM, SIGUSR1: finish the step, write a checkpoint, end with status 130 (SIGTERM: 143); a second SIGINT
 *     or SIGTERM ends at once. Under a bare mpiexec, which kills its ranks within two seconds of a SIGTERM, SIGTERM
 *     removes temporary files and ends at once; poe-pipe --ranks sends SIGUSR1 instead.
 *   SIGUSR2: every rank of the process says what it waits for.
 * A SIGTERM from anybody but the parent process, which is the launcher, lets targets that can do so leave instead.
 * A stage process (comm/agent/board.h) is told by its agent what the user wishes: there, SIGTERM ends at once, SIGUSR2
 * is as above, and the others mean nothing. */
#ifndef POE_PIPELINE_CONTROL_H
#define POE_PIPELINE_CONTROL_H

#include <stdbool.h>

#include "comm/comm.h"

typedef enum poe_control_mode {
    POE_CONTROL_SAVES,       /* there is time to save after any signal */
    POE_CONTROL_LAUNCHED,    /* a rank whose mpiexec has a launcher of ours, which asks otherwise: not after mpiexec's SIGTERM */
    POE_CONTROL_KILLED_SOON, /* not after any SIGTERM */
    POE_CONTROL_STAGE,       /* a stage process */
} poe_control_mode;

/* Whom signals are passed to, in the signal thread. */
typedef struct poe_control_target {
    void *context; /* names the target */
    void (*request_stop)(void *context);
    void (*request_report)(void *context);
    void (*end)(void *context); /* the process ends right after it; may be NULL */
    /* A SIGTERM that is not the launcher's: true when the target leaves the run, which goes on. May be NULL. */
    bool (*request_leave)(void *context);
} poe_control_target;

/* Blocks the signals in this thread (and those it starts from now on) and starts the thread that takes them. */
poe_status poe_control_start(poe_control_mode mode);
void poe_control_stop(void);

/* Copied. One that is added after a signal is asked to stop at once. */
void poe_control_add(const poe_control_target *target);
void poe_control_remove(const void *context);
/* A rank of this process. */
void poe_control_add_comm(poe_comm *comm);

/* Status of an interrupted process: 130 or 143; 0 when none came. */
int poe_control_exit_status(void);

#endif
