/* SPDX-License-Identifier: MIT
 * An agent and its keeper with real processes, which die in all ways, and a relay that does nothing. */
#include "pipeline/agent.h"

#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "src/clock.h"
#include "src/log.h"
#include "tests/check.h"

/* --- the relay -------------------------------------------------------------------------------------------------- */

static struct {
    poe_board *board;
    int fd, begun, ended, beats;
} relayed;

poe_status poe_relay_begin(poe_relay *relay)
{
    (void)relay;
    relayed.begun++;
    atomic_fetch_add(&relayed.board->incarnation, 1);
    return POE_OK;
}

void poe_relay_end(poe_relay *relay)
{
    (void)relay;
    relayed.ended++;
}

poe_status poe_relay_progress(poe_relay *relay, double wait)
{
    (void)relay;
    poll(&(struct pollfd){.fd = relayed.fd, .events = POLLIN}, 1, (int)(wait * 1000));
    return POE_OK;
}

void poe_relay_watch(poe_relay *relay, int fd)
{
    (void)relay;
    relayed.fd = fd;
}

void poe_relay_beat(poe_relay *relay, const char *text)
{
    (void)relay, (void)text;
    relayed.beats++;
}

bool poe_relay_idle(const poe_relay *relay)
{
    (void)relay;
    return true;
}

/* --- stage processes -------------------------------------------------------------------------------------------- */

static void rest(double seconds)
{
    struct timespec t = {.tv_sec = (time_t)seconds, .tv_nsec = (long)((seconds - (double)(time_t)seconds) * 1e9)};
    nanosleep(&t, NULL);
}

static void be_at(poe_board *board, int64_t step, int micro)
{
    atomic_store(&board->place.step, step);
    atomic_store(&board->place.micro, micro);
    atomic_store(&board->place.doing, "forward");
    atomic_fetch_add(&board->place.entered, 1);
    atomic_fetch_add(&board->beats, 1);
}

static int finish(poe_board *board, poe_status outcome)
{
    atomic_store(&board->outcome, outcome);
    atomic_store(&board->ended, true);
    return 0;
}

static int dies_early(poe_board *board, void *arg)
{
    (void)board, (void)arg;
    return 7;
}

static int dies_always(poe_board *board, void *arg)
{
    (void)arg;
    atomic_store(&board->recoverable, true);
    be_at(board, 3, 1);
    raise(SIGKILL);
    return 0;
}

/* Killed in step 20, then exits in step 22, then falls silent in step 24, then ends. */
static int dies_thrice(poe_board *board, void *arg)
{
    (void)arg;
    unsigned number = atomic_load(&board->incarnation);
    board->snapshots[0].step = 18;
    atomic_store(&board->valid, 0);
    atomic_store(&board->recoverable, true);
    for (int64_t step = 18; step < 18 + 2 * number + 1; step++, rest(0.01))
        be_at(board, step, 0);
    if (number == 1)
        raise(SIGKILL);
    if (number == 2)
        return 5;
    if (number == 3)
        rest(60);
    return finish(board, POE_INTERRUPTED);
}

/* --- the tests -------------------------------------------------------------------------------------------------- */

static poe_board *new_board(void)
{
    poe_board *board = mmap(NULL, sizeof(*board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(board != MAP_FAILED);
    board->rank = 2;
    board->size = 3;
    atomic_store(&board->valid, -1);
    relayed.board = board;
    relayed.begun = relayed.ended = relayed.beats = 0;
    return board;
}

/* What the agent comes to; its sentences, which it says as rank 2, are in `said`. */
static poe_status run(poe_keeper_stage stage, double deadline, char said[4096])
{
    poe_board *board = new_board();
    poe_keeper *keeper;
    int saved = dup(STDERR_FILENO);
    FILE *file = tmpfile();
    CHECK_INT(poe_keeper_start(board, stage, NULL, &keeper), POE_OK);
    dup2(fileno(file), STDERR_FILENO);
    poe_status status = poe_agent_run(board, keeper, NULL, &(poe_agent_settings){.deadline = deadline});
    dup2(saved, STDERR_FILENO);
    close(saved);
    rewind(file);
    said[fread(said, 1, 4095, file)] = '\0';
    fclose(file);
    poe_keeper_stop(keeper);
    CHECK(waitpid(-1, NULL, WNOHANG) == -1);
    munmap(board, sizeof(*board));
    return status;
}

#define CHECK_SAID(text) check_said(__LINE__, said, text)
static void check_said(int line, const char *said, const char *text)
{
    if (!strstr(said, text))
        fprintf(stderr, "line %d: expected \"%s\" in \"%s\"\n", line, text, said);
    CHECK(strstr(said, text));
}

static void test_hopeless(void)
{
    char said[4096];
    CHECK_INT(run(dies_early, 8, said), POE_FAILED);
    CHECK_INT(relayed.begun, 1);
    CHECK_SAID(
        "rank 2: its stage process has ended with exit status 7 and no outcome before training began, and is not "
        "started again: it has no snapshot to go on from\n");
    CHECK_INT(run(dies_always, 8, said), POE_FAILED);
    CHECK_INT(relayed.begun, 5);
    CHECK_SAID("in step 3, forward, micro-batch 1; starting it again\n");
    CHECK_SAID("is not started again: it dies again and again");
}

static void test_recovered(void)
{
    char said[4096];
    CHECK_INT(run(dies_thrice, 2, said), POE_INTERRUPTED);
    CHECK_INT(relayed.begun, 4);
    CHECK_INT(relayed.ended, 3);
    CHECK(relayed.beats > 0);
    CHECK_SAID(
        "its stage process was ended by signal 9 (Killed) in step 20, forward, micro-batch 0; starting it again\n");
    CHECK_SAID("then 2 steps and what had begun of another again\n");
    CHECK_SAID("has ended with exit status 5 and no outcome in step 22");
    CHECK_SAID("has given no sign of life for 1.");
    CHECK_SAID("then 6 steps and what had begun of another again\n");
}

static pid_t wait_for(poe_keeper *keeper, poe_keeper_news news, int *status)
{
    poe_keeper_event event;
    CHECK(poll(&(struct pollfd){.fd = poe_keeper_fd(keeper), .events = POLLIN}, 1, 5000) == 1);
    CHECK(poe_keeper_next(keeper, &event));
    CHECK_INT(event.news, news);
    *status = event.status;
    return event.pid;
}

static int sleeps(poe_board *board, void *arg)
{
    (void)board, (void)arg;
    rest(60);
    return 0;
}

/* A keeper is of no group that signals are sent to, minds none, and takes its stage process along. */
static void test_keeper(void)
{
    poe_board *board = new_board();
    poe_keeper *keeper;
    poe_keeper_event event;
    int status;
    CHECK_INT(poe_keeper_start(board, sleeps, NULL, &keeper), POE_OK);
    poe_keeper_spawn(keeper);
    pid_t stage = wait_for(keeper, POE_KEEPER_STARTED, &status);
    CHECK(getpgid(stage) != getpgid(0));
    CHECK_INT(kill(getpgid(stage), SIGTERM), 0);
    CHECK(!poe_keeper_next(keeper, &event));
    poe_keeper_signal(keeper, SIGTERM);
    CHECK_INT(wait_for(keeper, POE_KEEPER_ENDED, &status), stage);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM);
    poe_keeper_spawn(keeper);
    stage = wait_for(keeper, POE_KEEPER_STARTED, &status);
    kill(getpgid(stage), SIGKILL);
    wait_for(keeper, POE_KEEPER_LOST, &status);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    poe_keeper_stop(keeper);
    pid_t ended = 0;
    for (double until = poe_now() + 5; (ended = waitpid(stage, &status, WNOHANG)) == 0 && poe_now() < until;)
        rest(0.01);
    CHECK_INT(ended, stage);
    munmap(board, sizeof(*board));
}

int main(void)
{
    poe_log *log = poe_log_create(2, 3);
    poe_log_attach(log);
    prctl(PR_SET_CHILD_SUBREAPER, 1); /* a stage process whose keeper has died becomes our child */
    test_keeper();
    test_hopeless();
    test_recovered();
    poe_log_destroy(log);
    return check_result();
}
