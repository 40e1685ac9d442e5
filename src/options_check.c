/* SPDX-License-Identifier: MIT
 * What must hold between flags and needs no model to be checked. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "src/emulation.h"
#include "src/log.h"
#include "src/options_table.h"

static poe_status check_sync(poe_options *options)
{
    int value, used = 0;
    options->sync_delay = options->sync_every = 0;
    if (strcmp(options->sync, "exact") == 0)
        return POE_OK;
    if (strcmp(options->sync, "stale") == 0)
        strcpy(options->sync, "stale:1");
    const char *colon = strchr(options->sync, ':');
    size_t digits = colon ? strspn(colon + 1, "0123456789") : 0;
    bool number = colon && digits > 0 && digits < 7 && !colon[1 + digits];
    if (number && sscanf(options->sync, "stale:%d%n", &value, &used) == 1 && used && value >= 1 &&
        value <= POE_OPTION_DELAY) {
        options->sync_delay = value;
        return POE_OK;
    }
    if (number && sscanf(options->sync, "every:%d%n", &value, &used) == 1 && used && value >= 1) {
        options->sync_every = value;
        return POE_OK;
    }
    poe_error(
        "--sync: found \"%s\", allowed is exact, stale, stale:D (D from 1 to %d) or every:N (N from 1 to 999999)",
        options->sync, POE_OPTION_DELAY);
    return POE_BAD_INPUT;
}

static poe_status check_batch(const poe_options *options)
{
    int64_t micro = (int64_t)options->device_batch_size * options->sequence_len;
    int64_t total = options->total_batch_size, below = total / micro * micro;
    if (total % micro == 0)
        return POE_OK;
    int64_t nearest = below == 0 || total - below > micro / 2 ? below + micro : below;
    poe_error("--total-batch-size: found %lld, allowed are multiples of %lld tokens (--device-batch-size %d rows of "
              "--sequence-len %d); the nearest is %lld",
              (long long)total, (long long)micro, options->device_batch_size, options->sequence_len,
              (long long)nearest);
    return POE_BAD_INPUT;
}

static poe_status check_model(const poe_options *options)
{
    if (options->window_pattern[strspn(options->window_pattern, "SL")]) {
        poe_error("--window-pattern: found \"%s\", allowed are the letters S and L", options->window_pattern);
        return POE_BAD_INPUT;
    }
    return POE_OK;
}

static bool is_replicated(const poe_options *options)
{
    return strcmp(options->schedule, "ddp") == 0;
}

static bool is_interleaved(const poe_options *options)
{
    return strcmp(options->schedule, "interleaved") == 0;
}

int poe_options_virtual(const poe_options *options)
{
    if (!is_interleaved(options))
        return 1;
    return options->virtual_stages ? options->virtual_stages : 2;
}

/* Ranks that take turns would wait for each other's part of a sum, so interleaved is for the objective without one. */
static poe_status check_interleaved(const poe_options *options)
{
    int stages = options->ranks > 1 ? options->ranks : options->stages.count, virtual = poe_options_virtual(options);
    bool interleaved = is_interleaved(options);
    if (!interleaved && options->virtual_stages && poe_options_given(options, "virtual-stages")) {
        poe_error("--virtual-stages %d is for --schedule interleaved; found --schedule %s (0 goes with any)",
                  options->virtual_stages, options->schedule);
        return POE_BAD_INPUT;
    }
    if (interleaved && virtual == 1) {
        poe_error("--virtual-stages: found 1, which is --schedule 1f1b; allowed are 2 to %d (0: 2)", POE_OPTION_STAGES);
        return POE_BAD_INPUT;
    }
    if (interleaved && strcmp(options->objective, "bp") != 0) {
        poe_error("--schedule interleaved needs --objective bp; found %s", options->objective);
        return POE_BAD_INPUT;
    }
    if (stages % virtual == 0)
        return POE_OK;
    poe_error("--schedule interleaved puts --virtual-stages %d on each processor, which must divide the stages of --stages; "
              "found %d", virtual, stages);
    return POE_BAD_INPUT;
}

/* Which schedules an objective has: gradients flow back, or they do not. */
static poe_status check_schedule(const poe_options *options)
{
    const char *schedule = options->schedule, *objective = options->objective;
    bool local = strcmp(objective, "poe") == 0, streams = strcmp(schedule, "poe") == 0;
    poe_status status = check_interleaved(options);
    if (status != POE_OK)
        return status;
    if (strcmp(schedule, "auto") == 0 || (local && streams))
        return POE_OK;
    if (local) {
        poe_error("--schedule %s is for gradients that flow back between stages, and --objective poe has none; allowed is "
                  "poe (or --objective bp, hierarchical)", schedule);
        return POE_BAD_INPUT;
    }
    if (streams) {
        poe_error("--schedule poe is for stages that learn from their own losses; --objective %s allows gpipe, 1f1b, zb-h1, "
                  "zb-h2%s", objective, strcmp(objective, "bp") == 0 ? ", interleaved, ddp" : "");
        return POE_BAD_INPUT;
    }
    if (!is_replicated(options))
        return POE_OK;
    if (strcmp(objective, "bp") != 0) {
        poe_error("--schedule ddp puts the whole model on every rank, and needs --objective bp; found %s", objective);
        return POE_BAD_INPUT;
    }
    if (options->stages.count == 1)
        return POE_OK;
    poe_error("--schedule ddp puts the whole model on every rank: give --stages one number, all layers; found %d stages",
              options->stages.count);
    return POE_BAD_INPUT;
}

/* bp has one replica of every parameter, so there is no sum to be late. */
static poe_status check_shared(const poe_options *options)
{
    bool exact = !options->sync_delay && !options->sync_every, whole = strcmp(options->wire_shared, "fp32") == 0;
    if (strcmp(options->objective, "bp") != 0 || (exact && whole))
        return POE_OK;
    poe_error("--%s %s: --objective bp shares no parameters between stages; allowed is %s", exact ? "wire-shared" : "sync",
              exact ? options->wire_shared : options->sync, exact ? "fp32" : "exact");
    return POE_BAD_INPUT;
}

static poe_status check_wire(const poe_options *options)
{
    if (!is_replicated(options) || strcmp(options->wire, "fp32") == 0)
        return POE_OK;
    poe_error("--wire %s: under --schedule ddp nothing crosses between stages; allowed is fp32", options->wire);
    return POE_BAD_INPUT;
}

int poe_options_rank_count(const poe_options *options)
{
    int replicas = options->ranks ? options->ranks : 1;
    return is_replicated(options) ? replicas : options->stages.count;
}

bool poe_options_agents(const poe_options *o, int processes)
{
    bool carried = strcmp(o->transport, "fabric") == 0 || strcmp(o->transport, "auto") == 0;
    bool trains = !o->eval_only && !o->trace && !is_replicated(o);
    return strcmp(o->agents, "off") != 0 && processes > 1 && carried && trains;
}

poe_status poe_options_check_ranks(const poe_options *options, int ranks)
{
    int64_t micro = options->total_batch_size / ((int64_t)options->device_batch_size * options->sequence_len);
    if (!is_replicated(options) || options->eval_only || micro % ranks == 0)
        return POE_OK;
    poe_error("--schedule ddp deals the %lld micro-batches of a step (--total-batch-size / (--device-batch-size * "
              "--sequence-len)) to %d ranks, which must divide them", (long long)micro, ranks);
    return POE_BAD_INPUT;
}

static poe_status check_ranks(const poe_options *options)
{
    if (is_replicated(options))
        return options->ranks ? poe_options_check_ranks(options, options->ranks) : POE_OK;
    int wanted = options->stages.count + options->spares;
    if (options->ranks == wanted || (options->ranks <= 1 && !options->spares) || !options->ranks)
        return POE_OK;
    if (options->spares) {
        poe_error("--ranks: found %d with %d stages in --stages and --spares %d, allowed is one rank for each (%d)",
                  options->ranks, options->stages.count, options->spares, wanted);
        return POE_BAD_INPUT;
    }
    poe_error("--ranks: found %d with %d stages in --stages, allowed is one rank per stage (%d), or 1 for all of them",
              options->ranks, options->stages.count, options->stages.count);
    return POE_BAD_INPUT;
}

static poe_status check_ports(poe_options *options)
{
    int used = 0;
    options->port_low = options->port_high = 0;
    if (!options->port_range[0])
        return POE_OK;
    size_t digits = strspn(options->port_range, "0123456789-");
    if (digits == strlen(options->port_range) && digits < 12 &&
        sscanf(options->port_range, "%d-%d%n", &options->port_low, &options->port_high, &used) == 2 &&
        used == (int)digits && options->port_low >= 1 && options->port_low <= options->port_high &&
        options->port_high <= 65535)
        return POE_OK;
    poe_error("--port-range: found \"%s\", allowed is A-B with A and B from 1 to 65535 and A not above B",
              options->port_range);
    return POE_BAD_INPUT;
}

/* An agent looks after a stage process that trains, and carries its messages over the fabric. */
static poe_status check_agents(const poe_options *options)
{
    const char *transport = options->transport;
    bool carried = strcmp(transport, "auto") == 0 || strcmp(transport, "fabric") == 0;
    if (strcmp(options->agents, "on") != 0 || (carried && !options->trace && !options->eval_only && !is_replicated(options)))
        return POE_OK;
    if (!carried)
        poe_error("--agents on: agents carry messages over the fabric; found --transport %s, allowed are auto and fabric",
                  transport);
    else if (is_replicated(options))
        poe_error("--agents on is for ranks that are stages; found --schedule ddp, allowed is any other, or --agents auto");
    else
        poe_error("--agents on and --%s exclude each other; allowed with it is --agents auto or off",
                  options->trace ? "trace" : "eval-only");
    return POE_BAD_INPUT;
}

/* A spare is an agent that waits for a stage; an emulated network cannot move along. */
static poe_status check_spares(const poe_options *options)
{
    const char *transport = options->transport;
    const char *found = NULL;
    if (!options->spares)
        return POE_OK;
    if (is_replicated(options))
        found = "--schedule ddp";
    else if (strcmp(transport, "mpi") == 0)
        found = "--transport mpi";
    else if (strcmp(transport, "inproc") == 0)
        found = "--transport inproc";
    else if (strcmp(options->agents, "off") == 0)
        found = "--agents off";
    else if (options->trace)
        found = "--trace";
    else if (options->eval_only)
        found = "--eval-only";
    else if (options->net && strcmp(options->net, "none") != 0)
        found = "--net";
    if (!found)
        return POE_OK;
    if (strcmp(found, "--net") == 0)
        poe_error("--spares and --net exclude each other: what an emulated network holds back cannot move with a stage");
    else
        poe_error("--spares is for ranks with agents, and %s has none; give one of them", found);
    return POE_BAD_INPUT;
}

/* Where gradients flow back, no stage can leave anything out. */
static poe_status check_left_out(const poe_options *options)
{
    const char *words = strcmp(options->recover, "skip") == 0      ? "--recover skip"
                        : strcmp(options->on_nan, "skip") == 0     ? "--on-nan skip"
                        : strcmp(options->outage, "continue") == 0 ? "--outage continue"
                                                                   : NULL;
    if (!words || strcmp(options->objective, "poe") == 0)
        return POE_OK;
    poe_error("%s lets a stage go on without the others: found --objective %s, allowed with it is poe", words,
              options->objective);
    return POE_BAD_INPUT;
}

/* One sentence each: what must not be without, or beside, what. */
static const char *conflict(const poe_options *options)
{
    bool latest = options->resume && strcmp(options->resume, "latest") == 0;
    if (options->resume && options->init_from && poe_options_given(options, "init-from"))
        return "--resume and --init-from exclude each other: both say where the weights come from";
    if (latest && !options->out)
        return "--resume latest needs --out, the folder of the run";
    if (options->resume_older && !options->resume)
        return "--resume-older needs --resume";
    if (options->eval_only && !options->resume && !options->init_from)
        return "--eval-only needs weights: --resume with a run or checkpoint, or --init-from FILE.safetensors";
    if (options->eval_only && options->dry_run)
        return "--eval-only and --dry-run exclude each other";
    return NULL;
}

/* Nothing is learnt, so there is nothing to evaluate or to hand on. Checkpoints, asked for by --save-every, are for their
 * time, and for runs that are ended and resumed. */
static poe_status check_emulation(const poe_options *options)
{
    const struct {
        bool wanted;
        const char *name;
    } needs_weights[] = {{options->export_path, "export"},
                         {options->init_from, "init-from"},
                         {options->eval_only, "eval-only"},
                         {options->eval_every, "eval-every"}};
    if (!options->emulate_compute)
        return POE_OK;
    for (int i = 0; i < 4; i++) {
        if (!needs_weights[i].wanted)
            continue;
        poe_error("--emulate-compute computes nothing, and --%s needs weights; give one of them", needs_weights[i].name);
        return POE_BAD_INPUT;
    }
    poe_emulation emulation;
    return poe_emulation_parse(options->emulate_compute, options->stages.count, &emulation);
}

static poe_status check_train(poe_options *options)
{
    const char *sentence = conflict(options);
    if (sentence) {
        poe_error("%s", sentence);
        return POE_BAD_INPUT;
    }
    poe_status status = check_sync(options);
    if (status == POE_OK)
        status = check_model(options);
    if (status == POE_OK)
        status = check_schedule(options);
    if (status == POE_OK)
        status = check_shared(options);
    if (status == POE_OK)
        status = check_wire(options);
    if (status == POE_OK)
        status = check_batch(options);
    if (status == POE_OK)
        status = check_ranks(options);
    if (status == POE_OK)
        status = check_emulation(options);
    if (status == POE_OK)
        status = check_agents(options);
    if (status == POE_OK)
        status = check_spares(options);
    if (status == POE_OK)
        status = check_left_out(options);
    return status == POE_OK ? check_ports(options) : status;
}

/* As a run would check them, but that --ranks may ask for other stages than --stages has. */
static poe_status check_plan(poe_options *options)
{
    int layers = 0;
    poe_status status = check_sync(options);
    if (status == POE_OK)
        status = check_model(options);
    if (status == POE_OK)
        status = check_schedule(options);
    if (status == POE_OK)
        status = check_shared(options);
    if (status == POE_OK)
        status = check_batch(options);
    if (status != POE_OK || is_replicated(options))
        return status == POE_OK && options->ranks ? poe_options_check_ranks(options, options->ranks) : status;
    for (int k = 0; k < options->stages.count; k++)
        layers += options->stages.layers[k];
    if (options->ranks <= layers)
        return POE_OK;
    poe_error("--ranks: found %d with %d layers in --stages, allowed is at most one rank per layer (%d)", options->ranks,
              layers, layers);
    return POE_BAD_INPUT;
}

static const char *missing(const poe_options *options, poe_command command)
{
    bool checkpoint = options->checkpoint != NULL;
    switch (command) {
    case POE_COMMAND_GENERATE:
        if (options->stage >= 0 && options->prefix >= 0)
            return "--stage and --prefix exclude each other";
        return !checkpoint ? "--checkpoint DIR" : !options->prompt ? "--prompt TEXT" : NULL;
    case POE_COMMAND_INSPECT:
        return !checkpoint ? "a path: a checkpoint, a run folder or one of their files" : NULL;
    case POE_COMMAND_EXPORT:
        return !checkpoint ? "--checkpoint DIR" : !options->export_path ? "--export FILE.safetensors" : NULL;
    case POE_COMMAND_DATA:
        if (options->tokenizer && options->vocab_size)
            return "--tokenizer and --vocab-size exclude each other: a tokenizer has its size";
        return !options->data.count ? "--data FILE" : !options->out ? "--out DIR" : NULL;
    default:
        return NULL;
    }
}

poe_status poe_options_check(poe_options *options, poe_command command)
{
    if (command == POE_COMMAND_TRAIN)
        return check_train(options);
    if (command == POE_COMMAND_PLAN)
        return check_plan(options);
    const char *what = missing(options, command);
    if (!what)
        return POE_OK;
    if (strstr(what, "exclude"))
        poe_error("%s", what);
    else
        poe_error("%s needs %s", poe_command_title(command), what);
    return POE_BAD_INPUT;
}
