/* SPDX-License-Identifier: MIT
 * The keeper's process, and the agent's end of the socket between them. */
#include "pipeline/keeper.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "src/clock.h"
#include "src/files.h"
#include "src/log.h"

/* How long a stage process may take to remove its temporary files; a bare mpiexec gives two seconds for everything. */
static const double grace = 0.4;

typedef enum errand { START, SIGNAL, END } errand;

typedef struct request {
    errand errand;
    int number; /* of the signal */
} request;

struct poe_keeper {
    pid_t pid;
    int socket;
    atomic_bool ending;
    bool reaped;
    int status; /* of the keeper, when reaped */
};

/* --- the keeper's process --------------------------------------------------------------------------------------- */

static const int deaf_to[] = {SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGPIPE};
enum { N_DEAF = sizeof(deaf_to) / sizeof(deaf_to[0]) };

typedef struct house {
    poe_board *board;
    poe_keeper_stage stage;
    void *arg;
    int socket, signals; /* signals: a signalfd for SIGCHLD */
    pid_t child;         /* 0: none */
    sigset_t mask;       /* of a stage process */
} house;

/* Gets the signal when its parent ends; ends if that is gone already. */
static void follow(pid_t parent, int signal)
{
    prctl(PR_SET_PDEATHSIG, signal);
    if (getppid() != parent)
        _exit(1);
}

static void name_process(const char *what, int rank)
{
    char name[16];
    snprintf(name, sizeof(name), "poe-%s %d", what, rank);
    prctl(PR_SET_NAME, name);
}

static void report(const house *h, poe_keeper_news news, pid_t pid, int status)
{
    poe_keeper_event event = {.news = news, .pid = pid, .status = status};
    send(h->socket, &event, sizeof(event), MSG_NOSIGNAL);
}

static _Noreturn void become_stage(const house *h, pid_t keeper)
{
    follow(keeper, SIGKILL);
    name_process("stage", h->board->rank);
    close(h->socket);
    close(h->signals);
    sigprocmask(SIG_SETMASK, &h->mask, NULL);
    int status = h->stage(h->board, h->arg);
    fflush(NULL);
    _exit(status);
}

static void start_stage(house *h)
{
    pid_t self = getpid();
    name_process("keeper", h->board->rank); /* known by now */
    fflush(NULL);
    pid_t child = fork();
    if (child == 0)
        become_stage(h, self);
    if (child > 0)
        h->child = child;
    report(h, child > 0 ? POE_KEEPER_STARTED : POE_KEEPER_REFUSED, child, errno);
}

/* Takes in what has ended of the keeper's children. */
static void reap(house *h)
{
    struct signalfd_siginfo info;
    int status;
    pid_t pid;
    while (read(h->signals, &info, sizeof(info)) > 0)
        continue;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        if (pid != h->child)
            continue;
        h->child = 0;
        report(h, POE_KEEPER_ENDED, pid, status);
    }
}

/* `gently`: the agent wishes it, so the child has a moment to tidy up, and the agent does the rest. Else the agent is gone, and
 * nobody but the keeper can. */
static _Noreturn void leave(house *h, bool gently)
{
    struct pollfd ended = {.fd = h->signals, .events = POLLIN};
    double until = poe_now() + grace;
    if (h->child && gently)
        kill(h->child, SIGTERM);
    while (h->child && gently && poe_now() < until) {
        poll(&ended, 1, 10);
        reap(h);
    }
    if (h->child) {
        kill(h->child, SIGKILL);
        waitpid(h->child, NULL, 0);
    }
    if (!gently)
        poe_temporary_remove_all();
    _exit(0);
}

static void serve(house *h)
{
    request r;
    ssize_t got = recv(h->socket, &r, sizeof(r), 0);
    if (got < 0 && errno == EINTR)
        return;
    if (got != (ssize_t)sizeof(r) || r.errand == END)
        leave(h, got == (ssize_t)sizeof(r));
    if (r.errand == START)
        start_stage(h);
    else if (h->child)
        kill(h->child, r.number);
}

static _Noreturn void keep(house *h, pid_t agent)
{
    sigset_t children, deaf;
    struct pollfd fds[2];
    follow(agent, SIGCONT); /* the socket tells; a stopped keeper has to hear it */
    setpgid(0, 0);
    name_process("keeper", h->board->rank);
    sigemptyset(&children);
    sigaddset(&children, SIGCHLD);
    deaf = children; /* blocked, not ignored: one that comes to a stage process just made waits for it to be ready */
    for (int i = 0; i < N_DEAF; i++)
        sigaddset(&deaf, deaf_to[i]);
    sigprocmask(SIG_BLOCK, &deaf, &h->mask);
    h->signals = signalfd(-1, &children, SFD_NONBLOCK | SFD_CLOEXEC);
    if (h->signals < 0)
        _exit(1);
    fds[0] = (struct pollfd){.fd = h->signals, .events = POLLIN};
    fds[1] = (struct pollfd){.fd = h->socket, .events = POLLIN};
    while (true) {
        if (poll(fds, 2, -1) <= 0)
            continue;
        if (fds[0].revents)
            reap(h);
        if (fds[1].revents)
            serve(h);
    }
}

/* --- the agent's end -------------------------------------------------------------------------------------------- */

poe_status poe_keeper_start(poe_board *board, poe_keeper_stage stage, void *arg, poe_keeper **keeper)
{
    house h = {.board = board, .stage = stage, .arg = arg};
    poe_keeper *k = calloc(1, sizeof(*k));
    int ends[2] = {-1, -1};
    pid_t self = getpid();
    bool ready = k && socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0;
    fflush(NULL);
    if (ready && (k->pid = fork()) == 0) {
        close(ends[0]);
        h.socket = ends[1];
        keep(&h, self);
    }
    if (!ready || k->pid < 0) {
        poe_error("--agents: cannot start the process that starts stage processes: %s", strerror(errno));
        close(ends[0]);
        close(ends[1]);
        free(k);
        return POE_FAILED;
    }
    setpgid(k->pid, k->pid); /* before anybody signals the group: the keeper may not have come to it */
    close(ends[1]);
    k->socket = ends[0];
    *keeper = k;
    return POE_OK;
}

/* A keeper that is gone is found out by poe_keeper_next(). */
static void ask(const poe_keeper *keeper, errand what, int number)
{
    request r = {.errand = what, .number = number};
    send(keeper->socket, &r, sizeof(r), MSG_NOSIGNAL | MSG_DONTWAIT);
}

void poe_keeper_spawn(poe_keeper *keeper)
{
    ask(keeper, START, 0);
}

void poe_keeper_kill(poe_keeper *keeper)
{
    kill(keeper->pid, SIGKILL);
}

void poe_keeper_signal(poe_keeper *keeper, int number)
{
    ask(keeper, SIGNAL, number);
}

void poe_keeper_end(poe_keeper *keeper)
{
    const struct timespec moment = {.tv_nsec = 2000000};
    pid_t ended;
    atomic_store(&keeper->ending, true);
    ask(keeper, END, 0);
    for (double until = poe_now() + 2 * grace; (ended = waitpid(keeper->pid, NULL, WNOHANG)) == 0 && poe_now() < until;)
        nanosleep(&moment, NULL);
    if (ended == 0)
        kill(keeper->pid, SIGKILL);
}

void poe_keeper_stop(poe_keeper *keeper)
{
    if (!keeper)
        return;
    if (!keeper->reaped)
        poe_keeper_end(keeper);
    close(keeper->socket);
    free(keeper);
}

bool poe_keeper_next(poe_keeper *keeper, poe_keeper_event *event)
{
    ssize_t got = recv(keeper->socket, event, sizeof(*event), MSG_DONTWAIT);
    bool gone = got == 0 || (got < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR);
    if (atomic_load(&keeper->ending) || (got < 0 && !gone))
        return false;
    if (!gone)
        return true;
    if (!keeper->reaped)
        keeper->reaped = waitpid(keeper->pid, &keeper->status, 0) == keeper->pid;
    *event = (poe_keeper_event){.news = POE_KEEPER_LOST, .pid = keeper->pid, .status = keeper->status};
    return true;
}

int poe_keeper_fd(const poe_keeper *keeper)
{
    return keeper->socket;
}
