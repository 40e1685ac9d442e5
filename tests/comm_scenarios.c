/* SPDX-License-Identifier: MIT */
#include "tests/comm_scenarios.h"

#include <pthread.h>
#include <stdatomic.h>
#include <time.h>
#include <unistd.h>

#include "comm/transport.h"
#include "src/bf16.h"
#include "src/clock.h"
#include "src/log.h"
#include "src/rng.h"
#include "tests/check.h"

static void pause_for(double seconds)
{
    struct timespec t = {.tv_sec = (time_t)seconds, .tv_nsec = (long)((seconds - (double)(time_t)seconds) * 1e9)};
    nanosleep(&t, NULL);
}

static poe_link *open_link(poe_comm *comm, int from, int to, int window, size_t max_bytes, uint64_t run)
{
    char name[32];
    bool outgoing = poe_comm_rank(comm) == from;
    snprintf(name, sizeof(name), "activations %d->%d", from, to);
    poe_link_settings settings = {.name = name,
                                  .peer = outgoing ? to : from,
                                  .channel = 3,
                                  .outgoing = outgoing,
                                  .max_bytes = max_bytes,
                                  .window = window,
                                  .run = run};
    poe_link *link = NULL;
    CHECK_INT(poe_link_open(comm, &settings, &link), POE_OK);
    return link;
}

static poe_message message_of(int i, size_t bytes)
{
    return (poe_message){.kind = 1,
                         .flags = (uint32_t)i,
                         .step = i / 4,
                         .micro = i % 4,
                         .shape = {2, 3, 4, 0},
                         .data_hash = 77u * (uint64_t)i,
                         .bytes = bytes};
}

/* --- links ---------------------------------------------------------------------------------------------------------------- */
enum { STREAM = 120, LARGEST = 200000 };

static size_t stream_bytes(int i)
{
    return i % 7 == 0 ? 0 : (size_t)i * 7919 % LARGEST + 1;
}

static void fill(unsigned char *p, size_t n, int i)
{
    for (size_t j = 0; j < n; j++)
        p[j] = (unsigned char)(j * 31 + (size_t)i);
}

static bool is_filled(const unsigned char *p, size_t n, int i)
{
    for (size_t j = 0; j < n; j++)
        if (p[j] != (unsigned char)(j * 31 + (size_t)i))
            return false;
    return true;
}

static void send_one(poe_link *link, int i, size_t bytes)
{
    poe_message m = message_of(i, bytes);
    void *payload;
    CHECK_INT(poe_link_acquire(link, &m, &payload), POE_OK);
    CHECK_INT((uintptr_t)payload % 64, 0);
    fill(payload, bytes, i);
    CHECK_INT(poe_link_send(link, &m), POE_OK);
}

static void receive_one(poe_link *link, int i, size_t bytes)
{
    poe_message m = message_of(i, bytes), got;
    void *payload = NULL;
    CHECK_INT(poe_link_receive(link, &m, &got, &payload), POE_OK);
    CHECK_INT(got.flags, i);
    CHECK_INT(got.data_hash, 77 * i);
    CHECK(payload && is_filled(payload, bytes, i));
}

/* Messages of every length go down the chain, in order, at changing speeds, with several lent at a time. */
static bool stream(poe_comm *comm)
{
    int rank = poe_comm_rank(comm), size = poe_comm_size(comm), window = 3;
    poe_link *in = rank > 0 ? open_link(comm, rank - 1, rank, window, LARGEST, 5) : NULL;
    poe_link *out = rank + 1 < size ? open_link(comm, rank, rank + 1, window, LARGEST, 5) : NULL;
    int lent = 0;
    for (int i = 0; i < STREAM; i++) {
        poe_comm_doing(comm, "streaming", i / 4, i % 4);
        if (in) {
            receive_one(in, i, stream_bytes(i));
            for (lent++; lent > i % window; lent--)
                poe_link_release(in);
        }
        if ((i + rank) % 16 == 0)
            pause_for(0.003);
        if (out)
            send_one(out, i, stream_bytes(i));
    }
    for (; lent > 0; lent--)
        poe_link_release(in);
    poe_link_close(out);
    poe_link_close(in);
    return true;
}

/* A sender that is faster than the receiver sleeps once the window is used up. */
static bool credits(poe_comm *comm)
{
    int rank = poe_comm_rank(comm);
    if (rank > 1)
        return true;
    poe_link *link = open_link(comm, 0, 1, 2, 1000, 5);
    for (int i = 0; i < 4; i++) {
        if (rank == 0) {
            send_one(link, i, 1000);
        } else {
            if (i == 0)
                pause_for(0.2);
            receive_one(link, i, 1000);
            poe_link_release(link);
        }
    }
    poe_comm_stats stats;
    poe_comm_get_stats(comm, &stats);
    if (rank == 0)
        CHECK(stats.credit_wait > 0.1);
    else
        CHECK(stats.bytes_received >= 4000);
    poe_link_close(link);
    return true;
}

/* What the receiver expects differs from what comes: refused, and everything after it fails at once. */
static bool refused(poe_comm *comm, poe_message expected, uint64_t run)
{
    int rank = poe_comm_rank(comm);
    if (rank > 1)
        return false;
    poe_link *link = open_link(comm, 0, 1, 2, 1000, rank == 0 ? 5 : run);
    if (rank == 0) {
        send_one(link, 6, 96);
        pause_for(0.1);
    } else {
        void *payload;
        CHECK_INT(poe_link_receive(link, &expected, NULL, &payload), POE_PEER_LOST);
        double before = poe_now();
        CHECK_INT(poe_link_receive(link, &expected, NULL, &payload), POE_PEER_LOST);
        CHECK_INT(poe_comm_barrier(comm, "after the loss"), POE_PEER_LOST);
        CHECK(poe_now() - before < 0.1);
    }
    poe_link_close(link);
    return false;
}

static bool wrong_step(poe_comm *comm)
{
    return refused(comm, message_of(10, 96), 5);
}

static bool wrong_stage(poe_comm *comm)
{
    poe_message expected = message_of(6, 96);
    expected.stage = 2;
    return refused(comm, expected, 5);
}

static bool wrong_shape(poe_comm *comm)
{
    poe_message expected = message_of(6, 96);
    expected.shape[2] = 5;
    return refused(comm, expected, 5);
}

static bool wrong_length(poe_comm *comm)
{
    return refused(comm, message_of(6, 97), 5);
}

static bool wrong_run(poe_comm *comm)
{
    return refused(comm, message_of(6, 96), 6);
}

/* --- waiting --------------------------------------------------------------------------------------------------------------- */
/* Rank 0 waits for a message that rank 1 sends after `seconds`, or never (negative): then it leaves instead. */
static bool wait_for_rank_1(poe_comm *comm, double seconds)
{
    int rank = poe_comm_rank(comm);
    if (rank > 1)
        return seconds >= 0;
    poe_link *link = open_link(comm, 1, 0, 2, 1000, 5);
    if (rank == 1) {
        poe_comm_doing(comm, "computing forward", 12, 3);
        pause_for(seconds);
        if (seconds > 0)
            send_one(link, 51, 100);
    } else if (seconds > 0) {
        receive_one(link, 51, 100);
        poe_link_release(link);
    } else {
        poe_message m = message_of(51, 100);
        void *payload;
        CHECK_INT(poe_link_receive(link, &m, NULL, &payload), POE_PEER_LOST);
    }
    poe_link_close(link);
    return rank == 1 || seconds > 0;
}

static bool slow(poe_comm *comm)
{
    return wait_for_rank_1(comm, 0.8);
}

static bool left(poe_comm *comm)
{
    return wait_for_rank_1(comm, 0);
}

static void *request_report(void *comm)
{
    pause_for(0.1); /* until rank 0 waits */
    poe_comm_request_report(comm);
    return NULL;
}

static bool report(poe_comm *comm)
{
    pthread_t thread;
    bool asks = poe_comm_rank(comm) == 0;
    if (poe_comm_rank(comm) == 1)
        pause_for(0.3);
    if (asks)
        CHECK_INT(pthread_create(&thread, NULL, request_report, comm), 0);
    CHECK_INT(poe_comm_barrier(comm, "a barrier with a name"), POE_OK);
    if (asks)
        pthread_join(thread, NULL);
    poe_comm_doing(comm, "reporting", 7, -1);
    poe_comm_request_report(comm);
    pause_for(0.1);
    return true;
}

static bool stop(poe_comm *comm)
{
    int rank = poe_comm_rank(comm);
    CHECK_INT(poe_comm_barrier(comm, "before the stop"), POE_OK);
    if (rank == poe_comm_size(comm) - 1)
        poe_comm_request_stop(comm);
    double until = poe_now() + 3; /* heartbeats are 10 s apart: the wish must not wait for one */
    while (rank == 0 && !poe_comm_stop_wanted(comm) && poe_now() < until)
        pause_for(0.005);
    if (rank == 0)
        CHECK(poe_comm_stop_wanted(comm));
    return true;
}

/* --- collective calls ------------------------------------------------------------------------------------------------------ */
static bool collectives(poe_comm *comm)
{
    int rank = poe_comm_rank(comm), size = poe_comm_size(comm), all[8] = {0};
    unsigned char *big = malloc(300000);
    for (int round = 0; round < 5; round++) {
        CHECK_INT(poe_comm_barrier(comm, "a round"), POE_OK);
        int mine = 100 * round + rank;
        CHECK_INT(poe_comm_gather(comm, &mine, all, sizeof(mine)), POE_OK);
        for (int r = 0; r < size; r++)
            CHECK_INT(all[r], 100 * round + r);
    }
    for (int root = 0; root < size; root++) {
        fill(big, 300000, rank == root ? root + 1 : 0);
        CHECK_INT(poe_comm_broadcast(comm, root, big, 300000), POE_OK);
        CHECK(is_filled(big, 300000, root + 1));
    }
    free(big);
    return true;
}

static bool agree(poe_comm *comm)
{
    int rank = poe_comm_rank(comm), size = poe_comm_size(comm);
    CHECK_INT(poe_comm_agree(comm, POE_OK), POE_OK);
    poe_log_hold();
    poe_error("rank %d holds this", rank);
    poe_status mine = rank >= size / 2 ? rank == size / 2 ? POE_BAD_INPUT : POE_FAILED : POE_OK;
    CHECK_INT(poe_comm_agree(comm, mine), POE_BAD_INPUT);
    return true;
}

static bool different_calls(poe_comm *comm)
{
    int value = 0;
    if (poe_comm_rank(comm) == 0)
        CHECK_INT(poe_comm_barrier(comm, "rank 0's barrier"), POE_PEER_LOST);
    else
        CHECK_INT(poe_comm_broadcast(comm, 0, &value, sizeof(value)), POE_PEER_LOST);
    return false;
}

/* --- the shared sum -------------------------------------------------------------------------------------------------------- */
enum { COUNT = 10007, WIDTH = 24, TABLE = 400 * WIDTH, VECTORS = 9 };

/* What a sum is of: numbers, or a table of which a step touches some rows; and how it travels. */
typedef struct sum_case {
    size_t count, width, chunk;
    poe_wire wire;
    int slots, channel;
    bool apart; /* totals are not written over the ranks' own values */
} sum_case;

/* Of a table: no rows in step 0, all of them in step 1, in the others some, of each rank others, with zeros of both
 * signs in them and rows of nothing but -0. */
static void own_values(float *values, const sum_case *c, int rank, int step)
{
    poe_rng rng;
    poe_rng_init(&rng, (uint64_t)step, rank == 0 ? "a" : rank == 1 ? "b" : rank == 2 ? "c" : "d");
    double touched = !c->width || step == 1 ? 1 : step == 0 ? 0 : 0.05 * step;
    size_t width = c->width ? c->width : c->count;
    for (size_t first = 0; first < c->count; first += width) {
        bool used = poe_rng_uniform(&rng) < touched, negative = poe_rng_uniform(&rng) < 0.1;
        for (size_t i = first; i < first + width; i++) {
            double x = poe_rng_normal(&rng);
            values[i] = !used ? 0.0f : c->width && (negative || x < -1) ? -0.0f : x > 1 && c->width ? 0.0f : (float)x;
        }
    }
}

static float travelled(poe_wire wire, float x)
{
    return wire == POE_WIRE_BF16 ? poe_bf16_value(poe_bf16_bits(x)) : x;
}

/* Exactly ((own_0 + own_1) + own_2) + ..., in the order of the chain, each partial sum rounded as it travels. */
static bool is_sum(const float *values, const sum_case *c, const int *ranks, int n, int step)
{
    float *sum = malloc(c->count * sizeof(float)), *own = malloc(c->count * sizeof(float));
    own_values(sum, c, ranks[0], step);
    for (int r = 1; r < n; r++) {
        own_values(own, c, ranks[r], step);
        for (size_t i = 0; i < c->count; i++)
            sum[i] = travelled(c->wire, travelled(c->wire, sum[i]) + own[i]);
    }
    bool same = memcmp(sum, values, c->count * sizeof(float)) == 0;
    free(own);
    free(sum);
    return same;
}

static float *vector(size_t count)
{
    return aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64);
}

static poe_reduce *open_sum(poe_comm *comm, const sum_case *c, const int *ranks, int n)
{
    poe_reduce_settings settings = {.name = "gradients", .ranks = ranks, .n_ranks = n, .channel = c->channel,
                                    .count = c->count, .width = c->width, .wire = c->wire, .chunk = c->chunk,
                                    .slots = c->slots, .run = 9};
    poe_reduce *reduce = NULL;
    CHECK_INT(poe_reduce_open(comm, &settings, &reduce), POE_OK);
    return reduce;
}

static void reduce_along(poe_comm *comm, const sum_case *c, const int *ranks, int n)
{
    float *own[8], *totals[8], *unchanged = vector(c->count);
    int rank = poe_comm_rank(comm);
    poe_reduce *reduce = open_sum(comm, c, ranks, n);
    poe_rng rng;
    poe_rng_init(&rng, (uint64_t)rank, "delays");
    for (int s = 0; s < c->slots; s++) {
        own[s] = vector(c->count);
        totals[s] = c->apart ? vector(c->count) : own[s];
    }
    for (int step = 0; step < VECTORS + c->slots - 1; step++) {
        int slot = step % c->slots, last = step - c->slots + 1;
        if (step < VECTORS) {
            own_values(own[slot], c, rank, step);
            pause_for(0.004 * poe_rng_uniform(&rng));
            CHECK_INT(poe_reduce_begin(reduce, step, own[slot], totals[slot]), POE_OK);
        }
        if (last < 0)
            continue;
        CHECK_INT(poe_reduce_end(reduce, last), POE_OK);
        CHECK(is_sum(totals[last % c->slots], c, ranks, n, last));
        own_values(unchanged, c, rank, last);
        CHECK(!c->apart || memcmp(own[last % c->slots], unchanged, c->count * sizeof(float)) == 0);
    }
    poe_reduce_close(reduce);
    free(unchanged);
    for (int s = 0; s < c->slots; s++) {
        free(own[s]);
        if (c->apart)
            free(totals[s]);
    }
}

static void chains(int size, int *up, int *down)
{
    for (int r = 0; r < size; r++) {
        up[r] = r;
        down[r] = size - 1 - r;
    }
}

static bool reduce(poe_comm *comm)
{
    int size = poe_comm_size(comm), up[8], down[8];
    chains(size, up, down);
    reduce_along(comm, &(sum_case){.count = COUNT, .slots = 1, .channel = 0}, up, size);
    reduce_along(comm, &(sum_case){.count = COUNT, .chunk = 1000, .slots = 3, .channel = 1}, up, size);
    reduce_along(comm, &(sum_case){.count = COUNT, .chunk = 333, .slots = 4, .channel = 2, .apart = true}, down, size);
    return true;
}

static poe_comm_stats stats_of(poe_comm *comm)
{
    poe_comm_stats stats;
    poe_comm_get_stats(comm, &stats);
    return stats;
}

/* Bytes of sums that a rank sends of what whole floats would be: rows that are zero stay behind, and no bit differs. */
static bool sparse(poe_comm *comm)
{
    int size = poe_comm_size(comm), up[8], down[8];
    chains(size, up, down);
    sum_case c = {.count = TABLE, .width = WIDTH, .slots = 1, .channel = 0};
    reduce_along(comm, &c, up, size);
    poe_comm_stats stats = stats_of(comm);
    CHECK(size == 1 || stats.shared_sent < 0.8 * (double)stats.shared_dense);
    c = (sum_case){.count = TABLE, .width = WIDTH, .chunk = 1000, .slots = 3, .channel = 1, .apart = true};
    reduce_along(comm, &c, down, size);
    c = (sum_case){.count = TABLE, .width = WIDTH, .chunk = 1, .slots = 2, .channel = 2};
    reduce_along(comm, &c, up, size);
    return true;
}

static bool rounded(poe_comm *comm)
{
    int size = poe_comm_size(comm), up[8], down[8];
    chains(size, up, down);
    reduce_along(comm, &(sum_case){.count = COUNT, .chunk = 1001, .wire = POE_WIRE_BF16, .slots = 2, .channel = 0}, up,
                 size);
    poe_comm_stats stats = stats_of(comm);
    CHECK_INT(2 * stats.shared_sent, stats.shared_dense);
    sum_case c = {.count = TABLE, .width = WIDTH, .chunk = 999, .wire = POE_WIRE_BF16, .slots = 2, .channel = 1};
    reduce_along(comm, &c, down, size);
    /* rows of an odd number of floats */
    c = (sum_case){.count = 800, .width = 5, .chunk = 255, .wire = POE_WIRE_BF16, .slots = 1, .channel = 2};
    reduce_along(comm, &c, up, size);
    return true;
}

/* Parts of a vector become final one after the other, and their totals are wanted in another order. */
static bool parts(poe_comm *comm)
{
    int size = poe_comm_size(comm), up[8], down[8], rank = poe_comm_rank(comm);
    chains(size, up, down);
    sum_case cases[2] = {{.count = COUNT, .slots = 1, .chunk = 500, .channel = 0},
                         {.count = TABLE, .width = WIDTH, .slots = 1, .chunk = 500, .channel = 1}};
    poe_reduce *sums[2];
    float *values[2];
    for (int p = 0; p < 2; p++) {
        sums[p] = open_sum(comm, &cases[p], up, size);
        values[p] = vector(cases[p].count);
    }
    for (int step = 0; step < VECTORS; step++) {
        for (int p = 0; p < 2; p++) {
            own_values(values[p], &cases[p], rank, step);
            CHECK_INT(poe_reduce_begin(sums[p], step, values[p], values[p]), POE_OK);
            pause_for(0.001 * ((rank + step) % 3));
        }
        for (int p = 1; p >= 0; p--) {
            CHECK_INT(poe_reduce_end(sums[p], step), POE_OK);
            CHECK(is_sum(values[p], &cases[p], up, size, step));
        }
    }
    for (int p = 0; p < 2; p++) {
        poe_reduce_close(sums[p]);
        free(values[p]);
    }
    return true;
}

/* One rank sums something else: refused, not added. */
static bool refused_sum(poe_comm *comm, const sum_case *cases, int step)
{
    int ranks[] = {0, 1}, rank = poe_comm_rank(comm);
    if (rank > 1)
        return false;
    float *values = vector(cases[rank].count);
    own_values(values, &cases[rank], rank, 2);
    poe_reduce *sum = open_sum(comm, &cases[rank], ranks, 2);
    CHECK_INT(poe_reduce_begin(sum, rank * step, values, values), POE_OK);
    if (rank == 1)
        CHECK_INT(poe_reduce_end(sum, step), POE_PEER_LOST);
    else
        pause_for(0.1);
    poe_reduce_close(sum);
    free(values);
    return false;
}

static bool wrong_sum(poe_comm *comm)
{
    sum_case same = {.count = COUNT, .slots = 1};
    return refused_sum(comm, (sum_case[]){same, same}, 1);
}

static bool wrong_format(poe_comm *comm)
{
    sum_case half = {.count = COUNT, .slots = 1, .wire = POE_WIRE_BF16}, whole = {.count = COUNT, .slots = 1};
    return refused_sum(comm, (sum_case[]){half, whole}, 0);
}

static bool wrong_rows(poe_comm *comm)
{
    sum_case rows = {.count = TABLE, .slots = 1, .width = WIDTH}, whole = {.count = TABLE, .slots = 1, .width = 48};
    return refused_sum(comm, (sum_case[]){rows, whole}, 0);
}

#define PATIENT {.deadline = 30, .patience = 30}
const poe_scenario poe_scenarios[] = {
    {"stream", 1, PATIENT, stream, 0, NULL},
    {"credits", 2, PATIENT, credits, 0, NULL},
    {"collectives", 1, PATIENT, collectives, 0, NULL},
    {"agree", 1, PATIENT, agree, 0, NULL},
    {"reduce", 1, PATIENT, reduce, 0, NULL},
    {"sparse", 1, PATIENT, sparse, 0, NULL},
    {"rounded", 1, PATIENT, rounded, 0, NULL},
    {"parts", 1, PATIENT, parts, 0, NULL},
    {"stop", 1, {.deadline = 100, .patience = 100, .heartbeat = 10}, stop, 0, NULL},
    {"report", 2, PATIENT, report, 0,
     "rank 0: waiting for a barrier with a name (collective call 1) from rank 1 since "},
    {"report", 1, PATIENT, report, 0, "reporting, step 7\n"},
    {"slow", 2, {.deadline = 30, .patience = 0.3, .heartbeat = 0.1}, slow, 0,
     "still waiting for step 12, micro-batch 3 on link activations 1->0 from rank 1 (0 s); rank 1 is alive: computing "
     "forward, step 12, micro-batch 3\n"},
    {"left", 2, PATIENT, left, 0,
     "rank 1 has ended its part of the job: rank 0 waits for step 12, micro-batch 3 on link activations 1->0 since "},
    {"wrong step", 2, PATIENT, wrong_step, 1, "from rank 0: its step is 1, expected 2\n"},
    {"wrong stage", 2, PATIENT, wrong_stage, 1, "from rank 0: its stage is 0, expected 2\n"},
    {"wrong shape", 2, PATIENT, wrong_shape, 1, "from rank 0: its shape[2] is 4, expected 5\n"},
    {"wrong length", 2, PATIENT, wrong_length, 1, "from rank 0: its length is 96, expected 97\n"},
    {"wrong run", 2, PATIENT, wrong_run, 1, "its run is 0000000000000005, expected 0000000000000006\n"},
    {"different calls", 2, PATIENT, different_calls, 0, "its kind is 2, expected 1\n"},
    {"wrong sum", 2, PATIENT, wrong_sum, 1, "from rank 0: its step is 0, expected 1\n"},
    {"wrong format", 2, PATIENT, wrong_format, 1, "from rank 0: its shape[0] is 1, expected 0\n"},
    {"wrong rows", 2, PATIENT, wrong_rows, 1, "from rank 0: its shape[1] is 24, expected 48\n"},
};
const int poe_n_scenarios = sizeof(poe_scenarios) / sizeof(*poe_scenarios);

/* --- harness --------------------------------------------------------------------------------------------------------------- */
void poe_scenario_play(const poe_scenario *scenario, poe_transport *transport)
{
    poe_log *log = poe_log_create(transport->rank, transport->size);
    poe_log_attach(log);
    poe_comm *comm = NULL;
    CHECK_INT(poe_comm_create(transport, &scenario->settings, &comm), POE_OK);
    if (comm)
        poe_comm_destroy(comm, scenario->run(comm));
    poe_log_attach(NULL);
    poe_log_destroy(log);
}

static int capture_file = -1, real_stderr;

void poe_capture_begin(void)
{
    char path[] = "/tmp/poe-capture-XXXXXX";
    fflush(stderr);
    capture_file = mkstemp(path);
    unlink(path);
    real_stderr = dup(STDERR_FILENO);
    dup2(capture_file, STDERR_FILENO);
}

char *poe_capture_end(void)
{
    fflush(stderr);
    dup2(real_stderr, STDERR_FILENO);
    close(real_stderr);
    off_t size = lseek(capture_file, 0, SEEK_END);
    char *text = calloc((size_t)size + 1, 1);
    ssize_t got = pread(capture_file, text, (size_t)size, 0);
    CHECK_INT(got, size);
    close(capture_file);
    return text;
}

int poe_scenarios_failures(void)
{
    return check_failures;
}
