/* SPDX-License-Identifier: MIT
 * What a link costs over one transport, as JSON lines of rank 0: `bench_transports inproc [quick]`, or under
 * `mpiexec -n 2` with mpi or fabric. Per length of a message, over comm's links, credits and checksums included:
 *   latency_us  half of a round trip: median, and 99 of 100
 *   gbs         payload per second in one direction, window 4: median over rounds
 *   cpu_us      processor time of both ranks per message of that stream
 *   hidden      share of that stream's time that is gone while rank 0's thread computes twice as long:
 *               1 - (sending and computing - computing alone) / sending alone
 * and at the end: processor time of a rank that waits, in percent of one core, and the time of one shared sum of 16 Mi
 * floats. */
#include <pthread.h>
#include <sys/resource.h>
#include <unistd.h>

#include "comm/fabric/fabric.h"
#include "comm/inproc/inproc.h"
#include "comm/mpi/mpi.h"
#include "src/clock.h"
#include "src/log.h"
#include "tests/check.h"

enum { LARGEST = 64 << 20, WINDOW = 4, MAX_REPS = 2000, ROUNDS = 5, SUM_FLOATS = 16 << 20 };

typedef struct bench {
    const char *name;
    bool quick;
    poe_transport *transport;
} bench;

typedef struct pair {
    poe_comm *comm;
    poe_link *out, *in;
    bool first; /* rank 0 */
} pair;

static poe_link *open_link(poe_comm *comm, int from, int channel)
{
    bool outgoing = poe_comm_rank(comm) == from;
    poe_link_settings settings = {.name = "bench", .peer = 1 - poe_comm_rank(comm), .channel = channel,
                                  .outgoing = outgoing, .max_bytes = LARGEST, .window = WINDOW};
    poe_link *link = NULL;
    CHECK_INT(poe_link_open(comm, &settings, &link), POE_OK);
    return link;
}

static void send_one(poe_link *link, size_t bytes)
{
    poe_message m = {.bytes = bytes};
    void *payload;
    CHECK_INT(poe_link_acquire(link, &m, &payload), POE_OK);
    CHECK_INT(poe_link_send(link, &m), POE_OK);
}

static void receive_one(poe_link *link, size_t bytes)
{
    poe_message m = {.bytes = bytes};
    void *payload;
    CHECK_INT(poe_link_receive(link, &m, NULL, &payload), POE_OK);
    poe_link_release(link);
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double cpu_seconds(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)u.ru_utime.tv_sec + (double)u.ru_stime.tv_sec +
           1e-6 * (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

/* Both ranks' together; as threads they have one count. */
static double cpu_of_both(poe_comm *comm)
{
    double mine = cpu_seconds(), both[2];
    poe_comm_gather(comm, &mine, both, sizeof(mine));
    return strcmp(poe_comm_transport(comm), "inproc") ? both[0] + both[1] : both[0];
}

/* --- a length ----------------------------------------------------------------------------------------------------- */
static void ping_pong(const pair *p, size_t bytes, int reps, double times[MAX_REPS])
{
    for (int i = -3; i < reps; i++) {
        double start = poe_now();
        if (p->first)
            send_one(p->out, bytes);
        receive_one(p->in, bytes);
        if (!p->first)
            send_one(p->out, bytes);
        if (i >= 0)
            times[i] = (poe_now() - start) / 2;
    }
    qsort(times, (size_t)reps, sizeof(*times), compare);
}

static volatile double sink;

static void compute(long rounds)
{
    double x = 1;
    for (long i = 0; i < rounds; i++)
        x = x * 1.0000001 + 1e-9;
    sink = x;
}

static double seconds_of(long rounds)
{
    double start = poe_now();
    compute(rounds);
    return poe_now() - start;
}

/* Rank 0's time for `count` messages and the word that they are there, with computing in between. */
static double stream(const pair *p, size_t bytes, int count, long rounds)
{
    double start = poe_now();
    for (int i = 0; i < count; i++) {
        if (!p->first) {
            receive_one(p->in, bytes);
            continue;
        }
        send_one(p->out, bytes);
        compute(rounds);
    }
    if (p->first)
        receive_one(p->in, 4);
    else
        send_one(p->out, 4);
    return poe_now() - start;
}

static double median_stream(const pair *p, size_t bytes, int count, long rounds)
{
    double times[ROUNDS];
    for (int i = 0; i < ROUNDS; i++)
        times[i] = stream(p, bytes, count, rounds);
    qsort(times, ROUNDS, sizeof(*times), compare);
    return times[ROUNDS / 2];
}

static double hidden(const pair *p, size_t bytes, int count, double alone)
{
    long rounds = 0;
    if (p->first) {
        long sample = 200000;
        rounds = (long)((double)sample * 2 * alone / count / seconds_of(sample));
    }
    double both = median_stream(p, bytes, count, rounds);
    double start = poe_now();
    for (int i = 0; i < count && p->first; i++)
        compute(rounds);
    double computing = poe_now() - start, share = 1 - (both - computing) / alone;
    return share < 0 ? 0 : share > 1 ? 1 : share;
}

static void bench_length(const pair *p, const bench *b, size_t bytes)
{
    static double times[2][MAX_REPS];
    int reps = bytes <= 4096 ? 1000 : bytes <= 1 << 20 ? 200 : 15;
    int count = bytes <= 4096 ? 2000 : bytes <= 1 << 20 ? 300 : 12;
    if (b->quick)
        reps = reps / 10 + 3, count = count / 10 + 3;
    double *own = times[p->first];
    ping_pong(p, bytes, reps, own);
    stream(p, bytes, count, 0);
    double cpu = cpu_of_both(p->comm);
    double alone = median_stream(p, bytes, count, 0);
    cpu = cpu_of_both(p->comm) - cpu;
    double share = hidden(p, bytes, count, alone);
    if (!p->first)
        return;
    printf("{\"transport\": \"%s\", \"bytes\": %zu, \"latency_us\": %.2f, \"latency_p99_us\": %.2f, \"gbs\": %.6f, "
           "\"cpu_us\": %.2f, \"hidden\": %.3f}\n",
           b->name, bytes, 1e6 * own[reps / 2], 1e6 * own[reps * 99 / 100], 1e-9 * (double)bytes * count / alone,
           1e6 * cpu / (ROUNDS * count), share);
    fflush(stdout);
}

/* --- waiting and summing ------------------------------------------------------------------------------------------ */
/* Rank 0 waits for rank 1, which sleeps. */
static double bench_idle(poe_comm *comm, unsigned seconds)
{
    poe_comm_barrier(comm, "before idling");
    double cpu = cpu_seconds(), start = poe_now();
    if (poe_comm_rank(comm) == 1)
        sleep(seconds);
    poe_comm_barrier(comm, "idling");
    return 100 * (cpu_seconds() - cpu) / (poe_now() - start);
}

static double bench_sum(poe_comm *comm)
{
    static const int ranks[] = {0, 1};
    poe_reduce_settings settings = {.name = "bench", .ranks = ranks, .n_ranks = 2, .count = SUM_FLOATS, .slots = 1};
    poe_reduce *reduce;
    double times[3];
    float *values = aligned_alloc(64, SUM_FLOATS * sizeof(float));
    memset(values, 0, SUM_FLOATS * sizeof(float));
    CHECK_INT(poe_reduce_open(comm, &settings, &reduce), POE_OK);
    for (int i = 0; i < 3; i++) {
        double start = poe_now();
        CHECK_INT(poe_reduce_begin(reduce, i, values, values), POE_OK);
        CHECK_INT(poe_reduce_end(reduce, i), POE_OK);
        times[i] = poe_now() - start;
    }
    poe_reduce_close(reduce);
    free(values);
    qsort(times, 3, sizeof(*times), compare);
    return times[1];
}

static void bench_all(poe_comm *comm, const bench *b)
{
    double idle = bench_idle(comm, b->quick ? 1 : 10), sum = bench_sum(comm);
    poe_comm_barrier(comm, "before links");
    pair p = {.comm = comm, .first = poe_comm_rank(comm) == 0};
    poe_link *down = open_link(comm, 0, 0), *up = open_link(comm, 1, 1);
    p.out = p.first ? down : up;
    p.in = p.first ? up : down;
    for (size_t bytes = 4; bytes <= LARGEST; bytes *= 4)
        bench_length(&p, b, bytes);
    poe_link_close(p.out);
    poe_link_close(p.in);
    if (p.first)
        printf("{\"transport\": \"%s\", \"idle_percent\": %.3f, \"sum_s\": %.4f}\n", b->name, idle, sum);
}

/* --- the ranks ---------------------------------------------------------------------------------------------------- */
static bool change_to_fabric(poe_comm **comm)
{
    const poe_fabric_settings settings = {0};
    poe_transport *transport;
    poe_status status = poe_fabric_create(*comm, &settings, &transport);
    poe_comm_destroy(*comm, true);
    *comm = NULL;
    return status == POE_OK && poe_comm_create(transport, NULL, comm) == POE_OK;
}

static void *run_rank(void *arg)
{
    bench *b = arg;
    poe_log *log = poe_log_create(b->transport->rank, b->transport->size);
    poe_log_attach(log);
    poe_comm *comm;
    CHECK_INT(poe_comm_create(b->transport, NULL, &comm), POE_OK);
    bool ready = strcmp(b->name, "fabric") != 0 || change_to_fabric(&comm);
    CHECK(ready);
    if (ready)
        bench_all(comm, b);
    poe_comm_destroy(comm, true);
    poe_log_attach(NULL);
    poe_log_destroy(log);
    return NULL;
}

static int run_threads(bench *b)
{
    poe_transport *transports[2];
    bench benches[2] = {*b, *b};
    pthread_t second;
    if (poe_inproc_create(2, transports) != POE_OK)
        return 1;
    for (int r = 0; r < 2; r++)
        benches[r].transport = transports[r];
    pthread_create(&second, NULL, run_rank, &benches[1]);
    run_rank(&benches[0]);
    pthread_join(second, NULL);
    return check_result();
}

int main(int argc, char **argv)
{
    bench b = {.name = argc > 1 ? argv[1] : "inproc", .quick = argc > 2 && strcmp(argv[2], "quick") == 0};
    int rank, size;
    if (strcmp(b.name, "inproc") == 0)
        return run_threads(&b);
    if (!poe_mpi_launched() || poe_mpi_start(&rank, &size) != POE_OK || size != 2 ||
        poe_mpi_create(&b.transport) != POE_OK) {
        fprintf(stderr, "usage: bench_transports inproc [quick], mpiexec -n 2 bench_transports mpi|fabric [quick]\n");
        return 2;
    }
    run_rank(&b);
    poe_mpi_finish();
    return check_result();
}
