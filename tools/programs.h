/* SPDX-License-Identifier: MIT
 * What poe-pipe's commands run: one function each, given checked options, returning a status whose cause was said. */
#ifndef POE_TOOLS_PROGRAMS_H
#define POE_TOOLS_PROGRAMS_H

#include "src/options.h"

poe_status poe_generate(const poe_options *options);
poe_status poe_inspect(const poe_options *options);
poe_status poe_export(const poe_options *options);
poe_status poe_data(const poe_options *options);

#endif
