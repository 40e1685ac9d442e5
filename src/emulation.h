/* SPDX-License-Identifier: MIT
 * What --emulate-compute says: how long every stage's work is to take. Written as NAME=TIME,... for all stages, or
 * STAGE:NAME=TIME,... or FIRST-LAST:NAME=TIME,... for some, separated by semicolons; later ones win. */
#ifndef POE_SRC_EMULATION_H
#define POE_SRC_EMULATION_H

#include "src/options.h"

typedef enum poe_emulated {
    POE_EMULATED_FORWARD,         /* of a micro-batch */
    POE_EMULATED_BACKWARD,        /* likewise, whole */
    POE_EMULATED_BACKWARD_INPUT,  /* its two halves under zero bubble; half of the whole each unless given */
    POE_EMULATED_BACKWARD_WEIGHT,
    POE_EMULATED_OPTIMIZER,       /* all updates of a step; 0 unless given */
    POE_EMULATED_JITTER,          /* each of the above is longer or shorter by up to that; 0 unless given */
    POE_EMULATED_COUNT,
} poe_emulated;

typedef struct poe_emulation {
    double seconds[POE_OPTION_STAGES][POE_EMULATED_COUNT];
} poe_emulation;

/* POE_BAD_INPUT: said. */
poe_status poe_emulation_parse(const char *text, int n_stages, poe_emulation *emulation);

#endif
