/* SPDX-License-Identifier: MIT
 * One rank's part of a run: everything that training, evaluation, generation and export share, made in one fixed order
 * of collective steps so that every failure is said once and ends all ranks alike. */
#ifndef POE_PIPELINE_RUN_H
#define POE_PIPELINE_RUN_H

#include <stdbool.h>
#include <stdint.h>

#include "comm/comm.h"
#include "pipeline/accounts.h"
#include "pipeline/checkpoint.h"
#include "pipeline/compute.h"
#include "pipeline/corpus.h"
#include "pipeline/edges.h"
#include "pipeline/evaluate.h"
#include "pipeline/layout.h"
#include "pipeline/metrics.h"
#include "pipeline/replicas.h"
#include "pipeline/shared.h"
#include "pipeline/streams.h"
#include "pipeline/trace.h"
#include "pipeline/turns.h"
#include "src/options.h"
#include "stages/cpu/cpu.h"
#include "stages/stage.h"

typedef enum poe_purpose {
    POE_PURPOSE_TRAIN,
    POE_PURPOSE_EVALUATE, /* --eval-only on a checkpoint */
    POE_PURPOSE_USE,      /* generate, export: a checkpoint's weights, no data */
} poe_purpose;

/* Bytes that a stage of a training run takes: its arenas, shared gradients that wait their turn, the links' buffers of
 * micro-batches, the kernels' scratch. */
typedef struct poe_run_memory {
    uint64_t parameters, gradients, optimizer, activations, pending, messages, scratch;
    uint64_t snapshots;      /* at the agent, where there is one, beside these */
    poe_recompute recompute; /* what backward makes again, so that it is no more */
} poe_run_memory;

/* What a stage process that was started again does not repeat (--recover skip): everything from step `from` on and before
 * `micro` of `step`, which is how far its predecessor had got. */
typedef struct poe_absence {
    bool ends; /* it is still to end */
    int64_t from, step;
    int micro;
} poe_absence;

/* Whether the run goes on without this stage (--outage continue). */
typedef struct poe_outage {
    bool allowed; /* it would, if need be */
    bool absent;  /* this stage cannot work in the step at hand */
    bool missed;  /* a micro-batch of the step at hand went by, here or at a stage before */
} poe_outage;

typedef struct poe_run {
    const poe_options *options; /* borrowed */
    poe_purpose purpose;
    poe_comm *comm;             /* borrowed */
    int rank, size;
    poe_layout layout;
    int n_stages, index;        /* stages at work, and which of them is this rank's */
    uint64_t id;                /* random, the same on every rank */

    char out[POE_PATH_MAX];       /* the run's folder */
    char resumed[POE_PATH_MAX];   /* the checkpoint that was loaded, or "" */
    char resumed_run[POE_PATH_MAX]; /* the folder of the run that it is in; "": in none */
    json_t *facts;                /* its manifest; NULL when nothing was resumed */
    int64_t first_step;           /* updates that the loaded weights have had */
    uint64_t data_hash;           /* running hash of the tokens trained on */

    poe_kernels kernels;
    char arithmetic[64];          /* what rounding depends on: "avx512, products by oneDNN (AVX-512)" */
    int threads;
    poe_run_memory memory[POE_MAX_STAGES]; /* of every rank of a training run */
    poe_corpus corpus;
    poe_model model;
    poe_optimizer_config optimizer;
    poe_backend *backend;
    poe_stage *stage;
    poe_compute compute;          /* what training does with the stage */
    poe_absence absence;          /* of a process that goes on without what it lost */
    poe_outage outage;
    poe_trace *trace;             /* of training, with --trace; else NULL */
    poe_accounts accounts;        /* of training: running between its first step and its end */
    poe_edges edges;
    poe_streams streams;
    poe_shared_rule shared;
    poe_replicas replicas;        /* of a training run with --schedule ddp */
    poe_turns turns;              /* of a training run: with --schedule interleaved, else nobody's */
    poe_checkpoint_store *store;
    poe_evaluator evaluator;
    float *evaluation_memory;
    poe_metrics metrics;          /* last rank of a training run */
} poe_run;

/* Collective. Makes the run: agreement on the configuration and kernels, folders, checkpoint, tokenizer, data, model,
 * stage, links. POE_BAD_INPUT or POE_FAILED on every rank, said by one. The caller calls poe_run_close() in any case. */
poe_status poe_run_open(poe_run *run, poe_comm *comm, const poe_options *options, poe_purpose purpose);
void poe_run_close(poe_run *run);
/* Opens a run, does `work` on it, closes it: the body of a rank. */
poe_status poe_run_do(poe_comm *comm, const poe_options *options, poe_purpose purpose, poe_status (*work)(poe_run *run));

static inline bool poe_run_is_last(const poe_run *run)
{
    return run->rank == run->size - 1;
}

/* The stages that predict, and so have losses and scores: all of them, or under bp the last one. */
static inline int poe_run_first_head(const poe_run *run)
{
    return run->model.config.objective == POE_OBJECTIVE_BP ? run->n_stages - 1 : 0;
}

static inline int poe_run_heads(const poe_run *run)
{
    return run->n_stages - poe_run_first_head(run);
}

/* With --recompute, or else the first choice that fits --memory-limit (the last when none does). `agents`: whether the
 * rank has one. Computed without allocating any of it. */
poe_status poe_run_size(const poe_options *options, const poe_model *model, const poe_layout *layout, int stage,
                        int threads, bool agents, poe_run_memory *memory);
uint64_t poe_run_memory_total(const poe_run_memory *memory); /* of the stage, without snapshots */
/* POE_BAD_INPUT when that and the snapshots are more than --memory-limit. */
poe_status poe_run_check_memory(const poe_options *options, int stage, const poe_run_memory *memory);

/* Threads of each of `ranks_on_host` ranks: --threads, or the host's cores shared out, at least 1. Ranks that take turns
 * have their processor's share each. */
int poe_run_threads(const poe_options *options, int ranks_on_host);

#endif
