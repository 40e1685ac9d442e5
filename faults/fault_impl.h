/* SPDX-License-Identifier: MIT
 * Private to faults/fault_*.c: rules, and where a rank stands with them. */
#ifndef POE_FAULTS_FAULT_IMPL_H
#define POE_FAULTS_FAULT_IMPL_H

#include <stdio.h>

#include "comm/agent/board.h"
#include "faults/fault.h"
#include "src/moment.h"
#include "src/rng.h"

enum { POE_FAULT_RULE_BYTES = 1024 }; /* of a rule as text */

typedef enum poe_fault_kind {
    POE_FAULT_KILL,
    POE_FAULT_SEGFAULT,
    POE_FAULT_EXIT,
    POE_FAULT_STOP,
    POE_FAULT_SLOW,
    POE_FAULT_MEMORY,
    POE_FAULT_DISK,
    POE_FAULT_NAN,
    POE_FAULT_CORRUPT,
    POE_FAULT_CUT,
    POE_FAULT_PARTITION,
    POE_FAULT_CORRUPT_CHECKPOINT,
    POE_FAULT_KILL_AGENT,
    POE_FAULT_KILL_KEEPER,
    POE_FAULT_ABSENT,
    POE_FAULT_RANDOM, /* draws the others */
    POE_FAULT_KINDS,
} poe_fault_kind;

/* Keys of a rule, one bit each. */
typedef enum poe_fault_key {
    POE_FAULT_KEY_RANK = 1 << 0,
    POE_FAULT_KEY_STEP = 1 << 1,
    POE_FAULT_KEY_MICRO = 1 << 2,
    POE_FAULT_KEY_PHASE = 1 << 3,
    POE_FAULT_KEY_TIMES = 1 << 4,
    POE_FAULT_KEY_FOR = 1 << 5,
    POE_FAULT_KEY_DUTY = 1 << 6,
    POE_FAULT_KEY_CODE = 1 << 7,
    POE_FAULT_KEY_CAP = 1 << 8,
    POE_FAULT_KEY_TO = 1 << 9,
    POE_FAULT_KEY_RANKS = 1 << 10,
    POE_FAULT_KEY_MTBF = 1 << 11,
    POE_FAULT_KEY_SEED = 1 << 12,
    POE_FAULT_KEY_KINDS = 1 << 13,
    POE_FAULT_KEY_LIFE = 1 << 14,
    POE_FAULT_KEY_STEPS = 1 << 15,
} poe_fault_key;

typedef struct poe_fault_traits {
    const char *name;
    unsigned needs, takes; /* poe_fault_key bits; what is needed is also taken */
    bool agent;            /* only an agent can do it */
} poe_fault_traits;
extern const poe_fault_traits poe_fault_kinds[POE_FAULT_KINDS];

typedef struct poe_fault_rule {
    poe_fault_kind kind;
    int rank; /* -1: every rank */
    int64_t step;
    int micro, phase;            /* -1: any */
    int64_t times, life;         /* life: number of the stage process, from 1; 0: any */
    double duration;             /* seconds */
    int64_t steps;               /* instead of it; 0: not given */
    double duty;                 /* share of the time that is left */
    int code;                    /* exit status */
    uint64_t cap;                /* bytes that are taken at most */
    int to;                      /* peer */
    bool ranks[POE_BOARD_RANKS]; /* one side of a partition; whom a random rule strikes */
    /* of a random rule */
    double mtbf;
    uint64_t seed;
    unsigned kinds; /* bit 1 << poe_fault_kind */
} poe_fault_rule;

/* A failure that a random rule has drawn. */
typedef struct poe_fault_event {
    double at; /* seconds since training began */
    poe_fault_kind kind;
    int rank, to;
} poe_fault_event;

/* All failures of the job in order of time, the same for every rank. */
typedef struct poe_fault_sequence {
    poe_rng rng;
    poe_fault_event next;
} poe_fault_sequence;

/* Where a rank stands; its own thread's. */
typedef struct poe_fault_state {
    const poe_fault_plan *plan;
    int rank;
    int64_t life;
    poe_board *board; /* may be NULL */
    poe_fault_hooks hooks;
    atomic_uint *fired;     /* the board's, or `own_fired` */
    _Atomic int64_t *start; /* likewise */
    atomic_uint own_fired[POE_BOARD_FAULTS];
    _Atomic int64_t own_start;
    poe_fault_sequence sequences[POE_BOARD_FAULTS]; /* of the random rules; at the rank's next failure */
    double slow_until, slow_since, duty;            /* slow_until 0: at full speed */
} poe_fault_state;

struct poe_fault_plan {
    int size, n_rules;
    poe_fault_rule rules[POE_BOARD_FAULTS];
    poe_fault_state *states; /* (size) */
};

/* A rule as it is before anything is said of it. */
poe_fault_rule poe_fault_rule_default(poe_fault_kind kind);
/* In the syntax of --fault. */
void poe_fault_rule_print(const poe_fault_rule *rule, char text[POE_FAULT_RULE_BYTES]);

/* The first failure of all. */
void poe_fault_sequence_begin(const poe_fault_rule *rule, int size, poe_fault_sequence *sequence);
void poe_fault_sequence_step(const poe_fault_rule *rule, int size, poe_fault_sequence *sequence);
bool poe_fault_event_concerns(const poe_fault_event *event, int rank);

/* Does what `rule`, the plan's number `index`, says to this rank, now. Rules of a random rule's making have `index` -1.
 */
void poe_fault_strike(poe_fault_state *state, const poe_fault_rule *rule, int index);

/* A request on a board. `argument`: a peer; or of a partition the number of the rule that has its sides, or
 * POE_FAULT_ALONE + the one rank on one side. */
enum { POE_FAULT_ALONE = 0x8000 };
typedef struct poe_fault_request {
    poe_fault_kind kind;
    int argument;
    double seconds; /* rounded to microseconds, at most 4294 s */
} poe_fault_request;
uint64_t poe_fault_request_encode(poe_fault_request request); /* never 0 */
poe_fault_request poe_fault_request_decode(uint64_t word);
/* Leaves a request for the agent and waits until it is carried out. False: the agent does not answer. */
bool poe_fault_ask(poe_fault_state *state, poe_fault_request request);

#endif
