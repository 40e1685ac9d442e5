/* SPDX-License-Identifier: MIT
 * From the user's options to what the layers below are made of. */
#ifndef POE_PIPELINE_SETTINGS_H
#define POE_PIPELINE_SETTINGS_H

#include "src/options.h"
#include "stages/model.h"
#include "stages/optimizer.h"

/* Checks and derives the model. `vocab_size`: the resolved one. POE_BAD_INPUT: said. */
poe_status poe_settings_model(const poe_options *options, int vocab_size, poe_model *model);
void poe_settings_optimizer(const poe_options *options, poe_optimizer_config *config);

/* Micro-batches of a step. */
int poe_settings_micro_batches(const poe_options *options);

#endif
