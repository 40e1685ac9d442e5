/* SPDX-License-Identifier: MIT
 * Every step of a save ends in an agreement of all ranks, so that a failure of one is known to all before anything
 * gets its final name. */
#include "pipeline/checkpoint.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "pipeline/copies.h"
#include "pipeline/snapshot.h"
#include "pipeline/stage_file.h"
#include "src/crc32c.h"
#include "src/log.h"
#include "src/manifest.h"
#include "src/moment.h"

struct poe_checkpoint_store {
    poe_comm *comm;
    int keep;
    int leader;                /* the lowest rank that sees the same folder */
    int leaders[POE_MAX_STAGES]; /* of every rank */
    poe_copies copies;         /* with them; else all zero */
    const char *history;       /* this rank's file that is copied along; NULL: none */
    char folder[POE_PATH_MAX]; /* OUT/checkpoints */
};

/* What a rank does between poe_log_hold() and this is done by all; they agree on how it ended. A failure to agree
 * leaves this rank's sentence held, and then it is printed. */
static poe_status agree(poe_comm *comm, poe_status mine)
{
    poe_status status = poe_comm_agree(comm, mine);
    poe_log_settle(true);
    return status;
}

/* --- the store -------------------------------------------------------------------------------------------------- */

static poe_status prepare_folder(poe_checkpoint_store *store, const char *out)
{
    poe_status status = poe_path(store->folder, "%s/checkpoints", out);
    if (!status)
        status = poe_make_directories(store->folder);
    return status ? status : poe_check_writable(store->folder, "--out");
}

static poe_status marker_path(const poe_checkpoint_store *store, uint64_t run, int rank, char path[POE_PATH_MAX])
{
    return poe_path(path, "%s/.rank-%016" PRIx64 "-%d.tmp", store->folder, run, rank);
}

static poe_status make_marker(const char *path)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd >= 0) {
        close(fd);
        return POE_OK;
    }
    poe_error("cannot create %s: %s", path, strerror(errno));
    return POE_FAILED;
}

static int lowest_visible(const poe_checkpoint_store *store, uint64_t run, int rank)
{
    char path[POE_PATH_MAX];
    for (int r = 0; r < rank; r++) {
        if (marker_path(store, run, r, path) == POE_OK && access(path, F_OK) == 0)
            return r;
    }
    return rank;
}

/* Each rank leaves a marker with a name that only this run knows; the lowest rank whose marker is seen leads. */
static poe_status find_leader(poe_checkpoint_store *store)
{
    char marker[POE_PATH_MAX];
    int rank = poe_comm_rank(store->comm);
    uint64_t run = 0;
    if (rank == 0 && getrandom(&run, sizeof(run), 0) < 0)
        run = (uint64_t)getpid();
    poe_status status = poe_comm_broadcast(store->comm, 0, &run, sizeof(run));
    if (status)
        return status;
    bool anew = !poe_comm_replays(store->comm);
    poe_log_hold();
    poe_status mine = marker_path(store, run, rank, marker);
    poe_temporary_register(marker);
    if (!mine && anew)
        mine = make_marker(marker);
    status = agree(store->comm, mine);
    if (!status) {
        store->leader = anew ? lowest_visible(store, run, rank) : -1;
        poe_comm_remember(store->comm, &store->leader, sizeof(store->leader));
        status = poe_comm_gather(store->comm, &store->leader, store->leaders, sizeof(store->leader));
    }
    unlink(marker);
    poe_temporary_forget(marker);
    return status;
}

poe_status poe_checkpoint_store_open(poe_comm *comm, const char *out, int keep, poe_checkpoint_store **store)
{
    poe_checkpoint_store *s = calloc(1, sizeof(*s));
    poe_log_hold();
    if (!s)
        poe_error("not enough memory for the checkpoints' paths");
    poe_status status = agree(comm, s ? prepare_folder(s, out) : POE_FAILED);
    if (!status) {
        s->comm = comm;
        s->keep = keep;
        status = find_leader(s);
    }
    if (!status) {
        poe_log_hold();
        bool leads = s->leader == poe_comm_rank(comm) && !poe_comm_replays(comm);
        status = agree(comm, leads ? poe_checkpoint_clean(s->folder, INT64_MAX, 0) : POE_OK);
    }
    if (status) {
        free(s);
        return status;
    }
    *store = s;
    return POE_OK;
}

poe_status poe_checkpoint_store_copy(poe_checkpoint_store *store, uint64_t run, const char *history)
{
    store->history = history;
    poe_log_hold();
    poe_status status = agree(store->comm, poe_copies_open(&store->copies, store->comm, store->leaders, run));
    if (!status && !poe_copies_any(&store->copies) && poe_comm_rank(store->comm) == 0)
        poe_warn("--save-to peer: all ranks write into one folder, so no checkpoint is copied to another one");
    return status;
}

void poe_checkpoint_store_close(poe_checkpoint_store *store)
{
    if (store)
        poe_copies_close(&store->copies);
    free(store);
}

/* --- saving ----------------------------------------------------------------------------------------------------- */

typedef struct saving {
    poe_checkpoint_store *store;
    bool leads;
    int64_t step;
    poe_stage *stage;
    int stage_number;
    const poe_pending *pending;
    json_t *facts; /* rank 0's, with what load needs to know */
    char temporary[POE_PATH_MAX], final[POE_PATH_MAX];
    poe_manifest_file own, shared; /* shared: leaders */
    poe_manifest_file history;     /* with copies, of who has one */
    poe_manifest_file all[POE_MAX_STAGES], histories[POE_MAX_STAGES]; /* of every rank */
    bool again;                    /* a process before this one may have got some way */
    bool published, exchanged;     /* has its final name; the temporary name has what had it before */
} saving;

static poe_status save_agree(saving *s, poe_status mine)
{
    return agree(s->store->comm, mine ? POE_FAILED : POE_OK);
}

/* Rank 0's facts as text; NULL, said, when out of memory. */
static char *facts_text(const saving *s, const json_t *facts)
{
    json_t *all = json_copy((json_t *)facts);
    int totals = s->pending ? s->pending->n_totals : 0, held = s->pending ? s->pending->held_steps : 0;
    int failures = json_object_set_new(all, "step", json_integer(s->step));
    failures |= json_object_set_new(all, "pending_totals", json_integer(totals));
    failures |= json_object_set_new(all, "held_steps", json_integer(held));
    char *text = failures ? NULL : json_dumps(all, JSON_COMPACT);
    json_decref(all);
    if (!text)
        poe_error("not enough memory for the manifest of a checkpoint");
    return text;
}

static poe_status parse_facts(saving *s, const char *text)
{
    s->facts = json_loads(text, 0, NULL);
    if (s->facts)
        return POE_OK;
    poe_error("not enough memory for the manifest of a checkpoint");
    return POE_FAILED;
}

static poe_status share_facts(saving *s, const json_t *facts)
{
    poe_comm *comm = s->store->comm;
    bool root = poe_comm_rank(comm) == 0;
    poe_log_hold();
    char *text = root ? facts_text(s, facts) : NULL;
    size_t size = text ? strlen(text) + 1 : 0;
    poe_status status = save_agree(s, root && !text ? POE_FAILED : POE_OK);
    void *shared = text;
    if (!status)
        status = poe_comm_share(comm, 0, &shared, &size);
    if (!status) {
        poe_log_hold();
        status = save_agree(s, parse_facts(s, shared));
    }
    free(shared);
    return status;
}

static poe_status check_space(const char *folder, uint64_t needed)
{
    struct statvfs disk;
    if (statvfs(folder, &disk))
        return POE_OK; /* writing will tell */
    uint64_t available = (uint64_t)disk.f_bavail * disk.f_frsize;
    if (available >= needed)
        return POE_OK;
    poe_error("no checkpoint was written: %s has %.1f MB free, it needs %.1f MB", folder, (double)available / 1e6,
              (double)needed / 1e6);
    return POE_FAILED;
}

/* A process that repeats this may find others writing there. */
static poe_status make_folder(const saving *s)
{
    poe_status status = s->again ? POE_OK : poe_remove_tree(s->temporary);
    return status ? status : poe_make_directories(s->temporary);
}

static bool copies(const saving *s)
{
    return poe_copies_any(&s->store->copies);
}

/* Whether what rank r writes, or a copy of it, lies in this rank's folder. */
static bool is_here(const saving *s, int r)
{
    const poe_checkpoint_store *store = s->store;
    int holder = copies(s) ? store->copies.holders[r] : -1;
    return store->leaders[r] == store->leader || (holder >= 0 && store->leaders[holder] == store->leader);
}

/* The disk has to hold the files of all ranks that share the folder, and of those whose copies they keep. */
static poe_status prepare(saving *s)
{
    poe_comm *comm = s->store->comm;
    int size = poe_comm_size(comm);
    uint64_t mine = s->stage_number >= 0 ? poe_stage_file_bytes(s->stage, s->stage_number, s->pending) : 0;
    uint64_t all[POE_MAX_STAGES];
    poe_status status = poe_comm_gather(comm, &mine, all, sizeof(mine));
    if (status)
        return status;
    poe_log_hold();
    poe_status local = POE_OK;
    if (s->leads && !poe_comm_replays(comm)) {
        uint64_t needed = poe_shared_file_bytes(s->stage, s->pending);
        for (int r = 0; r < size; r++)
            needed += is_here(s, r) ? all[r] : 0;
        local = check_space(s->store->folder, needed);
        if (!local)
            local = make_folder(s);
    }
    return save_agree(s, local);
}

/* Its length and checksum, for the manifest, are those of what the disk gives back; from under the final name, when a process
 * before this one has got so far. */
static poe_status measure_file(const saving *s, poe_manifest_file *file)
{
    char path[POE_PATH_MAX];
    poe_status status = poe_path(path, "%s/%s", s->temporary, file->name);
    if (!status && poe_comm_replays(s->store->comm) && access(path, F_OK) != 0)
        status = poe_path(path, "%s/%s", s->final, file->name);
    return status ? status : poe_checksum_file(path, &file->size, &file->crc);
}

static poe_status write_own(saving *s)
{
    char path[POE_PATH_MAX];
    if (s->stage_number < 0)
        return POE_OK;
    snprintf(s->own.name, sizeof(s->own.name), "stage-%03d.h5", s->stage_number);
    poe_status status = poe_path(path, "%s/%s", s->temporary, s->own.name);
    if (!status && !poe_comm_replays(s->store->comm))
        status = poe_stage_file_write(path, s->step, s->stage, s->stage_number, s->pending);
    return status ? status : measure_file(s, &s->own);
}

static poe_status write_shared(saving *s)
{
    char path[POE_PATH_MAX];
    strcpy(s->shared.name, "shared.h5");
    poe_status status = poe_path(path, "%s/%s", s->temporary, s->shared.name);
    if (!status && !poe_comm_replays(s->store->comm))
        status = poe_shared_file_write(path, s->step, s->stage, s->pending);
    return status ? status : measure_file(s, &s->shared);
}

/* As far as it goes now. */
static poe_status write_history(saving *s)
{
    char path[POE_PATH_MAX], *text = NULL;
    size_t size = 0;
    if (!copies(s) || !s->store->history)
        return POE_OK;
    strcpy(s->history.name, POE_CHECKPOINT_HISTORY);
    poe_status status = poe_path(path, "%s/%s", s->temporary, s->history.name);
    if (!status && !poe_comm_replays(s->store->comm)) {
        status = poe_read_file(s->store->history, "history of the run", &text, &size);
        if (!status)
            status = poe_write_file(path, text, size);
        free(text);
    }
    return status ? status : measure_file(s, &s->history);
}

static poe_status write_files(saving *s)
{
    poe_log_hold();
    poe_status status = write_own(s);
    if (!status && s->leads)
        status = write_shared(s);
    if (!status)
        status = write_history(s);
    status = save_agree(s, status);
    if (!status)
        status = poe_comm_gather(s->store->comm, &s->own, s->all, sizeof(s->own));
    if (!status && copies(s))
        status = poe_comm_gather(s->store->comm, &s->history, s->histories, sizeof(s->history));
    return status;
}

static poe_status copy_files(saving *s)
{
    if (!copies(s))
        return POE_OK;
    bool done = poe_comm_replays(s->store->comm);
    poe_log_hold();
    poe_status status = poe_copies_exchange(&s->store->copies, s->step, s->temporary, s->all, done);
    if (status != POE_PEER_LOST) {
        poe_status second = poe_copies_exchange(&s->store->copies, s->step, s->temporary, s->histories, done);
        status = status ? status : second;
    }
    return save_agree(s, status);
}

/* Of files of one name, which replicas wrote into different folders, this rank's is the one that is here. */
static int list_files(const saving *s, poe_manifest_file *files)
{
    int n = 0, rank = poe_comm_rank(s->store->comm);
    for (int r = 0; r < poe_comm_size(s->store->comm); r++) {
        if (s->all[r].name[0] && (r == rank || strcmp(s->all[r].name, s->own.name) != 0))
            files[n++] = s->all[r];
        if (s->histories[r].name[0] && is_here(s, r))
            files[n++] = s->histories[r];
    }
    files[n++] = s->shared;
    return n;
}

static poe_status write_manifest(saving *s)
{
    poe_manifest_file files[2 * POE_MAX_STAGES + 1];
    int n = list_files(s, files);
    poe_log_hold();
    poe_status local = POE_OK;
    if (s->leads && !poe_comm_replays(s->store->comm)) {
        local = poe_manifest_write(s->temporary, s->facts, files, n);
        if (!local)
            local = poe_sync_path(s->temporary);
    }
    return save_agree(s, local);
}

/* One instant: an older checkpoint of the same step changes places with the new one, where the file system can. */
static poe_status rename_folder(saving *s)
{
    s->exchanged = access(s->final, F_OK) == 0;
    if (s->again && s->exchanged && access(s->temporary, F_OK) != 0)
        return POE_OK; /* by a process before this one */
    int failed = poe_temporary_rename(s->temporary, s->final, s->exchanged ? RENAME_EXCHANGE : 0);
    if (failed && (errno == EINVAL || errno == ENOSYS)) {
        poe_status status = s->exchanged ? poe_remove_tree(s->final) : POE_OK;
        s->exchanged = false;
        if (status)
            return status;
        failed = poe_temporary_rename(s->temporary, s->final, 0);
    }
    if (failed) {
        poe_error("cannot rename %s to %s: %s", s->temporary, s->final, strerror(errno));
        return POE_FAILED;
    }
    s->published = true;
    return poe_sync_path(s->store->folder);
}

static void undo_rename(saving *s)
{
    if (renameat2(AT_FDCWD, s->final, AT_FDCWD, s->temporary, s->exchanged ? RENAME_EXCHANGE : 0) && !s->exchanged)
        rename(s->final, s->temporary);
}

/* A rank that is lost does not say whether the others have renamed, so then the new one stays, and no older one goes.
 */
static poe_status publish(saving *s)
{
    poe_log_hold();
    bool renames = s->leads && !poe_comm_replays(s->store->comm);
    poe_status status = save_agree(s, renames ? rename_folder(s) : POE_OK);
    if (status && status != POE_PEER_LOST && s->published)
        undo_rename(s);
    return status;
}

static poe_status begin(saving *s, const json_t *facts)
{
    poe_status status = share_facts(s, facts);
    return status ? status : prepare(s);
}

/* The number of the part that is about to begin stands where moments have their micro-batch. */
static poe_status save(saving *s, const json_t *facts)
{
    poe_status (*const parts[])(saving *s) = {write_files, copy_files, write_manifest, publish};
    const int n = sizeof(parts) / sizeof(parts[0]);
    poe_status status = begin(s, facts);
    for (int i = 0; i < n && !status; i++) {
        poe_moment(POE_PHASE_CHECKPOINT, s->step, i);
        status = parts[i](s);
    }
    if (!status)
        poe_moment(POE_PHASE_CHECKPOINT, s->step, n);
    return status;
}

/* What a failure left, or what the new one replaced; and the oldest ones. Failing here costs only space, and is said
 * unless the save itself has failed. */
static void tidy(const saving *s, bool saved)
{
    poe_log_hold();
    poe_remove_tree(s->temporary);
    if (saved)
        poe_checkpoint_clean(s->store->folder, s->step, s->store->keep);
    poe_log_settle(saved);
}

poe_status poe_checkpoint_save(poe_checkpoint_store *store, int64_t step, poe_stage *stage, int stage_number,
                               const poe_pending *pending, const json_t *facts, char *path)
{
    saving s = {.store = store,
                .leads = store->leader == poe_comm_rank(store->comm),
                .step = step,
                .stage = stage,
                .stage_number = stage_number,
                .pending = pending,
                .again = poe_snapshot_resumes(store->comm)};
    poe_log_hold();
    poe_status status = poe_path(s.final, "%s/step-%08" PRId64, store->folder, step);
    if (!status)
        status = poe_path(s.temporary, "%s/.step-%08" PRId64 ".tmp", store->folder, step);
    status = save_agree(&s, status);
    if (status)
        return status;
    if (s.leads)
        poe_temporary_register(s.temporary);
    status = save(&s, facts);
    if (s.leads)
        tidy(&s, status == POE_OK);
    if (s.leads)
        poe_temporary_forget(s.temporary);
    json_decref(s.facts);
    if (!status && path)
        strcpy(path, s.final);
    return status;
}

/* --- loading ---------------------------------------------------------------------------------------------------- */

static int64_t fact(const json_t *facts, const char *name)
{
    return json_integer_value(json_object_get(facts, name));
}

/* The path of a file of a checkpoint, once it is found to be what the manifest says. */
static poe_status checked_path(const char *folder, const json_t *facts, const char *name, char path[POE_PATH_MAX])
{
    poe_status status = poe_path(path, "%s/%s", folder, name);
    return status ? status : poe_manifest_check(folder, facts, name, true);
}

static poe_status checked_stage_path(const char *folder, const json_t *facts, int stage_number, char path[POE_PATH_MAX])
{
    char name[32];
    snprintf(name, sizeof(name), "stage-%03d.h5", stage_number);
    return checked_path(folder, facts, name, path);
}

poe_status poe_checkpoint_load(const char *folder, const json_t *facts, poe_stage *stage, int stage_number,
                               poe_pending *pending)
{
    char path[POE_PATH_MAX];
    if (pending) {
        pending->n_totals = (int)fact(facts, "pending_totals");
        pending->held_steps = (int)fact(facts, "held_steps");
    }
    poe_status status = checked_stage_path(folder, facts, stage_number, path);
    if (!status)
        status = poe_stage_file_read(path, fact(facts, "step"), stage, stage_number, pending);
    if (!status)
        status = checked_path(folder, facts, "shared.h5", path);
    if (!status)
        status = poe_shared_file_read(path, fact(facts, "step"), stage, pending);
    if (!status)
        poe_stage_parameters_changed(stage);
    return status;
}

poe_status poe_checkpoint_load_layers(const char *folder, const json_t *facts, int stage_number, poe_model *model)
{
    char path[POE_PATH_MAX];
    int first = model->first_layer[stage_number];
    poe_status status = checked_stage_path(folder, facts, stage_number, path);
    if (status)
        return status;
    return poe_stage_file_read_layers(path, first, model->first_layer[stage_number + 1], &model->layers[first]);
}

/* --- finding ---------------------------------------------------------------------------------------------------- */

typedef enum verdict { WHOLE, MISSING, DAMAGED } verdict;

typedef struct search {
    poe_comm *comm;
    int stage_number;
    char folder[POE_PATH_MAX]; /* of checkpoints */
    char named[POE_PATH_MAX];  /* the checkpoint that the user named; empty: none */
    int64_t *steps;            /* in folder, newest first */
    int count;
    int64_t before; /* only steps before this one are considered */
    bool speaks;               /* of the ranks, about the last candidate */
} search;

static bool exists(const char *folder, const char *name)
{
    char path[POE_PATH_MAX];
    return snprintf(path, sizeof(path), "%s/%s", folder, name) < (int)sizeof(path) && access(path, F_OK) == 0;
}

/* A checkpoint that the user named: the older ones are beside it, if its name tells which those are. */
static poe_status resolve_checkpoint(search *s, const char *path, const char *name, int64_t step)
{
    poe_status status = poe_path(s->named, "%s", path);
    if (!status)
        status = name == path ? poe_path(s->folder, ".")
                              : poe_path(s->folder, "%.*s", name - path > 1 ? (int)(name - path - 1) : 1, path);
    s->before = step < 0 ? 0 : step;
    return status;
}

static poe_status resolve(search *s, const char *what, const char *out)
{
    char path[POE_PATH_MAX];
    s->before = INT64_MAX;
    if (strcmp(what, "latest") == 0)
        return poe_path(s->folder, "%s/checkpoints", out);
    poe_status status = poe_path(path, "%s", what);
    if (status)
        return status;
    for (size_t n = strlen(path); n > 1 && path[n - 1] == '/'; n--)
        path[n - 1] = '\0';
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    int64_t step = poe_checkpoint_step(name);
    if (step >= 0 || exists(path, "manifest.json"))
        return resolve_checkpoint(s, path, name, step);
    if (exists(path, "checkpoints"))
        return poe_path(s->folder, "%s/checkpoints", path);
    poe_error("--resume %s: there is neither a run with checkpoints nor a checkpoint", what);
    return POE_BAD_INPUT;
}

static poe_status list(search *s, const char *what, const char *out)
{
    poe_log_hold();
    poe_status status = resolve(s, what, out);
    if (!status)
        status = poe_checkpoint_list(s->folder, &s->steps, &s->count);
    return agree(s->comm, status);
}

/* The next candidate: the newest step before s->before that every rank may have; -1: none. */
static poe_status propose(search *s, int64_t *step)
{
    int64_t mine = -1, all[POE_MAX_STAGES];
    for (int i = s->count - 1; i >= 0; i--) {
        if (s->steps[i] < s->before)
            mine = s->steps[i];
    }
    poe_status status = poe_comm_gather(s->comm, &mine, all, sizeof(mine));
    for (int r = 0; r < poe_comm_size(s->comm) && !status; r++)
        mine = all[r] < mine ? all[r] : mine;
    *step = mine;
    return status;
}

/* What this rank needs of a checkpoint: the shared file and its own stage's, or every stage's. */
static verdict examine(const search *s, const char *folder, bool named, json_t **facts)
{
    char name[32];
    if (!named && access(folder, F_OK))
        return MISSING;
    if (poe_manifest_read(folder, true, facts))
        return DAMAGED;
    snprintf(name, sizeof(name), "stage-%03d.h5", s->stage_number);
    poe_status status = poe_manifest_check(folder, *facts, s->stage_number < 0 ? NULL : name, true);
    if (!status && s->stage_number >= 0)
        status = poe_manifest_check(folder, *facts, "shared.h5", true);
    return status ? DAMAGED : WHOLE;
}

/* Of all facts but the files' table: the same on every rank if it is one run's. */
static uint32_t identity(const json_t *facts)
{
    json_t *copy = json_copy((json_t *)facts);
    json_object_del(copy, "files");
    char *text = json_dumps(copy, JSON_COMPACT | JSON_SORT_KEYS);
    uint32_t crc = text ? poe_crc32c(0, text, strlen(text)) : 0;
    free(text);
    json_decref(copy);
    return crc;
}

/* The worst verdict of all ranks; the first rank that found damage says what it is. */
static poe_status judge(search *s, const char *folder, bool named, json_t **facts, verdict *worst)
{
    typedef struct opinion {
        uint32_t verdict, identity;
    } opinion;
    opinion all[POE_MAX_STAGES];
    int rank = poe_comm_rank(s->comm), speaker = -1;
    *facts = NULL;
    poe_log_hold();
    opinion mine = {examine(s, folder, named, facts), *facts ? identity(*facts) : 0};
    poe_status status = poe_comm_gather(s->comm, &mine, all, sizeof(mine));
    *worst = WHOLE;
    for (int r = 0; r < poe_comm_size(s->comm) && !status; r++) {
        speaker = speaker < 0 && all[r].verdict == DAMAGED ? r : speaker;
        *worst = all[r].verdict > *worst ? (verdict)all[r].verdict : *worst;
    }
    poe_log_settle(status || speaker == rank);
    s->speaks = rank == (speaker < 0 ? 0 : speaker);
    for (int r = 1; r < poe_comm_size(s->comm) && !status && *worst == WHOLE; r++) {
        if (all[r].identity == all[0].identity)
            continue;
        if (rank == 0)
            poe_error("%s on rank 0 and on rank %d are of different runs", folder, r);
        status = POE_BAD_INPUT;
    }
    if (status || *worst != WHOLE) {
        json_decref(*facts);
        *facts = NULL;
    }
    return status;
}

/* Whether the search may go on after a checkpoint that cannot be used. */
static poe_status pass_over(const search *s, const char *folder, verdict worst, bool use_older)
{
    if (worst == DAMAGED && !use_older) {
        if (s->speaks)
            poe_info("--resume-older goes on from the newest whole checkpoint before %s", folder);
        return POE_BAD_INPUT;
    }
    if (s->speaks)
        poe_warn("%s is not whole on every rank; looking for the one before it", folder);
    return POE_OK;
}

static poe_status search_on(search *s, bool use_older, char folder[POE_PATH_MAX], json_t **facts)
{
    char path[POE_PATH_MAX];
    bool named = s->named[0];
    strcpy(path, s->named);
    for (;; named = false) {
        int64_t step = s->before;
        verdict worst;
        poe_status status = named ? POE_OK : propose(s, &step);
        if (!status && step < 0) {
            if (poe_comm_rank(s->comm) == 0)
                poe_error("there is no checkpoint to resume from in %s", s->folder);
            status = POE_BAD_INPUT;
        }
        if (!status && !named)
            status = poe_path(path, "%s/step-%08" PRId64, s->folder, step);
        if (!status)
            status = judge(s, path, named, facts, &worst);
        if (!status && worst == WHOLE) {
            strcpy(folder, path);
            return POE_OK;
        }
        if (!status)
            status = pass_over(s, path, worst, use_older);
        if (status)
            return status;
        s->before = step;
    }
}

poe_status poe_checkpoint_find(poe_comm *comm, const char *what, const char *out, bool use_older, int stage_number,
                               char folder[POE_PATH_MAX], json_t **facts)
{
    search s = {.comm = comm, .stage_number = stage_number};
    poe_status status = list(&s, what, out);
    if (!status)
        status = search_on(&s, use_older, folder, facts);
    free(s.steps);
    return status;
}

poe_status poe_checkpoint_store_abandon(const poe_checkpoint_store *store, int64_t step)
{
    return poe_checkpoint_abandon(store->folder, step);
}

bool poe_checkpoint_store_leads(const poe_checkpoint_store *store)
{
    return store->leader == poe_comm_rank(store->comm);
}

bool poe_checkpoint_store_is_shared(const poe_checkpoint_store *store)
{
    for (int r = 1; r < poe_comm_size(store->comm); r++)
        if (store->leaders[r] != store->leaders[0])
            return false;
    return true;
}
