/* SPDX-License-Identifier: MIT */
#include "pipeline/step_reports.h"

#include <math.h>

void poe_step_reports_start(poe_step_reports *s, poe_run *run)
{
    *s = (poe_step_reports){.run = run, .passed = run->first_step, .done = run->first_step};
    if (poe_run_is_last(run))
        poe_progress_start(&s->progress, run);
}

void poe_step_reports_add(poe_step_reports *s, int64_t step, const poe_step_report *report, uint32_t epoch)
{
    s->own[step % POE_STEP_REPORTS].report = *report;
    s->own[step % POE_STEP_REPORTS].epoch = epoch;
    s->done = step + 1;
}

bool poe_step_reports_full(const poe_step_reports *s)
{
    return s->done - s->passed == POE_STEP_REPORTS;
}

/* Of the stages that have one, in order; replicas have the mean over their shares of the micro-batches. */
static void collect_losses(const poe_run *r, const poe_step_report *reports, double *losses)
{
    int first = poe_run_first_head(r);
    for (int k = 0; k < poe_run_heads(r); k++)
        losses[k] = reports[first + k].loss;
    for (int k = 1; poe_layout_replicated(&r->layout) && k < r->size; k++)
        losses[0] += reports[k].loss;
    if (poe_layout_replicated(&r->layout))
        losses[0] /= r->size;
}

/* A stage that has skipped a step has no loss of it: null. */
static json_t *number(double x)
{
    return isfinite(x) ? json_real(x) : json_null();
}

static poe_status write_step(poe_step_reports *s, int64_t step, const poe_step_report *reports)
{
    poe_run *r = s->run;
    poe_rates rates;
    poe_rates_at(&r->model, &r->optimizer, (int)step, &rates);
    double losses[POE_MAX_STAGES], dt = poe_account_step_seconds(&reports[r->rank].times);
    json_t *stages = json_array(), *accounts = json_array();
    collect_losses(r, reports, losses);
    for (int k = 0; k < poe_run_heads(r); k++)
        json_array_append_new(stages, number(losses[k]));
    for (int k = 0; k < r->size; k++)
        json_array_append_new(accounts, poe_account_json(&reports[k].times));
    double loss = poe_report_loss(r, losses);
    int64_t tokens = (step + 1) * r->options->total_batch_size;
    poe_progress_step(&s->progress, step, loss, losses, rates.lrm, dt, s->own[step % POE_STEP_REPORTS].epoch);
    json_t *object = r->options->emulate_compute
                         ? json_pack("{s:I, s:s}", "step", (json_int_t)step, "emulated", "compute")
                         : json_pack("{s:I, s:o, s:O, s:f}", "step", (json_int_t)step, "loss", number(loss), "stage_loss", stages,
                                     "lrm", rates.lrm);
    json_decref(stages);
    json_object_set_new(object, "tokens", json_integer((json_int_t)tokens));
    json_object_set_new(object, "dt", json_real(dt));
    json_object_set_new(object, "accounts", accounts);
    return poe_metrics_write(&r->metrics, object);
}

static poe_status pass(poe_step_reports *s, int64_t step)
{
    poe_run *r = s->run;
    poe_step_report reports[POE_MAX_STAGES];
    poe_status status = poe_streams_receive_report(&r->streams, step, reports);
    reports[r->rank] = s->own[step % POE_STEP_REPORTS].report;
    if (status == POE_OK)
        status = poe_streams_send_report(&r->streams, step, reports);
    return status == POE_OK && poe_run_is_last(r) ? write_step(s, step, reports) : status;
}

poe_status poe_step_reports_pass(poe_step_reports *s, bool all)
{
    poe_status status = POE_OK;
    while (status == POE_OK && s->passed < s->done && (all || poe_streams_report_ready(&s->run->streams)))
        status = pass(s, s->passed++);
    return status;
}

void poe_step_reports_image(poe_step_reports *s, poe_image *image)
{
    poe_image_pass(image, s->own, sizeof(s->own));
    poe_image_pass(image, &s->passed, sizeof(s->passed));
    poe_image_pass(image, &s->done, sizeof(s->done));
    if (poe_run_is_last(s->run))
        poe_progress_image(&s->progress, image);
}
