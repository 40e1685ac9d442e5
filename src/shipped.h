/* SPDX-License-Identifier: MIT
 * Files that come with the program. */
#ifndef POE_SRC_SHIPPED_H
#define POE_SRC_SHIPPED_H

#include "src/files.h"

/* The text that is trained on when none is given: share/poe-pipe/ of the installation, or data/ of the source folder
 * that this program was built in. POE_BAD_INPUT, said: it is in neither place. */
poe_status poe_shipped_text(char path[POE_PATH_MAX]);

#endif
