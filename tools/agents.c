/* SPDX-License-Identifier: MIT */
#include "tools/agents.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "comm/agent/proxy.h"
#include "comm/fabric/fabric.h"
#include "comm/mpi/mpi.h"
#include "faults/fault.h"
#include "faults/fault_link.h"
#include "pipeline/agent.h"
#include "pipeline/control.h"
#include "pipeline/report.h"
#include "src/files.h"
#include "src/log.h"
#include "tools/spares.h"

bool poe_agents_wanted(const poe_options *o)
{
    int rank = 0, size = 1;
    poe_mpi_environment(&rank, &size);
    return poe_options_agents(o, size);
}

static bool is_orderly(poe_status status)
{
    return status == POE_OK || status == POE_BAD_INPUT || status == POE_INTERRUPTED;
}

/* --- the stage process ------------------------------------------------------------------------------------------ */

static poe_status run_body(poe_board *board, const poe_rank_job *job)
{
    poe_comm_settings settings = {.deadline = job->options->deadline};
    poe_transport *transport;
    poe_comm *comm;
    poe_status status = poe_proxy_create(board, &transport);
    if (status == POE_OK)
        status = poe_comm_create(transport, &settings, &comm);
    if (status != POE_OK)
        return status;
    poe_control_add_comm(comm);
    status = job->body(comm, job->options);
    poe_log_settle(true);
    poe_control_remove(comm);
    if (is_orderly(status))
        poe_comm_destroy(comm, true);
    return status;
}

/* The whole of a stage process. The outcome comes last: until then its end is a death. */
static int run_stage(poe_board *board, void *arg)
{
    poe_log_attach(poe_log_create(board->rank, board->size));
    poe_log_hold();
    poe_status status = poe_control_start(POE_CONTROL_STAGE);
    if (status == POE_OK)
        status = run_body(board, arg);
    poe_log_settle(true);
    if (!is_orderly(status))
        poe_temporary_remove_all();
    fflush(NULL);
    atomic_store(&board->outcome, status);
    atomic_store(&board->ended, true);
    _exit(poe_exit_status(status));
}

/* --- the agent -------------------------------------------------------------------------------------------------- */

/* What `ps` calls this process. */
static void name_process(const char *what, int number)
{
    char name[16];
    snprintf(name, sizeof(name), "poe-%s %d", what, number);
    prctl(PR_SET_NAME, name);
}

poe_status poe_agents_prepare(poe_rank_job *job)
{
    poe_status status = poe_temporary_share();
    if (status == POE_OK)
        status = poe_board_create(&job->board);
    if (status != POE_OK)
        return status;
    poe_mpi_environment(&job->board->rank, &job->board->size);
    name_process(job->board->rank < job->options->stages.count ? "agent" : "spare", job->board->rank);
    setenv("POE_PIPE_TTY", poe_report_terminal() ? "1" : "0", 0); /* as seen from here, mpiexec's child */
    status = poe_keeper_start(job->board, run_stage, job, &job->keeper);
    if (status != POE_OK)
        poe_agents_dismiss(job);
    return status;
}

void poe_agents_dismiss(poe_rank_job *job)
{
    poe_keeper_stop(job->keeper);
    poe_board_destroy(job->board);
    job->keeper = NULL;
    job->board = NULL;
}

static void describe(poe_board *board, const poe_transport *transport)
{
    board->rank = transport->rank;
    board->size = transport->size;
    board->host_ranks = transport->host_ranks;
    snprintf(board->host, sizeof(board->host), "%s", transport->host);
    snprintf(board->emulated, sizeof(board->emulated), "%s", transport->emulated ? transport->emulated : "");
}

static void request_stop(void *context)
{
    poe_board *board = ((poe_rank_job *)context)->board;
    atomic_store(&board->stop, true);
    poe_ring_wake(&board->to_stage);
}

static void request_report(void *context)
{
    poe_board *board = ((poe_rank_job *)context)->board;
    atomic_store(&board->report, true);
    poe_ring_wake(&board->to_stage);
}

static bool request_leave(void *context)
{
    return poe_spares_request_leave(context);
}

static void end(void *context)
{
    poe_keeper_end(((poe_rank_job *)context)->keeper);
}

/* --- faults that only an agent can bring about ----------------------------------------------------------------------------- */

typedef struct breaker {
    poe_rank_job *job;
    poe_relay *relay;
    poe_transport *link; /* job->transport, when a plan damages or holds back messages */
    poe_fault_plan *plan;
} breaker;

static bool cut(void *context, int peer)
{
    return poe_relay_cut(((breaker *)context)->relay, peer);
}

static void corrupt(void *context, int peer)
{
    poe_fault_link_corrupt(((breaker *)context)->link, peer);
}

static void block(void *context, const bool *peers, double seconds)
{
    poe_fault_link_block(((breaker *)context)->link, peers, seconds);
}

static void kill_keeper(void *context)
{
    poe_keeper_kill(((breaker *)context)->job->keeper);
}

static void kill_agent(void *context)
{
    (void)context;
    raise(SIGKILL);
}

static void serve_faults(void *context)
{
    breaker *b = context;
    poe_fault_actions actions = {.context = b,
                                 .cut = cut,
                                 .corrupt = b->link ? corrupt : NULL,
                                 .block = b->link ? block : NULL,
                                 .kill_keeper = kill_keeper,
                                 .kill_agent = kill_agent};
    poe_fault_serve(b->plan, b->job->board, &actions);
}

static void attend(void *context)
{
    breaker *b = context;
    serve_faults(b);
    if (b->job->spares)
        poe_spares_attend(b->job->spares);
}

static poe_status open_breaker(breaker *b, poe_rank_job *job)
{
    const poe_options *o = job->options;
    *b = (breaker){.job = job};
    poe_status status = poe_fault_plan_read(o->fault, o->mtbf, (uint64_t)o->fault_seed, job->transport->size, &b->plan);
    if (status != POE_OK || !poe_fault_plan_strikes_links(b->plan))
        return status;
    status = poe_fault_link_wrap(&job->transport);
    b->link = job->transport;
    return status;
}

/* --- a stage here ----------------------------------------------------------------------------------------------- */

/* What has come from elsewhere, or NULL. */
typedef struct arrival {
    int rank;
    poe_parcel luggage;
    double since;
} arrival;

static poe_status open_relay(poe_rank_job *job, breaker *faults, arrival *from)
{
    poe_relay_settings relaying = {.log_limit = (uint64_t)job->options->log_limit};
    if (from) {
        poe_board_pass(job->board, &from->luggage);
        poe_fabric_pass(job->fabric, &from->luggage);
    }
    poe_status status = open_breaker(faults, job);
    if (status == POE_OK)
        status = poe_relay_create(job->board, job->transport, &relaying, &faults->relay);
    if (status != POE_OK || !from)
        return status;
    poe_relay_pass(faults->relay, &from->luggage);
    status = from->luggage.failed ? POE_FAILED : POE_OK;
    if (from->luggage.failed)
        poe_error("what has come of stage %d is not whole, or there is no memory for it", from->rank);
    poe_parcel_free(&from->luggage);
    return status;
}

/* Until the stage's outcome is there; POE_AGAIN: it has moved elsewhere. */
static poe_status run_agent(poe_rank_job *job, poe_relay *relay, const poe_agent_settings *settings)
{
    poe_agent_settings now = *settings;
    poe_status status = poe_agent_run(job->board, job->keeper, relay, &now);
    while (status == POE_AGAIN) {
        status = poe_spares_move(job->spares, relay);
        if (status == POE_OK)
            return POE_AGAIN;
        now.arriving = 0;
        if (status == POE_AGAIN)
            status = poe_agent_run(job->board, job->keeper, relay, &now);
    }
    return status;
}

/* What is left is a process that MPI needs until the end. */
static void strip(poe_rank_job *job)
{
    name_process("left", job->rank);
    poe_keeper_stop(job->keeper);
    poe_board_destroy(job->board);
    job->keeper = NULL;
    job->board = NULL;
}

/* Looks after the stage process. Returns as run_agent() does. */
static poe_status look_after(poe_rank_job *job, arrival *from)
{
    poe_control_target target = {
        .context = job, .request_stop = request_stop, .request_report = request_report, .end = end};
    breaker faults;
    /* Without the first stage there is nothing to train on. */
    bool continues = strcmp(job->options->outage, "continue") == 0 && job->transport->rank > 0;
    poe_agent_settings settings = {.deadline = job->options->deadline,
                                   .continues = continues,
                                   .skips = strcmp(job->options->recover, "skip") == 0,
                                   .attend = attend,
                                   .context = &faults,
                                   .arriving = from ? from->since : 0};
    describe(job->board, job->transport);
    poe_status status = open_relay(job, &faults, from);
    if (status != POE_OK)
        return status;
    if (from)
        poe_spares_announce(job->spares, from->rank);
    poe_control_add(&target);
    status = run_agent(job, faults.relay, &settings);
    poe_control_remove(job);
    if (is_orderly(status) || status == POE_AGAIN) {
        poe_relay_destroy(faults.relay);
        job->transport = job->fabric = NULL;
    }
    poe_fault_plan_free(faults.plan);
    return status;
}

/* --- a place, with a stage or without --------------------------------------------------------------------------- */

/* Who has a stage is told as well, and stops it, or tells. */
static void ignore(void *context)
{
    (void)context;
}

static poe_status take_over(poe_rank_job *job, arrival *from)
{
    int size = job->options->stages.count;
    poe_log *log = poe_log_create(from->rank, size), *before = poe_log_current();
    if (log)
        poe_log_attach(log);
    name_process("agent", from->rank);
    poe_status status = poe_fabric_take_rank(job->fabric, from->rank, size, poe_spares_owners(job->spares));
    if (status == POE_OK)
        status = look_after(job, from);
    poe_log_attach(before);
    poe_log_destroy(log);
    return status;
}

/* As run_agent(), where stages can move. */
static poe_status run_place(poe_rank_job *job)
{
    bool serves = job->rank < job->options->stages.count;
    poe_status status = poe_spares_open(job, &job->spares);
    if (status != POE_OK)
        return status;
    poe_control_add(&(poe_control_target){
        .context = job->spares, .request_stop = ignore, .request_report = ignore, .request_leave = request_leave});
    status = serves ? look_after(job, NULL) : POE_AGAIN;
    while (status == POE_AGAIN) {
        arrival from;
        if (!job->transport)
            strip(job);
        status = poe_spares_wait(job->spares, &from.rank, &from.luggage, &from.since);
        serves = status == POE_AGAIN;
        if (serves)
            status = take_over(job, &from);
    }
    poe_control_remove(job->spares);
    return status;
}

static void leave_place(poe_rank_job *job, poe_status outcome)
{
    if (job->board && job->board->rank == 0 && !job->transport)
        poe_spares_end(job->spares, outcome);
    if (job->transport)
        job->transport->ops->destroy(job->transport);
    poe_spares_close(job->spares);
}

poe_status poe_agents_run(poe_rank_job *job)
{
    poe_comm_settings settings = {.deadline = job->options->deadline};
    poe_comm *none;
    poe_status status = poe_ranks_join(job, &settings, POE_OK, &none);
    if (status != POE_OK)
        return status;
    poe_log_settle(true);
    status = job->letters ? run_place(job) : look_after(job, NULL);
    if (is_orderly(status)) {
        if (job->letters)
            leave_place(job, status);
        return status;
    }
    poe_keeper_end(job->keeper);
    poe_ranks_end_job(poe_exit_status(status));
}
