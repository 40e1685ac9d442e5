/* SPDX-License-Identifier: MIT
 * The launcher with a real mpiexec: this program is the test, and under mpiexec the ranks. What is tried: environment
 * and arguments, exit statuses, silence, signals, and that nothing is left behind. */
#include "tools/launch.h"

#include <errno.h>
#include <fcntl.h>
#include <mpi.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/wait.h>
#include <unistd.h>

#include "src/clock.h"
#include "src/log.h"
#include "tests/check.h"

enum { RANKS = 3 };

/* --- as a rank -------------------------------------------------------------------------------------------------------
 */

static volatile sig_atomic_t stop, asked;

static void on_stop(int signal)
{
    (void)signal;
    stop = 1;
}

static void on_ask(int signal)
{
    (void)signal;
    asked = 1;
}

static int check_environment(int argc, char **argv, int size)
{
    char buffer[4];
    CHECK_INT(size, RANKS);
    CHECK_INT(argc, 4);
    CHECK_STRING(argv[2], "a b");
    CHECK_STRING(argv[3], "--ranksack");
    CHECK_STRING(getenv("POE_PIPE_LAUNCHER"), "1");
    CHECK_STRING(getenv("POE_PIPE_TTY"), "0");
    CHECK_STRING(getenv("OMPI_MCA_btl"), "self,tcp");
    CHECK_STRING(getenv("HWLOC_HIDE_ERRORS"), "1"); /* the user's own setting stays */
    CHECK_INT(read(STDIN_FILENO, buffer, sizeof(buffer)), 0);
    return check_result();
}

/* polite: saves for half a second and exits with 130, as training does; stubborn: only SIGKILL helps. */
static int wait_for_signals(const char *how)
{
    bool stubborn = strcmp(how, "stubborn") == 0;
    signal(SIGUSR1, stubborn ? SIG_IGN : on_stop);
    signal(SIGUSR2, on_ask);
    if (stubborn)
        signal(SIGTERM, SIG_IGN);
    printf("ready %d\n", (int)getpid());
    fflush(stdout);
    while (!stop) {
        usleep(10000);
        if (asked)
            printf("asked\n");
        if (asked)
            fflush(stdout);
        asked = 0;
    }
    usleep(500000);
    return 130;
}

static int be_rank(int argc, char **argv)
{
    int rank, size, status = 0;
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    if (strcmp(argv[1], "environment") == 0)
        status = check_environment(argc, argv, size);
    else if (strcmp(argv[1], "fail") == 0)
        status = rank == 1 ? 2 : 0;
    else
        status = wait_for_signals(argv[1]);
    if (status != 130)
        MPI_Finalize();
    if (status)
        _exit(status);
    return 0;
}

/* --- as the test -----------------------------------------------------------------------------------------------------
 */

typedef struct job {
    pid_t launcher;
    int output; /* both streams of launcher, mpiexec and ranks */
    char text[8192];
    size_t length;
} job;

static void start(job *run, const char *how)
{
    int ends[2];
    memset(run, 0, sizeof(*run));
    CHECK_INT(pipe(ends), 0);
    fflush(NULL);
    run->launcher = fork();
    if (run->launcher == 0) {
        char *argv[] = {(char *)"test", (char *)how,         (char *)"--ranks",    (char *)"3",
                        (char *)"a b",  (char *)"--ranks=3", (char *)"--ranksack", NULL};
        int status = 99;
        dup2(ends[1], STDOUT_FILENO);
        dup2(ends[1], STDERR_FILENO);
        close(ends[0]);
        close(ends[1]);
        setenv("HWLOC_HIDE_ERRORS", "1", 1);
        poe_status launched = poe_launch(RANKS, 7, argv, &status);
        _exit(launched == POE_OK ? status : poe_exit_status(launched));
    }
    close(ends[1]);
    run->output = ends[0];
}

static int count(const job *run, const char *word)
{
    int n = 0;
    for (const char *p = run->text; (p = strstr(p, word)); p++)
        n++;
    return n;
}

/* Reads on until `word` was there `n` times, or to the end with word NULL. */
static void read_until(job *run, const char *word, int n)
{
    while (!word || count(run, word) < n) {
        ssize_t got = read(run->output, run->text + run->length, sizeof(run->text) - 1 - run->length);
        if (got < 0 && errno == EINTR)
            continue;
        CHECK(got > 0 || !word);
        if (got <= 0)
            return;
        run->length += (size_t)got;
        run->text[run->length] = '\0';
    }
}

/* A zombie that nobody has waited for is gone, too. */
static bool alive(pid_t process)
{
    char path[64], state = 'Z';
    snprintf(path, sizeof(path), "/proc/%d/stat", (int)process);
    FILE *f = fopen(path, "r");
    if (!f)
        return false;
    CHECK(fscanf(f, "%*d %*s %c", &state) == 1 || ferror(f));
    fclose(f);
    return state != 'Z';
}

/* The launcher's exit status. Every rank must be gone by then, or within `grace` seconds. */
static int finish(job *run, double grace)
{
    int status;
    double end;
    waitpid(run->launcher, &status, 0);
    end = poe_now() + grace;
    for (const char *p = run->text; (p = strstr(p, "ready ")); p++) {
        pid_t rank = (pid_t)atoi(p + strlen("ready "));
        while (alive(rank) && poe_now() < end)
            usleep(10000);
        CHECK(!alive(rank));
    }
    read_until(run, NULL, 0);
    close(run->output);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

static void test_statuses(void)
{
    job run;
    start(&run, "environment");
    CHECK_INT(finish(&run, 0), 0);
    read_until(&run, NULL, 0);
    CHECK_STRING(run.text, "");
    start(&run, "fail");
    CHECK_INT(finish(&run, 0), 2);
    CHECK_STRING(run.text, ""); /* no banner */
}

static void test_stop(int signal)
{
    job run;
    start(&run, "polite");
    read_until(&run, "ready", RANKS);
    kill(run.launcher, SIGUSR2);
    read_until(&run, "asked", RANKS);
    kill(run.launcher, signal);
    CHECK_INT(finish(&run, 0), 128 + signal);
    CHECK_INT(count(&run, "\n"), 2 * RANKS);
}

/* Ranks that do not listen: the second signal ends them within mpiexec's two seconds, or by SIGKILL. */
static void test_force(void)
{
    job run;
    double begin;
    start(&run, "stubborn");
    read_until(&run, "ready", RANKS);
    kill(run.launcher, SIGINT);
    usleep(300000);
    CHECK_INT(waitpid(run.launcher, NULL, WNOHANG), 0);
    begin = poe_now();
    kill(run.launcher, SIGINT);
    CHECK_INT(finish(&run, 0.5), 130);
    CHECK(poe_now() - begin < 8);
}

static void test_killed_launcher(void)
{
    job run;
    start(&run, "stubborn");
    read_until(&run, "ready", RANKS);
    kill(run.launcher, SIGKILL);
    CHECK_INT(finish(&run, 8), 1000 + SIGKILL);
}

static void test_no_mpiexec(void)
{
    job run;
    char *path = strdup(getenv("PATH"));
    setenv("PATH", "/nowhere", 1);
    start(&run, "polite");
    setenv("PATH", path, 1);
    free(path);
    CHECK_INT(finish(&run, 0), 2);
    CHECK(strstr(run.text, "install the Debian package openmpi-bin") != NULL);
}

int main(int argc, char **argv)
{
    if (getenv("POE_PIPE_LAUNCHER"))
        return be_rank(argc, argv);
    test_statuses();
    test_stop(SIGINT);
    test_stop(SIGTERM);
    test_force();
    test_killed_launcher();
    test_no_mpiexec();
    return check_result();
}
