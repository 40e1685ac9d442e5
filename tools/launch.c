/* SPDX-License-Identifier: MIT */
#include "tools/launch.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "src/log.h"

enum { PATIENCE = 3, EXEC_FAILED = 127 };

typedef struct variable {
    const char *name, *value;
} variable;

/* Made from mpi.env by the build. */
static const variable variables[] = {
#include "mpi_env.inc"
};

static void set_environment(void)
{
    struct winsize window;
    bool terminal = isatty(STDOUT_FILENO);
    for (size_t i = 0; i < sizeof(variables) / sizeof(variables[0]); i++)
        setenv(variables[i].name, variables[i].value, 0);
    setenv("POE_PIPE_LAUNCHER", "1", 1);
    setenv("POE_PIPE_TTY", terminal ? "1" : "0", 1);
    if (terminal && ioctl(STDOUT_FILENO, TIOCGWINSZ, &window) == 0 && window.ws_col > 0) {
        char columns[16];
        snprintf(columns, sizeof(columns), "%u", window.ws_col);
        setenv("COLUMNS", columns, 1);
    }
}

/* mpiexec -n ranks PROGRAM argv[1..] without --ranks; borrows all texts. NULL: out of memory. */
static char **make_command(const char *ranks, char *program, int argc, char **argv)
{
    char **command = calloc((size_t)argc + 5, sizeof(*command));
    int n = 0;
    if (!command)
        return NULL;
    command[n++] = (char *)"mpiexec";
    command[n++] = (char *)"-n";
    command[n++] = (char *)ranks;
    command[n++] = program;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--ranks") == 0)
            i++;
        else if (strncmp(argv[i], "--ranks=", strlen("--ranks=")) != 0)
            command[n++] = argv[i];
    }
    return command;
}

/* In the child: a group of its own, so that the terminal's Ctrl-C does not reach mpiexec, which would kill its ranks.
 */
static _Noreturn void become_mpiexec(char **command, const sigset_t *mask, pid_t launcher, int report)
{
    int null = open("/dev/null", O_RDONLY);
    setpgid(0, 0);
    if (null >= 0)
        dup2(null, STDIN_FILENO);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() == launcher) {
        set_environment();
        sigprocmask(SIG_SETMASK, mask, NULL);
        execvp(command[0], command);
    }
    int reason = errno;
    ssize_t written = write(report, &reason, sizeof(reason));
    _exit(written < 0 ? EXEC_FAILED + 1 : EXEC_FAILED);
}

/* Starts mpiexec; a pipe that closes on exec brings the reason when there is none. */
static poe_status start(char **command, const sigset_t *mask, pid_t *child)
{
    int report[2], reason = 0;
    pid_t self = getpid();
    if (pipe2(report, O_CLOEXEC) != 0 || (*child = fork()) < 0) {
        poe_error("cannot start mpiexec: %s", strerror(errno));
        return POE_FAILED;
    }
    if (*child == 0)
        become_mpiexec(command, mask, self, report[1]);
    setpgid(*child, *child);
    close(report[1]);
    ssize_t got = read(report[0], &reason, sizeof(reason));
    close(report[0]);
    if (got <= 0)
        return POE_OK;
    waitpid(*child, NULL, 0);
    if (reason == ENOENT)
        poe_error("--ranks: there is no mpiexec on this machine; install the Debian package openmpi-bin");
    else
        poe_error("--ranks: cannot start mpiexec: %s", strerror(reason));
    return reason == ENOENT ? POE_BAD_INPUT : POE_FAILED;
}

/* Waits for the child's end and passes signals on. *stop: the first signal that asked to stop, or 0; *forced: a second
 * one did. Returns the child's wait status. */
static int attend(pid_t child, const sigset_t *watched, int *stop, bool *forced)
{
    const struct timespec patience = {.tv_sec = PATIENCE};
    int status;
    while (waitpid(child, &status, WNOHANG) == 0) {
        int signal = *forced ? sigtimedwait(watched, NULL, &patience) : sigwaitinfo(watched, NULL);
        if (signal == SIGUSR2) {
            kill(child, SIGUSR2);
        } else if (signal == SIGINT || signal == SIGTERM || signal == SIGHUP) {
            kill(child, *forced ? SIGKILL : *stop ? SIGTERM : SIGUSR1);
            *forced = *stop != 0;
            *stop = *stop ? *stop : signal;
        } else if (signal < 0 && errno == EAGAIN) {
            kill(-child, SIGKILL);
        }
    }
    return status;
}

/* The exit status that mpiexec's end stands for: a run that a signal stopped is told from one that failed while it stopped. */
static int final_status(int status, int stop, bool forced)
{
    int code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    bool stopped = code == 130 || code == 143 || code == 128 + SIGUSR1 || WIFSIGNALED(status);
    if (stop && (forced || stopped))
        return 128 + stop;
    if (!stop && WIFSIGNALED(status))
        poe_error("mpiexec was ended by signal %d (%s)", WTERMSIG(status), strsignal(WTERMSIG(status)));
    else if (!stop && !stopped && code > 128)
        poe_error("a rank was ended by signal %d (%s)", code - 128, strsignal(code - 128));
    else if (!stop && !stopped && code > 2)
        poe_error("a rank has ended with exit status %d, which is none of poe-pipe's", code);
    return code;
}

poe_status poe_launch(int ranks, int argc, char **argv, int *exit_status)
{
    char program[PATH_MAX], count[16];
    sigset_t watched, before;
    pid_t child;
    int stop = 0;
    bool forced = false;
    ssize_t length = readlink("/proc/self/exe", program, sizeof(program) - 1);
    if (length < 0) {
        poe_error("--ranks: cannot read /proc/self/exe: %s", strerror(errno));
        return POE_FAILED;
    }
    program[length] = '\0';
    snprintf(count, sizeof(count), "%d", ranks);
    char **command = make_command(count, program, argc, argv);
    if (!command) {
        poe_error("out of memory");
        return POE_FAILED;
    }
    sigemptyset(&watched);
    const int signals[] = {SIGINT, SIGTERM, SIGHUP, SIGUSR2, SIGCHLD};
    for (size_t i = 0; i < sizeof(signals) / sizeof(signals[0]); i++)
        sigaddset(&watched, signals[i]);
    sigprocmask(SIG_BLOCK, &watched, &before);
    poe_status status = start(command, &before, &child);
    if (status == POE_OK) {
        int ended = attend(child, &watched, &stop, &forced);
        *exit_status = final_status(ended, stop, forced);
    }
    sigprocmask(SIG_SETMASK, &before, NULL);
    free(command);
    return status;
}
