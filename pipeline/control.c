/* SPDX-License-Identifier: MIT */
#include "pipeline/control.h"

#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

#include "src/files.h"
#include "src/log.h"
#include "stages/model.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static poe_control_target targets[POE_MAX_STAGES];
static int n_targets;
static poe_control_mode mode;
static bool running, stop_thread;
static int exit_status;
static pthread_t thread;

static void fill_set(sigset_t *set)
{
    sigemptyset(set);
    sigaddset(set, SIGINT);
    sigaddset(set, SIGTERM);
    sigaddset(set, SIGUSR1);
    sigaddset(set, SIGUSR2);
}

static void stop_all(void)
{
    pthread_mutex_lock(&lock);
    for (int i = 0; i < n_targets; i++)
        targets[i].request_stop(targets[i].context);
    pthread_mutex_unlock(&lock);
}

static void report_all(void)
{
    pthread_mutex_lock(&lock);
    for (int i = 0; i < n_targets; i++)
        targets[i].request_report(targets[i].context);
    pthread_mutex_unlock(&lock);
}

static void end_at_once(int status)
{
    pthread_mutex_lock(&lock);
    for (int i = 0; i < n_targets; i++)
        if (targets[i].end)
            targets[i].end(targets[i].context);
    pthread_mutex_unlock(&lock);
    poe_temporary_remove_all();
    _exit(status);
}

static void take_in_stage(int signal_number)
{
    if (signal_number == SIGUSR2)
        report_all();
    else if (signal_number == SIGTERM)
        end_at_once(143);
}

static bool leave(const siginfo_t *info)
{
    bool takes = false;
    if (info->si_signo != SIGTERM || info->si_pid == getppid())
        return false;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < n_targets; i++)
        takes |= targets[i].request_leave && targets[i].request_leave(targets[i].context);
    pthread_mutex_unlock(&lock);
    return takes;
}

/* True when there is no time to save. */
static bool is_sudden(const siginfo_t *info)
{
    bool killed = mode == POE_CONTROL_KILLED_SOON || (mode == POE_CONTROL_LAUNCHED && info->si_pid == getppid());
    return info->si_signo == SIGTERM && killed;
}

static void take_in_rank(const siginfo_t *info)
{
    int signal_number = info->si_signo;
    int status = signal_number == SIGTERM ? 143 : 130;
    pthread_mutex_lock(&lock);
    bool again = exit_status != 0;
    if (!again && signal_number != SIGUSR2)
        exit_status = status;
    pthread_mutex_unlock(&lock);
    if (signal_number == SIGUSR2)
        report_all();
    else if ((again && signal_number != SIGUSR1) || is_sudden(info))
        end_at_once(status);
    else
        stop_all();
}

/* True when the thread shall go on. */
static bool take(const siginfo_t *info)
{
    pthread_mutex_lock(&lock);
    bool stop = stop_thread;
    pthread_mutex_unlock(&lock);
    if (stop)
        return false;
    if (mode == POE_CONTROL_STAGE)
        take_in_stage(info->si_signo);
    else if (!leave(info))
        take_in_rank(info);
    return true;
}

static void *listen_for_signals(void *arg)
{
    (void)arg;
    sigset_t set;
    fill_set(&set);
    siginfo_t info;
    while (sigwaitinfo(&set, &info) < 0 || take(&info))
        continue;
    return NULL;
}

poe_status poe_control_start(poe_control_mode how)
{
    sigset_t set;
    fill_set(&set);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    mode = how;
    int error = pthread_create(&thread, NULL, listen_for_signals, NULL);
    if (error) {
        poe_error("cannot start the signal thread: %s", strerror(error));
        return POE_FAILED;
    }
    running = true;
    return POE_OK;
}

void poe_control_stop(void)
{
    if (!running)
        return;
    pthread_mutex_lock(&lock);
    stop_thread = true;
    pthread_mutex_unlock(&lock);
    pthread_kill(thread, SIGUSR2);
    pthread_join(thread, NULL);
    running = stop_thread = false;
}

void poe_control_add(const poe_control_target *target)
{
    pthread_mutex_lock(&lock);
    if (n_targets < POE_MAX_STAGES)
        targets[n_targets++] = *target;
    bool stop = exit_status != 0;
    pthread_mutex_unlock(&lock);
    if (stop) /* the signal came before there was anyone to tell */
        target->request_stop(target->context);
}

void poe_control_remove(const void *context)
{
    pthread_mutex_lock(&lock);
    for (int i = 0; i < n_targets; i++)
        if (targets[i].context == context)
            targets[i--] = targets[--n_targets];
    pthread_mutex_unlock(&lock);
}

static void stop_comm(void *context)
{
    poe_comm_request_stop(context);
}

static void report_comm(void *context)
{
    poe_comm_request_report(context);
}

void poe_control_add_comm(poe_comm *comm)
{
    poe_control_add(&(poe_control_target){.context = comm, .request_stop = stop_comm, .request_report = report_comm});
}

int poe_control_exit_status(void)
{
    pthread_mutex_lock(&lock);
    int status = exit_status;
    pthread_mutex_unlock(&lock);
    return status;
}
