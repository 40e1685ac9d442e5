/* SPDX-License-Identifier: MIT
 * poe-pipe without a command: training, evaluation and the dry run, on this process's rank or on all of them. */
#ifndef POE_TOOLS_TRAIN_H
#define POE_TOOLS_TRAIN_H

#include "src/options.h"

/* Returns the exit status. `options` is borrowed. `parse_status`: under mpiexec, flags that were refused come here too,
 * their sentence held (poe_log_hold()), so that ranks agree on who says it. */
int poe_train_main(int argc, char **argv, poe_options *options, poe_status parse_status);

#endif
