/* SPDX-License-Identifier: MIT */
#include "tools/agents.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "comm/agent/proxy.h"
#include "comm/mpi/mpi.h"
#include "faults/fault.h"
#include "faults/fault_link.h"
#include "pipeline/agent.h"
#include "pipeline/control.h"
#include "pipeline/report.h"
#include "src/files.h"
#include "src/log.h"

bool poe_agents_wanted(const poe_options *o)
{
    int rank = 0, size = 1;
    poe_mpi_environment(&rank, &size);
    bool carried = strcmp(o->transport, "fabric") == 0 || strcmp(o->transport, "auto") == 0;
    bool trains = !o->eval_only && !o->trace && strcmp(o->schedule, "ddp") != 0;
    return strcmp(o->agents, "off") != 0 && size > 1 && carried && trains;
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

poe_status poe_agents_prepare(poe_rank_job *job)
{
    poe_status status = poe_board_create(&job->board);
    if (status != POE_OK)
        return status;
    poe_mpi_environment(&job->board->rank, &job->board->size);
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

static poe_status open_breaker(breaker *b, poe_rank_job *job)
{
    const poe_options *o = job->options;
    *b = (breaker){.job = job};
    poe_status status = poe_fault_plan_read(o->fault, o->mtbf, (uint64_t)o->fault_seed, job->size, &b->plan);
    if (status != POE_OK || !poe_fault_plan_strikes_links(b->plan))
        return status;
    status = poe_fault_link_wrap(&job->transport);
    b->link = job->transport;
    return status;
}

/* Looks after the stage process. Returns as poe_agent_run() does. */
static poe_status look_after(poe_rank_job *job)
{
    poe_control_target target = {
        .context = job, .request_stop = request_stop, .request_report = request_report, .end = end};
    breaker faults;
    poe_agent_settings settings = {.deadline = job->options->deadline, .attend = serve_faults, .context = &faults};
    poe_relay_settings relaying = {.log_limit = (uint64_t)job->options->log_limit};
    poe_relay *relay;
    describe(job->board, job->transport);
    poe_status status = open_breaker(&faults, job);
    if (status == POE_OK)
        status = poe_relay_create(job->board, job->transport, &relaying, &faults.relay);
    if (status != POE_OK)
        return status;
    relay = faults.relay;
    poe_control_add(&target);
    status = poe_agent_run(job->board, job->keeper, relay, &settings);
    poe_control_remove(job);
    if (is_orderly(status))
        poe_relay_destroy(relay);
    poe_fault_plan_free(faults.plan);
    return status;
}

poe_status poe_agents_run(poe_rank_job *job)
{
    poe_comm_settings settings = {.deadline = job->options->deadline};
    poe_comm *none;
    poe_status status = poe_ranks_join(job, &settings, POE_OK, &none);
    if (status != POE_OK)
        return status;
    poe_log_settle(true);
    status = look_after(job);
    if (is_orderly(status))
        return status;
    poe_keeper_end(job->keeper);
    poe_ranks_end_job(poe_exit_status(status));
}
