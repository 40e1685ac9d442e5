/* SPDX-License-Identifier: MIT */
#include "tools/train.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "comm/agent/board.h"
#include "comm/mpi/mpi.h"
#include "faults/fault.h"
#include "pipeline/generate.h"
#include "pipeline/interchange.h"
#include "pipeline/report.h"
#include "pipeline/run.h"
#include "pipeline/settings.h"
#include "pipeline/train.h"
#include "src/log.h"
#include "src/moment.h"
#include "src/plot.h"
#include "tools/agents.h"
#include "tools/ranks.h"

enum { SAMPLE_TOKENS = 120 };

static _Thread_local poe_fault_plan *fault_plan; /* of a rank that trains */

/* --- before the first step ------------------------------------------------------------------------------------------------- */

/* What differs from the run that goes on, and what that changes. */
static void describe_changes(const poe_run *r)
{
    const poe_options *o = r->options;
    json_int_t before = json_integer_value(json_object_get(json_object_get(r->facts, "config"), "num_iterations"));
    const char *kernels = json_string_value(json_object_get(r->facts, "kernels"));
    printf("resuming %s at step %lld\n", r->resumed, (long long)r->first_step);
    if (before != o->num_iterations)
        printf("--num-iterations %d instead of %lld: learning rates, momentum and weight decay follow the new length from "
               "here on\n", o->num_iterations, (long long)before);
    if (kernels && strcmp(kernels, r->arithmetic) != 0)
        printf("kernels %s instead of %s: the numbers go on within rounding, not bit for bit (see --kernels)\n",
               r->arithmetic, kernels);
}

/* Who reads the data goes on where the run has stopped. */
static poe_status seek_data(const poe_run *r)
{
    const poe_options *o = r->options;
    const char *feed = json_string_value(json_object_get(r->facts, "feed_hash"));
    char hash[32];
    snprintf(hash, sizeof(hash), "%016llx", (unsigned long long)r->corpus.train_hash);
    if (!r->corpus.reads)
        return POE_OK;
    if (feed && strcmp(feed, hash) == 0)
        return poe_feed_seek(r->corpus.train, json_object_get(r->facts, "feed"));
    if (!poe_options_given(o, "data")) {
        poe_error("--resume %s: %s is not the data that the run was trained on; restore it, or name the new data with "
                  "--data", r->resumed, o->data.paths[0]);
        return POE_BAD_INPUT;
    }
    if (r->rank == 0)
        printf("new data: reading starts at its beginning\n");
    return POE_OK;
}

/* Takes the reference of `json`. */
static poe_status write_json(const char *path, json_t *json)
{
    char *text = json_dumps(json, JSON_INDENT(1));
    poe_status status = poe_write_file(path, text, strlen(text));
    free(text);
    json_decref(json);
    return status;
}

static poe_status write_config(const poe_run *r)
{
    char path[POE_PATH_MAX];
    poe_status status = poe_path(path, "%s/config.json", r->out);
    if (status != POE_OK)
        return status;
    json_t *config = poe_options_json(r->options);
    poe_report_complete_config(r, config);
    return write_json(path, config);
}

static poe_status write_tokenizer(const poe_run *r)
{
    char path[POE_PATH_MAX];
    if (!r->corpus.tokenizer)
        return POE_OK;
    poe_status status = poe_path(path, "%s/tokenizer.json", r->out);
    return status == POE_OK ? poe_tokenizer_write(r->corpus.tokenizer, path) : status;
}

/* Collective: rank 0's, which reads the data, into the folders that do not have it. */
static poe_status share_tokenizer(poe_run *r)
{
    char path[POE_PATH_MAX], *text = NULL;
    size_t size = 0;
    bool anew = !poe_comm_replays(r->comm);
    poe_status status = poe_path(path, "%s/tokenizer.json", r->out);
    if (status == POE_OK && r->rank == 0)
        status = poe_read_file(path, "tokenizer", &text, &size);
    status = poe_comm_agree(r->comm, status);
    void *shared = text;
    if (status == POE_OK)
        status = poe_comm_share(r->comm, 0, &shared, &size);
    if (status == POE_OK && r->rank > 0 && anew && poe_checkpoint_store_leads(r->store))
        status = poe_write_file(path, shared, size);
    free(shared);
    return poe_comm_agree(r->comm, status);
}

static poe_status open_metrics(poe_run *r)
{
    static const char name[] = "metrics.jsonl";
    char path[POE_PATH_MAX], previous[POE_PATH_MAX];
    bool evaluated_again = r->corpus.n_eval && r->first_step == r->options->num_iterations;
    poe_status status = poe_path(path, "%s/%s", r->out, name);
    if (status == POE_OK)
        status = poe_path(previous, "%s/%s", r->resumed_run, name);
    if (status == POE_OK && access(previous, F_OK) != 0) /* its host may be lost, and this be a copy */
        status = poe_path(previous, "%s/%s", r->resumed, POE_CHECKPOINT_HISTORY);
    if (status == POE_OK && poe_comm_replays(r->comm))
        status = poe_metrics_reopen(&r->metrics, path);
    else if (status == POE_OK)
        status = poe_metrics_open(&r->metrics, path, r->resumed_run[0] ? previous : NULL, r->first_step,
                                  r->first_step - evaluated_again);
    if (poe_comm_emulated(r->comm))
        r->metrics.emulated = "network";
    return status;
}

/* The run's folder: configuration and tokenizer (on every host), metrics (at the last rank), checkpoints. */
static poe_status prepare_folder(poe_run *r)
{
    bool anew = !poe_comm_replays(r->comm);
    if (r->rank == 0 && r->resumed[0] && anew)
        describe_changes(r);
    poe_status status = poe_comm_agree(r->comm, r->resumed[0] && anew ? seek_data(r) : POE_OK);
    if (status != POE_OK)
        return status;
    status = poe_checkpoint_store_open(r->comm, r->out, r->options->keep, &r->store);
    if (status == POE_OK && anew && poe_checkpoint_store_leads(r->store))
        status = poe_checkpoint_store_abandon(r->store, r->first_step);
    if (status == POE_OK && anew && poe_checkpoint_store_leads(r->store))
        status = write_config(r);
    if (status == POE_OK && anew && r->rank == 0)
        status = write_tokenizer(r);
    if (status == POE_OK && poe_run_is_last(r))
        status = open_metrics(r);
    status = poe_comm_agree(r->comm, status);
    if (status == POE_OK && r->corpus.has_tokenizer && !poe_checkpoint_store_is_shared(r->store))
        status = share_tokenizer(r);
    if (status == POE_OK && strcmp(r->options->save_to, "peer") == 0 && !poe_layout_replicated(&r->layout))
        status = poe_checkpoint_store_copy(r->store, r->id, poe_run_is_last(r) ? r->metrics.path : NULL);
    return status;
}

/* --- after the last step --------------------------------------------------------------------------------------------------- */

static poe_status show_sample(poe_run *r)
{
    poe_sampling sampling = {.first = poe_run_first_head(r),
                             .last = r->n_stages - 1,
                             .max_tokens = SAMPLE_TOKENS,
                             .temperature = 0.8,
                             .top_k = 50,
                             .seed = (uint64_t)r->options->seed};
    int32_t bos = 0;
    if (r->rank == 0) {
        bos = poe_tokenizer_bos(r->corpus.tokenizer);
        printf("\nsample (all stages, temperature %g, top-k %d):\n", sampling.temperature, sampling.top_k);
    }
    poe_status status = poe_generate(&r->evaluator, &sampling, &bos, 1, bos, poe_emit_text, r->corpus.tokenizer);
    if (r->rank == 0)
        putchar('\n');
    return status;
}

static poe_status draw_picture(const poe_run *r)
{
    char png[POE_PATH_MAX];
    poe_status status = poe_path(png, "%s/loss.png", r->out);
    if (status == POE_OK)
        poe_plot_run(r->metrics.path, png); /* a run without gnuplot is a run all the same */
    return status;
}

static poe_status export_model(poe_run *r)
{
    const poe_options *o = r->options;
    poe_dtype dtype = strcmp(o->export_dtype, "bf16") == 0 ? POE_BF16 : POE_F32;
    poe_status status = poe_export(o->export_path, dtype, &r->model, r->comm, r->stage, r->id);
    if (status == POE_OK && r->rank == 0)
        printf("exported    %s\n", o->export_path);
    return status;
}

/* What of the run is; NULL: nothing. */
static const char *emulated(const poe_run *r)
{
    bool compute = r->options->emulate_compute, network = poe_comm_emulated(r->comm);
    return compute && network ? "compute, network" : compute ? "compute" : network ? "network" : NULL;
}

/* Whether all stages could work at the end; else some cannot speak either. */
static bool is_whole(const poe_training *t)
{
    return !t->evaluated || isfinite(t->evaluation.prefix[t->evaluation.n_stages - 1].nats);
}

static poe_status report(poe_run *r, const poe_training *t, bool interrupted)
{
    fflush(stdout);
    poe_status status = poe_comm_barrier(r->comm, "the end of training");
    if (status == POE_OK && r->trace)
        status = poe_trace_write(r->trace, emulated(r), r->options->trace);
    if (status == POE_OK && r->rank == 0 && t->evaluated && !interrupted)
        poe_report_evaluation(r->options, &t->evaluation, r->corpus.has_tokenizer);
    bool learnt = !interrupted && !r->options->emulate_compute;
    if (status == POE_OK && r->corpus.has_tokenizer && learnt && is_whole(t))
        status = show_sample(r);
    if (status == POE_OK)
        status = poe_report_ranks(r, t);
    if (status == POE_OK && poe_run_is_last(r) && learnt)
        status = draw_picture(r);
    if (status == POE_OK)
        status = poe_comm_barrier(r->comm, "the picture");
    if (status == POE_OK && r->rank == 0)
        poe_report_files(r, t, interrupted);
    if (status == POE_OK && r->options->export_path && !interrupted)
        status = export_model(r);
    return status;
}

/* --- the bodies of a rank ---------------------------------------------------------------------------------------------------- */

/* --- faults on purpose ------------------------------------------------------------------------------------------------------- */

static void put_nan(void *context)
{
    poe_stage_own_gradients(((poe_run *)context)->stage)[0] = NAN;
}

static void wake_agent(void *context)
{
    poe_ring_wake(&poe_comm_board(((poe_run *)context)->comm)->to_agent);
}

/* What a plan has to know of this run. */
static void hook_faults(poe_run *r)
{
    poe_fault_hooks hooks = {.context = r,
                             .nan = put_nan,
                             .wake = poe_comm_board(r->comm) ? wake_agent : NULL,
                             .run = r->out,
                             .stage = r->index};
    poe_fault_plan_hook(fault_plan, r->rank, &hooks);
}

static poe_status train_run(poe_run *r)
{
    poe_status status = prepare_folder(r);
    if (status != POE_OK)
        return status;
    hook_faults(r);
    if (r->rank == 0 && !poe_comm_replays(r->comm))
        status = poe_report_start(r->options, &r->model, r->threads, r);
    if (status == POE_OK)
        status = poe_comm_barrier(r->comm, "the start");
    poe_log_settle(true);
    if (status != POE_OK)
        return status;
    if (r->options->trace)
        status = poe_trace_create(r->comm, r->id, poe_clock_machine(), POE_TRACE_EVENTS, &r->trace);
    if (status != POE_OK)
        return status;
    poe_training training;
    status = poe_train(r, &training);
    if (status != POE_OK && status != POE_INTERRUPTED)
        return status;
    poe_status reported = report(r, &training, status == POE_INTERRUPTED);
    return reported != POE_OK ? reported : status;
}

static poe_status train_rank(poe_comm *comm, const poe_options *o)
{
    poe_status status = poe_fault_plan_read(o->fault, o->mtbf, (uint64_t)o->fault_seed, poe_comm_size(comm), &fault_plan);
    if (status == POE_OK)
        status = poe_fault_plan_attach(fault_plan, poe_comm_rank(comm), poe_comm_board(comm));
    if (status == POE_OK)
        status = poe_run_do(comm, o, POE_PURPOSE_TRAIN, train_run);
    poe_moment_observe(NULL, NULL);
    poe_fault_plan_free(fault_plan);
    return status;
}

static poe_status write_evaluation(const poe_run *r, const poe_evaluation *e)
{
    char path[POE_PATH_MAX];
    poe_status status = poe_make_directories(r->options->out);
    if (status == POE_OK)
        status = poe_path(path, "%s/evaluation.json", r->options->out);
    if (status != POE_OK)
        return status;
    return write_json(path, poe_evaluation_json(e, r->first_step, r->corpus.has_tokenizer));
}

static poe_status evaluate_run(poe_run *r)
{
    poe_status status = POE_OK;
    if (!r->corpus.n_eval) {
        poe_error("--eval-only: there is no held-out text; name some with --val-data");
        status = POE_BAD_INPUT;
    }
    status = poe_comm_agree(r->comm, status);
    poe_log_settle(true);
    poe_evaluation evaluation;
    if (status == POE_OK)
        status = poe_evaluate(&r->evaluator, r->first_step, &evaluation);
    if (status != POE_OK || r->rank != 0)
        return status;
    poe_report_evaluation(r->options, &evaluation, r->corpus.has_tokenizer);
    return r->options->out ? write_evaluation(r, &evaluation) : POE_OK;
}

static poe_status evaluate_rank(poe_comm *comm, const poe_options *options)
{
    return poe_run_do(comm, options, POE_PURPOSE_EVALUATE, evaluate_run);
}

/* --- the program ------------------------------------------------------------------------------------------------------------- */

static poe_status dry_run(const poe_options *o)
{
    int vocab = o->vocab_size;
    if (!vocab && o->tokenizer) {
        poe_tokenizer *tokenizer;
        poe_status status = poe_tokenizer_read(o->tokenizer, &tokenizer);
        if (status != POE_OK)
            return status;
        vocab = poe_tokenizer_size(tokenizer);
        poe_tokenizer_destroy(tokenizer);
    }
    poe_model *model = malloc(sizeof(*model));
    poe_status status = model ? poe_settings_model(o, vocab ? vocab : POE_OPTION_VOCAB, model) : POE_FAILED;
    if (status == POE_OK)
        status = poe_report_start(o, model, poe_run_threads(o, poe_options_rank_count(o)), NULL);
    free(model);
    return status;
}

static poe_status check_transport(const poe_options *o, bool launched)
{
    if (launched || (strcmp(o->transport, "mpi") != 0 && strcmp(o->transport, "fabric") != 0))
        return POE_OK;
    poe_error("--transport %s needs ranks that a launcher started: --ranks %d, or mpiexec -n %d", o->transport,
              o->stages.count, o->stages.count);
    return POE_BAD_INPUT;
}

/* Whether there are several processes is not the flags' to say. */
static poe_status check_agents(const poe_options *o)
{
    int rank = 0, size = 1;
    poe_mpi_environment(&rank, &size);
    bool continues = strcmp(o->outage, "continue") == 0 && poe_options_given(o, "outage");
    if (continues && !poe_agents_wanted(o)) {
        poe_error("--outage continue needs agents: ranks that are processes (--ranks %d or mpiexec -n %d) and train over "
                  "the fabric, without --agents off, --trace or --eval-only", o->stages.count, o->stages.count);
        return POE_BAD_INPUT;
    }
    if (o->spares && size == 1) {
        poe_error("--spares is for ranks that are processes, and this is the only one; start more with --ranks %d or mpiexec "
                  "-n %d", o->stages.count + o->spares, o->stages.count + o->spares);
        return POE_BAD_INPUT;
    }
    if (strcmp(o->agents, "on") != 0 || size > 1)
        return POE_OK;
    poe_error("--agents on: agents are for ranks that are processes, and this is the only one; start more with --ranks %d "
              "or mpiexec -n %d, or give --agents auto", o->stages.count, o->stages.count);
    return POE_BAD_INPUT;
}

/* Replicas are as many as were started, stages as many as were asked for. */
static int ranks_of(const poe_options *o)
{
    int rank = 0, size = 1;
    poe_mpi_environment(&rank, &size);
    return size > 1 && strcmp(o->schedule, "ddp") == 0 ? size : poe_options_rank_count(o);
}

static poe_status check_net(const poe_options *o)
{
    poe_net net;
    poe_status status = poe_ranks_net(o, ranks_of(o), &net);
    poe_net_free(&net);
    return status;
}

/* Ranks that a launcher starts may have agents, threads of one process never. */
static poe_status check_fault(const poe_options *o, bool launched)
{
    poe_fault_plan *plan;
    poe_status status = poe_fault_plan_read(o->fault, o->mtbf, (uint64_t)o->fault_seed, ranks_of(o), &plan);
    if (status != POE_OK)
        return status;
    status = poe_fault_plan_check(plan, (launched && poe_agents_wanted(o)) || (o->dry_run && o->ranks > 1));
    if (status == POE_OK && poe_fault_plan_makes_absent(plan) && strcmp(o->outage, "continue") != 0) {
        poe_error("--fault: absent takes a stage out of a run that goes on without it; give --outage continue");
        status = POE_BAD_INPUT;
    }
    poe_fault_plan_free(plan);
    return status;
}

int poe_train_main(int argc, char **argv, poe_options *options, poe_status parse_status)
{
    (void)argc;
    bool launched = poe_mpi_launched();
    poe_kernels kernels;
    poe_status status = parse_status == POE_OK ? check_transport(options, launched) : parse_status;
    if (status == POE_OK)
        status = poe_kernels_parse(options->kernels, &kernels);
    if (status == POE_OK)
        status = check_net(options);
    if (status == POE_OK && !options->dry_run)
        status = check_agents(options);
    if (status == POE_OK)
        status = check_fault(options, launched);
    if (status == POE_OK && options->dry_run) {
        int rank = 0, size = 1;
        poe_mpi_environment(&rank, &size);
        poe_log_settle(rank == 0);
        return rank == 0 ? poe_exit_status(dry_run(options)) : 0;
    }
    if (status == POE_OK)
        poe_blas_ensure(kernels, argv);
    poe_rank_body body = options->eval_only ? evaluate_rank : train_rank;
    if (launched)
        return poe_ranks_mpi(options, status, body);
    poe_log_settle(true);
    return status == POE_OK ? poe_ranks_threads(poe_options_rank_count(options), options, body) : poe_exit_status(status);
}
