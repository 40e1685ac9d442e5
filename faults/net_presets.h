/* SPDX-License-Identifier: MIT
 * Networks by name. Private to faults/. Sources and assumptions: docs/networks.md. */
#ifndef POE_FAULTS_NET_PRESETS_H
#define POE_FAULTS_NET_PRESETS_H

#include "faults/net.h"

/* "same-rack, same-zone, ..." */
extern const char poe_net_preset_names[];

/* Index of a preset, -1 when there is none of that name. */
int poe_net_preset_find(const char *name);

/* Sets delay, jitter, bandwidth and loss as the preset has them from one rank to another. */
void poe_net_preset_apply(int preset, int from, int to, poe_net_link *link);

#endif
