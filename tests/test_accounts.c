/* SPDX-License-Identifier: MIT
 * Accounts of a rank's time, clocks compared over links, and traces that one rank could not keep whole. */
#include "pipeline/accounts.h"

#include <pthread.h>
#include <time.h>
#include <unistd.h>

#include "comm/inproc/inproc.h"
#include "pipeline/clock.h"
#include "pipeline/streams.h"
#include "pipeline/trace.h"
#include "src/log.h"
#include "tests/check.h"

enum { RANKS = 3, RUN = 7, KEPT = 100, SENT_MESSAGES = 200 };

static char path[] = "/tmp/poe-trace-XXXXXX";

typedef struct player {
    poe_transport *transport;
    void (*play)(poe_comm *comm);
} player;

static void *run(void *arg)
{
    player *p = arg;
    poe_log *log = poe_log_create(p->transport->rank, p->transport->size);
    poe_log_attach(log);
    poe_comm *comm = NULL;
    CHECK_INT(poe_comm_create(p->transport, &(poe_comm_settings){.deadline = 60}, &comm), POE_OK);
    p->play(comm);
    poe_comm_destroy(comm, true);
    poe_log_attach(NULL);
    poe_log_destroy(log);
    return NULL;
}

static void play(void (*body)(poe_comm *comm))
{
    poe_transport *transports[RANKS];
    pthread_t threads[RANKS];
    player players[RANKS];
    CHECK_INT(poe_inproc_create(RANKS, transports), POE_OK);
    for (int r = 0; r < RANKS; r++) {
        players[r] = (player){transports[r], body};
        pthread_create(&threads[r], NULL, run, &players[r]);
    }
    for (int r = 0; r < RANKS; r++)
        pthread_join(threads[r], NULL);
}

static void sleep_for(double seconds)
{
    struct timespec t = {.tv_nsec = (long)(seconds * 1e9)};
    nanosleep(&t, NULL);
}

/* A link from rank 0 to rank 1; NULL at the others. */
static poe_link *open_link(poe_comm *comm)
{
    int rank = poe_comm_rank(comm);
    poe_link_settings settings = {.name = "activations 0->1",
                                  .peer = 1 - rank,
                                  .channel = POE_CHANNEL_BATCH,
                                  .outgoing = rank == 0,
                                  .max_bytes = 8,
                                  .window = 2,
                                  .run = RUN};
    poe_link *link = NULL;
    if (rank < 2)
        CHECK_INT(poe_link_open(comm, &settings, &link), POE_OK);
    return link;
}

static void pass_message(poe_link *link, int rank, int step)
{
    poe_message message = {.kind = 1, .step = step, .bytes = 8};
    void *payload;
    if (rank == 0) {
        CHECK_INT(poe_link_acquire(link, &message, &payload), POE_OK);
        memcpy(payload, "payload", 8);
        CHECK_INT(poe_link_send(link, &message), POE_OK);
    } else {
        CHECK_INT(poe_link_receive(link, &message, NULL, &payload), POE_OK);
        poe_link_release(link);
    }
}

/* --- accounts ----------------------------------------------------------------------------------------------------------------- */

static double sum_of(const poe_account_times *times)
{
    double sum = 0;
    for (int i = 0; i < POE_ACCOUNT_COUNT; i++)
        sum += times->seconds[i];
    return sum;
}

/* Rank 1 waits for what rank 0 sends late, while it counts as data; in a checkpoint waiting is not told apart. */
static void keep_accounts(poe_comm *comm)
{
    int rank = poe_comm_rank(comm);
    poe_link *link = open_link(comm);
    poe_accounts a;
    poe_account_times first, second;
    poe_accounts_start(&a, comm, NULL);
    poe_account_enter(&a, POE_ACCOUNT_DATA, 0, 0);
    if (rank == 0)
        sleep_for(0.05);
    if (rank < 2)
        pass_message(link, rank, 0);
    poe_account_enter(&a, POE_ACCOUNT_FORWARD, 0, 0);
    double deadline = a.since + 0.01;
    sleep_for(0.02);
    poe_account_enter_at(&a, POE_ACCOUNT_OTHER, 0, 0, deadline);
    poe_accounts_close_step(&a, &first);
    CHECK_NEAR(sum_of(&first), first.wall, 0, 1e-9);
    CHECK_NEAR(first.seconds[POE_ACCOUNT_FORWARD], 0.01, 0, 1e-9);
    CHECK(first.seconds[POE_ACCOUNT_OTHER] >= 0.01);
    CHECK(rank == 1 || first.seconds[POE_ACCOUNT_RECEIVE] == 0);
    CHECK(rank != 0 || first.seconds[POE_ACCOUNT_DATA] >= 0.05);
    CHECK_NEAR(a.receive_wait[POE_CHANNEL_BATCH], first.seconds[POE_ACCOUNT_RECEIVE], 0, 1e-9);

    poe_account_enter(&a, POE_ACCOUNT_CHECKPOINT, 1, -1);
    CHECK_INT(poe_comm_barrier(comm, "a checkpoint"), POE_OK);
    poe_account_enter(&a, POE_ACCOUNT_OUTSIDE, 1, -1);
    double evaluated = a.since;
    sleep_for(0.05);
    poe_account_enter(&a, POE_ACCOUNT_OTHER, 1, -1);
    evaluated = a.since - evaluated;
    double opened = a.opened;
    poe_accounts_close_step(&a, &second);
    CHECK_NEAR(sum_of(&second), second.wall, 0, 1e-9);
    CHECK_NEAR(second.wall + evaluated, a.opened - opened, 0, 1e-9);
    CHECK(second.seconds[POE_ACCOUNT_CHECKPOINT] > 0 && second.seconds[POE_ACCOUNT_RECEIVE] == 0);
    CHECK_NEAR(a.total.wall, first.wall + second.wall, 0, 1e-9);
    CHECK(poe_accounts_fill(&a) > 0);
    poe_accounts_stop(&a);
    poe_link_close(link);
}

/* --- clocks ------------------------------------------------------------------------------------------------------------------- */

/* As if every rank but the last ran on a machine of its own; really they have one clock. */
static void compare_clocks(poe_comm *comm)
{
    int rank = poe_comm_rank(comm);
    poe_clock clock;
    poe_clock_reading reading;
    CHECK_INT(poe_clock_open(&clock, comm, (uint64_t)(rank == 2 ? 1 : rank), RUN), POE_OK);
    for (int i = 0; i < 2; i++) {
        CHECK_INT(poe_clock_read(&clock, &reading), POE_OK);
        CHECK(fabs(reading.offset) <= reading.error);
        CHECK(rank == 1 ? reading.error > 0 && reading.error < 30 : reading.error == 0);
    }
    poe_clock_close(&clock);
}

/* --- traces ------------------------------------------------------------------------------------------------------------------- */

/* More than rank 1 keeps: messages of two events at least each. */
static void overflow(poe_comm *comm)
{
    int rank = poe_comm_rank(comm);
    poe_link *link = open_link(comm);
    poe_trace *trace;
    poe_accounts a;
    CHECK_INT(poe_trace_create(comm, RUN, (uint64_t)rank, rank == 1 ? KEPT : 100 * KEPT, &trace), POE_OK);
    poe_accounts_start(&a, comm, trace);
    for (int i = 0; i < SENT_MESSAGES; i++) {
        poe_account_enter(&a, rank ? POE_ACCOUNT_DATA : POE_ACCOUNT_SEND, i, 0);
        if (rank < 2)
            pass_message(link, rank, i);
        poe_account_enter(&a, POE_ACCOUNT_FORWARD, i, 0);
    }
    poe_accounts_stop(&a);
    poe_log_settle(true);
    CHECK_INT(poe_trace_write(trace, NULL, path), POE_OK);
    poe_trace_destroy(trace);
    poe_link_close(link);
}

static int count_kind(const json_t *events, const char *kind, double before)
{
    size_t i;
    json_t *e;
    int n = 0;
    json_array_foreach(events, i, e)
        n += strcmp(json_string_value(json_object_get(e, "ph")), kind) == 0 &&
             json_number_value(json_object_get(e, "ts")) < before;
    return n;
}

/* It ends for all ranks where the first of them was full, and every arrow has two ends. */
static void check_trace(void)
{
    json_t *trace = json_load_file(path, 0, NULL), *events = json_object_get(trace, "traceEvents");
    json_t *about = json_object_get(trace, "otherData");
    double end = json_number_value(json_object_get(about, "ended_early_at_us"));
    json_t *errors = json_object_get(about, "clock_error_us");
    CHECK(end > 0);
    CHECK_INT(json_array_size(errors), RANKS);
    CHECK(json_number_value(json_array_get(errors, 1)) > 0);
    CHECK(json_number_value(json_array_get(errors, 2)) > json_number_value(json_array_get(errors, 1)));
    int slices = count_kind(events, "X", INFINITY), arrows = count_kind(events, "s", INFINITY);
    CHECK(arrows > 0 && arrows < SENT_MESSAGES && slices > KEPT / 2);
    CHECK_INT(count_kind(events, "X", end), slices);
    CHECK_INT(count_kind(events, "s", end), arrows);
    CHECK_INT(count_kind(events, "f", end), arrows);
    json_decref(trace);
}

int main(void)
{
    close(mkstemp(path));
    play(keep_accounts);
    play(compare_clocks);
    play(overflow);
    check_trace();
    unlink(path);
    return check_result();
}
