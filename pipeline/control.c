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
static poe_comm *comms[POE_MAX_STAGES];
static int n_comms;
static bool running, stop_thread, sudden;
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

static void each_comm(void (*act)(poe_comm *))
{
    pthread_mutex_lock(&lock);
    for (int i = 0; i < n_comms; i++)
        act(comms[i]);
    pthread_mutex_unlock(&lock);
}

static void end_at_once(int status)
{
    poe_temporary_remove_all();
    _exit(status);
}

/* True when the thread shall go on. */
static bool take(int signal_number)
{
    pthread_mutex_lock(&lock);
    bool stop = stop_thread, again = exit_status != 0;
    int status = signal_number == SIGTERM ? 143 : 130;
    if (!stop && !again && signal_number != SIGUSR2)
        exit_status = status;
    pthread_mutex_unlock(&lock);
    if (stop)
        return false;
    if (signal_number == SIGUSR2)
        each_comm(poe_comm_request_report);
    else if ((again && signal_number != SIGUSR1) || (sudden && signal_number == SIGTERM))
        end_at_once(status);
    else
        each_comm(poe_comm_request_stop);
    return true;
}

static void *listen_for_signals(void *arg)
{
    (void)arg;
    sigset_t set;
    fill_set(&set);
    int number;
    do {
        if (sigwait(&set, &number) != 0)
            continue;
    } while (take(number));
    return NULL;
}

poe_status poe_control_start(bool killed_soon)
{
    sigset_t set;
    fill_set(&set);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    sudden = killed_soon;
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

void poe_control_add(poe_comm *comm)
{
    pthread_mutex_lock(&lock);
    if (n_comms < POE_MAX_STAGES)
        comms[n_comms++] = comm;
    bool stop = exit_status != 0;
    pthread_mutex_unlock(&lock);
    if (stop) /* the signal came before there was anyone to tell */
        poe_comm_request_stop(comm);
}

void poe_control_remove(poe_comm *comm)
{
    pthread_mutex_lock(&lock);
    for (int i = 0; i < n_comms; i++)
        if (comms[i] == comm)
            comms[i--] = comms[--n_comms];
    pthread_mutex_unlock(&lock);
}

int poe_control_exit_status(void)
{
    pthread_mutex_lock(&lock);
    int status = exit_status;
    pthread_mutex_unlock(&lock);
    return status;
}
