/* SPDX-License-Identifier: MIT */
#include "pipeline/micro_batches.h"

#include <stdlib.h>
#include <unistd.h>

#include "pipeline/outage.h"
#include "pipeline/recovery.h"
#include "src/crc32c.h"
#include "src/log.h"

static void enter(poe_micro_batches *m, poe_account account, const poe_batch *batch)
{
    poe_account_enter(&m->run->accounts, account, batch->step, batch->micro);
}

/* Work, which a stage does not do while it is absent. */
static void enter_work(poe_micro_batches *m, poe_account account, const poe_batch *batch)
{
    enter(m, m->run->compute.attendance == POE_ABSENT ? POE_ACCOUNT_OTHER : account, batch);
}

/* --- data ------------------------------------------------------------------------------------------------------------------- */

/* Continues the running hash by a micro-batch's tokens: the same sequence of micro-batches gives the same value. */
static uint64_t hash_batch(uint64_t hash, const poe_batch *batch)
{
    size_t bytes = batch->rows * batch->t * sizeof(int32_t);
    uint32_t crc = poe_crc32c(poe_crc32c(0, batch->idx, bytes), batch->targets, bytes);
    return (hash ^ crc) * 0x9E3779B97F4A7C15u + 1;
}

static poe_status read_next(poe_micro_batches *m, poe_batch *batch)
{
    poe_run *r = m->run;
    size_t rows;
    poe_status status = poe_feed_next(r->corpus.train, batch->idx, batch->targets, &rows);
    if (status != POE_OK)
        return status;
    m->read++;
    r->data_hash = batch->data_hash = hash_batch(r->data_hash, batch);
    return POE_OK;
}

/* A replica reads all of the data and keeps its own micro-batches, so that the order is that of one process. */
static poe_status read_batch(poe_micro_batches *m, poe_batch *batch, int slot)
{
    poe_run *r = m->run;
    poe_status status = POE_OK;
    poe_streams_own_tokens(&r->streams, slot, batch);
    while (status == POE_OK && m->read <= batch->micro)
        status = read_next(m, batch);
    if (status != POE_OK)
        return status;
    bool last = batch->micro == r->layout.order.n_micro - 1;
    batch->flags = (uint32_t)poe_feed_epoch(r->corpus.train) << POE_EPOCH_SHIFT;
    if (last && poe_recovery_stops_after(r, batch->step))
        batch->flags |= POE_FLAG_STOP;
    return POE_OK;
}

static poe_status receive_batch(poe_micro_batches *m, poe_batch *batch)
{
    poe_run *r = m->run;
    poe_status status = poe_streams_receive_batch(&r->streams, batch);
    if (status != POE_OK)
        return status;
    r->data_hash = hash_batch(r->data_hash, batch);
    if (r->data_hash == batch->data_hash)
        return POE_OK;
    poe_error("step %lld, micro-batch %d from rank %d: its tokens are not the ones that follow those trained on so far "
              "(running hash %016llx, expected %016llx)", (long long)batch->step, batch->micro, r->streams.source,
              (unsigned long long)batch->data_hash, (unsigned long long)r->data_hash);
    return POE_PEER_LOST;
}

/* What the other replicas take of the step's end. */
static poe_status read_rest(poe_micro_batches *m)
{
    poe_run *r = m->run;
    poe_batch batch = {.step = m->step, .micro = -1, .rows = r->streams.rows, .t = r->streams.t};
    poe_status status = POE_OK;
    enter(m, POE_ACCOUNT_DATA, &batch);
    poe_streams_own_tokens(&r->streams, 0, &batch);
    while (status == POE_OK && m->read < r->layout.order.n_micro)
        status = read_next(m, &batch);
    m->epoch = (uint32_t)poe_feed_epoch(r->corpus.train);
    m->stop = poe_comm_stop_wanted(r->comm);
    return status;
}

/* --- passes ------------------------------------------------------------------------------------------------------------------ */

/* What is not finite in one stage is soon not finite in the later ones. So each gives every stage before it the time to
 * speak and to end the job (mpiexec takes a second to pass it on); false: one of them has. */
static bool speaks_first(const poe_run *r)
{
    sleep(2 * (unsigned)r->rank);
    return !poe_comm_stop_wanted(r->comm);
}

/* The shared parameters' update of the step before, if it has not been done: once a step. */
static poe_status before_forward(poe_micro_batches *m, const poe_batch *batch)
{
    if (batch->micro == 0)
        enter(m, POE_ACCOUNT_OPTIMIZER, batch);
    return poe_shared_before_forward(&m->run->shared);
}

static poe_status before_backward(poe_micro_batches *m, const poe_batch *batch)
{
    if (batch->micro == 0)
        enter(m, POE_ACCOUNT_OPTIMIZER, batch);
    return poe_shared_before_backward(&m->run->shared, m->step, batch->micro == m->run->layout.order.n_micro - 1);
}

static poe_status forward(poe_micro_batches *m, poe_batch *batch, int slot)
{
    poe_run *r = m->run;
    poe_crossing out;
    poe_attendance attendance = poe_recovery_reach(r, batch->step, batch->micro);
    enter(m, POE_ACCOUNT_DATA, batch);
    poe_status status = r->streams.source < 0 ? read_batch(m, batch, slot) : receive_batch(m, batch);
    if (status == POE_OK)
        poe_outage_attend(r, batch, attendance);
    enter(m, POE_ACCOUNT_OTHER, batch);
    if (status == POE_OK)
        status = poe_step_reports_pass(m->reports, false);
    enter(m, POE_ACCOUNT_SEND, batch);
    if (status == POE_OK)
        status = poe_streams_output(&r->streams, batch, &out);
    if (status == POE_OK)
        status = before_forward(m, batch);
    if (status != POE_OK)
        return status;
    enter_work(m, POE_ACCOUNT_FORWARD, batch);
    r->compute.ops->forward(&r->compute, slot, batch->rows, batch->t, batch->idx, poe_crossing_or_null(&batch->in),
                            poe_crossing_or_null(&out));
    enter(m, POE_ACCOUNT_SEND, batch);
    m->stop = batch->flags & POE_FLAG_STOP;
    m->epoch = batch->flags >> POE_EPOCH_SHIFT;
    return poe_streams_send_batch(&r->streams, batch);
}

/* Whether the micro-batch's gradients are those that should have stayed out. */
static void examine(poe_micro_batches *m, const poe_batch *batch)
{
    if (poe_recovery_examines(m->run, batch->step) && !poe_shared_gradients_finite(&m->run->shared))
        poe_recovery_leave_out(m->run, batch->step, batch->micro, "a gradient");
}

static poe_status compute_backward(poe_micro_batches *m, const poe_batch *batch, int slot, bool input,
                                   const poe_crossing *d_out, const poe_crossing *d_in)
{
    poe_compute *compute = &m->run->compute;
    double loss;
    enter_work(m, POE_ACCOUNT_BACKWARD, batch);
    poe_status status = (input ? compute->ops->backward_input : compute->ops->backward)(
        compute, slot, batch->targets, m->run->layout.order.n_micro, poe_crossing_or_null(d_out),
        poe_crossing_or_null(d_in), &loss);
    enter(m, POE_ACCOUNT_OTHER, batch);
    if (status == POE_NUMERIC)
        poe_recovery_leave_out(m->run, batch->step, batch->micro, "the loss");
    else
        examine(m, batch);
    if (status == POE_NUMERIC && speaks_first(m->run))
        poe_error("step %lld: the loss of stage %d is %g (micro-batch %d); stopped before that stage's update",
                  (long long)batch->step, m->run->index, loss, batch->micro);
    m->sum += loss;
    m->counted++;
    return status;
}

static poe_status backward(poe_micro_batches *m, const poe_batch *batch, int slot, bool input)
{
    poe_streams *streams = &m->run->streams;
    poe_crossing d_out, d_in;
    enter(m, POE_ACCOUNT_OTHER, batch);
    poe_status status = poe_streams_receive_gradient(streams, batch, &d_out);
    enter(m, POE_ACCOUNT_SEND, batch);
    if (status == POE_OK)
        status = poe_streams_input_gradient(streams, batch, &d_in);
    if (status == POE_OK)
        status = before_backward(m, batch);
    if (status == POE_OK && !poe_recovery_is_left_out(m->run, batch->step, batch->micro))
        status = compute_backward(m, batch, slot, input, &d_out, &d_in);
    if (status != POE_OK)
        return status;
    enter(m, POE_ACCOUNT_SEND, batch);
    status = poe_streams_send_gradient(streams, batch);
    poe_streams_release_gradient(streams);
    poe_streams_release_batch(streams);
    return status;
}

static void backward_weight(poe_micro_batches *m, const poe_batch *batch, int slot)
{
    enter(m, POE_ACCOUNT_BACKWARD, batch);
    m->run->compute.ops->backward_weight(&m->run->compute, slot);
}

static poe_status run_task(poe_micro_batches *m, poe_task task)
{
    int slot = task.micro % m->n_slots;
    poe_batch *batch = &m->slots[slot];
    switch (task.kind) {
    case POE_TASK_FORWARD:
        *batch = (poe_batch){.kind = POE_KIND_TRAIN,
                             .step = m->step,
                             .micro = task.micro,
                             .rows = m->run->streams.rows,
                             .t = m->run->streams.t};
        return forward(m, batch, slot);
    case POE_TASK_BACKWARD:
        return backward(m, batch, slot, false);
    case POE_TASK_BACKWARD_INPUT:
        return backward(m, batch, slot, true);
    default:
        backward_weight(m, batch, slot);
        return POE_OK;
    }
}

static poe_status check_gradients(poe_micro_batches *m)
{
    poe_run *r = m->run;
    if (poe_shared_gradients_finite(&r->shared))
        return POE_OK;
    poe_recovery_leave_out(r, m->step, -1, "a gradient");
    if (speaks_first(r))
        poe_error("step %lld: a gradient of stage %d is not finite; stopped before that stage's update",
                  (long long)m->step, r->index);
    return POE_NUMERIC;
}

poe_status poe_micro_batches_run(poe_micro_batches *m, int64_t step)
{
    poe_status status = POE_OK;
    m->step = step;
    m->read = m->counted = 0;
    m->sum = 0;
    for (int i = 0; status == POE_OK && i < m->n_tasks; i++) {
        status = poe_turns_take(&m->run->turns, step, i);
        if (status == POE_OK)
            status = run_task(m, m->tasks[i]);
        if (status == POE_OK)
            status = poe_turns_pass(&m->run->turns, step, i);
    }
    if (status == POE_OK && poe_layout_replicated(&m->run->layout))
        status = read_rest(m);
    if (status != POE_OK)
        return status;
    poe_account_enter(&m->run->accounts, POE_ACCOUNT_OTHER, step, -1);
    m->loss = m->sum / m->counted; /* NaN when none was */
    return check_gradients(m);
}

poe_status poe_micro_batches_open(poe_micro_batches *m, poe_run *run, poe_step_reports *reports)
{
    const poe_layout *l = &run->layout;
    *m = (poe_micro_batches){.run = run, .reports = reports, .n_slots = poe_layout_slots(l, run->index)};
    m->tasks = calloc(3 * (size_t)l->order.n_micro, sizeof(*m->tasks));
    m->slots = calloc((size_t)m->n_slots, sizeof(*m->slots));
    if (!m->tasks || !m->slots) {
        poe_error("out of memory for the schedule of %d micro-batches", l->order.n_micro);
        return POE_FAILED;
    }
    m->n_tasks = poe_schedule_tasks(&l->order, run->rank, m->tasks);
    return POE_OK;
}

void poe_micro_batches_close(poe_micro_batches *m)
{
    free(m->tasks);
    free(m->slots);
    *m = (poe_micro_batches){0};
}
