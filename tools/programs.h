/* SPDX-License-Identifier: MIT
 * What poe-pipe's commands run: one function each, given checked options, returning the exit status; what failed was
 * said. argv: the process's own, for those that may have to execute the program again (poe_blas_ensure()). */
#ifndef POE_TOOLS_PROGRAMS_H
#define POE_TOOLS_PROGRAMS_H

#include "src/options.h"

int poe_program_generate(char **argv, const poe_options *options);
int poe_program_export(char **argv, const poe_options *options);
int poe_program_inspect(const poe_options *options);
int poe_program_data(const poe_options *options);
int poe_program_plan(char **argv, const poe_options *options);

#endif
