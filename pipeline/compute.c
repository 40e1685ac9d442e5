/* SPDX-License-Identifier: MIT */
#include "pipeline/compute.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>

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
    *c = (poe_compute){.ops = &computing, .present = &computing, .stage = stage};
}

/* --- the row that sleeps ------------------------------------------------------------------------------------------------------ */

static void sleep_until(double deadline)
{
    double whole = floor(deadline);
    struct timespec t = {.tv_sec = (time_t)whole, .tv_nsec = (long)((deadline - whole) * 1e9)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) != 0)
        ;
}

/* Until `which` is over, which began when its account did. */
static void emulate(poe_compute *c, poe_emulated which)
{
    double nominal = c->seconds[which], jitter = c->seconds[POE_EMULATED_JITTER];
    if (nominal == 0)
        return;
    poe_accounts *a = c->accounts;
    double deadline = a->since + nominal + (jitter > 0 ? jitter * (2 * poe_rng_uniform(&c->rng) - 1) : 0);
    sleep_until(deadline);
    poe_account_enter_at(a, POE_ACCOUNT_OTHER, a->step, a->micro, deadline);
}

/* (n) floats of each of the crossing's members. */
static void put_zeros(const poe_crossing *crossing, size_t n)
{
    float *const members[] = {crossing ? crossing->h : NULL, crossing ? crossing->x0 : NULL, crossing ? crossing->mid : NULL};
    for (int i = 0; i < 3; i++)
        if (members[i])
            memset(members[i], 0, n * sizeof(float));
}

static void emulated_forward(poe_compute *c, int slot, size_t b, size_t t, const int32_t *idx, const poe_crossing *in,
                             const poe_crossing *out)
{
    (void)slot, (void)idx, (void)in;
    c->floats = b * t * c->channels;
    put_zeros(out, c->floats);
    emulate(c, POE_EMULATED_FORWARD);
}

static void emulate_backward(poe_compute *c, poe_emulated which, const poe_crossing *d_in, double *loss)
{
    put_zeros(d_in, c->floats);
    *loss = 0;
    emulate(c, which);
}

static poe_status emulated_backward(poe_compute *c, int slot, const int32_t *targets, int n_micro,
                                    const poe_crossing *d_out, const poe_crossing *d_in, double *loss)
{
    (void)slot, (void)targets, (void)n_micro, (void)d_out;
    emulate_backward(c, POE_EMULATED_BACKWARD, d_in, loss);
    return POE_OK;
}

static poe_status emulated_backward_input(poe_compute *c, int slot, const int32_t *targets, int n_micro,
                                          const poe_crossing *d_out, const poe_crossing *d_in, double *loss)
{
    (void)slot, (void)targets, (void)n_micro, (void)d_out;
    emulate_backward(c, POE_EMULATED_BACKWARD_INPUT, d_in, loss);
    return POE_OK;
}

static void emulated_backward_weight(poe_compute *c, int slot)
{
    (void)slot;
    emulate(c, POE_EMULATED_BACKWARD_WEIGHT);
}

static bool emulated_gradients_finite(const poe_compute *c)
{
    (void)c;
    return true;
}

static void emulated_update_own(poe_compute *c, const poe_rates *rates)
{
    (void)rates;
    poe_accounts *a = c->accounts;
    poe_account_enter(a, POE_ACCOUNT_OPTIMIZER, a->step, a->micro);
    emulate(c, POE_EMULATED_OPTIMIZER);
    poe_account_enter(a, POE_ACCOUNT_OPTIMIZER, a->step, a->micro);
}

static bool emulated_part_finite(const poe_compute *c, poe_shared_part part)
{
    (void)c, (void)part;
    return true;
}

static void emulated_update_part(poe_compute *c, poe_shared_part part, const poe_rates *rates, const float *sum)
{
    (void)c, (void)part, (void)rates, (void)sum;
}

/* Nothing was ever added to them. */
static void emulated_clear(poe_compute *c)
{
    (void)c;
}

static void emulated_clear_part(poe_compute *c, poe_shared_part part)
{
    (void)c, (void)part;
}

static const poe_compute_ops emulating = {
    .forward = emulated_forward,
    .backward = emulated_backward,
    .backward_input = emulated_backward_input,
    .backward_weight = emulated_backward_weight,
    .gradients_finite = emulated_gradients_finite,
    .update_own = emulated_update_own,
    .shared_part_finite = emulated_part_finite,
    .update_shared_part = emulated_update_part,
    .clear_gradients = emulated_clear,
    .clear_shared_part = emulated_clear_part,
};

void poe_compute_emulate(poe_compute *c, poe_stage *stage, poe_accounts *accounts,
                         const double seconds[POE_EMULATED_COUNT], int64_t seed, int rank)
{
    char stream[32];
    *c = (poe_compute){.ops = &emulating,
                       .present = &emulating,
                       .stage = stage,
                       .accounts = accounts,
                       .channels = (size_t)poe_stage_model(stage)->config.n_embd};
    memcpy(c->seconds, seconds, sizeof(c->seconds));
    snprintf(stream, sizeof(stream), "emulated rank %d", rank);
    poe_rng_init(&c->rng, (uint64_t)seed, stream);
    prctl(PR_SET_TIMERSLACK, 1UL); /* of this thread: the rank's */
}

/* --- absences ------------------------------------------------------------------------------------------------------------------ */

static void no_forward(poe_compute *c, int slot, size_t b, size_t t, const int32_t *idx, const poe_crossing *in,
                       const poe_crossing *out)
{
    (void)c, (void)slot, (void)b, (void)t, (void)idx, (void)in, (void)out;
}

static poe_status no_backward(poe_compute *c, int slot, const int32_t *targets, int n_micro, const poe_crossing *d_out,
                              const poe_crossing *d_in, double *loss)
{
    (void)c, (void)slot, (void)targets, (void)n_micro, (void)d_out, (void)d_in;
    *loss = NAN;
    return POE_OK;
}

static void no_update(poe_compute *c, const poe_rates *rates)
{
    (void)c, (void)rates;
}

/* Only poe's row is needed: where gradients flow back, nobody can be absent. */
void poe_compute_attend(poe_compute *c, poe_attendance attendance)
{
    c->ops = c->present;
    c->attendance = attendance;
    if (attendance == POE_PRESENT)
        return;
    c->absence = *c->present;
    c->absence.update_own = no_update;
    if (attendance == POE_ABSENT) {
        c->absence.forward = no_forward;
        c->absence.backward = no_backward;
    }
    c->ops = &c->absence;
}
