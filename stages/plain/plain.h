/* SPDX-License-Identifier: MIT
 * The reference backend: every operation as its formula says, in plain loops on one thread, each sum in double
 * precision. For tests; no speed is wanted here. */
#ifndef POE_STAGES_PLAIN_PLAIN_H
#define POE_STAGES_PLAIN_PLAIN_H

#include "stages/ops.h"

/* POE_FAILED: said. */
poe_status poe_plain_create(const poe_backend_limits *limits, poe_backend **backend);
void poe_plain_destroy(poe_backend *backend); /* NULL is legal */

#endif
