/* SPDX-License-Identifier: MIT
 * Ranks as processes of an MPI job. MPI is called by one thread at a time: the rank's before the helper thread starts
 * and after it ends, the helper's in between. */
#include "comm/mpi/mpi.h"

#include <limits.h>
#include <mpi.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "comm/alarm.h"
#include "src/clock.h"
#include "src/log.h"

/* MPI moves data only while it is called. After a sign of activity it is called without pause for a moment, as more
 * usually follows; later, who has waited t seconds for a message waits at most t / PATIENCE longer than needed. */
static const double brisk = 100e-6, shortest = 20e-6, longest = 4e-3; /* seconds */
enum { PATIENCE = 16 };

/* --- starting ----------------------------------------------------------------------------------------------------- */
static int number_in(const char *variable, int otherwise)
{
    const char *text = variable ? getenv(variable) : NULL;
    char *end;
    long value = text ? strtol(text, &end, 10) : -1;
    return text && end != text && *end == 0 && value >= 0 && value <= INT_MAX ? (int)value : otherwise;
}

/* The most specific first: mpiexec may itself have been started by srun, whose variables then speak of hosts. */
static const struct launcher {
    const char *size, *rank;
} launchers[] = {
    {"OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"},
    {"PMI_SIZE", "PMI_RANK"},
    {"SLURM_STEP_NUM_TASKS", "SLURM_PROCID"},
    {"MPI_LOCALNRANKS", "MPI_LOCALRANKID"},
};

static const struct launcher *find_launcher(void)
{
    for (size_t i = 0; i < sizeof(launchers) / sizeof(*launchers); i++)
        if (number_in(launchers[i].size, 0) >= 1)
            return &launchers[i];
    return NULL;
}

bool poe_mpi_launched(void)
{
    return find_launcher() || getenv("PMIX_RANK");
}

void poe_mpi_environment(int *rank, int *size)
{
    const struct launcher *launcher = find_launcher();
    *size = launcher ? number_in(launcher->size, 1) : 1;
    *rank = launcher ? number_in(launcher->rank, 0) : number_in("PMIX_RANK", 0);
}

poe_status poe_mpi_start(int *rank, int *size)
{
    int provided, expected_rank, expected_size;
    if (MPI_Init_thread(NULL, NULL, MPI_THREAD_SERIALIZED, &provided) != MPI_SUCCESS) {
        poe_error("MPI_Init_thread failed: start the ranks with Open MPI's own mpiexec, or with srun --mpi=pmix");
        return POE_FAILED;
    }
    if (provided < MPI_THREAD_SERIALIZED) {
        poe_error("this MPI does not let a second thread communicate (MPI_THREAD_SERIALIZED is needed)");
        return POE_BAD_INPUT;
    }
    MPI_Comm_rank(MPI_COMM_WORLD, rank);
    MPI_Comm_size(MPI_COMM_WORLD, size);
    poe_mpi_environment(&expected_rank, &expected_size);
    if (*size == 1 && expected_size > 1) {
        if (expected_rank == 0)
            poe_error("the launcher started %d ranks (%s=%d), but MPI joined them into worlds of one: use srun "
                      "--mpi=pmix, or Open MPI's own mpiexec",
                      expected_size, find_launcher()->size, expected_size);
        return POE_BAD_INPUT;
    }
    return POE_OK;
}

void poe_mpi_finish(void)
{
    MPI_Finalize();
}

/* --- the transport ------------------------------------------------------------------------------------------------ */
/* What is under way. Long messages go in pieces: MPI counts in int, and the end of each piece is a sign that data
 * flows, which keeps the sleeps short while it does. */
enum { PIECE_BYTES = 512 << 10 };
typedef struct piece {
    poe_operation *op;
    int bytes;
    bool receive;
} piece;

typedef struct mpi_transport {
    poe_transport base;
    MPI_Comm comm;
    piece *pieces; /* (capacity); the first n are under way, as are requests[] */
    MPI_Request *requests;
    MPI_Status *statuses; /* (capacity) of those that have completed, as is indices[] */
    int *indices;
    int n, capacity;
    double active; /* when something last happened */
    poe_alarm alarm;
    char host[MPI_MAX_PROCESSOR_NAME];
} mpi_transport;

static bool reserve(mpi_transport *t)
{
    if (t->n < t->capacity)
        return true;
    size_t capacity = t->capacity ? 2 * (size_t)t->capacity : 64;
    piece *pieces = realloc(t->pieces, capacity * sizeof(*pieces));
    t->pieces = pieces ? pieces : t->pieces;
    MPI_Request *requests = realloc(t->requests, capacity * sizeof(*requests));
    t->requests = requests ? requests : t->requests;
    MPI_Status *statuses = realloc(t->statuses, capacity * sizeof(*statuses));
    t->statuses = statuses ? statuses : t->statuses;
    int *indices = realloc(t->indices, capacity * sizeof(*indices));
    t->indices = indices ? indices : t->indices;
    if (!pieces || !requests || !statuses || !indices)
        return false;
    t->capacity = (int)capacity;
    return true;
}

/* backend[0] counts the pieces still under way. */
static void end_piece(poe_operation *op)
{
    op->backend[0] = (void *)((uintptr_t)op->backend[0] - 1);
    op->done = op->backend[0] == NULL;
}

static void say_error(mpi_transport *t, poe_operation *op, int peer, int code)
{
    char text[MPI_MAX_ERROR_STRING] = "";
    int length;
    MPI_Error_string(code, text, &length);
    if (op->status == POE_OK)
        poe_error("MPI reports between rank %d and rank %d: %s", t->base.rank, peer, text);
    op->status = POE_PEER_LOST;
}

static void start_piece(mpi_transport *t, piece p, void *data, int peer, int channel)
{
    if (!reserve(t)) {
        poe_error("out of memory for a message between ranks");
        p.op->status = POE_FAILED;
        end_piece(p.op);
        return;
    }
    MPI_Request *request = &t->requests[t->n];
    int code = p.receive ? MPI_Irecv(data, p.bytes, MPI_BYTE, peer, channel, t->comm, request)
                         : MPI_Isend(data, p.bytes, MPI_BYTE, peer, channel, t->comm, request);
    if (code != MPI_SUCCESS) {
        say_error(t, p.op, peer, code);
        end_piece(p.op);
        return;
    }
    t->pieces[t->n++] = p;
    t->active = poe_now();
}

static void start(poe_transport *transport, int peer, int channel, void *data, size_t bytes, poe_operation *op,
                  bool receive)
{
    mpi_transport *t = (mpi_transport *)transport;
    size_t pieces = bytes ? (bytes + PIECE_BYTES - 1) / PIECE_BYTES : 1;
    op->backend[0] = (void *)(uintptr_t)pieces;
    for (size_t i = 0, at = 0; i < pieces; i++, at += PIECE_BYTES) {
        size_t n = bytes - at < PIECE_BYTES ? bytes - at : PIECE_BYTES;
        start_piece(t, (piece){op, (int)n, receive}, (char *)data + at, peer, channel);
    }
}

static void mpi_send(poe_transport *transport, int peer, int channel, const void *data, size_t bytes,
                     poe_operation *op)
{
    start(transport, peer, channel, (void *)(uintptr_t)data, bytes, op, false);
}

static void mpi_receive(poe_transport *transport, int peer, int channel, void *data, size_t bytes, poe_operation *op)
{
    start(transport, peer, channel, data, bytes, op, true);
}

/* The request of piece i is gone; the last one takes its place. */
static void forget_piece(mpi_transport *t, int i)
{
    t->n--;
    t->pieces[i] = t->pieces[t->n];
    t->requests[i] = t->requests[t->n];
}

static void complete(mpi_transport *t, const piece *p, const MPI_Status *status, bool failed)
{
    int count = p->bytes;
    if (failed && status->MPI_ERROR != MPI_SUCCESS) {
        say_error(t, p->op, status->MPI_SOURCE, status->MPI_ERROR);
    } else if (p->receive && MPI_Get_count(status, MPI_BYTE, &count) == MPI_SUCCESS &&
               count != p->bytes) {
        if (p->op->status == POE_OK)
            poe_error("rank %d expects a message of %d bytes from rank %d on channel %d, but got one of %d bytes",
                      t->base.rank, p->bytes, status->MPI_SOURCE, status->MPI_TAG, count);
        p->op->status = POE_PEER_LOST;
    }
    end_piece(p->op);
}

static bool test(mpi_transport *t)
{
    int done = 0;
    if (t->n == 0)
        return false;
    int code = MPI_Testsome(t->n, t->requests, &done, t->indices, t->statuses);
    if (done == MPI_UNDEFINED || done <= 0)
        return false;
    for (int i = 0; i < done; i++) {
        piece *p = &t->pieces[t->indices[i]];
        complete(t, p, &t->statuses[i], code == MPI_ERR_IN_STATUS);
        p->op = NULL;
    }
    for (int i = t->n - 1; i >= 0; i--)
        if (!t->pieces[i].op)
            forget_piece(t, i);
    return true;
}

static bool mpi_progress(poe_transport *transport, double wait)
{
    mpi_transport *t = (mpi_transport *)transport;
    double now = poe_now(), until = now + wait;
    for (;;) {
        bool any = test(t);
        now = poe_now();
        if (any)
            t->active = now;
        if (any || now >= until)
            return any;
        if (now - t->active < brisk) {
            sched_yield();
            continue;
        }
        double pause = (now - t->active) / PATIENCE;
        pause = pause < shortest ? shortest : pause > longest ? longest : pause;
        if (poe_alarm_sleep(&t->alarm, pause < until - now ? pause : until - now)) {
            t->active = poe_now();
            return false;
        }
    }
}

static void mpi_wake(poe_transport *transport)
{
    poe_alarm_ring(&((mpi_transport *)transport)->alarm);
}

/* What cannot be cancelled stays with MPI, and the operation undone. */
static void mpi_cancel(poe_transport *transport, poe_operation *op)
{
    mpi_transport *t = (mpi_transport *)transport;
    for (int i = t->n - 1; i >= 0; i--) {
        if (t->pieces[i].op != op)
            continue;
        int done = 0;
        if (t->pieces[i].receive)
            MPI_Cancel(&t->requests[i]);
        MPI_Test(&t->requests[i], &done, MPI_STATUS_IGNORE);
        if (done)
            end_piece(op);
        else
            MPI_Request_free(&t->requests[i]);
        forget_piece(t, i);
    }
}

static void mpi_destroy(poe_transport *transport)
{
    mpi_transport *t = (mpi_transport *)transport;
    MPI_Comm_free(&t->comm);
    free(t->pieces);
    free(t->requests);
    free(t->statuses);
    free(t->indices);
    free(t);
}

static const poe_transport_ops mpi_ops = {
    .name = "mpi",
    .send = mpi_send,
    .receive = mpi_receive,
    .progress = mpi_progress,
    .wake = mpi_wake,
    .cancel = mpi_cancel,
    .destroy = mpi_destroy,
};

static int count_host_ranks(MPI_Comm comm)
{
    MPI_Comm host;
    int n = 1;
    if (MPI_Comm_split_type(comm, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &host) != MPI_SUCCESS)
        return n;
    MPI_Comm_size(host, &n);
    MPI_Comm_free(&host);
    return n;
}

poe_status poe_mpi_create(poe_transport **transport)
{
    mpi_transport *t = calloc(1, sizeof(*t));
    if (!t || MPI_Comm_dup(MPI_COMM_WORLD, &t->comm) != MPI_SUCCESS) {
        poe_error("the MPI communicator of this job cannot be duplicated, or memory has run out");
        free(t);
        return POE_FAILED;
    }
    MPI_Comm_set_errhandler(t->comm, MPI_ERRORS_RETURN);
    int length;
    MPI_Get_processor_name(t->host, &length);
    t->base.ops = &mpi_ops;
    t->base.host = t->host;
    t->base.host_ranks = count_host_ranks(t->comm);
    MPI_Comm_rank(t->comm, &t->base.rank);
    MPI_Comm_size(t->comm, &t->base.size);
    t->active = poe_now();
    *transport = &t->base;
    return POE_OK;
}
