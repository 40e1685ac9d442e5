/* SPDX-License-Identifier: MIT */
#include "pipeline/shared.h"

#include <stdlib.h>
#include <string.h>

#include "pipeline/streams.h"
#include "src/log.h"

/* Vectors beside the stage's own gradients: a ring of D + 1 under stale:D, the held sum under every:N. */
static int n_slots(int delay, int every)
{
    return delay ? delay + 1 : every ? 1 : 0;
}

size_t poe_shared_bytes(const poe_shared_settings *settings, size_t floats)
{
    return (size_t)n_slots(settings->delay, settings->every) * poe_arena_round(floats * sizeof(float));
}

static poe_status take_slots(poe_shared_rule *r, size_t bytes)
{
    int n = n_slots(r->delay, r->every);
    r->slots = calloc((size_t)n + 1, sizeof(*r->slots));
    if (!r->slots) {
        poe_error("out of memory for the shared gradients of %d steps", n);
        return POE_FAILED;
    }
    poe_status status = poe_arena_create(&r->arena, "shared gradients under way", bytes);
    for (int i = 0; status == POE_OK && i < n; i++)
        r->slots[i] = poe_arena_take(&r->arena, r->floats * sizeof(float));
    return status;
}

poe_status poe_shared_open(poe_shared_rule *r, poe_comm *comm, poe_compute *compute, const poe_model *model,
                           const poe_optimizer_config *optimizer, const poe_shared_settings *settings, int64_t first)
{
    size_t floats = poe_stage_shared_table(compute->stage)->floats;
    *r = (poe_shared_rule){.delay = floats ? settings->delay : 0,
                           .every = floats ? settings->every : 0,
                           .n_steps = settings->n_steps,
                           .stage = compute->stage,
                           .compute = compute,
                           .model = model,
                           .optimizer = optimizer,
                           .floats = floats,
                           .oldest = first,
                           .next = first,
                           .arrived = first};
    poe_status status = take_slots(r, poe_shared_bytes(settings, r->floats));
    if (status == POE_OK && floats) {
        poe_reduce_settings reduce = {.name = "shared gradients",
                                      .ranks = settings->ranks,
                                      .n_ranks = settings->n_ranks,
                                      .channel = POE_CHANNEL_SHARED,
                                      .count = r->floats,
                                      .slots = settings->delay + 1,
                                      .run = settings->run};
        status = poe_reduce_open(comm, &reduce, &r->reduce);
    }
    if (status != POE_OK)
        poe_shared_close(r);
    return status;
}

void poe_shared_close(poe_shared_rule *r)
{
    poe_reduce_close(r->reduce);
    poe_arena_destroy(&r->arena);
    free(r->slots);
    *r = (poe_shared_rule){0};
}

static float *slot_of(const poe_shared_rule *r, int64_t step)
{
    return r->slots[step % n_slots(r->delay, r->every)];
}

static void apply(poe_shared_rule *r, int64_t step, const float *sum)
{
    poe_rates rates;
    poe_rates_at(r->model, r->optimizer, (int)step, &rates);
    r->compute->ops->update_shared(r->compute, &rates, sum);
}

static poe_status wait_for(poe_shared_rule *r, int64_t step)
{
    if (step < r->arrived)
        return POE_OK;
    poe_status status = poe_reduce_end(r->reduce, step);
    if (status == POE_OK)
        r->arrived = step + 1;
    return status;
}

static void update_own(poe_shared_rule *r, int64_t step)
{
    poe_rates rates;
    poe_rates_at(r->model, r->optimizer, (int)step, &rates);
    r->compute->ops->update_own(r->compute, &rates);
    r->compute->ops->clear_gradients(r->compute);
}

static poe_status apply_oldest(poe_shared_rule *r)
{
    poe_status status = wait_for(r, r->oldest);
    if (status != POE_OK)
        return status;
    apply(r, r->oldest, slot_of(r, r->oldest));
    r->oldest++;
    return POE_OK;
}

/* The gradients leave in a slot of their own, and the next step may begin before their sum is there. */
static poe_status step_stale(poe_shared_rule *r, int64_t step)
{
    float *slot = slot_of(r, step);
    memcpy(slot, poe_stage_shared_gradients(r->stage), r->floats * sizeof(float));
    poe_status status = poe_reduce_begin(r->reduce, step, slot);
    if (status != POE_OK)
        return status;
    update_own(r, step);
    r->compute->ops->clear_shared_gradients(r->compute);
    return step - r->oldest == r->delay ? apply_oldest(r) : POE_OK;
}

/* Sums `vector`, which covers `steps` steps, in place and applies its mean. */
static poe_status sum_and_apply(poe_shared_rule *r, int64_t step, float *vector, int steps, bool update_meanwhile)
{
    poe_status status = poe_reduce_begin(r->reduce, step, vector);
    if (status != POE_OK)
        return status;
    if (update_meanwhile)
        update_own(r, step);
    status = poe_reduce_end(r->reduce, step);
    if (status != POE_OK)
        return status;
    for (size_t i = 0; steps > 1 && i < r->floats; i++)
        vector[i] /= (float)steps;
    apply(r, step, vector);
    return POE_OK;
}

/* A per-stage head's own update reads the shared head's gradient, so it comes before the sum overwrites it; otherwise
 * it runs while the sum is under way. */
static poe_status step_exact(poe_shared_rule *r, int64_t step)
{
    bool own_first = r->model->config.head == POE_HEAD_PER_STAGE;
    if (own_first)
        update_own(r, step);
    poe_status status = sum_and_apply(r, step, poe_stage_shared_gradients(r->stage), 1, !own_first);
    if (status == POE_OK)
        r->compute->ops->clear_shared_gradients(r->compute);
    return status;
}

static poe_status step_every(poe_shared_rule *r, int64_t step)
{
    const float *gradients = poe_stage_shared_gradients(r->stage);
    float *held = r->slots[0];
    for (size_t i = 0; i < r->floats; i++)
        held[i] += gradients[i];
    r->held_steps++;
    update_own(r, step);
    r->compute->ops->clear_shared_gradients(r->compute);
    if ((step + 1) % r->every != 0 && step + 1 != r->n_steps)
        return POE_OK;
    poe_status status = sum_and_apply(r, step, held, r->held_steps, false);
    memset(held, 0, r->floats * sizeof(float));
    r->held_steps = 0;
    return status;
}

poe_status poe_shared_step(poe_shared_rule *r, int64_t step)
{
    r->next = step + 1;
    if (!r->floats) {
        update_own(r, step);
        return POE_OK;
    }
    if (r->delay)
        return step_stale(r, step);
    return r->every ? step_every(r, step) : step_exact(r, step);
}

poe_status poe_shared_finish(poe_shared_rule *r)
{
    poe_status status = POE_OK;
    while (status == POE_OK && r->delay && r->oldest < r->next)
        status = apply_oldest(r);
    return status;
}

/* Where the pending totals of steps oldest..next-1 and the held sum are. */
static void describe(poe_shared_rule *r, poe_pending *pending)
{
    pending->floats = r->floats;
    pending->held_steps = r->held_steps;
    pending->held = r->every ? r->slots[0] : NULL;
    pending->n_totals = 0;
    for (int64_t step = r->oldest; r->delay && step < r->next; step++) {
        pending->total_steps[pending->n_totals] = step;
        pending->totals[pending->n_totals++] = slot_of(r, step);
    }
}

poe_status poe_shared_pending(poe_shared_rule *r, poe_pending *pending)
{
    poe_status status = POE_OK;
    for (int64_t step = r->oldest; status == POE_OK && r->delay && step < r->next; step++)
        status = wait_for(r, step);
    if (status == POE_OK)
        describe(r, pending);
    return status;
}

void poe_shared_restore(poe_shared_rule *r, int n_totals, int held_steps, poe_pending *pending)
{
    r->oldest = r->next - n_totals;
    r->held_steps = held_steps;
    describe(r, pending);
}
