/* SPDX-License-Identifier: MIT
 * poe-pipe generate and poe-pipe export: stages of a checkpoint as threads of this process. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pipeline/generate.h"
#include "pipeline/interchange.h"
#include "pipeline/run.h"
#include "src/log.h"
#include "tools/programs.h"
#include "tools/ranks.h"

/* The options of the run that made the checkpoint, with the command's own flags beside them. */
static poe_status options_of_run(const poe_options *command, poe_options *run)
{
    char *argv[] = {"poe-pipe", "--resume", command->checkpoint, NULL};
    poe_command train;
    poe_status status = poe_options_parse(3, argv, &train, run);
    if (status != POE_OK)
        return status;
    run->prompt = command->prompt;
    run->export_path = command->export_path;
    memcpy(run->export_dtype, command->export_dtype, sizeof(run->export_dtype));
    memcpy(run->aggregate, command->aggregate, sizeof(run->aggregate));
    memcpy(run->kernels, command->kernels, sizeof(run->kernels));
    run->resume_older = command->resume_older;
    run->max_tokens = command->max_tokens;
    run->temperature = command->temperature;
    run->top_k = command->top_k;
    run->stage = command->stage;
    run->prefix = command->prefix;
    run->threads = command->threads;
    run->seed = command->seed;
    run->device_batch_size = 1;
    return POE_OK;
}

static void free_options_of_run(poe_options *run)
{
    run->prompt = run->export_path = NULL; /* the command's */
    poe_options_free(run);
}

static int last_stage(const poe_options *o)
{
    return o->stage >= 0 ? o->stage : o->prefix >= 0 ? o->prefix : o->stages.count - 1;
}

/* <|bos|> and the prompt's tokens; the caller frees. */
static poe_status encode_prompt(const poe_run *run, int32_t **tokens, int32_t *n)
{
    poe_encoder *encoder;
    const int32_t *ids;
    size_t count, bad_byte;
    const char *prompt = run->options->prompt;
    poe_status status = poe_encoder_create(run->corpus.tokenizer, &encoder);
    if (status != POE_OK)
        return status;
    status = poe_encoder_encode(encoder, prompt, strlen(prompt), &ids, &count, &bad_byte);
    if (status == POE_BAD_INPUT)
        poe_error("--prompt is not valid UTF-8 at byte %zu", bad_byte);
    *tokens = status == POE_OK ? malloc((count + 1) * sizeof(int32_t)) : NULL;
    if (*tokens) {
        (*tokens)[0] = poe_tokenizer_bos(run->corpus.tokenizer);
        memcpy(*tokens + 1, ids, count * sizeof(int32_t));
        *n = (int32_t)count + 1;
    }
    poe_encoder_destroy(encoder);
    return status == POE_OK && !*tokens ? POE_FAILED : status;
}

static poe_status generate_text(poe_run *run)
{
    const poe_options *o = run->options;
    poe_sampling sampling = {.first = o->stage >= 0 ? o->stage : poe_run_first_head(run),
                             .last = last_stage(o),
                             .max_tokens = o->max_tokens,
                             .temperature = o->temperature,
                             .top_k = o->top_k,
                             .seed = (uint64_t)o->seed};
    int32_t *prompt = NULL, n = 0, bos = 0;
    poe_status status = POE_OK;
    if (run->rank == 0) {
        status = encode_prompt(run, &prompt, &n);
        bos = poe_tokenizer_bos(run->corpus.tokenizer);
    }
    status = poe_comm_agree(run->comm, status);
    if (status == POE_OK && run->rank == 0)
        fputs(o->prompt, stdout);
    if (status == POE_OK)
        status = poe_generate(&run->evaluator, &sampling, prompt, n, bos, poe_emit_text, run->corpus.tokenizer);
    if (status == POE_OK && run->rank == 0)
        putchar('\n');
    free(prompt);
    return status;
}

static poe_status check_tokenizer(const poe_run *run)
{
    poe_status status = POE_OK;
    if (!run->corpus.has_tokenizer) {
        poe_error("%s was trained on tokens without a tokenizer.json, so there is no text to generate",
                  run->options->resume);
        status = POE_BAD_INPUT;
    }
    return poe_comm_agree(run->comm, status);
}

static poe_status generate_run(poe_run *run)
{
    poe_status status = check_tokenizer(run);
    return status == POE_OK ? generate_text(run) : status;
}

static poe_status generate_rank(poe_comm *comm, const poe_options *options)
{
    return poe_run_do(comm, options, POE_PURPOSE_USE, generate_run);
}

static poe_status export_run(poe_run *run)
{
    const poe_options *o = run->options;
    poe_dtype dtype = strcmp(o->export_dtype, "bf16") == 0 ? POE_BF16 : POE_F32;
    return poe_export(o->export_path, dtype, &run->model, run->comm, run->stage, run->id);
}

static poe_status export_rank(poe_comm *comm, const poe_options *options)
{
    return poe_run_do(comm, options, POE_PURPOSE_USE, export_run);
}

static poe_status check_view(const poe_options *o)
{
    int asked = o->stage >= 0 ? o->stage : o->prefix;
    if (asked >= 0 && strcmp(o->objective, "bp") == 0) {
        poe_error("--%s %d: the model was trained with --objective bp, so it is the whole that predicts; generate without "
                  "--stage and --prefix", o->stage >= 0 ? "stage" : "prefix", asked);
        return POE_BAD_INPUT;
    }
    if (asked < o->stages.count)
        return POE_OK;
    poe_error("--%s %d: the checkpoint has stages 0..%d", o->stage >= 0 ? "stage" : "prefix", asked, o->stages.count - 1);
    return POE_BAD_INPUT;
}

static int run_command(const poe_options *command, char **argv, poe_rank_body body)
{
    poe_options run;
    poe_kernels kernels;
    poe_status status = options_of_run(command, &run);
    if (status == POE_OK)
        status = check_view(&run);
    if (status == POE_OK)
        status = poe_kernels_parse(run.kernels, &kernels);
    int exit_status = poe_exit_status(status);
    if (status == POE_OK) {
        poe_blas_ensure(kernels, argv);
        exit_status = poe_ranks_threads(last_stage(&run) + 1, &run, body);
    }
    free_options_of_run(&run);
    return exit_status;
}

int poe_program_generate(char **argv, const poe_options *options)
{
    return run_command(options, argv, generate_rank);
}

int poe_program_export(char **argv, const poe_options *options)
{
    return run_command(options, argv, export_rank);
}
