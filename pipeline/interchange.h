/* SPDX-License-Identifier: MIT
 * Whole models in one safetensors file with nanochat's names (spec 7), to and from the stages of a run. */
#ifndef POE_PIPELINE_INTERCHANGE_H
#define POE_PIPELINE_INTERCHANGE_H

#include "comm/comm.h"
#include "src/safetensors.h"
#include "stages/stage.h"

/* Not collective: every rank reads its own and the shared tensors. A tensor that is missing, superfluous or has
 * another shape than the model's: POE_BAD_INPUT, said. */
poe_status poe_import(const char *path, const poe_model *model, poe_stage *stage);

/* Collective: rank 0 writes `path`; the others send it their stages' tensors piece by piece. Every tensor of the model
 * is in the file, backout_lambda included. */
poe_status poe_export(const char *path, poe_dtype dtype, const poe_model *model, poe_comm *comm, poe_stage *stage,
                      uint64_t run);

#endif
