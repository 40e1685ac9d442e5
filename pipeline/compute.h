/* SPDX-License-Identifier: MIT
 * What a run asks of a stage while it trains, as a table: one row computes (stages/), the other sleeps for as long as
 * --emulate-compute says and leaves zeros. All else of a run is the same under both. */
#ifndef POE_PIPELINE_COMPUTE_H
#define POE_PIPELINE_COMPUTE_H

#include "pipeline/accounts.h"
#include "src/emulation.h"
#include "src/rng.h"
#include "stages/stage.h"

typedef struct poe_compute poe_compute;

/* A stage that does not repeat what it lost (--recover skip), or cannot work (--outage continue). Absent: nothing is
 * computed, what would be written is left as it is, the loss is not a number, and the stage's own tensors stay; the shared
 * ones are updated. Returning: all is computed, the own tensors stay. Present: as before. */
typedef enum poe_attendance { POE_PRESENT, POE_RETURNING, POE_ABSENT } poe_attendance;

/* As the functions of stages/stage.h of these names. */
typedef struct poe_compute_ops {
    void (*forward)(poe_compute *compute, int slot, size_t b, size_t t, const int32_t *idx, const poe_crossing *in,
                    const poe_crossing *out);
    poe_status (*backward)(poe_compute *compute, int slot, const int32_t *targets, int n_micro,
                           const poe_crossing *d_out, const poe_crossing *d_in, double *loss);
    poe_status (*backward_input)(poe_compute *compute, int slot, const int32_t *targets, int n_micro,
                                 const poe_crossing *d_out, const poe_crossing *d_in, double *loss);
    void (*backward_weight)(poe_compute *compute, int slot);
    bool (*gradients_finite)(const poe_compute *compute);
    void (*update_own)(poe_compute *compute, const poe_rates *rates);
    bool (*shared_part_finite)(const poe_compute *compute, poe_shared_part part);
    void (*update_shared_part)(poe_compute *compute, poe_shared_part part, const poe_rates *rates, const float *sum);
    void (*clear_gradients)(poe_compute *compute);
    void (*clear_shared_part)(poe_compute *compute, poe_shared_part part);
} poe_compute_ops;

struct poe_compute {
    const poe_compute_ops *ops;
    poe_stage *stage; /* borrowed */
    const poe_compute_ops *present; /* the row in use but for absences */
    poe_compute_ops absence;        /* that row, but for what is left out */
    poe_attendance attendance;
    /* of the emulated row: */
    poe_accounts *accounts;
    double seconds[POE_EMULATED_COUNT];
    size_t channels, floats; /* C; b t C of the last forward */
    poe_rng rng;     /* of the jitter */
};

/* The row that computes. */
void poe_compute_init(poe_compute *compute, poe_stage *stage);

/* The row that sleeps `seconds` (see src/emulation.h) to absolute deadlines, counted from the moment that the account at
 * hand was entered, and puts zeros where results would be. That account gets exactly the time that was asked for; what
 * waking took longer is POE_ACCOUNT_OTHER. The jitter of a rank depends on `seed`, `rank` and the order of its calls
 * alone. */
void poe_compute_emulate(poe_compute *compute, poe_stage *stage, poe_accounts *accounts,
                         const double seconds[POE_EMULATED_COUNT], int64_t seed, int rank);

void poe_compute_attend(poe_compute *compute, poe_attendance attendance);

#endif
