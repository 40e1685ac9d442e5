/* SPDX-License-Identifier: MIT
 * How fast links are, how much of a transfer is hidden behind computing, and what waiting costs. Under mpiexec over
 * MPI; alone, with 4 ranks as threads. Columns:
 *   bytes     payload of a message, sent from rank 0 to rank 1 and back
 *   us        half of the round trip, median
 *   GB/s      bytes / us
 *   idle      processor time of a rank whose thread waits, in percent of one core
 *   sum       time of one shared sum of 16 Mi floats along all ranks
 *   hidden    1 - (time that rank 0's thread waited when it sent and computed) / (time of sending alone) */
#include <pthread.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "comm/inproc/inproc.h"
#include "comm/mpi/mpi.h"
#include "src/clock.h"
#include "src/log.h"
#include "tests/check.h"

enum { LARGEST = 64 << 20, IDLE_SECONDS = 10 };

static int seconds_idle = IDLE_SECONDS;

static poe_link *open_link(poe_comm *comm, int from, int to, int channel)
{
    poe_link_settings settings = {.name = "bench",
                                  .peer = poe_comm_rank(comm) == from ? to : from,
                                  .channel = channel,
                                  .outgoing = poe_comm_rank(comm) == from,
                                  .max_bytes = LARGEST,
                                  .window = 2};
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

static void bench_links(poe_comm *comm, poe_link *out, poe_link *in)
{
    static double times[400];
    int rank = poe_comm_rank(comm);
    for (size_t bytes = 4; bytes <= LARGEST; bytes *= 16) {
        int n = bytes <= 65536 ? 400 : bytes <= 1 << 20 ? 100 : 12;
        for (int i = -2; i < n; i++) {
            double start = poe_now();
            if (rank == 0)
                send_one(out, bytes);
            receive_one(in, bytes);
            if (rank == 1)
                send_one(out, bytes);
            if (rank == 0 && i >= 0)
                times[i] = (poe_now() - start) / 2;
        }
        if (rank != 0)
            continue;
        qsort(times, (size_t)n, sizeof(*times), compare);
        double median = times[n / 2];
        printf("%10zu bytes %10.1f us %8.3f GB/s\n", bytes, 1e6 * median, 1e-9 * (double)bytes / median);
        fflush(stdout);
    }
}

static volatile double sink;

static void compute(long rounds)
{
    double x = 1;
    for (long i = 0; i < rounds; i++)
        x = x * 1.0000001 + 1e-9;
    sink = x;
}

/* Messages of 16 MiB down the link while rank 0's thread computes four times as long as they take. */
static void bench_overlap(poe_comm *comm, poe_link *out, poe_link *in)
{
    enum { N = 8, BYTES = 16 << 20 };
    if (poe_comm_rank(comm) == 1) {
        for (int i = 0; i < 2 * N; i++) {
            receive_one(in, BYTES);
            if (i % N == N - 1)
                send_one(out, 4);
        }
        return;
    }
    double start = poe_now();
    for (int i = 0; i < N; i++)
        send_one(out, BYTES);
    receive_one(in, 4);
    double alone = poe_now() - start;
    long rounds = 1000000;
    start = poe_now();
    compute(rounds);
    rounds = (long)((double)rounds * 4 * alone / N / (poe_now() - start));
    start = poe_now();
    for (int i = 0; i < N; i++)
        compute(rounds);
    double computing = poe_now() - start;
    poe_comm_stats before, after;
    poe_comm_get_stats(comm, &before);
    start = poe_now();
    for (int i = 0; i < N; i++) {
        send_one(out, BYTES);
        compute(rounds);
    }
    receive_one(in, 4);
    double both = poe_now() - start;
    poe_comm_get_stats(comm, &after);
    double waited = after.receive_wait + after.credit_wait - before.receive_wait - before.credit_wait;
    printf("sending %.3f s, computing %.3f s, both %.3f s: hidden %.0f %%, computing while %.0f %% of sending\n", alone,
           computing, both, 100 * (1 - waited / alone),
           100 * (after.transfer_busy - before.transfer_busy) / (after.transfer - before.transfer));
}

static void bench_sum(poe_comm *comm)
{
    enum { COUNT = 16 << 20, N = 3 };
    int ranks[64], size = poe_comm_size(comm);
    for (int r = 0; r < size; r++)
        ranks[r] = r;
    poe_reduce_settings settings = {.name = "bench", .ranks = ranks, .n_ranks = size, .count = COUNT, .slots = 1};
    poe_reduce *reduce;
    float *values = aligned_alloc(64, COUNT * sizeof(float));
    memset(values, 0, COUNT * sizeof(float));
    CHECK_INT(poe_reduce_open(comm, &settings, &reduce), POE_OK);
    for (int i = 0; i < N; i++) {
        double start = poe_now();
        CHECK_INT(poe_reduce_begin(reduce, i, values, values), POE_OK);
        CHECK_INT(poe_reduce_end(reduce, i), POE_OK);
        if (poe_comm_rank(comm) == 0)
            printf("sum %.3f s\n", poe_now() - start);
    }
    poe_reduce_close(reduce);
    free(values);
}

static double cpu_seconds(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)u.ru_utime.tv_sec + (double)u.ru_stime.tv_sec +
           1e-6 * (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

/* All ranks wait for the last one, which sleeps. */
static void bench_idle(poe_comm *comm)
{
    int rank = poe_comm_rank(comm), size = poe_comm_size(comm);
    double mine[2], all[2 * 64];
    poe_comm_barrier(comm, "before idling");
    double cpu = cpu_seconds(), start = poe_now();
    if (rank == size - 1)
        sleep((unsigned)seconds_idle);
    poe_comm_barrier(comm, "idling");
    mine[0] = 100 * (cpu_seconds() - cpu) / (poe_now() - start);
    poe_comm_gather(comm, mine, all, sizeof(mine[0]));
    for (int r = 0; rank == 0 && r < size; r++)
        printf("rank %d idle %.2f %%%s\n", r, all[r], strcmp(poe_comm_transport(comm), "mpi") ? " (all ranks)" : "");
}

static void *bench(void *arg)
{
    poe_transport *transport = arg;
    poe_log *log = poe_log_create(transport->rank, transport->size);
    poe_log_attach(log);
    poe_comm *comm;
    CHECK_INT(poe_comm_create(transport, NULL, &comm), POE_OK);
    bench_idle(comm);
    bench_sum(comm);
    poe_comm_barrier(comm, "before links");
    if (poe_comm_rank(comm) < 2 && poe_comm_size(comm) > 1) {
        poe_link *first = open_link(comm, 0, 1, 0), *second = open_link(comm, 1, 0, 1);
        poe_link *out = poe_comm_rank(comm) == 0 ? first : second, *in = out == first ? second : first;
        bench_links(comm, out, in);
        bench_overlap(comm, out, in);
        poe_link_close(first);
        poe_link_close(second);
    }
    poe_comm_destroy(comm, true);
    poe_log_attach(NULL);
    poe_log_destroy(log);
    return NULL;
}

int main(int argc, char **argv)
{
    poe_transport *transports[4];
    pthread_t threads[4];
    int rank, size;
    if (argc > 1)
        seconds_idle = atoi(argv[1]);
    if (poe_mpi_launched()) {
        if (poe_mpi_start(&rank, &size) != POE_OK || poe_mpi_create(transports) != POE_OK)
            return 1;
        bench(transports[0]);
        poe_mpi_finish();
        return check_result();
    }
    if (poe_inproc_create(4, transports) != POE_OK)
        return 1;
    for (int r = 0; r < 4; r++)
        pthread_create(&threads[r], NULL, bench, transports[r]);
    for (int r = 0; r < 4; r++)
        pthread_join(threads[r], NULL);
    return check_result();
}
