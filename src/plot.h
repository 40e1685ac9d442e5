/* SPDX-License-Identifier: MIT
 * Pictures by gnuplot, as its own process. */
#ifndef POE_SRC_PLOT_H
#define POE_SRC_PLOT_H

#include "src/status.h"

/* Draws the loss of every stage over steps, and where there are evaluations the BPB of every prefix, from a run's
 * metrics.jsonl into a PNG (1200x675). POE_FAILED (said as a warning: a missing gnuplot is no failure of a run). */
poe_status poe_plot_run(const char *metrics_path, const char *png_path);

#endif
