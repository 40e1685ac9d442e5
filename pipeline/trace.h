/* SPDX-License-Identifier: MIT
 * What every rank did when (--trace), as one file of the Trace Event format (chrome://tracing, ui.perfetto.dev): a row per
 * rank, a slice for every stretch of time in one account, an arrow for every message of a link. Each rank keeps its
 * events until the end of the run; rank 0 writes them, all on its clock. */
#ifndef POE_PIPELINE_TRACE_H
#define POE_PIPELINE_TRACE_H

#include "pipeline/accounts.h"
#include "pipeline/clock.h"

enum { POE_TRACE_EVENTS = 131072 }; /* that a rank keeps: 5 MiB; about ten per micro-batch */

typedef struct poe_trace poe_trace;

/* Collective: compares the ranks' clocks, see pipeline/clock.h for `machine`. After `events` events on any rank the trace
 * of all ends. `comm` is borrowed. */
poe_status poe_trace_create(poe_comm *comm, uint64_t run, uint64_t machine, size_t events, poe_trace **trace);
void poe_trace_destroy(poe_trace *trace); /* NULL is legal */

/* Not collective; by the rank's own thread. Times are poe_now()'s. */
void poe_trace_slice(poe_trace *trace, poe_account account, int64_t step, int micro, double from, double to);
void poe_trace_message(poe_trace *trace, bool sent, int peer, int channel, const poe_message *message, double at);

/* Collective, once: compares the clocks again, brings every rank's events to rank 0, which writes `path`. POE_FAILED on
 * all ranks: said. `emulated` (may be NULL): what of the run is. */
poe_status poe_trace_write(poe_trace *trace, const char *emulated, const char *path);

#endif
