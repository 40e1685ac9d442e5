/* SPDX-License-Identifier: MIT
 * poe-pipe plan: what a run would be like, by the theory of its schedule. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pipeline/plan.h"
#include "pipeline/run.h"
#include "pipeline/settings.h"
#include "src/emulation.h"
#include "src/log.h"
#include "stages/cpu/cpu.h"
#include "tools/programs.h"
#include "tools/ranks.h"

enum { SOURCE_BYTES = 512 };

/* Where times come from, in the form that a plan takes them. */
typedef struct sources {
    poe_calibration calibration;
    poe_theory_rank given[POE_THEORY_RANKS];
    poe_theory_link down[POE_THEORY_RANKS], up[POE_THEORY_RANKS];
    char rates[SOURCE_BYTES], network[SOURCE_BYTES];
} sources;

static poe_status out_of_memory(void)
{
    poe_error("out of memory for the plan");
    return POE_FAILED;
}

static poe_status read_emulation(const poe_options *o, int n_ranks, sources *from)
{
    poe_emulation emulation;
    bool replicated = strcmp(o->schedule, "ddp") == 0;
    if (!replicated && o->stages.count != n_ranks) {
        poe_error("--emulate-compute gives the times of the %d stages of --stages; --ranks: found %d, allowed is %d",
                  o->stages.count, n_ranks, o->stages.count);
        return POE_BAD_INPUT;
    }
    poe_status status = poe_emulation_parse(o->emulate_compute, o->stages.count, &emulation);
    for (int k = 0; status == POE_OK && k < n_ranks; k++) {
        const double *seconds = emulation.seconds[replicated ? 0 : k];
        from->given[k] = (poe_theory_rank){.forward = seconds[POE_EMULATED_FORWARD],
                                           .backward = seconds[POE_EMULATED_BACKWARD],
                                           .backward_input = seconds[POE_EMULATED_BACKWARD_INPUT],
                                           .backward_weight = seconds[POE_EMULATED_BACKWARD_WEIGHT],
                                           .update_own = seconds[POE_EMULATED_OPTIMIZER]};
    }
    snprintf(from->rates, SOURCE_BYTES, "given: --emulate-compute %.400s", o->emulate_compute);
    return status;
}

static poe_status calibrate(const poe_options *o, int n_ranks, sources *from)
{
    poe_model *model = malloc(sizeof(*model));
    poe_status status = model ? poe_settings_model(o, o->vocab_size, model) : out_of_memory();
    int threads = poe_run_threads(o, n_ranks);
    poe_calibration *c = &from->calibration;
    if (status == POE_OK)
        status = poe_calibrate(o, model, threads, c);
    free(model);
    if (status != POE_OK)
        return status;
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    int used = snprintf(from->rates, SOURCE_BYTES, "measured in %.1f s with %d thread%s, OpenBLAS %s", c->seconds,
                        threads, threads == 1 ? "" : "s", poe_blas_kernels());
    if (c->rows < (size_t)o->device_batch_size || c->positions < (size_t)o->sequence_len)
        used += snprintf(from->rates + used, SOURCE_BYTES - (size_t)used,
                         ", on %zu x %zu tokens of a micro-batch's %d x %d", c->rows, c->positions, o->device_batch_size,
                         o->sequence_len);
    if (c->narrower > 1)
        used += snprintf(from->rates + used, SOURCE_BYTES - (size_t)used, ", with a %dth of the width", c->narrower);
    if ((long)n_ranks * threads > cores)
        snprintf(from->rates + used, SOURCE_BYTES - (size_t)used,
                 "; the %ld cores here are fewer than %d ranks want: this is a plan for ranks with cores of their own",
                 cores, n_ranks);
    return POE_OK;
}

static poe_theory_link theory_of(const poe_net_link *link)
{
    return (poe_theory_link){.latency = link->delay, .bandwidth = link->bandwidth / 8, .jitter = link->jitter};
}

/* Jitter only says how late messages may be, and loss is left out: what they do is a matter of chance. */
static poe_status read_network(const poe_options *o, int n_ranks, sources *from)
{
    poe_net net;
    poe_status status = poe_ranks_net(o, n_ranks, &net);
    for (int k = 0; status == POE_OK && n_ranks > 1 && k < n_ranks; k++) {
        int next = (k + 1) % n_ranks;
        from->down[k] = theory_of(poe_net_link_of(&net, k, next));
        from->up[k] = theory_of(poe_net_link_of(&net, next, k));
    }
    snprintf(from->network, SOURCE_BYTES, "--net %.400s, without jitter and loss", o->net);
    poe_net_free(&net);
    return status;
}

static void describe_links(const poe_options *o, sources *from)
{
    const poe_calibration *c = &from->calibration;
    if (o->emulate_compute)
        snprintf(from->network, SOURCE_BYTES, "none: messages take no time");
    else
        snprintf(from->network, SOURCE_BYTES, "between threads here: %.0f us, %.2f GB/s", c->latency * 1e6,
                 c->bandwidth / 1e9);
}

static poe_status print_plan(const poe_plan_settings *settings, const sources *from)
{
    poe_plan *plan = malloc(sizeof(*plan));
    poe_status status = plan ? poe_plan_make(settings, plan) : out_of_memory();
    json_t *json = NULL;
    if (status == POE_OK && settings->options->json) {
        json = poe_plan_json(settings, plan, from->rates, from->network);
        if (json && json_dumpf(json, stdout, JSON_INDENT(1)) == 0)
            putchar('\n');
        else
            status = out_of_memory();
    } else if (status == POE_OK) {
        poe_plan_print(settings, plan, from->rates, from->network);
    }
    json_decref(json);
    free(plan);
    return status;
}

int poe_program_plan(char **argv, const poe_options *options)
{
    poe_options *o = malloc(sizeof(*o));
    sources *from = calloc(1, sizeof(*from));
    poe_kernels kernels;
    poe_status status = o && from ? poe_kernels_parse(options->kernels, &kernels) : out_of_memory();
    if (status == POE_OK) {
        poe_blas_ensure(kernels, argv);
        *o = *options;
        o->vocab_size = o->vocab_size ? o->vocab_size : POE_OPTION_VOCAB;
        poe_plan_settings settings = {.options = o, .n_ranks = o->ranks ? o->ranks : o->stages.count};
        bool given = o->emulate_compute != NULL, networked = o->net && strcmp(o->net, "none") != 0;
        status = given ? read_emulation(o, settings.n_ranks, from) : calibrate(o, settings.n_ranks, from);
        if (status == POE_OK && networked)
            status = read_network(o, settings.n_ranks, from);
        if (!networked)
            describe_links(o, from);
        settings.given = given ? from->given : NULL;
        settings.calibration = given ? NULL : &from->calibration;
        settings.down = networked ? from->down : NULL;
        settings.up = networked ? from->up : NULL;
        if (status == POE_OK)
            status = print_plan(&settings, from);
    }
    free(from);
    free(o);
    return poe_exit_status(status);
}
