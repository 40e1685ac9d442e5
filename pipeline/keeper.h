/* SPDX-License-Identifier: MIT
 * A process that forks a rank's stage processes, so that the first and every later one begins as the same bare process:
 * without MPI, threads or connections, which the agent has by then. It is forked itself before there are any. When its
 * agent is gone it ends the stage process, removes the temporary files of both, and ends; a stage process dies with its
 * keeper. It has a process group of its own, so that what mpiexec or a terminal sends to the agent's group reaches the
 * agent alone.
 *
 * Calls come from one thread, but poe_keeper_end() from any. */
#ifndef POE_PIPELINE_KEEPER_H
#define POE_PIPELINE_KEEPER_H

#include <stdbool.h>
#include <sys/types.h>

#include "comm/agent/board.h"

typedef struct poe_keeper poe_keeper;

/* The whole of a stage process; returns its exit status. Atexit handlers do not run after it. */
typedef int (*poe_keeper_stage)(poe_board *board, void *arg);

/* Forks the keeper; this process must have one thread. `arg`, and what it points to, is seen by stage processes as it
 * is now; what the board holds, as it is then. POE_FAILED: said. */
poe_status poe_keeper_start(poe_board *board, poe_keeper_stage stage, void *arg, poe_keeper **keeper);
/* Ends keeper and stage process, and frees. NULL is legal. */
void poe_keeper_stop(poe_keeper *keeper);

/* Asks for a stage process; there must be none. Events tell what becomes of it. */
void poe_keeper_spawn(poe_keeper *keeper);
/* Sends a signal to the stage process, if there is one. */
void poe_keeper_signal(poe_keeper *keeper, int number);
/* Signal and thread safe. The stage process gets a SIGTERM, and a moment to remove its temporary files; then it and the
 * keeper are ended. No event tells it. */
void poe_keeper_end(poe_keeper *keeper);

/* For tests of what follows: SIGKILL for the keeper itself. */
void poe_keeper_kill(poe_keeper *keeper);

typedef enum poe_keeper_news {
    POE_KEEPER_STARTED, /* `pid` runs */
    POE_KEEPER_REFUSED, /* it could not be started: `status` is errno */
    POE_KEEPER_ENDED,   /* `pid` has ended: `status` is what waitpid() said */
    POE_KEEPER_LOST,    /* the keeper itself has ended: the same */
} poe_keeper_news;

typedef struct poe_keeper_event {
    poe_keeper_news news;
    pid_t pid;
    int status;
} poe_keeper_event;

/* The next event, if there is one; does not wait. LOST is the last, and comes again. */
bool poe_keeper_next(poe_keeper *keeper, poe_keeper_event *event);
/* Readable when there is an event. */
int poe_keeper_fd(const poe_keeper *keeper);

#endif
