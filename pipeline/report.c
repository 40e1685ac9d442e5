/* SPDX-License-Identifier: MIT */
#include "pipeline/report.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "comm/agent/board.h"
#include "pipeline/settings.h"
#include "pipeline/train.h"
#include "src/clock.h"
#include "src/log.h"

static const double plain_interval = 2.0; /* seconds between progress lines where no terminal renews them */
enum { SHOWN_LOSSES = 8 };                /* more stages than that do not fit on a line */

/* mpiexec gives its ranks pseudo-terminals, so its own standard output decides. */
static bool launcher_is_terminal(void)
{
    char link[64], target[256];
    snprintf(link, sizeof(link), "/proc/%ld/fd/1", (long)getppid());
    ssize_t n = readlink(link, target, sizeof(target) - 1);
    if (n < 0)
        return false;
    target[n] = '\0';
    return strncmp(target, "/dev/pts/", 9) == 0 || strncmp(target, "/dev/tty", 8) == 0;
}

bool poe_report_terminal(void)
{
    const char *told = getenv("POE_PIPE_TTY");
    if (told)
        return strcmp(told, "1") == 0;
    return isatty(STDOUT_FILENO) && (!getenv("OMPI_COMM_WORLD_SIZE") || launcher_is_terminal());
}

/* "4.123"; "-" for what there is not. */
static const char *decimal(double x, int digits, char text[32])
{
    if (!isfinite(x))
        return "-";
    snprintf(text, 32, "%.*f", digits, x);
    return text;
}

/* --- start ------------------------------------------------------------------------------------------------------------------- */

static const char *mib(double bytes, char text[32])
{
    if (bytes >= 10 * 0x1p30)
        snprintf(text, 32, "%.1f GiB", bytes / 0x1p30);
    else
        snprintf(text, 32, bytes < 10 * 0x1p20 ? "%.1f MiB" : "%.0f MiB", bytes / 0x1p20);
    return text;
}

static void print_model(const poe_options *o, const poe_model *m, const poe_layout *l)
{
    const poe_model_config *c = &m->config;
    printf("model     %d layers, %d channels, %d heads (%d key/value) of %zu, mlp %zu, window %s, %s\n", m->n_layers,
           c->n_embd, c->n_head, c->n_kv_head, m->head_size, m->mlp_dim, c->window_pattern,
           c->head == POE_HEAD_PER_STAGE ? "shared and per-stage heads" : "one shared head");
    printf("          vocabulary %d (padded to %zu), sequence %d, %.3f M parameters\n", c->vocab_size, m->vocab_padded,
           c->sequence_len, (double)poe_model_parameters(m) / 1e6);
    printf("objective %s, alpha %g, %d stages, --schedule %s, --sync %s, %d steps of %lld tokens (%d micro-batches of "
           "%d x %d)\n", o->objective, c->alpha, c->n_stages, poe_schedule_name(l->order.schedule), o->sync, o->num_iterations,
           (long long)o->total_batch_size, l->order.n_micro, o->device_batch_size, c->sequence_len);
}

static void print_stage(const poe_model *m, int k, const poe_run_memory *memory)
{
    char a[32], b[32], c[32], d[32], e[32], f[32], g[32];
    printf("%6d  %2d..%-2d  %8.3f M    %10s %10s %10s   %10s %9s %9s %9s  %9s\n", k, m->first_layer[k],
           m->first_layer[k + 1] - 1, (double)poe_model_stage_parameters(m, k) / 1e6,
           mib((double)memory->parameters, a), mib((double)(memory->gradients + memory->pending), b),
           mib((double)memory->optimizer, c), mib((double)memory->activations, d), mib((double)memory->messages, e),
           mib((double)memory->scratch, f), mib((double)poe_run_memory_total(memory), g),
           poe_recompute_name(memory->recompute));
}

static void print_shared(const poe_model *m, const poe_layout *l)
{
    static const char *const what[] = {[POE_OBJECTIVE_POE] = "embedding, head, smear: a replica on every rank, in its numbers",
                                       [POE_OBJECTIVE_BP] = "nothing: each tensor is one rank's",
                                       [POE_OBJECTIVE_HIERARCHICAL] = "head: a replica on every rank, in its numbers"};
    printf("shared          %8.3f M    (%s)\n", (double)poe_model_stage_parameters(m, -1) / 1e6,
           poe_layout_replicated(l) ? "nothing: every rank has all of it" : what[m->config.objective]);
}

/* What agents take beside the stage processes: `snapshots` are the largest rank's. */
static void print_agents(const poe_options *o, uint64_t snapshots)
{
    char twice[32], log[32];
    printf("agents          up to %s more for each rank's snapshots (its weights, optimiser and waiting sums, twice), and "
           "%s for messages (--log-limit)\n", mib((double)snapshots, twice), mib((double)o->log_limit, log));
}

/* `known`: the ranks' own figures; NULL: as these flags would have them, refused behind the table when too much. */
static poe_status print_stages(const poe_options *o, const poe_model *m, const poe_layout *l, int threads,
                               const poe_run_memory *known, bool agents)
{
    poe_status refused = POE_OK;
    uint64_t snapshots = 0;
    printf("\n stage  layers  parameters       weights  gradients  optimiser  activations  messages   scratch     total"
           "  recompute\n");
    for (int k = 0; k < m->config.n_stages; k++) {
        poe_run_memory memory;
        poe_status status = known ? POE_OK : poe_run_size(o, m, l, k, threads, agents, &memory);
        if (status != POE_OK)
            return status;
        const poe_run_memory *figures = known ? &known[k] : &memory;
        snapshots = figures->snapshots > snapshots ? figures->snapshots : snapshots;
        print_stage(m, k, figures);
        if (!known && refused == POE_OK)
            refused = poe_run_check_memory(o, k, &memory);
    }
    print_shared(m, l);
    if (agents)
        print_agents(o, snapshots);
    putchar('\n');
    return refused;
}

static void print_data(const poe_run *r)
{
    const poe_options *o = r->options;
    printf("data      %s%s", o->data.paths[0], o->data.count > 1 ? " and others" : "");
    if (poe_feed_documents(r->corpus.train))
        printf(", %zu documents", poe_feed_documents(r->corpus.train));
    else if (poe_feed_tokens(r->corpus.train))
        printf(", %zu tokens", poe_feed_tokens(r->corpus.train));
    if (r->corpus.tokenizer)
        printf(", tokenizer %s", r->corpus.trained ? "trained from it" : o->tokenizer ? o->tokenizer : "of the run");
    long long rows = 0;
    for (int i = 0; i < r->corpus.n_eval; i++)
        rows += r->corpus.eval_rows[i];
    if (rows)
        printf("; evaluated on %lld held-out tokens\n", rows * o->sequence_len);
    else
        printf("; no held-out text, no evaluation\n");
}

/* The text's lines, one below the other. */
static void print_network(const char *emulated)
{
    const char *heading = "network   emulated: ";
    for (size_t length; *emulated; emulated += length + (emulated[length] == '\n')) {
        length = strcspn(emulated, "\n");
        printf("%s%.*s\n", heading, (int)length, emulated);
        heading = "          ";
    }
}

/* What the ranks talk over; agents have nothing but the fabric. */
static const char *carrier(const poe_comm *comm)
{
    const char *transport = poe_comm_transport(comm);
    return strcmp(transport, "agent") == 0 ? "fabric by agents" : transport;
}

poe_status poe_report_start(const poe_options *o, const poe_model *m, int threads, const poe_run *r)
{
    poe_layout layout;
    poe_layout_init(&layout, o, r ? r->size : poe_options_rank_count(o));
    printf("poe-pipe %s\n", POE_VERSION);
    print_model(o, m, &layout);
    if (r) {
        print_data(r);
        printf("ranks     %d over %s, %d on this host, %d thread%s each, kernels %s\n", r->size,
               carrier(r->comm), poe_comm_host_ranks(r->comm), threads, threads == 1 ? "" : "s",
               r->arithmetic);
        if (poe_comm_emulated(r->comm))
            print_network(poe_comm_emulated(r->comm));
        if (strcmp(o->dtype, "bf16") == 0)
            printf("dtype     bf16: %s\n", poe_bf16_engine(r->kernels));
        if (o->emulate_compute)
            printf("emulated  compute: every stage sleeps %s; nothing is learnt%s\n", o->emulate_compute,
                   o->save_every ? " or evaluated, and checkpoints hold zeros" : ", evaluated or saved");
        printf("output    %s\n", r->out);
    }
    bool agents = r ? poe_comm_board(r->comm) != NULL : poe_options_agents(o, o->ranks);
    poe_status status = print_stages(o, m, &layout, threads, r ? r->memory : NULL, agents);
    fflush(stdout);
    return status;
}

double poe_report_loss(const poe_run *r, const double *stage_losses)
{
    int n = 0;
    double sum = 0;
    for (int k = 0; k < poe_run_heads(r); k++)
        n += isfinite(stage_losses[k]);
    for (int k = 0; k < poe_run_heads(r); k++)
        if (isfinite(stage_losses[k]))
            sum += stage_losses[k] / pow(n, 1 - r->model.config.alpha);
    return n ? sum : NAN;
}

void poe_report_complete_config(const poe_run *r, json_t *config)
{
    char path[POE_PATH_MAX + 16];
    json_object_set_new(config, "vocab_size", json_integer(r->corpus.vocab_size));
    if (r->corpus.trained) {
        snprintf(path, sizeof(path), "%s/tokenizer.json", r->out);
        json_object_set_new(config, "tokenizer", json_string(path));
    }
}

/* --- progress ---------------------------------------------------------------------------------------------------------------- */

void poe_progress_start(poe_progress *p, const poe_run *run)
{
    *p = (poe_progress){.run = run, .terminal = poe_report_terminal(), .started = poe_now(), .first_step = run->first_step};
}

static int terminal_columns(void)
{
    struct winsize size;
    if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0)
        return size.ws_col;
    const char *columns = getenv("COLUMNS");
    int n = columns ? atoi(columns) : 0;
    return n > 0 ? n : 120;
}

static void end_line(poe_progress *p)
{
    if (p->pending_newline)
        putchar('\n');
    p->pending_newline = false;
}

static void show_line(poe_progress *p, const char *line, bool last)
{
    if (!p->terminal) {
        puts(line);
    } else {
        printf("\r\033[K%.*s", terminal_columns() - 1, line);
        p->pending_newline = true;
        if (last)
            end_line(p);
    }
    fflush(stdout);
}

static int append_losses(char *text, size_t room, double loss, const double *losses, int n, double lrm)
{
    char number[32];
    int used = snprintf(text, room, "loss: %s", decimal(loss, 4, number));
    for (int k = 0; n > 1 && k < n && k < SHOWN_LOSSES; k++)
        used += snprintf(text + used, room - (size_t)used, "%s%s", k ? " " : " (", decimal(losses[k], 3, number));
    if (n > 1)
        used += snprintf(text + used, room - (size_t)used, "%s)", n > SHOWN_LOSSES ? " ..." : "");
    return used + snprintf(text + used, room - (size_t)used, " | lrm: %.2f", lrm);
}

static void format_time(double seconds, char text[32])
{
    if (seconds < 60)
        snprintf(text, 32, "%.1fs", seconds);
    else if (seconds < 3600)
        snprintf(text, 32, "%dm%02ds", (int)seconds / 60, (int)seconds % 60);
    else
        snprintf(text, 32, "%dh%02dm", (int)seconds / 3600, (int)seconds / 60 % 60);
}

/* From now on it was. */
static bool was_shown(const poe_run *r, int64_t step)
{
    poe_board *board = poe_comm_board(r->comm);
    if (!board)
        return false;
    if (step < atomic_load(&board->shown))
        return true;
    atomic_store(&board->shown, step + 1);
    return false;
}

void poe_progress_image(poe_progress *p, poe_image *image)
{
    poe_image_pass(image, &p->started, sizeof(p->started));
    poe_image_pass(image, &p->shown, sizeof(p->shown));
    poe_image_pass(image, &p->step_seconds, sizeof(p->step_seconds));
    poe_image_pass(image, &p->counted, sizeof(p->counted));
}

void poe_progress_step(poe_progress *p, int64_t step, double loss, const double *stage_losses, double lrm, double dt,
                       uint32_t epoch)
{
    const poe_run *r = p->run;
    int n = r->options->num_iterations;
    if (step > p->first_step) {
        p->step_seconds += dt;
        p->counted++;
    }
    double now = poe_now();
    bool last = step + 1 == n;
    if (was_shown(r, step))
        return;
    if (!p->terminal && !last && step != p->first_step && now - p->shown < plain_interval)
        return;
    p->shown = now;
    char line[512], total[32], eta[32] = "?";
    format_time(now - p->started, total);
    if (p->counted)
        format_time(p->step_seconds / (double)p->counted * (double)(n - step - 1), eta);
    int used = snprintf(line, sizeof(line), "step %05lld/%05d (%.2f%%) | ", (long long)step, n, 100.0 * (double)(step + 1) / n);
    if (r->options->emulate_compute)
        used += snprintf(line + used, sizeof(line) - (size_t)used, "compute emulated");
    else
        used += append_losses(line + used, sizeof(line) - (size_t)used, loss, stage_losses, poe_run_heads(r), lrm);
    snprintf(line + used, sizeof(line) - (size_t)used,
             " | dt: %.0fms | tok/sec: %.0f%s | epoch: %u | total time: %s | eta: %s", dt * 1e3,
             (double)r->options->total_batch_size / dt, poe_comm_emulated(r->comm) ? " (emulated network)" : "", epoch, total,
             eta);
    show_line(p, line, last);
}

void poe_progress_evaluation(poe_progress *p, int64_t step, const poe_evaluation *e, bool has_tokenizer)
{
    double (*of)(const poe_evaluation *, const poe_score *) = has_tokenizer ? poe_evaluation_bpb : poe_evaluation_nats;
    char number[32], accuracy[32];
    end_line(p);
    printf("step %05lld | validation %s:", (long long)step, has_tokenizer ? "bpb" : "nats per token");
    for (int k = 0; k < e->n_stages && k < SHOWN_LOSSES; k++)
        printf(" %s", decimal(of(e, &e->stage[k]), 4, number));
    const poe_score *aggregate = &e->prefix[e->n_stages - 1];
    printf(" | aggregate: %s, accuracy %s%%\n", decimal(of(e, aggregate), 4, number),
           decimal(100 * poe_evaluation_accuracy(e, aggregate), 2, accuracy));
    fflush(stdout);
}

void poe_progress_end(poe_progress *p)
{
    end_line(p);
    fflush(stdout);
}

/* --- end --------------------------------------------------------------------------------------------------------------------- */

static void print_score(const char *name, const poe_evaluation *e, const poe_score *score, bool has_tokenizer)
{
    char loss[32], accuracy[32], perplexity[32];
    printf("%-16s  %10s  %8s %%  %12s\n", name,
           decimal(has_tokenizer ? poe_evaluation_bpb(e, score) : poe_evaluation_nats(e, score), 6, loss),
           decimal(100 * poe_evaluation_accuracy(e, score), 2, accuracy),
           decimal(exp(poe_evaluation_nats(e, score)), 6, perplexity));
}

void poe_report_evaluation(const poe_options *o, const poe_evaluation *e, bool has_tokenizer)
{
    printf("\nheld-out text: %lld targets", (long long)e->targets);
    if (has_tokenizer)
        printf(", %lld bytes", (long long)e->bytes);
    printf("; stages combined by %s\n%-16s  %10s  %10s  %12s\n", o->aggregate, "", has_tokenizer ? "BPB" : "nats/token",
           "top-1", "perplexity");
    char name[32];
    for (int k = 0; k < e->n_stages; k++) {
        if (strcmp(o->objective, "bp") == 0)
            snprintf(name, sizeof(name), "the whole model");
        else
            snprintf(name, sizeof(name), "stage %d", k);
        print_score(name, e, &e->stage[k], has_tokenizer);
    }
    for (int k = 1; k + 1 < e->n_stages; k++) {
        snprintf(name, sizeof(name), "stages 0..%d", k);
        print_score(name, e, &e->prefix[k], has_tokenizer);
    }
    if (e->n_stages > 1)
        print_score("all (aggregate)", e, &e->prefix[e->n_stages - 1], has_tokenizer);
    fflush(stdout);
}

/* What a rank slept longest for. */
typedef struct longest_wait {
    poe_account account;
    double seconds;
    int channel, peer; /* of a receive */
} longest_wait;

typedef struct rank_facts {
    poe_account_times times;
    double fill;
    longest_wait wait;
    poe_comm_stats traffic;
    double sent, dense;   /* bytes a step: sent, and if all of it travelled in fp32 */
    uint64_t arenas;      /* bytes */
    uint64_t peak;        /* bytes: resident, of the whole process */
} rank_facts;

static uint64_t peak_memory(void)
{
    struct rusage usage;
    return getrusage(RUSAGE_SELF, &usage) == 0 ? (uint64_t)usage.ru_maxrss * 1024 : 0;
}

static double share(double part, double whole)
{
    return whole > 0 ? 100 * part / whole : 0;
}

static longest_wait find_longest(const poe_accounts *a)
{
    longest_wait longest = {.account = POE_ACCOUNT_CREDIT, .seconds = a->total.seconds[POE_ACCOUNT_CREDIT]};
    if (a->total.seconds[POE_ACCOUNT_SHARED] > longest.seconds)
        longest = (longest_wait){.account = POE_ACCOUNT_SHARED, .seconds = a->total.seconds[POE_ACCOUNT_SHARED]};
    for (int c = 0; c < POE_ACCOUNT_CHANNELS; c++)
        if (a->receive_wait[c] > longest.seconds)
            longest = (longest_wait){
                .account = POE_ACCOUNT_RECEIVE, .seconds = a->receive_wait[c], .channel = c, .peer = a->receive_peer[c]};
    return longest;
}

static void describe_wait(const rank_facts *facts, char text[96])
{
    const longest_wait *wait = &facts->wait;
    int used = snprintf(text, 96, "%.1f %% for ", share(wait->seconds, facts->times.wall));
    if (wait->seconds == 0)
        snprintf(text, 96, "-");
    else if (wait->account == POE_ACCOUNT_RECEIVE)
        snprintf(text + used, 96 - (size_t)used, "%s of rank %d", poe_channel_name((poe_channel)wait->channel), wait->peer);
    else
        snprintf(text + used, 96 - (size_t)used, wait->account == POE_ACCOUNT_SHARED ? "shared sums" : "room at the next rank");
}

static void print_times(const poe_run *r, const rank_facts *all)
{
    printf(" rank");
    for (int i = 0; i < POE_ACCOUNT_COUNT; i++)
        printf(" %10s", poe_account_name((poe_account)i));
    printf("  longest wait\n");
    for (int k = 0; k < r->size; k++) {
        char wait[96];
        describe_wait(&all[k], wait);
        printf("%5d", k);
        for (int i = 0; i < POE_ACCOUNT_COUNT; i++)
            printf(" %8.1f %%", share(all[k].times.seconds[i], all[k].times.wall));
        printf("  %s\n", wait);
    }
}

/* Share of the steps' time, checkpoints and the first `fill` seconds left out, in which rank k was not busy, nor any that
 * shares its processor. */
static double idle(const poe_run *r, const rank_facts *all, int k, double fill)
{
    int processors = poe_schedule_processors(&r->layout.order);
    double time = all[k].times.wall - all[k].times.seconds[POE_ACCOUNT_CHECKPOINT] - fill, busy = 0;
    for (int i = k % processors; i < r->size; i += processors)
        busy += poe_account_busy(&all[i].times);
    return time > 0 ? 1 - busy / time : 0;
}

static void print_traffic(const poe_run *r, const rank_facts *all)
{
    bool processes = strcmp(poe_comm_transport(r->comm), "inproc") != 0;
    printf(" rank     idle   fill      sent     a step     (fp32)  overlapped     arenas       peak%s\n",
           processes ? "" : " (all)");
    for (int k = 0; k < r->size; k++) {
        const poe_comm_stats *s = &all[k].traffic;
        char sent[32], step[32], dense[32], arenas[32], peak[32], overlap[32] = "-", fill[32];
        if (s->transfer > 0)
            snprintf(overlap, sizeof(overlap), "%.0f %%", share(s->transfer_busy, s->transfer));
        format_time(all[k].fill, fill);
        printf("%5d %6.1f %% %6s %9s  %9s  %9s %11s  %9s  %9s\n", k, 100 * idle(r, all, k, 0), fill,
               mib((double)s->bytes_sent, sent), mib(all[k].sent, step), mib(all[k].dense, dense), overlap, mib((double)all[k].arenas, arenas), mib((double)all[k].peak, peak));
    }
    if (r->size > 1)
        printf("(idle: neither forward, backward nor optimizer%s; fill: until the first forward; fp32: a step's bytes if all\n"
               "of it travelled in fp32; overlapped: share of the time with a message under way in which the rank was\n"
               "computing)\n", r->layout.order.n_virtual > 1 ? ", nor another rank on its processor" : "");
}

/* The last line of the metrics. */
static poe_status write_idle(poe_run *r, const rank_facts *all)
{
    json_t *whole = json_array(), *fill = json_array(), *after = json_array(), *accounts = json_array();
    json_t *sent = json_array(), *dense = json_array(), *memory = json_array();
    for (int k = 0; k < r->size; k++) {
        json_array_append_new(whole, json_real(idle(r, all, k, 0)));
        json_array_append_new(fill, json_real(all[k].fill));
        json_array_append_new(after, json_real(idle(r, all, k, all[k].fill)));
        json_array_append_new(accounts, poe_account_json(&all[k].times));
        json_array_append_new(sent, json_real(all[k].sent));
        json_array_append_new(dense, json_real(all[k].dense));
        json_array_append_new(memory, json_pack("{s:I, s:I}", "arenas", (json_int_t)all[k].arenas, "peak",
                                                (json_int_t)all[k].peak));
    }
    json_t *object = json_pack("{s:o, s:o, s:o, s:o, s:o, s:o, s:o}", "idle", whole, "fill", fill, "idle_after_fill", after,
                               "accounts", accounts, "step_bytes", sent, "step_bytes_fp32", dense, "memory", memory);
    if (r->options->emulate_compute)
        json_object_set_new(object, "emulated", json_string("compute"));
    return poe_metrics_write(&r->metrics, object);
}

poe_status poe_report_ranks(poe_run *r, const poe_training *t)
{
    rank_facts mine = {.times = r->accounts.total,
                       .fill = poe_accounts_fill(&r->accounts),
                       .wait = find_longest(&r->accounts),
                       .traffic = t->traffic,
                       .arenas = poe_run_memory_total(&r->memory[r->rank]),
                       .peak = peak_memory()};
    rank_facts all[POE_MAX_STAGES];
    double steps = (double)t->tokens / (double)r->options->total_batch_size;
    mine.sent = steps > 0 ? (double)t->traffic.bytes_sent / steps : 0;
    mine.dense = steps > 0 ? (double)(t->traffic.bytes_sent + t->saved) / steps : 0;
    poe_status status = poe_comm_gather(r->comm, &mine, all, sizeof(mine));
    if (status != POE_OK || !t->tokens)
        return status;
    if (r->rank == 0) {
        printf("\n%.0f tokens/s over %.1f s of training%s%s\n", (double)t->tokens / t->seconds, t->seconds,
               r->options->emulate_compute ? ", emulated compute" : "",
               poe_comm_emulated(r->comm) ? ", emulated network" : "");
        print_times(r, all);
        print_traffic(r, all);
    }
    return poe_run_is_last(r) ? write_idle(r, all) : POE_OK;
}

/* `path` as one word of a shell command. */
static const char *quoted(const char *path, char text[4 * POE_PATH_MAX])
{
    static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-+=:,@%";
    if (path[strspn(path, plain)] == '\0')
        return path;
    char *end = text;
    *end++ = '\'';
    for (const char *c = path; *c; c++)
        end = *c == '\'' ? stpcpy(end, "'\\''") : stpncpy(end, c, 1);
    strcpy(end, "'");
    return text;
}

/* True when `name` alone would start this program. */
static bool on_path(const char *name)
{
    const char *folders = getenv("PATH");
    char path[POE_PATH_MAX];
    struct stat found, self;
    if (!folders || stat("/proc/self/exe", &self) != 0)
        return false;
    for (const char *end; *folders; folders = *end ? end + 1 : end) {
        end = strchrnul(folders, ':');
        int used = snprintf(path, sizeof(path), "%.*s/%s", (int)(end - folders), folders, name);
        if (used < (int)sizeof(path) && stat(path, &found) == 0 && access(path, X_OK) == 0)
            return found.st_dev == self.st_dev && found.st_ino == self.st_ino;
    }
    return false;
}

/* How the user can start this program from where he is: by its name, or by its path, below this folder or whole. */
static const char *program(char path[POE_PATH_MAX])
{
    char folder[POE_PATH_MAX];
    ssize_t used = readlink("/proc/self/exe", path, POE_PATH_MAX - 1);
    if (used < 0 || on_path("poe-pipe"))
        return "poe-pipe";
    path[used] = '\0';
    size_t length = getcwd(folder, sizeof(folder)) ? strlen(folder) : 0;
    bool below = length > 1 && strncmp(path, folder, length) == 0 && path[length] == '/' && strchr(path + length + 1, '/');
    return below ? path + length + 1 : path;
}

void poe_report_files(const poe_run *r, const poe_training *t, bool interrupted)
{
    char ranks[32] = "", run[4 * POE_PATH_MAX], checkpoint[4 * POE_PATH_MAX], path[POE_PATH_MAX], command[4 * POE_PATH_MAX];
    const char *pipe = quoted(program(path), command);
    if (strcmp(poe_comm_transport(r->comm), "inproc") != 0 || poe_layout_replicated(&r->layout))
        snprintf(ranks, sizeof(ranks), " --ranks %d", r->size);
    const char *out = quoted(r->out, run), *newest = quoted(t->checkpoint, checkpoint);
    printf("\n");
    if (t->checkpoint[0])
        printf("checkpoint  %s (%.3f M parameters)\n", t->checkpoint, (double)poe_model_parameters(&r->model) / 1e6);
    printf("metrics     %s/metrics.jsonl\n", r->out);
    if (r->options->trace)
        printf("trace       %s (open it in https://ui.perfetto.dev)\n", r->options->trace);
    if (r->options->emulate_compute) {
        fflush(stdout);
        return;
    }
    if (!interrupted)
        printf("picture     %s/loss.png\n", r->out);
    if (interrupted)
        printf("stopped after step %lld of %d; go on:  %s%s --resume %s\n", (long long)t->steps,
               r->options->num_iterations, pipe, ranks, out);
    else
        printf("go on       %s%s --resume %s --num-iterations %d\n", pipe, ranks, out, 2 * r->options->num_iterations);
    if (t->checkpoint[0])
        printf("export      %s export --checkpoint %s --export model.safetensors\n"
               "generate    %s generate --checkpoint %s --prompt \"...\"\n", pipe, newest, pipe, newest);
    fflush(stdout);
}
