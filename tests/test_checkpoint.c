/* SPDX-License-Identifier: MIT
 * Checkpoints of several ranks: what comes back is what was saved, bit for bit, with one folder for all ranks and with
 * one for each; damage, absent ranks, a failing disk and a killed process leave what was there before. */
#include <dirent.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "comm/inproc/inproc.h"
#include "pipeline/checkpoint.h"
#include "src/log.h"
#include "src/manifest.h"
#include "src/rng.h"
#include "stages/plain/plain.h"
#include "tests/check.h"

/* HDF5 does not free a file whose close failed; under the leak sanitizer that is its fault, not ours. */
__attribute__((visibility("default"))) const char *__lsan_default_suppressions(void);
const char *__lsan_default_suppressions(void)
{
    return "leak:libhdf5";
}

enum { RANKS = 3, TOTALS = 2 };

static char folder[] = "/tmp/poe-checkpoint-XXXXXX";
static poe_model model;

/* One rank of a test: its stage, its waiting gradients, and where it writes. */
typedef struct rank_state {
    int rank;
    poe_comm *comm;
    poe_backend *backend;
    poe_stage *stage;
    poe_pending pending;
    int64_t total_steps[TOTALS];
    float *totals[TOTALS];
    char out[POE_PATH_MAX];
} rank_state;

static void make_model(poe_objective objective)
{
    poe_model_config config = {.n_stages = RANKS,
                               .stage_layers = {2, 1, 1},
                               .head = POE_HEAD_PER_STAGE,
                               .objective = objective,
                               .alpha = 1,
                               .backout = true,
                               .n_embd = 32,
                               .n_head = 2,
                               .n_kv_head = 1,
                               .sequence_len = 8,
                               .vocab_size = 50,
                               .window_pattern = "SL",
                               .norm_eps = 1e-6};
    CHECK_INT(poe_model_init(&model, &config), POE_OK);
}

/* Everything that a checkpoint holds of this rank: fills it (seed > 0), or returns the number of floats in which it
 * differs from what the seed -seed fills in. */
static size_t each_float(rank_state *state, int64_t seed)
{
    struct block {
        float *at;
        size_t n;
    } blocks[256];
    size_t count = 0, different = 0;
    for (int shared = 0; shared < 2; shared++) {
        const poe_tensor_table *table =
            shared ? poe_stage_shared_table(state->stage) : poe_stage_own_table(state->stage);
        float *values = shared ? poe_stage_shared_values(state->stage) : poe_stage_own_values(state->stage);
        for (size_t row = 0; row < table->count; row++) {
            const poe_tensor *tensor = &table->rows[row];
            blocks[count++] = (struct block){values + tensor->offset, tensor->rows * tensor->cols};
            for (int part = 0, parts = 2; part < parts; part++) {
                const char *name;
                parts = poe_stage_state(state->stage, shared, row, part, &name, &blocks[count].at, &blocks[count].n);
                count += parts > 0;
            }
        }
    }
    for (int i = 0; i < state->pending.n_totals; i++)
        blocks[count++] = (struct block){state->totals[i], state->pending.floats};
    if (state->pending.held_steps)
        blocks[count++] = (struct block){state->pending.held, state->pending.floats};
    poe_rng rng;
    poe_rng_init(&rng, (uint64_t)(seed < 0 ? -seed : seed), "checkpoint");
    for (size_t b = 0; b < count; b++) {
        for (size_t i = 0; i < blocks[b].n; i++) {
            float value = (float)poe_rng_normal(&rng);
            different += memcmp(&blocks[b].at[i], &value, sizeof(value)) != 0;
            if (seed > 0)
                blocks[b].at[i] = value;
        }
    }
    return different;
}

static void set_pending(rank_state *state, int n_totals, int held_steps)
{
    state->pending.n_totals = n_totals;
    state->pending.held_steps = held_steps;
}

static void rank_init(rank_state *state)
{
    poe_stage_settings settings = {.stage = state->rank, .rows = 1, .slots = 1, .training = true};
    poe_backend_limits limits;
    poe_stage_limits(&model, &settings, &limits);
    CHECK_INT(poe_plain_create(&limits, &state->backend), POE_OK);
    CHECK_INT(poe_stage_create(&model, &settings, state->backend, &state->stage), POE_OK);
    size_t floats = poe_stage_shared_table(state->stage)->floats;
    for (int i = 0; i < TOTALS; i++)
        state->totals[i] = calloc(floats, sizeof(float));
    state->pending = (poe_pending){.total_steps = state->total_steps,
                                   .totals = state->totals,
                                   .held = calloc(floats, sizeof(float)),
                                   .floats = floats};
}

static void rank_finish(rank_state *state)
{
    poe_stage_destroy(state->stage);
    poe_plain_destroy(state->backend);
    for (int i = 0; i < TOTALS; i++)
        free(state->totals[i]);
    free(state->pending.held);
}

/* --- ranks as threads ------------------------------------------------------------------------------------------- */

typedef struct job {
    rank_state state;
    poe_transport *transport;
    bool separate; /* every rank has its own --out */
    void (*body)(rank_state *state);
} job;

static void *run_rank(void *arg)
{
    job *j = arg;
    poe_comm_settings settings = {.deadline = 60, .patience = 30};
    poe_log *log = poe_log_create(j->state.rank, RANKS);
    poe_log_attach(log);
    CHECK_INT(poe_comm_create(j->transport, &settings, &j->state.comm), POE_OK);
    if (j->separate)
        CHECK_INT(poe_path(j->state.out, "%s/r%d", folder, j->state.rank), POE_OK);
    else
        CHECK_INT(poe_path(j->state.out, "%s/all", folder), POE_OK);
    rank_init(&j->state);
    j->body(&j->state);
    rank_finish(&j->state);
    poe_comm_destroy(j->state.comm, true);
    poe_log_attach(NULL);
    poe_log_destroy(log);
    return NULL;
}

static void run_ranks(bool separate, void (*body)(rank_state *state))
{
    poe_transport *transports[RANKS];
    job jobs[RANKS] = {0};
    pthread_t threads[RANKS];
    CHECK_INT(poe_inproc_create(RANKS, transports), POE_OK);
    for (int r = 0; r < RANKS; r++) {
        jobs[r] = (job){.state.rank = r, .transport = transports[r], .separate = separate, .body = body};
        CHECK_INT(pthread_create(&threads[r], NULL, run_rank, &jobs[r]), 0);
    }
    for (int r = 0; r < RANKS; r++)
        pthread_join(threads[r], NULL);
}

/* The seed of all that this rank has at `step`. */
static int64_t seed_of(const rank_state *state, int64_t step)
{
    return 1000 * step + state->rank + 1;
}

static poe_status save(poe_checkpoint_store *store, rank_state *state, int64_t step)
{
    json_t *facts = json_pack("{s:s, s:I}", "run", "test", "position", (json_int_t)(7 * step));
    *poe_stage_own_updates(state->stage) = step;
    *poe_stage_shared_updates(state->stage) = step - 1;
    poe_status status = poe_checkpoint_save(store, step, state->stage, state->rank, &state->pending,
                                            state->rank == 0 ? facts : NULL, NULL);
    json_decref(facts);
    return status;
}

/* As in a real run, the shared tensors are the same everywhere: here rank 0's. */
static void share(rank_state *state)
{
    CHECK_INT(poe_comm_broadcast(state->comm, 0, poe_stage_shared_values(state->stage),
                                 poe_stage_shared_table(state->stage)->floats * sizeof(float)),
              POE_OK);
}

static poe_status find(rank_state *state, const char *what, bool use_older, char path[POE_PATH_MAX])
{
    json_t *facts = NULL;
    poe_status status = poe_checkpoint_find(state->comm, what, state->out, use_older, state->rank, path, &facts);
    if (!status)
        CHECK_INT(json_integer_value(json_object_get(facts, "position")),
                  7 * json_integer_value(json_object_get(facts, "step")));
    json_decref(facts);
    return status;
}

static int entries(const char *path)
{
    DIR *directory = opendir(path);
    int count = 0;
    while (directory && readdir(directory))
        count++;
    if (directory)
        closedir(directory);
    return count - 2;
}

static void in_out(const rank_state *state, const char *name, char path[POE_PATH_MAX])
{
    CHECK_INT(poe_path(path, "%s/checkpoints/%s", state->out, name), POE_OK);
}

/* --- cases ------------------------------------------------------------------------------------------------------ */

static void check_load(rank_state *state, int64_t step)
{
    char path[POE_PATH_MAX];
    json_t *facts;
    CHECK_INT(poe_checkpoint_find(state->comm, "latest", state->out, false, state->rank, path, &facts), POE_OK);
    set_pending(state, 0, 0);
    each_float(state, 99);
    memset(state->total_steps, 0, sizeof(state->total_steps));
    CHECK_INT(poe_checkpoint_load(path, facts, state->stage, state->rank, &state->pending), POE_OK);
    CHECK_INT(state->pending.n_totals, TOTALS);
    CHECK_INT(state->pending.held_steps, 3);
    CHECK_INT(state->total_steps[1], step - 1);
    CHECK_INT(*poe_stage_own_updates(state->stage), step);
    CHECK_INT(*poe_stage_shared_updates(state->stage), step - 1);
    json_decref(facts);
}

/* With a folder for each rank, every rank leads and keeps its own shared file, so that all of its floats come back. */
static void round_trip_separate(rank_state *state)
{
    poe_checkpoint_store *store;
    char path[POE_PATH_MAX];
    CHECK_INT(poe_checkpoint_store_open(state->comm, state->out, 2, &store), POE_OK);
    for (int64_t step = 10; step <= 30; step += 10) {
        set_pending(state, TOTALS, 3);
        state->total_steps[0] = step - 2;
        state->total_steps[1] = step - 1;
        each_float(state, seed_of(state, step));
        CHECK_INT(save(store, state, step), POE_OK);
    }
    in_out(state, "", path);
    CHECK_INT(entries(path), 2);
    in_out(state, "step-00000030", path);
    CHECK_INT(entries(path), 3);
    check_load(state, 30);
    CHECK_INT(each_float(state, -seed_of(state, 30)), 0);
    poe_checkpoint_store_close(store);
}

/* Under bp nothing is shared: wte and lm_head are tensors of one stage like any other, and nothing waits. */
static void round_trip_unshared(rank_state *state)
{
    poe_checkpoint_store *store;
    char path[POE_PATH_MAX];
    json_t *facts;
    CHECK_INT(poe_stage_shared_table(state->stage)->count, 0);
    CHECK_INT(poe_checkpoint_store_open(state->comm, state->out, 0, &store), POE_OK);
    set_pending(state, 0, 0);
    each_float(state, seed_of(state, 900));
    CHECK_INT(save(store, state, 900), POE_OK);
    each_float(state, 99);
    CHECK_INT(poe_checkpoint_find(state->comm, "latest", state->out, false, state->rank, path, &facts), POE_OK);
    CHECK_INT(poe_checkpoint_load(path, facts, state->stage, state->rank, &state->pending), POE_OK);
    CHECK_INT(each_float(state, -seed_of(state, 900)), 0);
    json_decref(facts);
    poe_checkpoint_store_close(store);
}

/* With one folder, rank 0 writes the shared file for all. */
static void round_trip_together(rank_state *state)
{
    poe_checkpoint_store *store;
    char path[POE_PATH_MAX];
    CHECK_INT(poe_checkpoint_store_open(state->comm, state->out, 0, &store), POE_OK);
    for (int64_t step = 10; step <= 30; step += 10) {
        set_pending(state, TOTALS, 3);
        state->total_steps[1] = step - 1;
        each_float(state, seed_of(state, step));
        share(state);
        CHECK_INT(save(store, state, step), POE_OK);
        CHECK_INT(save(store, state, step), POE_OK); /* the same again takes its place */
    }
    CHECK_INT(poe_comm_barrier(state->comm, "test"), POE_OK); /* until rank 0 has removed what was replaced */
    in_out(state, "", path);
    CHECK_INT(entries(path), 3);
    in_out(state, "step-00000030", path);
    CHECK_INT(entries(path), RANKS + 2);
    size_t own = poe_stage_own_table(state->stage)->floats, shared = poe_stage_shared_table(state->stage)->floats;
    float *kept = malloc((own + shared) * sizeof(float));
    memcpy(kept, poe_stage_own_values(state->stage), own * sizeof(float));
    memcpy(kept + own, poe_stage_shared_values(state->stage), shared * sizeof(float));
    check_load(state, 30);
    CHECK_INT(memcmp(kept, poe_stage_own_values(state->stage), own * sizeof(float)), 0);
    CHECK_INT(memcmp(kept + own, poe_stage_shared_values(state->stage), shared * sizeof(float)), 0);
    free(kept);
    poe_checkpoint_store_close(store);
}

static void flip(const char *path, long place)
{
    FILE *f = fopen(path, "r+b");
    CHECK(f != NULL);
    if (!f)
        return;
    fseek(f, place, SEEK_SET);
    int c = fgetc(f);
    fseek(f, place, SEEK_SET);
    fputc(c ^ 1, f);
    fclose(f);
}

/* Steps 10, 20, 30 are there, in one folder; the stage file of rank 1 in step 30 is damaged. */
static void find_damaged(rank_state *state)
{
    char path[POE_PATH_MAX], name[POE_PATH_MAX];
    in_out(state, "step-00000030/stage-001.h5", name);
    if (state->rank == 1)
        flip(name, 5000);
    CHECK_INT(poe_comm_barrier(state->comm, "test"), POE_OK);
    CHECK_INT(find(state, "latest", false, path), POE_BAD_INPUT);
    CHECK_INT(find(state, "latest", true, path), POE_OK);
    in_out(state, "step-00000020", name);
    CHECK_STRING(path, name);
    in_out(state, "step-00000030/", name);
    CHECK_INT(find(state, name, false, path), POE_BAD_INPUT);
    CHECK_INT(find(state, name, true, path), POE_OK);
    in_out(state, "step-00000020", name);
    CHECK_STRING(path, name);
    in_out(state, "step-00000010", name);
    CHECK_INT(find(state, name, false, path), POE_OK);
    CHECK_STRING(path, name);
    CHECK_INT(find(state, state->out, true, path), POE_OK);
    in_out(state, "step-00000015", name);
    CHECK_INT(find(state, name, false, path), POE_BAD_INPUT);
    CHECK_INT(find(state, "/nonexistent", true, path), POE_BAD_INPUT);
    CHECK_INT(find(state, "/tmp", true, path), POE_BAD_INPUT);
}

/* Steps 20, 30 are there, in separate folders; rank 2 never finished step 30: no permission is needed to go back. */
static void find_unfinished(rank_state *state)
{
    char path[POE_PATH_MAX], name[POE_PATH_MAX];
    in_out(state, "step-00000030", name);
    if (state->rank == 2)
        CHECK_INT(poe_remove_tree(name), POE_OK);
    CHECK_INT(poe_comm_barrier(state->comm, "test"), POE_OK);
    CHECK_INT(find(state, "latest", false, path), POE_OK);
    in_out(state, "step-00000020", name);
    CHECK_STRING(path, name);
}

/* Rank 1's folder is gone, and a file is in its place: nobody gets a checkpoint, nobody loses one. */
static void save_fails(rank_state *state)
{
    poe_checkpoint_store *store;
    char path[POE_PATH_MAX], aside[POE_PATH_MAX], at[POE_PATH_MAX];
    CHECK_INT(poe_checkpoint_store_open(state->comm, state->out, 2, &store), POE_OK);
    CHECK_INT(poe_path(at, "%s/checkpoints", state->out), POE_OK);
    CHECK_INT(poe_path(aside, "%s/aside", state->out), POE_OK);
    int before = entries(at);
    if (state->rank == 1) {
        CHECK_INT(rename(at, aside), 0);
        CHECK_INT(poe_write_file(at, "x", 1), POE_OK);
    }
    CHECK_INT(save(store, state, 40), POE_FAILED);
    if (state->rank == 1) {
        CHECK_INT(unlink(at), 0);
        CHECK_INT(rename(aside, at), 0);
    }
    CHECK_INT(poe_comm_barrier(state->comm, "test"), POE_OK);
    CHECK_INT(entries(at), before);
    CHECK_INT(find(state, "latest", false, path), POE_OK);
    poe_checkpoint_store_close(store);
}

/* No file may become longer than 20 kB: every rank's disk is full. */
static void save_full(rank_state *state)
{
    poe_checkpoint_store *store;
    char path[POE_PATH_MAX];
    CHECK_INT(poe_checkpoint_store_open(state->comm, state->out, 1, &store), POE_OK);
    in_out(state, "", path);
    int before = entries(path);
    if (state->rank == 0) {
        struct rlimit small = {20000, RLIM_INFINITY};
        setrlimit(RLIMIT_FSIZE, &small);
    }
    CHECK_INT(poe_comm_barrier(state->comm, "test"), POE_OK);
    CHECK_INT(save(store, state, 40), POE_FAILED);
    if (state->rank == 0) {
        struct rlimit none = {RLIM_INFINITY, RLIM_INFINITY};
        setrlimit(RLIMIT_FSIZE, &none);
    }
    CHECK_INT(poe_comm_barrier(state->comm, "test"), POE_OK);
    CHECK_INT(entries(path), before);
    CHECK_INT(find(state, "latest", false, path), POE_OK);
    CHECK_INT(save(store, state, 40), POE_OK); /* and afterwards all is well again */
    poe_checkpoint_store_close(store);
}

static void save_for_ever(rank_state *state)
{
    poe_checkpoint_store *store;
    if (poe_checkpoint_store_open(state->comm, state->out, 2, &store))
        _exit(1);
    for (int64_t step = 1; save(store, state, step % 50) == POE_OK; step++)
        continue;
    _exit(1);
}

static void save_once(rank_state *state)
{
    poe_checkpoint_store *store;
    CHECK_INT(poe_checkpoint_store_open(state->comm, state->out, 2, &store), POE_OK);
    CHECK_INT(save(store, state, 1), POE_OK);
    poe_checkpoint_store_close(store);
}

static void check_after_kill(rank_state *state)
{
    poe_checkpoint_store *store;
    char path[POE_PATH_MAX];
    json_t *facts = NULL;
    CHECK_INT(poe_checkpoint_store_open(state->comm, state->out, 0, &store), POE_OK);
    poe_status status = poe_checkpoint_find(state->comm, "latest", state->out, false, state->rank, path, &facts);
    CHECK_INT(status, POE_OK);
    if (!status)
        CHECK_INT(poe_checkpoint_load(path, facts, state->stage, state->rank, &state->pending), POE_OK);
    json_decref(facts);
    in_out(state, "", path);
    DIR *directory = opendir(path);
    for (struct dirent *entry; directory && (entry = readdir(directory));)
        CHECK(poe_checkpoint_step(entry->d_name) >= 0 || entry->d_name[1] == '.' || !entry->d_name[1]);
    if (directory)
        closedir(directory);
    poe_checkpoint_store_close(store);
}

/* Killed at any instant of writing, the newest checkpoint is whole and what was being written goes at the next start.
 */
static void check_kills(void)
{
    poe_rng rng;
    poe_rng_init(&rng, 11, "kills");
    for (int layout = 0; layout < 2; layout++) /* however slow the machine, there is one whole checkpoint to keep */
        run_ranks(layout, save_once);
    for (int round = 0; round < 8; round++) {
        pid_t child = fork();
        if (child == 0)
            run_ranks(round % 2, save_for_ever);
        usleep(100000 + (useconds_t)(poe_rng_next(&rng) % 100000));
        kill(child, SIGKILL);
        waitpid(child, NULL, 0);
        run_ranks(round % 2, check_after_kill);
    }
}

/* Whatever is changed in any file of a checkpoint: loading says so, and HDF5 never sees it. */
static void check_mutations(void)
{
    static const char *const names[] = {"manifest.json", "stage-000.h5", "shared.h5"};
    char path[POE_PATH_MAX], file[POE_PATH_MAX], out[POE_PATH_MAX];
    int64_t *steps;
    int count;
    rank_state state = {.rank = 0};
    poe_rng rng;
    rank_init(&state);
    poe_rng_init(&rng, 13, "checkpoint");
    CHECK_INT(poe_path(out, "%s/r0/checkpoints", folder), POE_OK);
    CHECK_INT(poe_checkpoint_list(out, &steps, &count), POE_OK);
    CHECK(count > 0);
    CHECK_INT(poe_path(path, "%s/step-%08" PRId64, out, count ? steps[0] : 0), POE_OK);
    free(steps);
    poe_log *log = poe_log_create(0, 1);
    poe_log_attach(log);
    poe_log_hold();
    for (int round = 0; round < 1500; round++) {
        char *good;
        size_t size;
        CHECK_INT(poe_path(file, "%s/%s", path, names[round % 3]), POE_OK);
        CHECK_INT(poe_read_file(file, "test", &good, &size), POE_OK);
        long place = (long)(poe_rng_next(&rng) % size);
        if (poe_rng_next(&rng) % 8 == 0)
            CHECK_INT(truncate(file, place), 0);
        else
            flip(file, place);
        json_t *facts = NULL;
        poe_status status = poe_manifest_read(path, true, &facts);
        if (!status)
            status = poe_checkpoint_load(path, facts, state.stage, 0, &state.pending);
        json_decref(facts);
        CHECK_INT(status, POE_BAD_INPUT);
        FILE *f = fopen(file, "wb");
        CHECK(f && fwrite(good, 1, size, f) == size && fclose(f) == 0);
        free(good);
    }
    poe_log_settle(false);
    poe_log_attach(NULL);
    poe_log_destroy(log);
    rank_finish(&state);
}

/* The layers' properties come from the files, whatever the model at hand says. */
static void check_layers(void)
{
    static poe_model other;
    char path[POE_PATH_MAX];
    json_t *facts;
    CHECK_INT(poe_path(path, "%s/all/checkpoints/step-00000020", folder), POE_OK);
    CHECK_INT(poe_manifest_read(path, true, &facts), POE_OK);
    other = model;
    for (int i = 0; i < model.n_layers; i++)
        other.layers[i] = (poe_layer_shape){-1, !model.layers[i].has_value_embed};
    CHECK_INT(poe_checkpoint_load_layers(path, facts, 1, &other), POE_OK);
    for (int i = 0; i < model.n_layers; i++) {
        bool loaded = model.first_layer[1] <= i && i < model.first_layer[2];
        CHECK_INT(other.layers[i].window, loaded ? model.layers[i].window : -1);
        CHECK_INT(other.layers[i].has_value_embed, loaded == model.layers[i].has_value_embed);
    }
    json_decref(facts);
}

int main(void)
{
    signal(SIGXFSZ, SIG_IGN);
    CHECK(mkdtemp(folder) != NULL);
    make_model(POE_OBJECTIVE_POE);
    run_ranks(true, round_trip_separate);
    run_ranks(false, round_trip_together);
    check_layers();
    run_ranks(false, find_damaged);
    run_ranks(true, save_fails);
    run_ranks(true, find_unfinished);
    run_ranks(true, save_full);
    check_mutations();
    make_model(POE_OBJECTIVE_BP);
    run_ranks(true, round_trip_unshared);
    make_model(POE_OBJECTIVE_POE);
    CHECK_INT(poe_remove_tree(folder), POE_OK);
    check_kills();
    CHECK_INT(poe_remove_tree(folder), POE_OK);
    return check_result();
}
