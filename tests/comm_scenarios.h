/* SPDX-License-Identifier: MIT
 * What ranks do with each other in the tests of comm: the same scenarios over every transport. */
#ifndef POE_TESTS_COMM_SCENARIOS_H
#define POE_TESTS_COMM_SCENARIOS_H

#include "comm/comm.h"

typedef struct poe_scenario {
    const char *name;
    int ranks; /* takes part from so many on */
    poe_comm_settings settings;
    bool (*run)(poe_comm *comm); /* one rank's part; true when it is to end in good order */
    int sayer;                   /* the rank that must say ... */
    const char *says;            /* ... this; may be NULL */
} poe_scenario;

extern const poe_scenario poe_scenarios[];
extern const int poe_n_scenarios;

/* Runs `scenario` as the rank of `comm`, with a log of its own, and destroys `comm`. */
struct poe_transport;
void poe_scenario_play(const poe_scenario *scenario, struct poe_transport *transport);

/* Standard error goes to memory between the two; the caller frees the text. */
void poe_capture_begin(void);
char *poe_capture_end(void);

int poe_scenarios_failures(void);

#endif
