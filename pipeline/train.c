/* SPDX-License-Identifier: MIT */
#include "pipeline/train.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pipeline/report.h"
#include "pipeline/settings.h"
#include "src/clock.h"
#include "src/crc32c.h"
#include "src/log.h"

typedef struct trainer {
    poe_run *run;
    poe_training *training;
    poe_progress progress; /* last rank */
    int micro_batches;
    double losses[POE_MAX_STAGES]; /* of the step; own and those of the stages before */
    bool stop;                     /* after this step */
    uint32_t epoch;
    double mark;           /* when the time that is not yet counted began */
    poe_comm_stats marked; /* and what had been waited by then */
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

/* --- one step ----------------------------------------------------------------------------------------------------------------- */

/* What is not finite in one stage is soon not finite in the later ones. So each gives every stage before it the time to
 * speak and to end the job (mpiexec takes a second to pass it on); false: one of them has. */
static bool speaks_first(const poe_run *r)
{
    sleep(2 * (unsigned)r->rank);
    return !poe_comm_stop_wanted(r->comm);
}

static poe_status run_micro_batch(trainer *t, poe_batch *batch, double *loss)
{
    poe_run *r = t->run;
    float *h_out;
    poe_status status = r->streams.source < 0 ? read_batch(t, batch) : receive_batch(t, batch);
    if (status == POE_OK)
        status = poe_streams_output(&r->streams, batch, &h_out);
    if (status != POE_OK)
        return status;
    poe_comm_doing(r->comm, "forward", batch->step, batch->micro);
    poe_stage_forward(r->stage, 0, batch->rows, batch->t, batch->idx, batch->h ? &(poe_crossing){.h = batch->h} : NULL,
                      h_out ? &(poe_crossing){.h = h_out} : NULL);
    status = poe_streams_send_batch(&r->streams, batch);
    if (status != POE_OK)
        return status;
    poe_comm_doing(r->comm, "loss and backward", batch->step, batch->micro);
    status = poe_stage_backward(r->stage, 0, batch->targets, t->micro_batches, NULL, NULL, loss);
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
    t->losses[r->rank] = sum / t->micro_batches;
    if (poe_stage_gradients_finite(r->stage))
        return POE_OK;
    if (speaks_first(r))
        poe_error("step %lld: a gradient of stage %d is not finite; stopped before that stage's update", (long long)step,
                  r->rank);
    return POE_NUMERIC;
}

static poe_status write_step(trainer *t, int64_t step, double dt)
{
    poe_run *r = t->run;
    poe_rates rates;
    poe_rates_at(&r->model, &r->optimizer, (int)step, &rates);
    json_t *stages = json_array();
    for (int k = 0; k < r->size; k++)
        json_array_append_new(stages, json_real(t->losses[k]));
    double loss = poe_report_loss(&r->model, t->losses);
    int64_t tokens = (step + 1) * r->options->total_batch_size;
    poe_progress_step(&t->progress, step, loss, t->losses, rates.lrm, dt, t->epoch);
    return poe_metrics_write(&r->metrics, json_pack("{s:I, s:f, s:o, s:f, s:I, s:f}", "step", (json_int_t)step, "loss", loss,
                                                    "stage_loss", stages, "lrm", rates.lrm, "tokens", (json_int_t)tokens,
                                                    "dt", dt));
}

/* The losses ride forward, and the last rank writes them down. */
static poe_status report_step(trainer *t, int64_t step, double dt)
{
    poe_run *r = t->run;
    poe_status status = poe_streams_receive_report(&r->streams, step, t->losses);
    if (status == POE_OK)
        status = poe_streams_send_report(&r->streams, step, t->losses);
    return status == POE_OK && poe_run_is_last(r) ? write_step(t, step, dt) : status;
}

/* --- evaluation and checkpoints ---------------------------------------------------------------------------------------------- */

static poe_status evaluate(trainer *t, int64_t step)
{
    poe_run *r = t->run;
    poe_evaluation *e = &t->training->evaluation;
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
    poe_comm_doing(r->comm, "checkpoint", step, 0);
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

static void set_mark(trainer *t)
{
    t->mark = poe_now();
    poe_comm_get_stats(t->run->comm, &t->marked);
}

/* Seconds since the last mark, which count as training; sets the next one. */
static double pass_mark(trainer *t)
{
    double before = t->mark;
    poe_comm_stats from = t->marked, *waits = &t->training->waits;
    set_mark(t);
    waits->receive_wait += t->marked.receive_wait - from.receive_wait;
    waits->credit_wait += t->marked.credit_wait - from.credit_wait;
    waits->shared_wait += t->marked.shared_wait - from.shared_wait;
    waits->transfer += t->marked.transfer - from.transfer;
    waits->transfer_busy += t->marked.transfer_busy - from.transfer_busy;
    waits->bytes_sent += t->marked.bytes_sent - from.bytes_sent;
    t->training->seconds += t->mark - before;
    return t->mark - before;
}

static poe_status train_step(trainer *t, int64_t step)
{
    poe_status status = accumulate_step(t, step);
    if (status != POE_OK)
        return status;
    poe_comm_doing(t->run->comm, "update", step, t->micro_batches);
    status = poe_shared_step(&t->run->shared, step);
    if (status != POE_OK)
        return status;
    t->training->steps = step + 1;
    t->training->tokens += t->run->options->total_batch_size;
    return report_step(t, step, pass_mark(t));
}

/* What is due between two steps; its time is not theirs. */
static poe_status rest_after(trainer *t, int64_t done)
{
    const poe_options *o = t->run->options;
    bool evaluates = t->run->corpus.n_eval && due(done, o->eval_every);
    poe_status status = evaluates ? evaluate(t, done) : POE_OK;
    if (status == POE_OK && (t->stop || due(done, o->save_every)))
        status = save(t, done);
    set_mark(t);
    return status;
}

static poe_status run_step(trainer *t, int64_t step)
{
    poe_status status = train_step(t, step);
    bool at_end = step + 1 == t->run->options->num_iterations;
    return status == POE_OK && !at_end ? rest_after(t, step + 1) : status;
}

static poe_status finish(trainer *t)
{
    poe_run *r = t->run;
    poe_status status = poe_shared_finish(&r->shared);
    if (status == POE_OK && r->corpus.n_eval)
        status = evaluate(t, t->training->steps);
    if (status == POE_OK && t->training->steps > r->first_step)
        status = save(t, t->training->steps);
    return status;
}

poe_status poe_train(poe_run *r, poe_training *training)
{
    *training = (poe_training){.steps = r->first_step};
    trainer t = {.run = r, .training = training, .micro_batches = poe_settings_micro_batches(r->options)};
    if (poe_run_is_last(r))
        poe_progress_start(&t.progress, r);
    set_mark(&t);
    poe_status status = POE_OK;
    for (int64_t step = r->first_step; status == POE_OK && !t.stop && step < r->options->num_iterations; step++)
        status = run_step(&t, step);
    bool interrupted = t.stop && training->steps < r->options->num_iterations;
    if (status == POE_OK && !interrupted)
        status = finish(&t);
    if (poe_run_is_last(r))
        poe_progress_end(&t.progress);
    return status == POE_OK && interrupted ? POE_INTERRUPTED : status;
}
