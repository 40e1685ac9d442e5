/* SPDX-License-Identifier: MIT */
#include "pipeline/compute.h"

/* --- the row that computes ---------------------------------------------------------------------------------------------------- */

static void forward(poe_compute *c, int slot, size_t b, size_t t, const int32_t *idx, const poe_crossing *in,
                    const poe_crossing *out)
{
    poe_stage_forward(c->stage, slot, b, t, idx, in, out);
}

static poe_status backward(poe_compute *c, int slot, const int32_t *targets, int n_micro, const poe_crossing *d_out,
                           const poe_crossing *d_in, double *loss)
{
    return poe_stage_backward(c->stage, slot, targets, n_micro, d_out, d_in, loss);
}

static poe_status backward_input(poe_compute *c, int slot, const int32_t *targets, int n_micro,
                                 const poe_crossing *d_out, const poe_crossing *d_in, double *loss)
{
    return poe_stage_backward_input(c->stage, slot, targets, n_micro, d_out, d_in, loss);
}

static void backward_weight(poe_compute *c, int slot)
{
    poe_stage_backward_weight(c->stage, slot);
}

static bool gradients_finite(const poe_compute *c)
{
    return poe_stage_gradients_finite(c->stage);
}

static void update_own(poe_compute *c, const poe_rates *rates)
{
    poe_stage_update_own(c->stage, rates);
}

static bool shared_part_finite(const poe_compute *c, poe_shared_part part)
{
    return poe_stage_shared_part_finite(c->stage, part);
}

static void update_shared_part(poe_compute *c, poe_shared_part part, const poe_rates *rates, const float *sum)
{
    poe_stage_update_shared_part(c->stage, part, rates, sum);
}

static void clear_gradients(poe_compute *c)
{
    poe_stage_clear_gradients(c->stage);
}

static void clear_shared_part(poe_compute *c, poe_shared_part part)
{
    poe_stage_clear_shared_part(c->stage, part);
}

static const poe_compute_ops computing = {
    .forward = forward,
    .backward = backward,
    .backward_input = backward_input,
    .backward_weight = backward_weight,
    .gradients_finite = gradients_finite,
    .update_own = update_own,
    .shared_part_finite = shared_part_finite,
    .update_shared_part = update_shared_part,
    .clear_gradients = clear_gradients,
    .clear_shared_part = clear_shared_part,
};

void poe_compute_init(poe_compute *c, poe_stage *stage)
{
    *c = (poe_compute){.ops = &computing, .stage = stage};
}
