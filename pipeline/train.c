/* SPDX-License-Identifier: MIT */
#include "pipeline/train.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pipeline/report.h"
#include "pipeline/settings.h"
#include "src/crc32c.h"
#include "src/log.h"

/* Steps whose reports may be waiting for those of the stages before: more than ranks are ever apart. */
enum { OWN_REPORTS = 4 * POE_MAX_STAGES };

typedef struct own_report {
    poe_step_report report;
    uint32_t epoch;
} own_report;

typedef struct trainer {
    poe_run *run;
    poe_training *training;
    poe_progress progress; /* last rank */
    int micro_batches;
    double loss;                   /* of the step at hand */
    own_report own[OWN_REPORTS];   /* by step; those of steps reported..done-1 are to be passed on */
    int64_t reported, done;
    bool stop;                     /* after this step */
    uint32_t epoch;
    poe_comm_stats marked; /* what had been sent before the step */
} trainer;

/* --- data ------------------------------------------------------------------------------------------------------------------- */

/* Continues the running hash by a micro-batch's tokens: the same sequence of micro-batches gives the same value. */
static uint64_t hash_batch(uint64_t hash, const poe_batch *batch)
{
    size_t bytes = batch->rows * batch->t * sizeof(int32_t);
    uint32_t crc = poe_crc32c(poe_crc32c(0, batch->idx, bytes), batch->targets, bytes);
    return (hash ^ crc) * 0x9E3779B97F4A7C15u + 1;
}

static poe_status read_batch(trainer *t, poe_batch *batch)
{
    poe_run *r = t->run;
    size_t rows;
    batch->idx = r->streams.own_tokens;
    batch->targets = batch->idx + r->streams.rows * r->streams.t;
    batch->h = NULL;
    poe_status status = poe_feed_next(r->corpus.train, batch->idx, batch->targets, &rows);
    if (status != POE_OK)
        return status;
    r->data_hash = batch->data_hash = hash_batch(r->data_hash, batch);
    bool last = batch->micro == t->micro_batches - 1;
    batch->flags = (uint32_t)poe_feed_epoch(r->corpus.train) << POE_EPOCH_SHIFT;
    if (last && poe_comm_stop_wanted(r->comm))
        batch->flags |= POE_FLAG_STOP;
    return POE_OK;
}

static poe_status receive_batch(trainer *t, poe_batch *batch)
{
    poe_run *r = t->run;
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

/* --- reports -------------------------------------------------------------------------------------------------------------------- */

/* A step's seconds without the checkpoint before it. */
static double step_seconds(const poe_account_times *times)
{
    return times->wall - times->seconds[POE_ACCOUNT_CHECKPOINT];
}

static poe_status write_step(trainer *t, int64_t step, const poe_step_report *reports)
{
    poe_run *r = t->run;
    poe_rates rates;
    poe_rates_at(&r->model, &r->optimizer, (int)step, &rates);
    double losses[POE_MAX_STAGES], dt = step_seconds(&reports[r->rank].times);
    json_t *stages = json_array(), *accounts = json_array();
    for (int k = 0; k < r->size; k++) {
        losses[k] = reports[k].loss;
        json_array_append_new(stages, json_real(losses[k]));
        json_array_append_new(accounts, poe_account_json(&reports[k].times));
    }
    double loss = poe_report_loss(&r->model, losses);
    int64_t tokens = (step + 1) * r->options->total_batch_size;
    poe_progress_step(&t->progress, step, loss, losses, rates.lrm, dt, t->own[step % OWN_REPORTS].epoch);
    json_t *object = r->options->emulate_compute
                         ? json_pack("{s:I, s:s}", "step", (json_int_t)step, "emulated", "compute")
                         : json_pack("{s:I, s:f, s:O, s:f}", "step", (json_int_t)step, "loss", loss, "stage_loss", stages,
                                     "lrm", rates.lrm);
    json_decref(stages);
    json_object_set_new(object, "tokens", json_integer((json_int_t)tokens));
    json_object_set_new(object, "dt", json_real(dt));
    json_object_set_new(object, "accounts", accounts);
    return poe_metrics_write(&r->metrics, object);
}

static poe_status pass_report(trainer *t, int64_t step)
{
    poe_run *r = t->run;
    poe_step_report reports[POE_MAX_STAGES];
    poe_status status = poe_streams_receive_report(&r->streams, step, reports);
    reports[r->rank] = t->own[step % OWN_REPORTS].report;
    if (status == POE_OK)
        status = poe_streams_send_report(&r->streams, step, reports);
    return status == POE_OK && poe_run_is_last(r) ? write_step(t, step, reports) : status;
}

/* Losses and accounts ride forward, and the last rank writes them down. A stage before may well end the step later than
 * this one: nobody waits for reports while there is work, unless `all` that are left must be passed on now. */
static poe_status pass_reports(trainer *t, bool all)
{
    poe_status status = POE_OK;
    while (status == POE_OK && t->reported < t->done && (all || poe_streams_report_ready(&t->run->streams)))
        status = pass_report(t, t->reported++);
    return status;
}

/* --- one step ----------------------------------------------------------------------------------------------------------------- */

/* What is not finite in one stage is soon not finite in the later ones. So each gives every stage before it the time to
 * speak and to end the job (mpiexec takes a second to pass it on); false: one of them has. */
static bool speaks_first(const poe_run *r)
{
    sleep(2 * (unsigned)r->rank);
    return !poe_comm_stop_wanted(r->comm);
}

static void enter(trainer *t, poe_account account, const poe_batch *batch)
{
    poe_account_enter(&t->run->accounts, account, batch->step, batch->micro);
}

static poe_status run_micro_batch(trainer *t, poe_batch *batch, double *loss)
{
    poe_run *r = t->run;
    float *h_out;
    enter(t, POE_ACCOUNT_DATA, batch);
    poe_status status = r->streams.source < 0 ? read_batch(t, batch) : receive_batch(t, batch);
    enter(t, POE_ACCOUNT_OTHER, batch);
    if (status == POE_OK)
        status = pass_reports(t, false);
    enter(t, POE_ACCOUNT_SEND, batch);
    if (status == POE_OK)
        status = poe_streams_output(&r->streams, batch, &h_out);
    if (status != POE_OK)
        return status;
    enter(t, POE_ACCOUNT_FORWARD, batch);
    r->compute.ops->forward(&r->compute, 0, batch->rows, batch->t, batch->idx,
                            batch->h ? &(poe_crossing){.h = batch->h} : NULL, h_out ? &(poe_crossing){.h = h_out} : NULL);
    enter(t, POE_ACCOUNT_SEND, batch);
    status = poe_streams_send_batch(&r->streams, batch);
    if (status != POE_OK)
        return status;
    enter(t, POE_ACCOUNT_BACKWARD, batch);
    status = r->compute.ops->backward(&r->compute, 0, batch->targets, t->micro_batches, NULL, NULL, loss);
    enter(t, POE_ACCOUNT_OTHER, batch);
    if (status == POE_NUMERIC && speaks_first(r))
        poe_error("step %lld: the loss of stage %d is %g (micro-batch %d); stopped before that stage's update",
                  (long long)batch->step, r->rank, *loss, batch->micro);
    poe_streams_release_batch(&r->streams);
    return status;
}

static poe_status accumulate_step(trainer *t, int64_t step)
{
    poe_run *r = t->run;
    double sum = 0;
    for (int m = 0; m < t->micro_batches; m++) {
        poe_batch batch = {.kind = POE_KIND_TRAIN, .step = step, .micro = m, .rows = r->streams.rows, .t = r->streams.t};
        double loss;
        poe_status status = run_micro_batch(t, &batch, &loss);
        if (status != POE_OK)
            return status;
        sum += loss;
        t->stop = batch.flags & POE_FLAG_STOP;
        t->epoch = batch.flags >> POE_EPOCH_SHIFT;
    }
    t->loss = sum / t->micro_batches;
    if (r->compute.ops->gradients_finite(&r->compute))
        return POE_OK;
    if (speaks_first(r))
        poe_error("step %lld: a gradient of stage %d is not finite; stopped before that stage's update", (long long)step,
                  r->rank);
    return POE_NUMERIC;
}

/* --- evaluation and checkpoints ---------------------------------------------------------------------------------------------- */

static poe_status evaluate(trainer *t, int64_t step)
{
    poe_run *r = t->run;
    poe_evaluation *e = &t->training->evaluation;
    poe_account_enter(&r->accounts, POE_ACCOUNT_OUTSIDE, step, -1);
    poe_status status = poe_evaluate(&r->evaluator, step, e);
    if (status != POE_OK)
        return status;
    t->training->evaluated = true;
    if (!poe_run_is_last(r))
        return POE_OK;
    poe_progress_evaluation(&t->progress, step, e, r->corpus.has_tokenizer);
    return poe_metrics_write(&r->metrics, poe_evaluation_json(e, step, r->corpus.has_tokenizer));
}

static json_t *hexadecimal(uint64_t x)
{
    return json_sprintf("%016llx", (unsigned long long)x);
}

/* What the manifest says beside the files: all that resuming needs and rank 0 knows. */
static json_t *facts_of(const poe_run *r, int64_t step, const poe_pending *pending)
{
    json_t *config = poe_options_json(r->options);
    poe_report_complete_config(r, config);
    json_t *facts = json_pack("{s:I, s:o, s:o, s:o, s:i, s:i, s:i, s:s, s:s}", "step", (json_int_t)step, "config", config,
                              "data_hash", hexadecimal(r->data_hash), "feed_hash",
                              hexadecimal(r->corpus.train_hash), "stages", r->size, "pending_totals",
                              pending->n_totals, "held_steps", pending->held_steps, "kernels",
                              poe_kernels_name(r->kernels), "blas", poe_blas_kernels());
    json_object_set_new(facts, "feed", poe_feed_position(r->corpus.train));
    if (r->corpus.tokenizer)
        json_object_set_new(facts, "tokenizer_hash", hexadecimal(poe_tokenizer_hash(r->corpus.tokenizer)));
    return facts;
}

static poe_status save(trainer *t, int64_t step)
{
    poe_run *r = t->run;
    int64_t steps[POE_OPTION_DELAY];
    float *totals[POE_OPTION_DELAY];
    poe_pending pending = {.total_steps = steps, .totals = totals};
    poe_account_enter(&r->accounts, POE_ACCOUNT_CHECKPOINT, step, -1);
    poe_status status = poe_shared_pending(&r->shared, &pending);
    if (status != POE_OK)
        return status;
    json_t *facts = r->rank == 0 ? facts_of(r, step, &pending) : NULL;
    status = poe_checkpoint_save(r->store, step, r->stage, r->rank, &pending, facts, t->training->checkpoint);
    json_decref(facts);
    return status;
}

static bool due(int64_t done, int every)
{
    return every && done % every == 0;
}

/* --- the run ------------------------------------------------------------------------------------------------------------------- */

/* What is sent from now on counts as training. */
static void mark_traffic(trainer *t)
{
    poe_comm_get_stats(t->run->comm, &t->marked);
}

static void count_traffic(trainer *t)
{
    poe_comm_stats from = t->marked, *traffic = &t->training->traffic;
    mark_traffic(t);
    traffic->transfer += t->marked.transfer - from.transfer;
    traffic->transfer_busy += t->marked.transfer_busy - from.transfer_busy;
    traffic->bytes_sent += t->marked.bytes_sent - from.bytes_sent;
}

/* Ends the step's accounts and leaves its report to be passed on. */
static void close_step(trainer *t, int64_t step)
{
    own_report *own = &t->own[step % OWN_REPORTS];
    *own = (own_report){.report.loss = t->loss, .epoch = t->epoch};
    poe_accounts_close_step(&t->run->accounts, &own->report.times);
    t->done = step + 1;
    t->training->seconds += step_seconds(&own->report.times);
    t->training->steps = step + 1;
    t->training->tokens += t->run->options->total_batch_size;
    count_traffic(t);
}

static poe_status train_step(trainer *t, int64_t step)
{
    poe_status status = accumulate_step(t, step);
    if (status != POE_OK)
        return status;
    poe_account_enter(&t->run->accounts, POE_ACCOUNT_OPTIMIZER, step, -1);
    status = poe_shared_step(&t->run->shared, step);
    if (status != POE_OK)
        return status;
    close_step(t, step);
    bool full = t->done - t->reported == OWN_REPORTS;
    return pass_reports(t, full);
}

/* What is due between two steps. */
static poe_status rest_after(trainer *t, int64_t done)
{
    const poe_options *o = t->run->options;
    bool evaluates = t->run->corpus.n_eval && due(done, o->eval_every);
    bool saves = !o->emulate_compute && (t->stop || due(done, o->save_every));
    poe_status status = evaluates || saves ? pass_reports(t, true) : POE_OK;
    if (status == POE_OK && evaluates)
        status = evaluate(t, done);
    if (status == POE_OK && saves)
        status = save(t, done);
    poe_account_enter(&t->run->accounts, POE_ACCOUNT_OTHER, done, -1);
    mark_traffic(t);
    return status;
}

static poe_status run_step(trainer *t, int64_t step)
{
    poe_status status = train_step(t, step);
    bool at_end = step + 1 == t->run->options->num_iterations;
    if (status != POE_OK)
        return status;
    return at_end ? pass_reports(t, true) : rest_after(t, step + 1);
}

static poe_status finish(trainer *t)
{
    poe_run *r = t->run;
    poe_account_enter(&r->accounts, POE_ACCOUNT_OPTIMIZER, t->training->steps, -1);
    poe_status status = poe_shared_finish(&r->shared);
    if (status == POE_OK && r->corpus.n_eval)
        status = evaluate(t, t->training->steps);
    if (status == POE_OK && t->training->steps > r->first_step && !r->options->emulate_compute)
        status = save(t, t->training->steps);
    return status;
}

poe_status poe_train(poe_run *r, poe_training *training)
{
    *training = (poe_training){.steps = r->first_step};
    trainer t = {.run = r,
                 .training = training,
                 .micro_batches = poe_settings_micro_batches(r->options),
                 .reported = r->first_step,
                 .done = r->first_step};
    if (poe_run_is_last(r))
        poe_progress_start(&t.progress, r);
    mark_traffic(&t);
    poe_accounts_start(&r->accounts, r->comm);
    poe_status status = POE_OK;
    for (int64_t step = r->first_step; status == POE_OK && !t.stop && step < r->options->num_iterations; step++)
        status = run_step(&t, step);
    bool interrupted = t.stop && training->steps < r->options->num_iterations;
    if (status == POE_OK && !interrupted)
        status = finish(&t);
    poe_accounts_stop(&r->accounts);
    if (poe_run_is_last(r))
        poe_progress_end(&t.progress);
    return status == POE_OK && interrupted ? POE_INTERRUPTED : status;
}
