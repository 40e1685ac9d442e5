/* SPDX-License-Identifier: MIT */
#include "pipeline/shared.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "comm/agent/board.h"
#include "pipeline/streams.h"
#include "src/log.h"
#include "src/moment.h"

/* --- memory ----------------------------------------------------------------------------------------------------------------- */

/* Vectors beside the stage's own gradients: a ring of D + 1 under stale:D, the held sum under every:N. */
static int n_slots(int delay, int every)
{
    return delay ? delay + 1 : every ? 1 : 0;
}

/* Under exact a total replaces the gradients, except where a stage's own head is still to be updated with them. */
static size_t head_total_floats(const poe_shared_settings *settings, const poe_model *model,
                                const poe_tensor_table *table)
{
    bool exact = !settings->delay && !settings->every;
    bool apart = exact && model->config.head == POE_HEAD_PER_STAGE && settings->n_ranks > 1;
    return apart ? poe_stage_shared_extent(table, POE_SHARED_HEAD).floats : 0;
}

size_t poe_shared_bytes(const poe_shared_settings *settings, const poe_model *model, const poe_tensor_table *table)
{
    size_t slots = (size_t)n_slots(settings->delay, settings->every);
    return slots * poe_arena_round(table->floats * sizeof(float)) +
           poe_arena_round(head_total_floats(settings, model, table) * sizeof(float));
}

static poe_status take_memory(poe_shared_rule *r, const poe_shared_settings *settings)
{
    const poe_tensor_table *table = poe_stage_shared_table(r->stage);
    int n = n_slots(r->delay, r->every);
    size_t total = head_total_floats(settings, r->model, table);
    r->slots = calloc((size_t)n + 1, sizeof(*r->slots));
    if (!r->slots) {
        poe_error("out of memory for the shared gradients of %d steps", n);
        return POE_FAILED;
    }
    poe_status status =
        poe_arena_create(&r->arena, "shared gradients under way", poe_shared_bytes(settings, r->model, table));
    for (int i = 0; status == POE_OK && i < n; i++)
        r->slots[i] = poe_arena_take(&r->arena, r->floats * sizeof(float));
    if (status == POE_OK && total)
        r->head_total = poe_arena_take(&r->arena, total * sizeof(float));
    return status;
}

/* --- opening ---------------------------------------------------------------------------------------------------------------- */

static poe_status open_part(poe_shared_rule *r, poe_comm *comm, const poe_shared_settings *settings, poe_shared_part p)
{
    static const poe_channel channels[] = {[POE_SHARED_HEAD] = POE_CHANNEL_SHARED_HEAD,
                                           [POE_SHARED_WTE] = POE_CHANNEL_SHARED,
                                           [POE_SHARED_SMEAR] = POE_CHANNEL_SHARED_SMEAR};
    const poe_tensor_table *table = poe_stage_shared_table(r->stage);
    poe_part_sum *part = &r->parts[p];
    part->at = poe_stage_shared_extent(table, p);
    if (!part->at.n_rows)
        return POE_OK;
    bool sparse = settings->sparse && p == POE_SHARED_WTE; /* a step reads, and learns in, some rows */
    poe_reduce_settings reduce = {.name = poe_channel_name(channels[p]),
                                  .ranks = settings->ranks,
                                  .n_ranks = settings->n_ranks,
                                  .channel = (int)channels[p],
                                  .count = part->at.floats,
                                  .width = sparse ? table->rows[part->at.first_row].cols : 0,
                                  .wire = settings->wire,
                                  .slots = r->delay + 1,
                                  .run = settings->run};
    return poe_reduce_open(comm, &reduce, &part->reduce);
}

static void restart(poe_shared_rule *r, int64_t due)
{
    r->due = r->counted = due;
    for (poe_shared_part p = 0; p < POE_SHARED_PARTS; p++) {
        r->parts[p].applied = due;
        r->parts[p].left = r->parts[p].arrived = r->next;
    }
}

static void on_head_gradient(void *rule);

poe_status poe_shared_open(poe_shared_rule *r, poe_comm *comm, poe_compute *compute, const poe_model *model,
                           const poe_optimizer_config *optimizer, const poe_shared_settings *settings, int64_t first)
{
    size_t floats = poe_stage_shared_table(compute->stage)->floats;
    *r = (poe_shared_rule){.delay = floats ? settings->delay : 0,
                           .every = floats ? settings->every : 0,
                           .n_steps = settings->n_steps,
                           .board = poe_comm_board(comm),
                           .stage = compute->stage,
                           .compute = compute,
                           .model = model,
                           .optimizer = optimizer,
                           .floats = floats,
                           .next = first,
                           .departing = -1};
    poe_status status = take_memory(r, settings);
    for (poe_shared_part p = 0; status == POE_OK && p < POE_SHARED_PARTS; p++)
        status = open_part(r, comm, settings, p);
    restart(r, first);
    poe_stage_on_head_gradient(r->stage, on_head_gradient, r);
    if (status != POE_OK)
        poe_shared_close(r);
    return status;
}

void poe_shared_close(poe_shared_rule *r)
{
    poe_stage_on_head_gradient(r->stage, NULL, NULL);
    for (poe_shared_part p = 0; p < POE_SHARED_PARTS; p++)
        poe_reduce_close(r->parts[p].reduce);
    poe_arena_destroy(&r->arena);
    free(r->slots);
    *r = (poe_shared_rule){0};
}

/* --- sums --------------------------------------------------------------------------------------------------------------------- */

static bool is_exact(const poe_shared_rule *r)
{
    return !r->delay && !r->every;
}

/* Whether the gradients of `step`, and under every:N those held before it, are summed after it. */
static bool sums_after(const poe_shared_rule *r, int64_t step)
{
    return !r->every || (step + 1) % r->every == 0 || step + 1 == r->n_steps;
}

static float *gradients_of(const poe_shared_rule *r, poe_shared_part p)
{
    return poe_stage_shared_gradients(r->stage) + r->parts[p].at.offset;
}

/* Where the part's sum of `step` is made. */
static float *sum_of(const poe_shared_rule *r, poe_shared_part p, int64_t step)
{
    if (!is_exact(r))
        return r->slots[step % n_slots(r->delay, r->every)] + r->parts[p].at.offset;
    return p == POE_SHARED_HEAD && r->head_total ? r->head_total : gradients_of(r, p);
}

/* From now on others may count on the gradients of `step`, and on those held before it. */
static void note_leaving(poe_shared_rule *r, int64_t step)
{
    if (r->board && step >= atomic_load(&r->board->left))
        atomic_store(&r->board->left, step + 1);
}

/* The part's gradients of `step` are final: they leave for the sum, or are added to those that are held. Under exact
 * from where they are; else from a vector of their own, and the next step may begin before their sum is there. */
static poe_status leave(poe_shared_rule *r, poe_shared_part p, int64_t step)
{
    poe_part_sum *part = &r->parts[p];
    const float *gradients = gradients_of(r, p);
    float *sum = sum_of(r, p, step);
    if (r->delay)
        memcpy(sum, gradients, part->at.floats * sizeof(float));
    for (size_t i = 0; r->every && i < part->at.floats; i++)
        sum[i] += gradients[i];
    part->left = step + 1;
    poe_moment(POE_PHASE_REDUCE, step, -1);
    if (!sums_after(r, step))
        return POE_OK;
    note_leaving(r, step);
    return poe_reduce_begin(part->reduce, step, is_exact(r) ? gradients : sum, sum);
}

/* From within the last backward of a step. What is not finite stays: the run ends when all have been looked at. */
static void on_head_gradient(void *rule)
{
    poe_shared_rule *r = rule;
    int64_t step = r->departing;
    r->departing = -1;
    if (step >= 0 && r->compute->ops->shared_part_finite(r->compute, POE_SHARED_HEAD))
        r->status = leave(r, POE_SHARED_HEAD, step);
}

static poe_status wait_for(poe_shared_rule *r, poe_shared_part p, int64_t step)
{
    poe_part_sum *part = &r->parts[p];
    if (step < part->arrived)
        return POE_OK;
    poe_moment(POE_PHASE_REDUCE, step, -1);
    poe_status status = poe_reduce_end(part->reduce, step);
    if (status == POE_OK)
        part->arrived = step + 1;
    return status;
}

/* --- updates ------------------------------------------------------------------------------------------------------------------ */

static void update_own(poe_shared_rule *r, int64_t step)
{
    poe_rates rates;
    poe_rates_at(r->model, r->optimizer, (int)step, &rates);
    r->compute->ops->update_own(r->compute, &rates);
    r->compute->ops->clear_gradients(r->compute);
}

/* All parts of a step are one update, whichever comes first. */
static void count_update(poe_shared_rule *r, int64_t step)
{
    if (step < r->counted)
        return;
    ++*poe_stage_shared_updates(r->stage);
    r->counted = step + 1;
}

static poe_status apply(poe_shared_rule *r, poe_shared_part p, int64_t step)
{
    size_t floats = r->parts[p].at.floats;
    float *sum = sum_of(r, p, step);
    poe_rates rates;
    poe_status status = wait_for(r, p, step);
    if (status != POE_OK)
        return status;
    for (size_t i = 0; r->mean_of > 1 && i < floats; i++)
        sum[i] /= (float)r->mean_of;
    count_update(r, step);
    poe_rates_at(r->model, r->optimizer, (int)step, &rates);
    r->compute->ops->update_shared_part(r->compute, p, &rates, sum);
    if (is_exact(r))
        r->compute->ops->clear_shared_part(r->compute, p);
    if (r->every)
        memset(sum, 0, floats * sizeof(float));
    return POE_OK;
}

/* Of one part: what is due, which is at most one step's. */
static poe_status catch_up(poe_shared_rule *r, poe_shared_part p)
{
    poe_part_sum *part = &r->parts[p];
    if (!part->at.n_rows || part->applied == r->due)
        return POE_OK;
    part->applied = r->due;
    return apply(r, p, r->due - 1);
}

poe_status poe_shared_before_forward(poe_shared_rule *r)
{
    poe_status status = catch_up(r, POE_SHARED_WTE);
    return status == POE_OK ? catch_up(r, POE_SHARED_SMEAR) : status;
}

poe_status poe_shared_before_backward(poe_shared_rule *r, int64_t step, bool last)
{
    r->departing = last && r->parts[POE_SHARED_HEAD].at.n_rows ? step : -1;
    return catch_up(r, POE_SHARED_HEAD);
}

poe_status poe_shared_settle(poe_shared_rule *r)
{
    poe_status status = POE_OK;
    for (poe_shared_part p = 0; status == POE_OK && p < POE_SHARED_PARTS; p++)
        status = catch_up(r, p);
    return status;
}

/* --- steps -------------------------------------------------------------------------------------------------------------------- */

bool poe_shared_gradients_finite(const poe_shared_rule *r)
{
    bool finite = r->compute->ops->gradients_finite(r->compute);
    for (poe_shared_part p = 0; finite && p < POE_SHARED_PARTS; p++)
        if (r->parts[p].at.n_rows && r->parts[p].left <= r->next)
            finite = r->compute->ops->shared_part_finite(r->compute, p);
    return finite;
}

static poe_status leave_all(poe_shared_rule *r, int64_t step)
{
    poe_status status = r->status;
    for (poe_shared_part p = 0; status == POE_OK && p < POE_SHARED_PARTS; p++)
        if (r->parts[p].at.n_rows && r->parts[p].left <= step) {
            assert(r->parts[p].applied == r->due);
            status = leave(r, p, step);
        }
    return status;
}

/* The update that is due once the gradients of `step` are there: under stale:D that of D steps before. */
static void make_due(poe_shared_rule *r, int64_t step)
{
    r->mean_of = r->every ? ++r->held_steps : 1;
    if (!sums_after(r, step) || step - r->due < r->delay)
        return;
    r->due = r->delay ? r->due + 1 : step + 1;
    r->held_steps = 0;
}

poe_status poe_shared_step(poe_shared_rule *r, int64_t step)
{
    poe_status status = leave_all(r, step);
    if (status != POE_OK)
        return status;
    update_own(r, step);
    for (poe_shared_part p = 0; !is_exact(r) && p < POE_SHARED_PARTS; p++)
        if (r->parts[p].at.n_rows)
            r->compute->ops->clear_shared_part(r->compute, p);
    make_due(r, step);
    r->next = step + 1;
    return POE_OK;
}

poe_status poe_shared_finish(poe_shared_rule *r)
{
    poe_status status = poe_shared_settle(r);
    while (status == POE_OK && r->delay && r->due < r->next) {
        r->due++;
        status = poe_shared_settle(r);
    }
    return status;
}

/* --- checkpoints -------------------------------------------------------------------------------------------------------------- */

/* Where the pending totals of steps due..next-1 and the held sum are. */
static void describe(poe_shared_rule *r, poe_pending *pending)
{
    pending->floats = r->floats;
    pending->held_steps = r->held_steps;
    pending->held = r->every ? r->slots[0] : NULL;
    pending->n_totals = 0;
    for (int64_t step = r->due; r->delay && step < r->next; step++) {
        pending->total_steps[pending->n_totals] = step;
        pending->totals[pending->n_totals++] = r->slots[step % n_slots(r->delay, r->every)];
    }
}

poe_status poe_shared_pending(poe_shared_rule *r, poe_pending *pending)
{
    poe_status status = poe_shared_settle(r);
    for (int64_t step = r->due; status == POE_OK && r->delay && step < r->next; step++)
        for (poe_shared_part p = 0; status == POE_OK && p < POE_SHARED_PARTS; p++)
            if (r->parts[p].at.n_rows)
                status = wait_for(r, p, step);
    if (status == POE_OK)
        describe(r, pending);
    return status;
}

void poe_shared_restore(poe_shared_rule *r, int n_totals, int held_steps, poe_pending *pending)
{
    r->held_steps = held_steps;
    restart(r, r->next - n_totals);
    describe(r, pending);
}

/* --- snapshots ---------------------------------------------------------------------------------------------------------------- */

void poe_shared_image(poe_shared_rule *r, poe_image *image)
{
    for (int i = 0; i < n_slots(r->delay, r->every); i++)
        poe_image_pass(image, r->slots[i], r->floats * sizeof(float));
    for (poe_shared_part p = 0; p < POE_SHARED_PARTS; p++) {
        poe_image_pass(image, &r->parts[p].left, sizeof(r->parts[p].left));
        poe_image_pass(image, &r->parts[p].arrived, sizeof(r->parts[p].arrived));
        poe_image_pass(image, &r->parts[p].applied, sizeof(r->parts[p].applied));
    }
    poe_image_pass(image, &r->next, sizeof(r->next));
    poe_image_pass(image, &r->due, sizeof(r->due));
    poe_image_pass(image, &r->counted, sizeof(r->counted));
    poe_image_pass(image, &r->held_steps, sizeof(r->held_steps));
    poe_image_pass(image, &r->mean_of, sizeof(r->mean_of));
}

/* Under exact and every:N none is under way between two steps. */
poe_status poe_shared_resume(poe_shared_rule *r)
{
    poe_status status = POE_OK;
    for (poe_shared_part p = 0; r->delay && p < POE_SHARED_PARTS; p++) {
        const poe_part_sum *part = &r->parts[p];
        for (int64_t step = part->arrived; status == POE_OK && part->reduce && step < part->left; step++)
            status = poe_reduce_begin(part->reduce, step, sum_of(r, p, step), sum_of(r, p, step));
    }
    return status;
}
