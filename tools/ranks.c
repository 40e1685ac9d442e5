/* SPDX-License-Identifier: MIT */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "comm/fabric/fabric.h"
#include "comm/inproc/inproc.h"
#include "comm/mpi/mpi.h"
#include "faults/net.h"
#include "pipeline/control.h"
#include "src/files.h"
#include "src/log.h"
#include "tools/agents.h"

_Noreturn void poe_ranks_end_job(int exit_status)
{
    poe_log_settle(true);
    poe_temporary_remove_all();
    fflush(NULL);
    _exit(exit_status);
}

static poe_status run_body(poe_comm *comm, const poe_rank_job *job)
{
    poe_control_add_comm(comm);
    poe_status status = job->body(comm, job->options);
    poe_log_settle(true);
    poe_control_remove(comm);
    if (status != POE_OK && status != POE_BAD_INPUT && status != POE_INTERRUPTED)
        poe_ranks_end_job(poe_exit_status(status));
    poe_comm_destroy(comm, true);
    return status;
}

static void *run_thread(void *arg)
{
    poe_rank_job *job = arg;
    poe_log *log = poe_log_create(job->rank, job->size);
    poe_log_attach(log);
    poe_log_hold();
    poe_comm_settings settings = {.deadline = job->options->deadline};
    poe_comm *comm;
    job->status = poe_comm_create(job->transport, &settings, &comm);
    if (job->status != POE_OK)
        poe_ranks_end_job(poe_exit_status(job->status));
    job->status = run_body(comm, job);
    poe_log_destroy(log);
    return NULL;
}

static poe_status start_threads(pthread_t *threads, poe_rank_job *jobs, int size)
{
    for (int k = 0; k < size; k++) {
        int error = pthread_create(&threads[k], NULL, run_thread, &jobs[k]);
        if (error) {
            poe_error("cannot start the thread of stage %d: %s", k, strerror(error));
            poe_ranks_end_job(1);
        }
    }
    for (int k = 0; k < size; k++)
        pthread_join(threads[k], NULL);
    return jobs[0].status;
}

static int exit_status_of(poe_status status)
{
    int interrupted = poe_control_exit_status();
    return status == POE_INTERRUPTED && interrupted ? interrupted : poe_exit_status(status);
}

poe_status poe_ranks_net(const poe_options *options, int size, poe_net *net)
{
    poe_status status = poe_net_read(options->net, size, net);
    return status == POE_OK ? poe_net_share(net, poe_options_virtual(options)) : status;
}

/* Puts --net in front of each of `n` transports of one job. On failure some may have it and some not: they still reach
 * each other. */
static poe_status wrap(const poe_options *options, int n, poe_transport **transports)
{
    poe_net net;
    poe_status status = poe_ranks_net(options, transports[0]->size, &net);
    for (int k = 0; status == POE_OK && k < n; k++)
        status = poe_net_wrap(&net, &transports[k]);
    poe_net_free(&net);
    return status;
}

int poe_ranks_threads(int size, const poe_options *options, poe_rank_body body)
{
    poe_transport *transports[POE_OPTION_STAGES];
    pthread_t threads[POE_OPTION_STAGES];
    poe_rank_job jobs[POE_OPTION_STAGES];
    poe_status status = poe_inproc_create(size, transports);
    if (status == POE_OK)
        status = wrap(options, size, transports);
    if (status == POE_OK)
        status = poe_control_start(POE_CONTROL_SAVES);
    if (status != POE_OK)
        return poe_exit_status(status);
    for (int k = 0; k < size; k++)
        jobs[k] = (poe_rank_job){.transport = transports[k], .options = options, .body = body, .rank = k, .size = size};
    status = start_threads(threads, jobs, size);
    poe_control_stop();
    return exit_status_of(status);
}

static poe_status check_size(const poe_options *options, int size)
{
    if (strcmp(options->transport, "inproc") == 0) {
        poe_error("--transport inproc runs all ranks in one process, but %d were started; start one, or give mpi", size);
        return POE_BAD_INPUT;
    }
    if (strcmp(options->schedule, "ddp") == 0)
        return poe_options_check_ranks(options, size);
    if (size == options->stages.count + options->spares)
        return POE_OK;
    if (options->spares) {
        poe_error("--stages has %d stages and --spares is %d, but %d ranks were started; start one for each (mpiexec -n %d)",
                  options->stages.count, options->spares, size, options->stages.count + options->spares);
        return POE_BAD_INPUT;
    }
    poe_error("--stages has %d stages, but %d ranks were started; start one rank per stage (mpiexec -n %d), or one for all",
              options->stages.count, size, options->stages.count);
    return POE_BAD_INPUT;
}

/* auto: the better one by experiments/transports. */
static bool wants_fabric(const poe_options *options)
{
    return strcmp(options->transport, "fabric") == 0 || strcmp(options->transport, "auto") == 0;
}

/* The ranks meet over MPI, agree on what they were started with, and stay there unless the fabric is to carry the run.
 * On failure all return the same. */
static poe_status meet(poe_rank_job *job, const poe_comm_settings *settings, poe_status parse_status, poe_comm **comm)
{
    bool direct = parse_status == POE_OK && wants_fabric(job->options);
    poe_status status = poe_mpi_create(&job->transport), mine = parse_status;
    if (status == POE_OK && mine == POE_OK)
        mine = check_size(job->options, job->size);
    if (status == POE_OK && mine == POE_OK && !direct)
        mine = wrap(job->options, 1, &job->transport);
    if (status == POE_OK)
        status = poe_comm_create(job->transport, settings, comm);
    if (status != POE_OK)
        poe_ranks_end_job(poe_exit_status(status));
    return poe_comm_agree(*comm, mine);
}

static poe_status open_fabric(poe_rank_job *job, poe_comm *over)
{
    const poe_options *o = job->options;
    poe_fabric_settings settings = {.provider = o->fabric_provider,
                                    .interface = o->interface,
                                    .port_low = o->port_low,
                                    .port_high = o->port_high};
    poe_status status = poe_fabric_create_for(over, &settings, job->size - o->spares, &job->transport);
    if (status != POE_OK)
        return status;
    job->fabric = job->transport;
    if (o->spares) {
        status = poe_fabric_create(over, &settings, &job->letters);
        if (status != POE_OK)
            job->transport->ops->destroy(job->transport);
        return status;
    }
    status = poe_comm_agree(over, wrap(o, 1, &job->transport));
    if (status != POE_OK)
        job->transport->ops->destroy(job->transport);
    return status;
}

poe_status poe_ranks_join(poe_rank_job *job, const poe_comm_settings *settings, poe_status parse_status, poe_comm **comm)
{
    poe_comm *over;
    poe_status status = meet(job, settings, parse_status, &over);
    bool direct = status == POE_OK && wants_fabric(job->options);
    if (direct)
        status = open_fabric(job, over);
    if (status == POE_OK && !direct) {
        *comm = over;
        return POE_OK;
    }
    poe_comm_destroy(over, true);
    *comm = NULL;
    return status;
}

static poe_status run_mpi_rank(poe_rank_job *job, poe_status parse_status)
{
    poe_comm_settings settings = {.deadline = parse_status == POE_OK ? job->options->deadline : 0};
    poe_comm *comm;
    poe_status status = poe_ranks_join(job, &settings, parse_status, &comm);
    if (status != POE_OK)
        return status;
    if (!comm)
        status = poe_comm_create(job->transport, &settings, &comm);
    if (status != POE_OK)
        poe_ranks_end_job(poe_exit_status(status));
    return run_body(comm, job);
}

/* The first processes to be, and the signals, before MPI starts threads. */
static void start_rank(poe_rank_job *job, poe_status parse_status)
{
    bool launched = getenv("POE_PIPE_LAUNCHER") != NULL;
    poe_status status = POE_OK;
    if (parse_status == POE_OK && poe_agents_wanted(job->options))
        status = poe_agents_prepare(job);
    if (status == POE_OK)
        status = poe_control_start(launched ? POE_CONTROL_LAUNCHED : POE_CONTROL_KILLED_SOON);
    if (status == POE_OK)
        status = poe_mpi_start(&job->rank, &job->size);
    if (status != POE_OK)
        poe_ranks_end_job(poe_exit_status(status));
}

int poe_ranks_mpi(const poe_options *options, poe_status parse_status, poe_rank_body body)
{
    poe_rank_job job = {.options = options, .body = body};
    start_rank(&job, parse_status);
    if (job.size == 1) {
        poe_agents_dismiss(&job);
        poe_control_stop();
        poe_log_settle(true);
        int exit_status = parse_status == POE_OK ? poe_ranks_threads(poe_options_rank_count(options), options, body)
                                                 : poe_exit_status(parse_status);
        poe_mpi_finish();
        return exit_status;
    }
    poe_status status = job.keeper ? poe_agents_run(&job) : run_mpi_rank(&job, parse_status);
    poe_agents_dismiss(&job);
    poe_mpi_finish();
    poe_control_stop();
    return exit_status_of(status);
}
