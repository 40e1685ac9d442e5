/* SPDX-License-Identifier: MIT
 * One clock for all ranks. Ranks on one machine have it; where neighbours of the chain 0-1-...-size-1 run on different
 * machines they compare their clocks over a pair of links: the answer to a ping tells the other clock, at some moment
 * between its departure and its return, and of several the one that was back soonest counts. */
#ifndef POE_PIPELINE_CLOCK_H
#define POE_PIPELINE_CLOCK_H

#include "comm/comm.h"

typedef struct poe_clock_reading {
    double at;     /* own clock, seconds */
    double offset; /* to be added to it for the clock of the rank before */
    double error;  /* of the offset, at most */
} poe_clock_reading;

typedef struct poe_clock {
    poe_link *ping_out, *answer_in;  /* with the rank before; NULL: one machine */
    poe_link *ping_in, *answer_out;  /* with the rank after */
    int rank;
} poe_clock;

/* The same on all ranks of a machine until it is started again, and on no other. */
uint64_t poe_clock_machine(void);

/* Collective. */
poe_status poe_clock_open(poe_clock *clock, poe_comm *comm, uint64_t machine, uint64_t run);
void poe_clock_close(poe_clock *clock);
/* Collective. Compares this rank's clock with that of the rank before; rank 0's is the clock. */
poe_status poe_clock_read(poe_clock *clock, poe_clock_reading *reading);

#endif
