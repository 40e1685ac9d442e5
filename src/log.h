/* SPDX-License-Identifier: MIT
 * Messages for people, on standard error. A rank is a process under mpiexec and a thread in one process, so each
 * rank's main thread owns a context; helper threads of the same rank attach to it. Thread-safe. */
#ifndef POE_SRC_LOG_H
#define POE_SRC_LOG_H

#include <stdbool.h>

typedef struct poe_log poe_log;

/* A context for `rank` of `size`; messages name the rank when size > 1. NULL when out of memory. */
poe_log *poe_log_create(int rank, int size);
void poe_log_destroy(poe_log *log); /* NULL is legal; no thread may still be attached */

/* The calling thread speaks for `log` from now on; NULL detaches it. A thread without one speaks for nobody. */
void poe_log_attach(poe_log *log);
poe_log *poe_log_current(void);

/* While held, the first error sentence is kept instead of printed, so that ranks can agree on who speaks. Holds nest. */
void poe_log_hold(void);
/* Prints (`print` true) or drops the held sentence, and ends the innermost hold. */
void poe_log_settle(bool print);
/* Drops the held sentence; the hold goes on. */
void poe_log_drop(void);

/* poe_error: the one sentence that explains a failure. poe_warn: something the user should know. poe_info: a
 * fact. No trailing newline. */
void poe_error(const char *format, ...) __attribute__((format(printf, 1, 2)));
void poe_warn(const char *format, ...) __attribute__((format(printf, 1, 2)));
void poe_info(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
