/* SPDX-License-Identifier: MIT */
#include "pipeline/train.h"

#include <stdlib.h>
#include <string.h>

#include "comm/agent/board.h"
#include "pipeline/micro_batches.h"
#include "pipeline/outage.h"
#include "pipeline/recovery.h"
#include "pipeline/report.h"
#include "pipeline/snapshot.h"
#include "pipeline/step_reports.h"
#include "src/log.h"
#include "src/moment.h"

typedef struct trainer {
    poe_run *run;
    poe_training *training;
    poe_micro_batches batches;
    poe_step_reports reports;
    bool stop;             /* after this step */
    poe_comm_stats marked; /* what had been sent before the step */
    uint64_t marked_saved; /* and left out */
} trainer;

/* --- evaluation and checkpoints ---------------------------------------------------------------------------------------------- */

static poe_status evaluate(trainer *t, int64_t step)
{
    poe_run *r = t->run;
    poe_evaluation *e = &t->training->evaluation;
    poe_account_enter(&r->accounts, POE_ACCOUNT_OUTSIDE, step, -1);
    r->evaluator.absent = poe_outage_covers(r, step - 1);
    poe_status status = poe_evaluate(&r->evaluator, step, e);
    if (status != POE_OK)
        return status;
    t->training->evaluated = true;
    if (!poe_run_is_last(r))
        return POE_OK;
    poe_progress_evaluation(&t->reports.progress, step, e, r->corpus.has_tokenizer);
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
    json_t *facts = json_pack("{s:I, s:o, s:o, s:o, s:i, s:i, s:i, s:s}", "step", (json_int_t)step, "config", config,
                              "data_hash", hexadecimal(r->data_hash), "feed_hash",
                              hexadecimal(r->corpus.train_hash), "stages", r->n_stages, "pending_totals",
                              pending->n_totals, "held_steps", pending->held_steps, "kernels",
                              r->arithmetic);
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
    /* Replicas have the same to write: whoever leads does it. */
    bool writes = !poe_layout_replicated(&r->layout) || poe_checkpoint_store_leads(r->store);
    status = poe_checkpoint_save(r->store, step, r->stage, writes ? r->index : -1, &pending, facts,
                                 t->training->checkpoint);
    json_decref(facts);
    return status;
}

static bool due(int64_t done, int every)
{
    return every && done % every == 0;
}

/* --- snapshots --------------------------------------------------------------------------------------------------------------- */

static void pass_loop(void *loop, poe_image *image)
{
    trainer *t = loop;
    poe_image_pass(image, t->training, sizeof(*t->training));
    poe_image_pass(image, &t->run->evaluator.next, sizeof(t->run->evaluator.next));
    poe_image_pass(image, &t->stop, sizeof(t->stop));
    poe_step_reports_image(&t->reports, image);
}

static poe_status take_snapshot(trainer *t, int64_t step)
{
    poe_account_enter(&t->run->accounts, POE_ACCOUNT_CHECKPOINT, step, -1);
    poe_status status = poe_shared_settle(&t->run->shared);
    return status == POE_OK ? poe_snapshot_take(t->run, step, pass_loop, t) : status;
}

static bool snapshot_wanted(const trainer *t)
{
    poe_board *board = poe_comm_board(t->run->comm);
    return board && atomic_exchange(&board->snapshot_wanted, false);
}

/* The messages of a long evaluation are more than a log can keep. */
static poe_status snap_between(void *context, int64_t step)
{
    trainer *t = context;
    if (!snapshot_wanted(t))
        return POE_OK;
    poe_status status = take_snapshot(t, step);
    poe_account_enter(&t->run->accounts, POE_ACCOUNT_OUTSIDE, step, -1);
    return status;
}

/* The first snapshot, or the return to the last one. *step: where training begins. */
static poe_status begin_recoverable(trainer *t, int64_t *step)
{
    poe_run *r = t->run;
    *step = r->first_step;
    if (!poe_comm_board(r->comm))
        return POE_OK;
    poe_comm_journal(r->comm, NULL, NULL, false);
    if (!poe_snapshot_resumes(r->comm)) {
        poe_outage_begin(r, *step);
        poe_status taken = take_snapshot(t, *step);
        poe_accounts_start(&r->accounts, r->comm, r->trace); /* it belongs to no step */
        return taken;
    }
    poe_status status = poe_snapshot_restore(r, step, pass_loop, t);
    poe_outage_begin(r, *step);
    if (status == POE_OK && strcmp(r->options->recover, "skip") == 0)
        poe_recovery_begin_absence(r, *step);
    return status;
}

static void end_recoverable(trainer *t)
{
    poe_board *board = poe_comm_board(t->run->comm);
    if (!board)
        return;
    atomic_store(&board->recoverable, false);
    atomic_store(&board->over, true);
}

/* --- the run ------------------------------------------------------------------------------------------------------------------- */

/* What is sent from now on counts as training. */
static void mark_traffic(trainer *t)
{
    poe_comm_get_stats(t->run->comm, &t->marked);
    t->marked_saved = t->run->streams.saved + t->marked.shared_dense - t->marked.shared_sent;
}

static void count_traffic(trainer *t)
{
    poe_comm_stats from = t->marked, *traffic = &t->training->traffic;
    uint64_t saved = t->marked_saved;
    mark_traffic(t);
    t->training->saved += t->marked_saved - saved;
    traffic->transfer += t->marked.transfer - from.transfer;
    traffic->transfer_busy += t->marked.transfer_busy - from.transfer_busy;
    traffic->bytes_sent += t->marked.bytes_sent - from.bytes_sent;
}

/* Ends the step's accounts and leaves its report to be passed on. */
static void close_step(trainer *t, int64_t step)
{
    poe_step_report report = {.loss = t->batches.loss};
    poe_accounts_close_step(&t->run->accounts, &report.times);
    poe_step_reports_add(&t->reports, step, &report, t->batches.epoch);
    t->training->seconds += poe_account_step_seconds(&report.times);
    t->training->steps = step + 1;
    t->training->tokens += t->run->options->total_batch_size;
    count_traffic(t);
}

/* Replicas sum their gradients, and learn of the wish to stop that rank 0 has. */
static poe_status sum_replicas(trainer *t, int64_t step)
{
    poe_run *r = t->run;
    uint32_t flags = t->batches.stop ? POE_FLAG_STOP : 0;
    poe_account_enter(&r->accounts, POE_ACCOUNT_SEND, step, -1);
    poe_status status = poe_replicas_sum(&r->replicas, step, poe_stage_own_gradients(r->stage), &flags);
    t->batches.stop = flags & POE_FLAG_STOP;
    return status;
}

static bool evaluates_after(const trainer *t, int64_t done)
{
    return t->run->corpus.n_eval && due(done, t->run->options->eval_every);
}

/* Where nothing is learnt, only who asks for checkpoints gets them. */
static bool keeps(const poe_options *o)
{
    return !o->emulate_compute || o->save_every > 0;
}

static bool saves_after(const trainer *t, int64_t done)
{
    const poe_options *o = t->run->options;
    return keeps(o) && (t->stop || due(done, o->save_every));
}

/* What took long is not to be repeated, and its messages need not be kept. */
static bool snaps_after(const trainer *t, int64_t done)
{
    poe_board *board = poe_comm_board(t->run->comm);
    if (!board || t->stop)
        return false;
    return snapshot_wanted(t) || due(done, t->run->options->snapshot_every) ||
           evaluates_after(t, done) || saves_after(t, done);
}

/* Where the next step does not follow at once, this one lasts until its sums are there. */
static poe_status settle_before_pause(trainer *t, int64_t done)
{
    bool pauses = evaluates_after(t, done) || saves_after(t, done) || done == t->run->options->num_iterations;
    return pauses ? poe_shared_settle(&t->run->shared) : POE_OK;
}

static poe_status update(trainer *t, int64_t step)
{
    poe_run *r = t->run;
    poe_status status = poe_turns_take_update(&r->turns, step);
    poe_account_enter(&r->accounts, POE_ACCOUNT_OPTIMIZER, step, -1);
    if (status == POE_OK)
        status = poe_shared_step(&r->shared, step);
    if (status == POE_OK)
        status = settle_before_pause(t, step + 1);
    bool last = t->stop || step + 1 == r->options->num_iterations;
    return status == POE_OK ? poe_turns_pass_update(&r->turns, step, last) : status;
}

static poe_status train_step(trainer *t, int64_t step)
{
    poe_run *r = t->run;
    poe_status status = poe_micro_batches_run(&t->batches, step);
    if (status == POE_OK && poe_layout_replicated(&r->layout))
        status = sum_replicas(t, step);
    if (status != POE_OK)
        return status;
    t->stop = t->batches.stop;
    status = update(t, step);
    if (status != POE_OK)
        return status;
    close_step(t, step);
    return poe_step_reports_pass(&t->reports, poe_step_reports_full(&t->reports));
}

/* What is due between two steps. */
static poe_status rest_after(trainer *t, int64_t done)
{
    bool evaluates = evaluates_after(t, done), saves = saves_after(t, done);
    poe_status status = evaluates || saves ? poe_step_reports_pass(&t->reports, true) : POE_OK;
    if (status == POE_OK && evaluates)
        status = evaluate(t, done);
    if (status == POE_OK && saves)
        status = save(t, done);
    bool leaves = !t->stop && poe_recovery_leaves(t->run);
    if (status == POE_OK && (snaps_after(t, done) || leaves))
        status = take_snapshot(t, done);
    if (status == POE_OK && leaves)
        poe_recovery_leave();
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
    return at_end ? poe_step_reports_pass(&t->reports, true) : rest_after(t, step + 1);
}

static poe_status finish(trainer *t)
{
    poe_run *r = t->run;
    poe_account_enter(&r->accounts, POE_ACCOUNT_OPTIMIZER, t->training->steps, -1);
    poe_status status = poe_shared_finish(&r->shared);
    if (status == POE_OK && r->corpus.n_eval)
        status = evaluate(t, t->training->steps);
    if (status == POE_OK && t->training->steps > r->first_step && keeps(r->options))
        status = save(t, t->training->steps);
    return status;
}

static poe_status run_steps(trainer *t)
{
    poe_run *r = t->run;
    int64_t step;
    poe_status status = begin_recoverable(t, &step);
    mark_traffic(t);
    if (status == POE_OK && r->evaluator.next.micro && step < r->options->num_iterations)
        status = rest_after(t, step);
    for (; status == POE_OK && !t->stop && step < r->options->num_iterations; step++)
        status = run_step(t, step);
    bool interrupted = t->stop && t->training->steps < r->options->num_iterations;
    if (status == POE_OK && !interrupted)
        status = finish(t);
    return status == POE_OK && interrupted ? POE_INTERRUPTED : status;
}

poe_status poe_train(poe_run *r, poe_training *training)
{
    *training = (poe_training){.steps = r->first_step};
    trainer *t = calloc(1, sizeof(*t));
    if (!t) {
        poe_error("out of memory for the reports of %d steps", POE_STEP_REPORTS);
        return POE_FAILED;
    }
    t->run = r;
    t->training = training;
    r->evaluator.between = snap_between;
    r->evaluator.context = t;
    poe_step_reports_start(&t->reports, r);
    poe_status status = poe_micro_batches_open(&t->batches, r, &t->reports);
    poe_accounts_start(&r->accounts, r->comm, r->trace);
    if (status == POE_OK)
        status = run_steps(t);
    end_recoverable(t);
    poe_accounts_stop(&r->accounts);
    if (poe_run_is_last(r))
        poe_progress_end(&t->reports.progress);
    poe_micro_batches_close(&t->batches);
    r->evaluator.between = NULL;
    free(t);
    return status;
}
