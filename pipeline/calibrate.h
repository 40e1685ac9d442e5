/* SPDX-License-Identifier: MIT
 * How fast this machine computes the parts that stages are made of, and moves messages between two ranks of a process:
 * measured on the real kernels and links within a few seconds, for poe-pipe plan. */
#ifndef POE_PIPELINE_CALIBRATE_H
#define POE_PIPELINE_CALIBRATE_H

#include "src/options.h"
#include "stages/model.h"

/* Seconds of one micro-batch. */
typedef struct poe_part_time {
    double forward, backward;
} poe_part_time;

typedef struct poe_calibration {
    poe_part_time embedding;    /* x0 from tokens */
    poe_part_time head;         /* loss and both gradients: backward */
    poe_part_time layers[2][2]; /* [has a value embedding][attention's window is the whole sequence] */
    double muon;                /* seconds per floating-point operation of an update, poe_muon_flops() */
    double adamw;               /* seconds per parameter of an update */
    double latency, bandwidth;  /* of one message: seconds, and bytes per second beyond */
    size_t rows, positions;     /* of the micro-batch that was timed */
    int narrower;               /* and what the model's widths were divided by: for large models, then scaled by the
                                 * arithmetic that is left out */
    int threads;
    double seconds;             /* that it took */
} poe_calibration;

/* Of Muon on one matrix: five iterations of three products of its smaller side. */
double poe_muon_flops(size_t rows, size_t cols);

/* Takes at most about 10 s, whatever the size; memory of three layers, embedding and head. `threads` of one rank. The
 * OpenBLAS kernels must be the right ones (poe_blas_ensure()). POE_BAD_INPUT, POE_FAILED: said. */
poe_status poe_calibrate(const poe_options *options, const poe_model *model, int threads, poe_calibration *calibration);

#endif
