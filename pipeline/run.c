/* SPDX-License-Identifier: MIT */
#include "pipeline/run.h"

#include <errno.h>
#include <math.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "comm/agent/board.h"
#include "pipeline/interchange.h"
#include "pipeline/settings.h"
#include "pipeline/snapshot.h"
#include "src/log.h"
#include "src/manifest.h"

static int cores_of_host(void)
{
    cpu_set_t set;
    return sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
}

int poe_run_threads(const poe_options *options, int ranks_on_host)
{
    if (options->threads)
        return options->threads;
    int share = cores_of_host() * poe_options_virtual(options) / ranks_on_host;
    return share > 1 ? share : 1;
}

/* --- agreement -------------------------------------------------------------------------------------------------------- */

/* Rank 0's text at everyone; the caller frees *copy. */
static poe_status broadcast_text(poe_comm *comm, const char *text, char **copy)
{
    uint64_t length = text ? strlen(text) : 0;
    poe_status status = poe_comm_broadcast(comm, 0, &length, sizeof(length));
    if (status != POE_OK)
        return status;
    *copy = calloc(length + 1, 1);
    if (!*copy) {
        poe_error("out of memory for a text of %llu bytes", (unsigned long long)length);
        return POE_FAILED;
    }
    if (poe_comm_rank(comm) == 0 && length)
        memcpy(*copy, text, length);
    return poe_comm_broadcast(comm, 0, *copy, length);
}

static poe_status compare_options(const poe_options *options, const char *rank0)
{
    json_t *mine = poe_options_json(options), *theirs = json_loads(rank0, 0, NULL);
    char a[256], b[256];
    const char *key = poe_options_difference(mine, theirs, a, b);
    if (key)
        poe_error("this rank got another configuration than rank 0: %s is %s here and %s there; "
                  "all ranks must be started with the same flags", key, a, b);
    json_decref(mine);
    json_decref(theirs);
    return key ? POE_BAD_INPUT : POE_OK;
}

static poe_status agree_on_options(poe_run *r)
{
    char *text = NULL, *rank0 = NULL;
    if (r->rank == 0) {
        json_t *json = poe_options_json(r->options);
        text = json_dumps(json, JSON_COMPACT);
        json_decref(json);
    }
    poe_status status = broadcast_text(r->comm, text, &rank0);
    if (status == POE_OK)
        status = poe_comm_agree(r->comm, compare_options(r->options, rank0));
    free(text);
    free(rank0);
    return status;
}

static bool wants_bf16(const poe_options *o)
{
    return strcmp(o->dtype, "bf16") == 0;
}

static poe_status agree_on_kernels(poe_run *r)
{
    poe_status status = poe_kernels_parse(r->options->kernels, &r->kernels);
    bool computes = !r->options->emulate_compute;
    if (status == POE_OK && computes)
        status = poe_blas_check();
    if (status == POE_OK && computes && wants_bf16(r->options))
        status = poe_bf16_check(r->kernels);
    status = poe_comm_agree(r->comm, status);
    char all[POE_MAX_STAGES][sizeof(r->arithmetic)];
    snprintf(r->arithmetic, sizeof(r->arithmetic), "%s, products by %s (%s)", poe_kernels_name(r->kernels),
             poe_blas_library(), poe_blas_kernels());
    if (status == POE_OK)
        status = poe_comm_gather(r->comm, r->arithmetic, all, sizeof(r->arithmetic));
    if (status != POE_OK)
        return status;
    for (int k = 0; k < r->size && status == POE_OK; k++)
        if (strcmp(all[k], r->arithmetic) != 0) {
            poe_error("ranks chose different kernels: %s here, %s on rank %d; give all of them the same --kernels and "
                      "the same build", r->arithmetic, all[k], k);
            status = POE_BAD_INPUT;
        }
    return poe_comm_agree(r->comm, status);
}

static poe_status agree_on_id(poe_run *r)
{
    if (getrandom(&r->id, sizeof(r->id), 0) != (ssize_t)sizeof(r->id))
        r->id = (uint64_t)time(NULL) ^ ((uint64_t)getpid() << 32);
    return poe_comm_broadcast(r->comm, 0, &r->id, sizeof(r->id));
}

/* --- folders and the checkpoint to go on from --------------------------------------------------------------------------- */

static poe_status choose_out(poe_run *r)
{
    char name[POE_PATH_MAX] = "";
    if (r->rank == 0 && !r->options->out && !r->resumed_run[0]) {
        time_t now = time(NULL);
        struct tm local;
        localtime_r(&now, &local);
        strftime(name, sizeof(name), "runs/%Y-%m-%d-%H%M%S", &local);
    }
    poe_status status = poe_comm_broadcast(r->comm, 0, name, sizeof(name));
    if (status != POE_OK)
        return status;
    if (r->options->out)
        return poe_path(r->out, "%s", r->options->out);
    memcpy(r->out, r->resumed_run[0] ? r->resumed_run : name, sizeof(name));
    return POE_OK;
}

static bool same_folder(const char *a, const char *b)
{
    struct stat x, y;
    return stat(a, &x) == 0 && stat(b, &y) == 0 && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

static poe_status check_unused(const poe_run *r)
{
    char path[POE_PATH_MAX];
    poe_status status = poe_path(path, "%s/config.json", r->out);
    if (status == POE_OK && !same_folder(r->out, r->resumed_run) && access(path, F_OK) == 0) {
        poe_error("--out %s already holds a run; go on with it by --resume %s, or choose another folder", r->out, r->out);
        status = POE_BAD_INPUT;
    }
    return status;
}

/* Before the training, not after it. In --out, which is checked when it is made, there is room. */
static poe_status check_file(const poe_run *r, const char *flag, const char *path)
{
    size_t length = strlen(r->out);
    char folder[POE_PATH_MAX];
    struct stat found;
    if (!path || r->rank != 0 || (strncmp(path, r->out, length) == 0 && path[length] == '/'))
        return POE_OK;
    if (stat(path, &found) == 0 && S_ISDIR(found.st_mode)) {
        poe_error("%s: %s is a directory; give the name of a file", flag, path);
        return POE_BAD_INPUT;
    }
    const char *slash = strrchr(path, '/');
    poe_status status = poe_path(folder, "%.*s", slash ? (int)(slash - path) + 1 : 1, slash ? path : ".");
    return status == POE_OK ? poe_check_writable(folder, flag) : status;
}

/* Only looks: the folder is made once nothing else can be wrong. */
static poe_status find_out(poe_run *r)
{
    poe_status status = choose_out(r);
    bool anew = !poe_comm_replays(r->comm);
    if (status == POE_OK && anew)
        status = check_unused(r);
    if (status == POE_OK && anew)
        status = check_file(r, "--export", r->options->export_path);
    if (status == POE_OK && anew)
        status = check_file(r, "--trace", r->options->trace);
    return poe_comm_agree(r->comm, status);
}

static void remember_checkpoint(poe_run *r)
{
    char *text = r->facts ? json_dumps(r->facts, JSON_COMPACT) : NULL;
    uint64_t length = text ? strlen(text) + 1 : 0;
    poe_comm_remember(r->comm, r->resumed, sizeof(r->resumed));
    poe_comm_remember(r->comm, &length, sizeof(length));
    char *kept = calloc(length + 1, 1);
    if (kept && text)
        memcpy(kept, text, length);
    if (kept)
        poe_comm_remember(r->comm, kept, length);
    if (kept && !r->facts)
        r->facts = json_loads(kept, 0, NULL);
    free(kept);
    free(text);
}

static poe_status find_checkpoint(poe_run *r)
{
    const poe_options *o = r->options;
    if (!o->resume)
        return POE_OK;
    poe_status status = POE_OK;
    if (poe_comm_begin_once(r->comm)) /* by now it may be gone, or no longer the latest */
        status = poe_checkpoint_find(r->comm, o->resume, o->out ? o->out : "runs", o->resume_older, r->index, r->resumed,
                                     &r->facts);
    poe_comm_end_once(r->comm);
    if (status != POE_OK)
        return status;
    remember_checkpoint(r);
    r->first_step = json_integer_value(json_object_get(r->facts, "step"));
    const char *hash = json_string_value(json_object_get(r->facts, "data_hash"));
    r->data_hash = hash ? strtoull(hash, NULL, 16) : 0;
    return poe_comm_agree(r->comm, poe_checkpoint_run(r->resumed, r->resumed_run));
}

/* --- model and stage ------------------------------------------------------------------------------------------------------ */

/* Weights mean nothing under another tokenizer than the one they were trained with. */
static poe_status check_tokenizer(const poe_run *r)
{
    const char *before = json_string_value(json_object_get(r->facts, "tokenizer_hash"));
    if (!before || !r->corpus.tokenizer || strtoull(before, NULL, 16) == poe_tokenizer_hash(r->corpus.tokenizer))
        return POE_OK;
    poe_error("--tokenizer: %s is not the tokenizer that %s was trained with",
              r->options->tokenizer ? r->options->tokenizer : "the one trained on --data", r->resumed);
    return POE_BAD_INPUT;
}

/* A resumed run keeps its own tokenizer, wherever the checkpoint came from. */
static poe_status open_tokenizer(poe_run *r)
{
    char stored[POE_PATH_MAX + 16];
    const char *path = NULL;
    bool replays = poe_comm_replays(r->comm);
    if (replays || (r->resumed_run[0] && !poe_options_given(r->options, "tokenizer"))) {
        snprintf(stored, sizeof(stored), "%s/tokenizer.json", replays ? r->out : r->resumed_run);
        if (access(stored, R_OK) == 0)
            path = stored;
    }
    poe_status status =
        poe_corpus_open_tokenizer(&r->corpus, r->comm, r->options, path, poe_layout_replicated(&r->layout));
    poe_comm_remember(r->comm, &r->corpus.trained, sizeof(r->corpus.trained)); /* the next one reads what is stored */
    return status == POE_OK ? poe_comm_agree(r->comm, check_tokenizer(r)) : status;
}

/* Replicas read the data each for itself. */
static poe_status compare_data(poe_run *r)
{
    uint64_t hash = r->corpus.train_hash;
    poe_status status = poe_comm_broadcast(r->comm, 0, &hash, sizeof(hash));
    if (status == POE_OK && hash != r->corpus.train_hash) {
        poe_error("--data: this rank's %s is not what rank 0 has under that name", r->options->data.paths[0]);
        status = POE_BAD_INPUT;
    }
    return poe_comm_agree(r->comm, status);
}

static poe_status open_feeds(poe_run *r)
{
    poe_status status = poe_corpus_open_feeds(&r->corpus, r->comm, r->options, r->purpose == POE_PURPOSE_EVALUATE);
    return status == POE_OK && poe_layout_replicated(&r->layout) ? compare_data(r) : status;
}

static bool trains(const poe_run *r)
{
    return r->purpose == POE_PURPOSE_TRAIN;
}

static poe_stage_settings use_settings(const poe_options *o, int stage)
{
    return (poe_stage_settings){.stage = stage, .rows = (size_t)o->device_batch_size, .slots = 1};
}

static poe_stage_settings train_settings(const poe_options *o, const poe_layout *layout, int stage,
                                         poe_recompute recompute)
{
    return (poe_stage_settings){.stage = stage,
                                .rows = (size_t)o->device_batch_size,
                                .slots = poe_layout_slots(layout, stage),
                                .training = true,
                                .split = poe_schedule_splits(layout->order.schedule),
                                .recompute = recompute};
}

/* Every rank's memory, before any of it is allocated. */
static poe_status agree_on_memory(poe_run *r)
{
    poe_run_memory mine;
    poe_status status = poe_run_size(r->options, &r->model, &r->layout, r->index, r->threads, poe_comm_board(r->comm), &mine);
    if (status == POE_OK)
        status = poe_run_check_memory(r->options, r->index, &mine);
    status = poe_comm_agree(r->comm, status);
    return status == POE_OK ? poe_comm_gather(r->comm, &mine, r->memory, sizeof(mine)) : status;
}

static poe_status emulate_compute(poe_run *r)
{
    poe_emulation emulation;
    poe_status status = poe_emulation_parse(r->options->emulate_compute, r->options->stages.count, &emulation);
    if (status == POE_OK)
        poe_compute_emulate(&r->compute, r->stage, &r->accounts, emulation.seconds[r->index], r->options->seed, r->rank);
    return status;
}

static poe_status create_stage(poe_run *r)
{
    poe_stage_settings settings =
        trains(r) ? train_settings(r->options, &r->layout, r->index, r->memory[r->rank].recompute)
                  : use_settings(r->options, r->index);
    poe_backend_limits limits;
    poe_stage_limits(&r->model, &settings, &limits);
    limits.bf16 = wants_bf16(r->options);
    poe_status status = poe_cpu_create(r->kernels, r->threads, &limits, &r->backend);
    if (status == POE_OK)
        status = poe_stage_create(&r->model, &settings, r->backend, &r->stage);
    if (status == POE_OK && r->options->emulate_compute)
        status = emulate_compute(r);
    else
        poe_compute_init(&r->compute, r->stage);
    return status;
}

/* Each rank has its own stage's file, and perhaps no other. */
static poe_status share_layers(poe_run *r)
{
    const int *first = r->model.first_layer;
    poe_status status = POE_OK;
    for (int k = 0; k < r->n_stages && status == POE_OK; k++)
        status = poe_comm_broadcast(r->comm, k, &r->model.layers[first[k]],
                                    (size_t)(first[k + 1] - first[k]) * sizeof(r->model.layers[0]));
    return status;
}

static poe_status open_model(poe_run *r)
{
    poe_status status = poe_settings_model(r->options, r->corpus.vocab_size, &r->model);
    poe_settings_optimizer(r->options, &r->optimizer);
    if (status == POE_OK && r->resumed[0] && !poe_comm_replays(r->comm))
        status = poe_checkpoint_load_layers(r->resumed, r->facts, r->index, &r->model);
    r->threads = poe_run_threads(r->options, poe_comm_host_ranks(r->comm));
    status = poe_comm_agree(r->comm, status);
    if (status == POE_OK && r->resumed[0])
        status = share_layers(r);
    if (status == POE_OK && trains(r))
        status = agree_on_memory(r);
    return status == POE_OK ? poe_comm_agree(r->comm, create_stage(r)) : status;
}

/* How many vectors of shared gradients wait in the checkpoint: at most D, for the rule is the run's own. */
static poe_status restore_pending(poe_run *r, poe_pending *pending)
{
    int totals = (int)json_integer_value(json_object_get(r->facts, "pending_totals"));
    int held = (int)json_integer_value(json_object_get(r->facts, "held_steps"));
    if (totals < 0 || totals > r->options->sync_delay || held < 0 || (held && !r->options->sync_every)) {
        poe_error("%s/manifest.json: %d pending sums and %d held steps do not belong to --sync %s", r->resumed, totals,
                  held, r->options->sync);
        return POE_BAD_INPUT;
    }
    poe_shared_restore(&r->shared, totals, held, pending);
    return POE_OK;
}

static poe_status load_checkpoint(poe_run *r)
{
    int64_t steps[POE_OPTION_DELAY];
    float *totals[POE_OPTION_DELAY];
    poe_pending pending = {.total_steps = steps, .totals = totals};
    poe_status status = trains(r) ? restore_pending(r, &pending) : POE_OK;
    if (status == POE_OK)
        status = poe_checkpoint_load(r->resumed, r->facts, r->stage, r->index, trains(r) ? &pending : NULL);
    if (status == POE_OK)
        poe_stage_parameters_changed(r->stage);
    return status;
}

static poe_status fill_parameters(poe_run *r)
{
    poe_status status = POE_OK;
    if (poe_comm_replays(r->comm)) {
        ; /* they come from the snapshot */
    } else if (r->resumed[0]) {
        status = load_checkpoint(r);
    } else if (r->options->init_from) {
        status = poe_import(r->options->init_from, &r->model, r->stage);
    } else if (!r->options->emulate_compute) {
        uint64_t seed = (uint64_t)r->options->seed;
        poe_model_initialise(&r->model, poe_stage_own_table(r->stage), seed, poe_stage_own_values(r->stage));
        poe_model_initialise(&r->model, poe_stage_shared_table(r->stage), seed, poe_stage_shared_values(r->stage));
        poe_stage_parameters_changed(r->stage);
    }
    return poe_comm_agree(r->comm, status);
}

static poe_shared_settings shared_settings(const poe_options *o, const int *ranks, int n_ranks, uint64_t id)
{
    return (poe_shared_settings){.delay = o->sync_delay,
                                 .every = o->sync_every,
                                 .n_steps = o->num_iterations,
                                 .ranks = ranks,
                                 .n_ranks = n_ranks,
                                 .wire = poe_wire_parse(o->wire_shared),
                                 .sparse = !o->emulate_compute, /* its gradients are all zero, and a real run's are not */
                                 .run = id};
}

/* Under ps the gradient of lm_head is that of the own head too, which stands last and has none of its own. */
static size_t gradient_floats(const poe_tensor_table *own)
{
    const poe_tensor *last = &own->rows[own->count - 1];
    return strncmp(last->name, "lm_head_stages.", 15) == 0 ? last->offset : own->floats;
}

static size_t aggregate_floats(size_t chunk, size_t vocab_size)
{
    return chunk * vocab_size;
}

static poe_status open_streams(poe_run *r, size_t floats)
{
    poe_streams_settings settings = {.edges = &r->edges,
                                     .layout = &r->layout,
                                     .stage = r->index,
                                     .rows = (size_t)r->options->device_batch_size,
                                     .training = trains(r),
                                     .aggregate_floats = floats,
                                     .reports = r->options->sync_delay + 4, /* as many steps as ranks may be apart */
                                     .wire = poe_wire_parse(r->options->wire),
                                     .run = r->id};
    poe_edges_chain(&r->edges, r->n_stages);
    return poe_streams_open(&r->streams, r->comm, &r->model, &settings);
}

/* The rule of the shared parameters, and the sum of replicas. */
static poe_status open_sums(poe_run *r)
{
    int ranks[POE_MAX_STAGES];
    for (int k = 0; k < r->size; k++)
        ranks[k] = k;
    poe_shared_settings settings = shared_settings(r->options, ranks, r->size, r->id);
    poe_status status =
        poe_shared_open(&r->shared, r->comm, &r->compute, &r->model, &r->optimizer, &settings, r->first_step);
    if (status == POE_OK && poe_layout_replicated(&r->layout))
        status = poe_replicas_open(&r->replicas, r->comm, gradient_floats(poe_stage_own_table(r->stage)),
                                   poe_layout_window(&r->layout, r->index), r->id);
    return status;
}

static poe_status open_links(poe_run *r)
{
    size_t chunk = poe_evaluate_chunk_rows(r->stage), floats = aggregate_floats(chunk, (size_t)r->corpus.vocab_size);
    poe_status status = open_streams(r, floats);
    if (status == POE_OK && trains(r))
        status = open_sums(r);
    if (status == POE_OK && trains(r))
        status = poe_turns_open(&r->turns, r->comm, &r->layout, r->first_step, r->id);
    if (status == POE_OK && !(r->evaluation_memory = calloc(2 * floats, sizeof(float)))) {
        poe_error("out of memory for %zu log-probabilities", 2 * floats);
        status = POE_FAILED;
    }
    r->evaluator = (poe_evaluator){.comm = r->comm,
                                   .stage = r->stage,
                                   .streams = &r->streams,
                                   .corpus = &r->corpus,
                                   .first_head = poe_run_first_head(r),
                                   .heads = poe_run_heads(r),
                                   .replicated = poe_layout_replicated(&r->layout),
                                   .aggregate = poe_aggregate_parse(r->options->aggregate),
                                   .z = r->evaluation_memory,
                                   .lp = r->evaluation_memory ? r->evaluation_memory + floats : NULL,
                                   .chunk = chunk};
    return poe_comm_agree(r->comm, status);
}

/* A stage process that is started again opens its run as the first one did, and asks nobody. */
static poe_status open_journal(poe_run *r)
{
    poe_board *board = poe_comm_board(r->comm);
    bool resumes = poe_snapshot_resumes(r->comm);
    if (board)
        poe_comm_journal(r->comm, poe_board_journal(board), &board->journal_bytes, resumes);
    return resumes ? poe_snapshot_prepare(r->comm) : POE_OK;
}

poe_status poe_run_open(poe_run *r, poe_comm *comm, const poe_options *options, poe_purpose purpose)
{
    *r = (poe_run){.options = options, .purpose = purpose, .comm = comm, .rank = poe_comm_rank(comm), .size = poe_comm_size(comm)};
    poe_layout_init(&r->layout, options, r->size);
    r->n_stages = poe_layout_stages(&r->layout);
    r->index = poe_layout_stage(&r->layout, r->rank);
    poe_status status = open_journal(r);
    if (status == POE_OK)
        status = agree_on_options(r);
    if (status == POE_OK)
        status = agree_on_kernels(r);
    if (status == POE_OK)
        status = agree_on_id(r);
    if (status == POE_OK)
        status = find_checkpoint(r);
    if (status == POE_OK && trains(r))
        status = find_out(r);
    if (status == POE_OK)
        status = open_tokenizer(r);
    if (status == POE_OK && purpose != POE_PURPOSE_USE)
        status = open_feeds(r);
    if (status == POE_OK)
        status = open_model(r);
    if (status == POE_OK)
        status = open_links(r);
    return status == POE_OK ? fill_parameters(r) : status;
}

void poe_run_close(poe_run *r)
{
    poe_metrics_close(&r->metrics);
    poe_trace_destroy(r->trace);
    poe_checkpoint_store_close(r->store);
    if (r->shared.stage)
        poe_shared_close(&r->shared);
    poe_replicas_close(&r->replicas);
    poe_turns_close(&r->turns);
    poe_streams_close(&r->streams);
    free(r->evaluation_memory);
    poe_stage_destroy(r->stage);
    poe_cpu_destroy(r->backend);
    poe_corpus_close(&r->corpus);
    json_decref(r->facts);
}

poe_status poe_run_do(poe_comm *comm, const poe_options *options, poe_purpose purpose, poe_status (*work)(poe_run *run))
{
    poe_run run;
    poe_status status = poe_run_open(&run, comm, options, purpose);
    if (status == POE_OK)
        status = work(&run);
    poe_run_close(&run);
    return status;
}

/* --- sizes ------------------------------------------------------------------------------------------------------------------ */

static size_t message_bytes(const poe_options *o, const poe_model *model, const poe_layout *layout, int stage)
{
    poe_edges edges;
    poe_edges_chain(&edges, poe_layout_stages(layout));
    poe_streams_settings settings = {.edges = &edges,
                                     .layout = layout,
                                     .stage = stage,
                                     .rows = (size_t)o->device_batch_size,
                                     .training = true,
                                     .wire = poe_wire_parse(o->wire)};
    return poe_streams_memory(model, &settings);
}

/* Bytes for shared gradients that wait their turn. */
static poe_status pending_bytes(const poe_options *o, const poe_model *model, int n_ranks, uint64_t *bytes)
{
    poe_shared_settings settings = shared_settings(o, NULL, n_ranks, 0);
    poe_tensor_table table;
    poe_status status = poe_model_tensors(model, -1, &table);
    if (status != POE_OK)
        return status;
    *bytes = poe_shared_bytes(&settings, model, &table);
    poe_tensor_table_free(&table);
    return POE_OK;
}

static poe_status own_gradient_floats(const poe_model *model, int stage, size_t *floats)
{
    poe_tensor_table table;
    poe_status status = poe_model_tensors(model, stage, &table);
    if (status != POE_OK)
        return status;
    *floats = gradient_floats(&table);
    poe_tensor_table_free(&table);
    return POE_OK;
}

static poe_status size_with(const poe_options *o, const poe_model *model, const poe_layout *layout, int stage,
                            int threads, poe_recompute recompute, poe_run_memory *memory)
{
    poe_stage_settings settings = train_settings(o, layout, stage, recompute);
    poe_stage_memory parts;
    size_t own_floats = 0;
    uint64_t pending = 0;
    poe_status status = poe_stage_size(model, &settings, &parts);
    if (status == POE_OK)
        status = pending_bytes(o, model, layout->order.n_ranks, &pending);
    if (status == POE_OK)
        status = own_gradient_floats(model, stage, &own_floats);
    if (status != POE_OK)
        return status;
    poe_backend_limits limits;
    poe_stage_limits(model, &settings, &limits);
    limits.bf16 = wants_bf16(o);
    *memory = (poe_run_memory){
        .parameters = parts.parameters,
        .gradients = parts.gradients,
        .optimizer = parts.optimizer,
        .activations = parts.activations,
        .pending = pending,
        .messages = message_bytes(o, model, layout, stage),
        .scratch = poe_cpu_scratch_bytes(&limits, threads),
        .recompute = recompute,
    };
    if (poe_layout_replicated(layout))
        memory->messages += poe_replicas_memory(layout->order.n_ranks, own_floats, poe_layout_window(layout, 0));
    return POE_OK;
}

uint64_t poe_run_memory_total(const poe_run_memory *m)
{
    return m->parameters + m->gradients + m->optimizer + m->activations + m->pending + m->messages + m->scratch;
}

static uint64_t needed(const poe_run_memory *memory)
{
    return poe_run_memory_total(memory) + memory->snapshots;
}

static bool fits(const poe_options *o, const poe_run_memory *memory)
{
    return !o->memory_limit || needed(memory) <= (uint64_t)o->memory_limit;
}

/* Two of all that training goes on from (snapshot.h). */
static uint64_t snapshot_bytes(const poe_run_memory *m)
{
    return 2 * (m->parameters + m->optimizer + m->pending);
}

poe_status poe_run_size(const poe_options *o, const poe_model *model, const poe_layout *layout, int stage, int threads,
                        bool agents, poe_run_memory *memory)
{
    bool chosen = strcmp(o->recompute, "auto") != 0;
    for (poe_recompute recompute = 0; recompute < POE_RECOMPUTE_COUNT; recompute++) {
        if (chosen && strcmp(o->recompute, poe_recompute_name(recompute)) != 0)
            continue;
        poe_status status = size_with(o, model, layout, stage, threads, recompute, memory);
        memory->snapshots = agents && status == POE_OK ? snapshot_bytes(memory) : 0;
        bool only = poe_schedule_splits(layout->order.schedule); /* nothing may be made again between the two halves */
        if (status != POE_OK || only || fits(o, memory))
            return status;
    }
    return POE_OK;
}

poe_status poe_run_check_memory(const poe_options *o, int stage, const poe_run_memory *memory)
{
    if (fits(o, memory))
        return POE_OK;
    poe_error("--memory-limit: stage %d needs %.1f MiB%s with --recompute %s, allowed are %.8g MiB", stage,
              ceil((double)needed(memory) / 0x1p20 * 10) / 10, memory->snapshots ? ", its two snapshots included," : "",
              poe_recompute_name(memory->recompute), (double)o->memory_limit / 0x1p20);
    return POE_BAD_INPUT;
}
