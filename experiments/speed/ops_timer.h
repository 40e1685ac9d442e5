/* SPDX-License-Identifier: MIT
 * A stopwatch for a backend: a table of operations that forwards to the backend's own and keeps, per operation, the
 * calls, their time, and the FLOPs and bytes that they need. Costs a microsecond per call. */
#ifndef POE_EXPERIMENTS_OPS_TIMER_H
#define POE_EXPERIMENTS_OPS_TIMER_H

#include <stdint.h>

#include "stages/ops.h"

typedef struct poe_ops_timer poe_ops_timer;

/* What an operation took since the last reset. FLOPs: what the mathematics needs, a multiply and an add counting two,
 * for the operations that are made of products; 0 for the others. Bytes: every operand read or written once. */
typedef struct poe_ops_timer_row {
    const char *name, *group;
    uint64_t calls;
    double seconds;     /* by the clock */
    double cpu_seconds; /* of all threads together */
    double flops, bytes;
} poe_ops_timer_row;

/* Puts the stopwatch between `backend` (borrowed) and whoever calls it. Operations that no training step uses are
 * passed through untimed. NULL: out of memory. */
poe_ops_timer *poe_ops_timer_attach(poe_backend *backend);
/* Gives the backend its own table back; NULL is legal. */
void poe_ops_timer_detach(poe_ops_timer *timer);

void poe_ops_timer_reset(poe_ops_timer *timer);
/* One row per timed operation, `*count` of them; owned by the timer. */
const poe_ops_timer_row *poe_ops_timer_rows(const poe_ops_timer *timer, size_t *count);

#endif
