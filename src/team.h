/* SPDX-License-Identifier: MIT
 * A persistent team of threads that one rank's kernels share. Work comes as numbered tasks whose number and content
 * depend on the problem alone, never on the number of threads, so that results do not either. */
#ifndef POE_SRC_TEAM_H
#define POE_SRC_TEAM_H

#include <stddef.h>

#include "src/status.h"

typedef struct poe_team poe_team;

/* `thread` is in 0..poe_team_size()-1: for scratch memory, never for choosing what to compute. */
typedef void (*poe_team_task)(void *arg, size_t task, int thread);

/* A team of `n_threads` >= 1, the caller of poe_team_run() being one of them. POE_FAILED: said. */
poe_status poe_team_create(int n_threads, poe_team **team);
void poe_team_destroy(poe_team *team); /* NULL is legal */
int poe_team_size(const poe_team *team);

/* Runs task(arg, 0..n_tasks-1, thread) in any order and returns when all are done. Not reentrant: one caller at a
 * time, no task starts another run. Idle threads sleep. */
void poe_team_run(poe_team *team, size_t n_tasks, poe_team_task task, void *arg);

#endif
