/* SPDX-License-Identifier: MIT
 * Fault plans: their rules, what a log says of them, and the blows themselves, which fall on forked children. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "comm/inproc/inproc.h"
#include "faults/fault_impl.h"
#include "faults/fault_link.h"
#include "src/clock.h"
#include "src/files.h"
#include "src/log.h"
#include "tests/check.h"
#include "tests/comm_scenarios.h"

static poe_fault_plan *read_plan(const char *text, int size)
{
    poe_fault_plan *plan = NULL;
    CHECK_INT(poe_fault_plan_read(text, 0, 0, size, &plan), POE_OK);
    if (!plan)
        exit(1);
    return plan;
}

/* What survives a stage process. */
static poe_board *make_board(int rank, int size)
{
    poe_board *board = mmap(NULL, sizeof(*board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(board != MAP_FAILED);
    board->rank = rank;
    board->size = size;
    return board;
}

/* --- rules -------------------------------------------------------------------------------------------------------- */
static void check_rule(const char *text, const char *described)
{
    poe_fault_plan *plan = read_plan(text, 4);
    char *lines = poe_fault_plan_describe(plan);
    CHECK(lines != NULL);
    if (lines)
        CHECK_STRING(lines, described);
    free(lines);
    poe_fault_plan_free(plan);
}

static void check_rules(void)
{
    check_rule("kill rank=2 step=20 phase=backward", "kill rank=2 step=20 phase=backward\n");
    check_rule("segfault rank=1 step=3  micro=1 phase=forward;", "segfault rank=1 step=3 micro=1 phase=forward\n");
    check_rule("stop rank=0 step=5 phase=optimizer for=2s", "stop rank=0 step=5 phase=optimizer for=2s\n");
    check_rule("slow rank=3 step=4 duty=0.25 for=1500ms", "slow rank=3 step=4 duty=0.25 for=1.5s\n");
    check_rule("exit rank=1 step=7 code=3; kill rank=0 step=0", "exit rank=1 step=7 code=3\nkill rank=0 step=0\n");
    check_rule("memory rank=1 step=7 cap=1GiB", "memory rank=1 step=7 cap=1024MiB\n");
    check_rule("disk rank=1 step=7 for=3s", "disk rank=1 step=7 for=3s\n");
    check_rule("nan rank=1 step=5", "nan rank=1 step=5 phase=backward\n");
    check_rule("corrupt rank=1 to=2 step=5", "corrupt rank=1 to=2 step=5\n");
    check_rule("cut rank=1 to=2 step=5;drop rank=0 to=1 step=5", "cut rank=1 to=2 step=5\ncut rank=0 to=1 step=5\n");
    check_rule("partition ranks=0,1 step=5 for=3s", "partition ranks=0,1 step=5 for=3s\n");
    check_rule("corrupt-checkpoint rank=1 step=10", "corrupt-checkpoint rank=1 step=10\n");
    check_rule("kill-agent rank=2 step=9\nkill-keeper rank=2 step=9",
               "kill-agent rank=2 step=9\nkill-keeper rank=2 step=9\n");
    check_rule("absent rank=2 step=30 steps=40", "absent rank=2 step=30 steps=40\n");
    check_rule("absent rank=2 step=30 for=60s", "absent rank=2 step=30 for=60s\n");
    check_rule("kill rank=1 step=2 phase=recovery life=2 times=3",
               "kill rank=1 step=2 phase=recovery life=2 times=3\n");
    check_rule("random mtbf=20s seed=7 kinds=kill,cut ranks=1,2",
               "random mtbf=20s seed=7 kinds=kill,cut for=2s ranks=1,2\n");
    check_rule("poe-pipe: rank 2: fault: kill rank=2 step=20 micro=1 phase=backward\nfault: kill rank=1 step=1",
               "kill rank=2 step=20 micro=1 phase=backward\nkill rank=1 step=1\n");
}

static void check_sources(void)
{
    poe_fault_plan *plan = read_plan("none", 4);
    CHECK(poe_fault_plan_is_empty(plan) && !poe_fault_plan_describe(plan));
    poe_fault_plan_free(plan);
    CHECK_INT(poe_fault_plan_read(NULL, 20, 3, 2, &plan), POE_OK);
    char *text = poe_fault_plan_describe(plan);
    CHECK(strstr(text, "random mtbf=20s seed=3 kinds=kill,segfault,exit,stop for=2s ranks=0,1") == text);
    CHECK(!poe_fault_plan_strikes_links(plan));
    free(text);
    poe_fault_plan_free(plan);

    char path[] = "/tmp/test-fault-XXXXXX";
    const char *rules = "# twice\nkill rank=1 step=3\n\nkill rank=3 step=3 # late; later\nexit rank=9 step=0\n";
    int file = mkstemp(path);
    CHECK(write(file, rules, strlen(rules)) == (ssize_t)strlen(rules));
    close(file);
    plan = read_plan(path, 10);
    CHECK_INT(plan->n_rules, 3);
    poe_fault_plan_free(plan);
    poe_capture_begin();
    CHECK_INT(poe_fault_plan_read(path, 0, 0, 4, &plan), POE_BAD_INPUT);
    char *said = poe_capture_end();
    CHECK(strstr(said, path) && strstr(said, ", line 5, 'exit rank=9 step=0': found \"9\" for rank, allowed is a rank "
                                             "from 0 to 3\n"));
    free(said);
    unlink(path);
}

static void check_wrong(void)
{
    static const struct {
        const char *text, *says;
    } cases[] = {
        {"nothing", "--fault: there is no file nothing, and no rule in it, as in 'kill rank=2 step=20'"},
        {"kill rank=1 step=1; burn rank=1 step=1",
         "--fault 'burn rank=1 step=1': there is no fault \"burn\"; allowed are kill,"},
        {"kill step=2", "--fault 'kill step=2': kill needs rank\n"},
        {"kill rank=1", "kill needs step\n"},
        {"kill rank=4 step=1", "found \"4\" for rank, allowed is a rank from 0 to 3"},
        {"kill rank=-1 step=1", "found \"-1\" for rank"},
        {"kill rank step=1", "found \"\" for rank"},
        {"kill rank=1 step=1x", "found \"1x\" for step, allowed is the number of a step, from 0"},
        {"kill rank=1 step=99999999999999999999", "for step"},
        {"kill rank=1 step=1 micro=x", "found \"x\" for micro"},
        {"kill rank=1 step=1 phase=lunch", "found \"lunch\" for phase, allowed is receive, forward, backward, reduce, "
                                           "optimizer, snapshot, checkpoint, recovery\n"},
        {"kill rank=1 step=1 times=0", "found \"0\" for times"},
        {"kill rank=1 step=1 life=0",
         "found \"0\" for life, allowed is the number of the rank's stage process, from 1"},
        {"kill rank=1 step=1 for=2s", "kill has no key \"for\"; keys are rank, step, micro, phase, times, life\n"},
        {"kill rank=1 rank=2 step=1", "says rank twice"},
        {"stop rank=1 step=1 for=2", "found \"2\" for for, allowed is a time from 1ms to 3600s"},
        {"stop rank=1 step=1 for=0s", "found \"0s\" for for"},
        {"slow rank=1 step=1 duty=1", "found \"1\" for duty, allowed is the share of the time that is left"},
        {"slow rank=1 step=1 duty=nan", "found \"nan\" for duty"},
        {"exit rank=1 step=1 code=256", "found \"256\" for code, allowed is an exit status from 0 to 255"},
        {"memory rank=1 step=1 cap=1", "found \"1\" for cap"},
        {"cut rank=1 step=1", "cut needs to\n"},
        {"cut rank=1 to=1 step=1", "rank 1 has no connection with itself"},
        {"partition step=1", "partition needs ranks\n"},
        {"partition ranks= step=1", "found \"\" for ranks"},
        {"partition ranks=0,1,2,3 step=1", "found all 4 ranks for ranks"},
        {"absent rank=0 step=1 steps=2", "without the first stage there is nothing to train on"},
        {"absent rank=1 step=1 steps=0", "found \"0\" for steps, allowed is a number of steps from 1"},
        {"absent rank=1 step=1 steps=2 for=2s", "says steps and for; allowed is one of them"},
        {"random seed=1", "random needs mtbf\n"},
        {"random mtbf=0s", "found \"0s\" for mtbf"},
        {"random mtbf=1s kinds=kill,random", "found \"random\" for kinds, allowed is kill,"},
        {"random mtbf=1s seed=-1", "found \"-1\" for seed"},
        {"random mtbf=1s step=3", "random has no key \"step\"; keys are for, ranks, mtbf, seed, kinds\n"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        poe_fault_plan *plan;
        poe_capture_begin();
        int status = poe_fault_plan_read(cases[i].text, 0, 0, 4, &plan);
        char *said = poe_capture_end();
        CHECK_INT(status, POE_BAD_INPUT);
        bool one = strchr(said, '\n') == strrchr(said, '\n');
        if (!one || !strstr(said, cases[i].says)) {
            fprintf(stderr, "%s: not said: %s\nbut: %s\n", cases[i].text, cases[i].says, said);
            check_failures++;
        }
        free(said);
    }
}

/* Beyond what the board, and a plan, can count. */
static void check_too_many(void)
{
    char text[70 * 24] = "";
    poe_fault_plan *plan;
    for (int i = 0; i < 65; i++)
        sprintf(text + strlen(text), "kill rank=1 step=%d;", i);
    poe_capture_begin();
    CHECK_INT(poe_fault_plan_read(text, 0, 0, 4, &plan), POE_BAD_INPUT);
    char *said = poe_capture_end();
    CHECK(strstr(said, "'kill rank=1 step=64': is rule 65, and a plan has at most 64\n"));
    free(said);
    *strstr(text, "kill rank=1 step=64") = '\0';
    plan = read_plan(text, 4);
    CHECK_INT(plan->n_rules, 64);
    poe_fault_plan_free(plan);
    poe_capture_begin();
    CHECK_INT(poe_fault_plan_read(text, 1, 0, 4, &plan), POE_BAD_INPUT);
    free(poe_capture_end());
    CHECK_INT(poe_fault_plan_read(NULL, 0, 0, 200, &plan), POE_OK);
    poe_fault_plan_free(plan);
    poe_capture_begin();
    CHECK_INT(poe_fault_plan_read("partition ranks=0,199 step=1", 0, 0, 200, &plan), POE_BAD_INPUT);
    free(poe_capture_end());
}

static void check_needs_agent(void)
{
    static const char *const texts[] = {"kill rank=0 step=1;cut rank=0 to=1 step=1", "random mtbf=1s kinds=kill,cut"};
    for (int i = 0; i < 2; i++) {
        poe_fault_plan *plan = read_plan(texts[i], 2);
        poe_capture_begin();
        CHECK_INT(poe_fault_plan_attach(plan, 1, NULL), POE_BAD_INPUT);
        char *said = poe_capture_end();
        CHECK(strstr(said, "cut is done by the agent that looks after a rank, and these ranks have none"));
        free(said);
        CHECK_INT(poe_fault_plan_check(plan, true), POE_OK);
        poe_fault_plan_free(plan);
    }
}

/* --- random sequences --------------------------------------------------------------------------------------------- */
static void check_sequence(void)
{
    enum { N = 20000, SIZE = 4 };
    poe_fault_plan *plan = read_plan("random mtbf=20s seed=7 kinds=kill,cut ranks=1,2", SIZE);
    poe_fault_plan *other = read_plan("random mtbf=20s seed=8 kinds=kill,cut ranks=1,2", SIZE);
    poe_fault_sequence a, b, c;
    int kills = 0, ones = 0, same = 0;
    double last = 0;
    poe_fault_sequence_begin(&plan->rules[0], SIZE, &a);
    poe_fault_sequence_begin(&plan->rules[0], SIZE, &b);
    poe_fault_sequence_begin(&other->rules[0], SIZE, &c);
    for (int i = 0; i < N; i++) {
        const poe_fault_event *e = &a.next;
        CHECK(e->at > last && e->at == b.next.at && e->kind == b.next.kind && e->rank == b.next.rank);
        CHECK(e->kind == POE_FAULT_KILL || e->kind == POE_FAULT_CUT);
        CHECK((e->rank == 1 || e->rank == 2) && e->to != e->rank && e->to >= 0 && e->to < SIZE);
        kills += e->kind == POE_FAULT_KILL;
        ones += e->rank == 1;
        same += e->at == c.next.at;
        last = e->at;
        poe_fault_sequence_step(&plan->rules[0], SIZE, &a);
        poe_fault_sequence_step(&plan->rules[0], SIZE, &b);
        poe_fault_sequence_step(&other->rules[0], SIZE, &c);
    }
    CHECK_NEAR(last / N, 20, 0, 5 * 20 / sqrt(N)); /* five standard errors, here and below */
    CHECK_NEAR(kills, N / 2, 0, 2.5 * sqrt(N));
    CHECK_NEAR(ones, N / 2, 0, 2.5 * sqrt(N));
    CHECK_INT(same, 0);
    poe_fault_plan_free(plan);
    poe_fault_plan_free(other);
}

static void count_nan(void *context)
{
    ++*(int *)context;
}

/* Every rank strikes at its own failures, and together they strike at all of them. */
static void check_shared_sequence(void)
{
    enum { SIZE = 3 };
    const double last = 0.4;
    poe_fault_plan *plan = read_plan("random mtbf=20ms seed=5 kinds=nan", SIZE);
    poe_fault_sequence all;
    int expected[SIZE] = {0}, struck[SIZE] = {0};
    for (poe_fault_sequence_begin(&plan->rules[0], SIZE, &all); all.next.at < last;
         poe_fault_sequence_step(&plan->rules[0], SIZE, &all))
        expected[all.next.rank]++;
    poe_capture_begin();
    for (int rank = 0; rank < SIZE; rank++) {
        CHECK_INT(poe_fault_plan_attach(plan, rank, NULL), POE_OK);
        poe_fault_plan_hook(plan, rank, &(poe_fault_hooks){.context = &struck[rank], .nan = count_nan});
        poe_moment(POE_PHASE_RECEIVE, 0, 0);
        plan->states[rank].own_start -= (int64_t)(1e9 * last); /* as if it were that late */
        for (int i = 0; i < 100; i++)
            poe_moment(POE_PHASE_RECEIVE, i, 0);
        CHECK(struck[rank] >= expected[rank] && struck[rank] <= expected[rank] + 5);
        CHECK_INT(plan->states[rank].own_fired[0], struck[rank]);
    }
    poe_moment_observe(NULL, NULL);
    char *said = poe_capture_end();
    CHECK(strstr(said, "poe-pipe: fault: nan rank=0 step="));
    free(said);
    poe_fault_plan_free(plan);
}

/* --- children ----------------------------------------------------------------------------------------------------- */
static char log_path[] = "/tmp/test-fault-log-XXXXXX";

/* A rank's steps: two micro-batches each. What it last announced is on the board. */
static void take_steps(poe_board *board, int64_t n)
{
    static const poe_phase phases[] = {POE_PHASE_RECEIVE, POE_PHASE_FORWARD, POE_PHASE_BACKWARD};
    for (int64_t step = 0; step < n; step++) {
        for (int i = 0; i < 6; i++) {
            board->place.step = step;
            board->place.micro = i / 3;
            board->place.entered = phases[i % 3];
            poe_moment(phases[i % 3], step, i / 3);
        }
        board->place.micro = -1;
        board->place.entered = POE_PHASE_OPTIMIZER;
        poe_moment(POE_PHASE_OPTIMIZER, step, -1);
    }
}

/* Forks a stage process that does `body`, and exits 0 when it survives. Its standard error is added to the log. */
static pid_t fork_stage(poe_fault_plan *plan, poe_board *board, void (*body)(poe_board *board))
{
    fflush(NULL);
    pid_t child = fork();
    if (child)
        return child;
    int log = open(log_path, O_WRONLY | O_APPEND);
    dup2(log, 2);
    board->incarnation++;
    if (poe_fault_plan_attach(plan, board->rank, board) != POE_OK)
        _exit(99);
    body(board);
    _exit(check_failures != 0);
}

static int run_stage(poe_fault_plan *plan, poe_board *board, void (*body)(poe_board *board))
{
    int status = -1;
    pid_t child = fork_stage(plan, board, body);
    CHECK(waitpid(child, &status, 0) == child);
    return status;
}

static char *read_log(void)
{
    static char text[65536];
    FILE *f = fopen(log_path, "r");
    size_t n = fread(text, 1, sizeof(text) - 1, f);
    text[n] = '\0';
    fclose(f);
    CHECK_INT(truncate(log_path, 0), 0);
    return text;
}

static void ten_steps(poe_board *board)
{
    take_steps(board, 10);
}

/* The first stage process ends as `signal` or `code` says at the moment of the rule, the next one lives. */
static void check_end(const char *text, int signal, int code, int64_t step, int micro, poe_phase phase,
                      const char *said)
{
    poe_fault_plan *plan = read_plan(text, 4);
    poe_board *board = make_board(1, 4);
    int status = run_stage(plan, board, ten_steps);
    if (signal)
        CHECK(WIFSIGNALED(status) && WTERMSIG(status) == signal);
    else
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == code);
    CHECK_INT(board->place.step, step);
    CHECK_INT(board->place.micro, micro);
    CHECK_INT(board->place.entered, phase);
    CHECK_INT(board->fired[0], 1);
    CHECK_STRING(read_log(), said);
    status = run_stage(plan, board, ten_steps);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK_INT(board->place.step, 9);
    CHECK_STRING(read_log(), "");
    munmap(board, sizeof(*board));
    poe_fault_plan_free(plan);
}

static void check_ends(void)
{
    check_end("kill rank=1 step=3 micro=1 phase=backward", SIGKILL, 0, 3, 1, POE_PHASE_BACKWARD,
              "poe-pipe: fault: kill rank=1 step=3 micro=1 phase=backward\n");
    check_end("kill rank=1 step=0", SIGKILL, 0, 0, 0, POE_PHASE_RECEIVE,
              "poe-pipe: fault: kill rank=1 step=0 micro=0 phase=receive\n");
    check_end("exit rank=1 step=7 code=3 phase=optimizer", 0, 3, 7, -1, POE_PHASE_OPTIMIZER,
              "poe-pipe: fault: exit rank=1 step=7 phase=optimizer code=3\n");
    check_end("memory rank=1 step=2 micro=1 cap=4MiB", SIGKILL, 0, 2, 1, POE_PHASE_RECEIVE,
              "poe-pipe: fault: memory rank=1 step=2 micro=1 phase=receive cap=4MiB\n");
#if !defined(__SANITIZE_ADDRESS__) /* which has a handler of its own */
    check_end("segfault rank=1 step=5 phase=forward", SIGSEGV, 0, 5, 0, POE_PHASE_FORWARD,
              "poe-pipe: fault: segfault rank=1 step=5 micro=0 phase=forward\n");
#endif
}

/* Another rank's rules, and those of moments that do not come, leave a rank alone. */
static void check_others(void)
{
    poe_fault_plan *plan = read_plan("kill rank=2 step=3;kill rank=1 step=10;kill rank=1 step=3 micro=2;"
                                     "kill rank=1 step=4 phase=recovery",
                                     4);
    poe_board *board = make_board(1, 4);
    int status = run_stage(plan, board, ten_steps);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK_STRING(read_log(), "");
    munmap(board, sizeof(*board));
    poe_fault_plan_free(plan);
}

/* times=3: three stage processes in a row. Their lines make a plan that does the same. */
static void check_repetition(void)
{
    char said[65536];
    const char *text = "kill rank=1 step=3 micro=1 times=3";
    for (int i = 0; i < 2; i++) {
        poe_fault_plan *plan = read_plan(text, 4);
        poe_board *board = make_board(1, 4);
        for (int k = 0; k < 3; k++)
            CHECK(WIFSIGNALED(run_stage(plan, board, ten_steps)));
        CHECK(WIFEXITED(run_stage(plan, board, ten_steps)));
        char *log = read_log();
        if (i == 1)
            CHECK_STRING(log, said);
        strcpy(said, log);
        text = said;
        munmap(board, sizeof(*board));
        poe_fault_plan_free(plan);
    }
    CHECK(strstr(said, "fault: kill rank=1 step=3 micro=1 phase=receive\npoe-pipe: fault: kill rank=1 step=3 micro=1 "
                       "phase=receive life=2\n"));
}

/* The second stage process dies before the step at which the first did, and again only when it is repeated. */
static void check_lives(void)
{
    poe_fault_plan *plan = read_plan("exit rank=0 step=3 code=3;exit rank=0 step=1 code=1 life=2", 2);
    poe_board *board = make_board(0, 2);
    CHECK_INT(WEXITSTATUS(run_stage(plan, board, ten_steps)), 3);
    CHECK_INT(WEXITSTATUS(run_stage(plan, board, ten_steps)), 1);
    CHECK_INT(WEXITSTATUS(run_stage(plan, board, ten_steps)), 0);
    CHECK_STRING(read_log(), "poe-pipe: fault: exit rank=0 step=3 micro=0 phase=receive code=3\n"
                             "poe-pipe: fault: exit rank=0 step=1 micro=0 phase=receive life=2 code=1\n");
    munmap(board, sizeof(*board));
    poe_fault_plan_free(plan);
}

static void recover(poe_board *board)
{
    if (board->incarnation > 1)
        poe_moment(POE_PHASE_RECOVERY, 2, -1);
    take_steps(board, 3);
}

static void check_recovery(void)
{
    poe_fault_plan *plan =
        read_plan("exit rank=0 step=2 phase=recovery code=5;exit rank=0 step=2 phase=forward code=4", 2);
    poe_board *board = make_board(0, 2);
    CHECK_INT(WEXITSTATUS(run_stage(plan, board, recover)), 4);
    CHECK_INT(WEXITSTATUS(run_stage(plan, board, recover)), 5);
    CHECK_INT(WEXITSTATUS(run_stage(plan, board, recover)), 0);
    read_log();
    munmap(board, sizeof(*board));
    poe_fault_plan_free(plan);
}

static void check_stop(void)
{
    poe_fault_plan *plan = read_plan("stop rank=0 step=1 for=300ms", 2);
    poe_board *board = make_board(0, 2);
    int status = 0;
    double start = poe_now();
    pid_t child = fork_stage(plan, board, ten_steps);
    CHECK(waitpid(child, &status, WUNTRACED) == child && WIFSTOPPED(status) && WSTOPSIG(status) == SIGSTOP);
    CHECK_INT(board->place.step, 1);
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(poe_now() - start >= 0.3);
    CHECK_INT(board->place.step, 9);
    CHECK_STRING(read_log(), "poe-pipe: fault: stop rank=0 step=1 micro=0 phase=receive for=0.3s\n");
    munmap(board, sizeof(*board));
    poe_fault_plan_free(plan);
}

static bool can_write(void)
{
    char path[] = "/tmp/test-fault-disk-XXXXXX";
    int file = mkstemp(path);
    bool could = write(file, "x", 1) == 1;
    if (!could)
        CHECK_INT(errno, EFBIG);
    close(file);
    unlink(path);
    return could;
}

static void fill_disk(poe_board *board)
{
    CHECK(can_write());
    take_steps(board, 1);
    CHECK(!can_write());
    for (double until = poe_now() + 30; poe_now() < until && !can_write();)
        usleep(10000);
    CHECK(can_write());
}

static void check_disk(void)
{
    poe_fault_plan *plan = read_plan("disk rank=0 step=0 for=400ms", 2);
    poe_board *board = make_board(0, 2);
    CHECK_INT(run_stage(plan, board, fill_disk), 0);
    CHECK_STRING(read_log(), "poe-pipe: fault: disk rank=0 step=0 micro=0 phase=receive for=0.4s\n");
    munmap(board, sizeof(*board));
    poe_fault_plan_free(plan);
}

/* Random failures in a row of stage processes: each is one failure further, and the log repeats them. */
static void tick(poe_board *board)
{
    for (int64_t step = board->place.step; step < 1000000; step++) {
        board->place.step = step;
        usleep(1000);
        poe_moment(POE_PHASE_FORWARD, step, 0);
    }
}

static void check_random_deaths(void)
{
    enum { DEATHS = 5 };
    char said[65536];
    poe_fault_plan *plan = read_plan("random mtbf=20ms seed=3 kinds=kill,exit", 2);
    poe_board *board = make_board(1, 2);
    poe_fault_sequence all;
    double at = 0, start = poe_now();
    for (int i = 0; i < DEATHS; i++) {
        int status = run_stage(plan, board, tick);
        CHECK(WIFSIGNALED(status) || WEXITSTATUS(status) == 1);
        CHECK_INT(board->fired[0], i + 1);
    }
    poe_fault_sequence_begin(&plan->rules[0], 2, &all);
    for (int own = 0; own < DEATHS; poe_fault_sequence_step(&plan->rules[0], 2, &all))
        if (all.next.rank == 1) {
            own++;
            at = all.next.at;
        }
    CHECK(poe_now() - start >= at);
    strcpy(said, read_log());
    poe_fault_plan_free(plan);
    plan = read_plan(said, 2);
    CHECK_INT(plan->n_rules, DEATHS);
    for (int i = 0; i < DEATHS; i++)
        CHECK(plan->rules[i].rank == 1 && plan->rules[i].micro == 0 && plan->rules[i].phase == POE_PHASE_FORWARD);
    munmap(board, sizeof(*board));
    poe_fault_plan_free(plan);
}

/* --- what this process survives ----------------------------------------------------------------------------------- */
/* A quarter of the time is left: as little as 0.1 s of work takes 0.4 s. */
static void check_slow(void)
{
    poe_fault_plan *plan = read_plan("slow rank=1 step=0 duty=0.25 for=30s", 2);
    CHECK_INT(poe_fault_plan_attach(plan, 1, NULL), POE_OK);
    poe_capture_begin();
    poe_moment(POE_PHASE_FORWARD, 0, 0);
    double start = poe_now();
    for (int i = 0; i < 20; i++) {
        usleep(5000);
        poe_moment(POE_PHASE_FORWARD, 1, i);
    }
    CHECK(poe_now() - start >= 0.399);
    poe_moment_observe(NULL, NULL);
    char *said = poe_capture_end();
    CHECK_STRING(said, "poe-pipe: fault: slow rank=1 step=0 micro=0 phase=forward duty=0.25 for=30s\n");
    free(said);
    poe_fault_plan_free(plan);

    plan = read_plan("slow rank=1 step=0 duty=0.01 for=20ms", 2);
    CHECK_INT(poe_fault_plan_attach(plan, 1, NULL), POE_OK);
    poe_capture_begin();
    poe_moment(POE_PHASE_FORWARD, 0, 0);
    usleep(20000);
    poe_moment(POE_PHASE_FORWARD, 0, 1);
    CHECK(plan->states[1].slow_until == 0);
    poe_moment_observe(NULL, NULL);
    free(poe_capture_end());
    poe_fault_plan_free(plan);
}

static void check_nan(void)
{
    int struck = 0;
    poe_fault_plan *plan = read_plan("nan rank=0 step=1;nan rank=1 step=1", 2);
    poe_fault_plan_hook(plan, 0, &(poe_fault_hooks){.context = &struck, .nan = count_nan});
    poe_capture_begin();
    for (int rank = 0; rank < 2; rank++) {
        CHECK_INT(poe_fault_plan_attach(plan, rank, NULL), POE_OK);
        poe_moment(POE_PHASE_FORWARD, 1, 0);
        CHECK_INT(struck, rank);
        poe_moment(POE_PHASE_BACKWARD, 1, 0);
        poe_moment(POE_PHASE_BACKWARD, 1, 1);
        CHECK_INT(struck, 1);
    }
    poe_moment_observe(NULL, NULL);
    char *said = poe_capture_end();
    CHECK_STRING(said, "poe-pipe: fault: nan rank=0 step=1 micro=0 phase=backward\n"
                       "poe-pipe: fault: nan rank=1 step=1 micro=0 phase=backward\n"
                       "poe-pipe: warning: nan of --fault does not happen: this rank has no gradients here\n");
    free(said);
    poe_fault_plan_free(plan);
}

static unsigned char middle_of(const char *path)
{
    char text[16] = "";
    FILE *f = fopen(path, "r");
    CHECK(f && fread(text, 1, 5, f) == 5);
    fclose(f);
    CHECK(text[0] == 'h' && text[1] == 'e' && text[3] == 'l' && text[4] == 'o');
    return (unsigned char)text[2];
}

static void write_checkpoint(const char *run, int step, char path[POE_PATH_MAX])
{
    snprintf(path, POE_PATH_MAX, "%s/checkpoints/step-%08d", run, step);
    CHECK_INT(poe_make_directories(path), POE_OK);
    snprintf(path, POE_PATH_MAX, "%s/checkpoints/step-%08d/stage-001.h5", run, step);
    CHECK_INT(poe_write_file(path, "hello", 5), POE_OK);
}

static void check_checkpoint(void)
{
    char run[] = "/tmp/test-fault-run-XXXXXX", older[POE_PATH_MAX], newest[POE_PATH_MAX];
    CHECK(mkdtemp(run) != NULL);
    poe_fault_plan *plan = read_plan("corrupt-checkpoint rank=1 step=10", 2);
    poe_fault_plan_hook(plan, 1, &(poe_fault_hooks){.run = run, .stage = 1});
    CHECK_INT(poe_fault_plan_attach(plan, 1, NULL), POE_OK);
    poe_capture_begin();
    poe_moment(POE_PHASE_RECEIVE, 10, 0); /* there is none yet */
    write_checkpoint(run, 5, older);
    write_checkpoint(run, 10, newest);
    poe_moment(POE_PHASE_RECEIVE, 9, 0); /* too early */
    CHECK_INT(middle_of(newest), 'l');
    poe_moment(POE_PHASE_RECEIVE, 11, 2);
    CHECK_INT(middle_of(newest), 'l' ^ 0x10);
    CHECK_INT(middle_of(older), 'l');
    poe_moment(POE_PHASE_RECEIVE, 11, 3);
    CHECK_INT(middle_of(newest), 'l' ^ 0x10);
    poe_moment_observe(NULL, NULL);
    char *said = poe_capture_end();
    CHECK_STRING(said, "poe-pipe: fault: corrupt-checkpoint rank=1 step=11 micro=2 phase=receive\n");
    free(said);
    poe_fault_plan_free(plan);
    poe_remove_tree(run);
}

/* --- agents ------------------------------------------------------------------------------------------------------- */
typedef struct agent {
    poe_fault_plan *plan;
    poe_board *board;
    atomic_bool ends;
    atomic_int awoken;
    int cut, corrupt, keepers, agents;
    bool peers[4];
    double seconds;
} agent;

static bool cut(void *context, int peer)
{
    ((agent *)context)->cut = peer;
    return true;
}

static void corrupt(void *context, int peer)
{
    ((agent *)context)->corrupt = peer;
}

static void block(void *context, const bool *peers, double seconds)
{
    agent *a = context;
    memcpy(a->peers, peers, sizeof(a->peers));
    a->seconds = seconds;
}

static void kill_keeper(void *context)
{
    ((agent *)context)->keepers++;
}

static void kill_agent(void *context)
{
    agent *a = context;
    CHECK_INT(a->board->fault_request, 0); /* nobody else would lower it */
    a->agents++;
}

static void wake(void *context)
{
    ((agent *)context)->awoken++;
}

static void *serve(void *arg)
{
    agent *a = arg;
    const poe_fault_actions actions = {a, cut, corrupt, block, kill_keeper, kill_agent};
    while (!a->ends) {
        poe_fault_serve(a->plan, a->board, &actions);
        usleep(1000);
    }
    return NULL;
}

static void check_peers(const agent *a, const char *expected)
{
    for (int peer = 0; peer < 4; peer++)
        CHECK_INT(a->peers[peer], expected[peer] == 'x');
}

static void check_agent(void)
{
    pthread_t thread;
    agent a = {.plan = read_plan("kill rank=0 step=9;cut rank=1 to=3 step=1;corrupt rank=1 to=2 step=2;"
                                 "partition ranks=0,1 step=3 for=2500ms;kill-keeper rank=1 step=4;"
                                 "kill-agent rank=1 step=5;partition rank=0 ranks=2 step=3",
                                 4),
               .board = make_board(1, 4)};
    pthread_create(&thread, NULL, serve, &a);
    CHECK(poe_fault_plan_strikes_links(a.plan));
    CHECK_INT(poe_fault_plan_attach(a.plan, 1, a.board), POE_OK);
    poe_fault_plan_hook(a.plan, 1, &(poe_fault_hooks){.context = &a, .wake = wake});
    poe_capture_begin();
    poe_moment(POE_PHASE_FORWARD, 1, 0);
    CHECK_INT(a.cut, 3);
    poe_moment(POE_PHASE_FORWARD, 2, 0);
    CHECK_INT(a.corrupt, 2);
    poe_moment(POE_PHASE_FORWARD, 3, 0);
    check_peers(&a, "..xx");
    CHECK_NEAR(a.seconds, 2.5, 1e-9, 0);
    poe_moment(POE_PHASE_FORWARD, 4, 0);
    CHECK_INT(a.keepers, 1);
    poe_moment(POE_PHASE_FORWARD, 5, 0);
    usleep(50000);
    CHECK_INT(a.agents, 1);
    CHECK_INT(a.awoken, 5);
    char *said = poe_capture_end();
    CHECK(strstr(said, "fault: partition rank=1 ranks=0,1 step=3 micro=0 phase=forward for=2.5s\n"));
    poe_fault_plan *again = read_plan(said, 4);
    CHECK_INT(again->n_rules, 5);
    free(said);
    poe_fault_plan_free(again);
    poe_moment_observe(NULL, NULL);
    a.ends = true;
    pthread_join(thread, NULL);
    munmap(a.board, sizeof(*a.board));
    poe_fault_plan_free(a.plan);
}

/* A random partition: one rank against the others, and all hold back. */
static void check_random_partition(void)
{
    pthread_t thread;
    agent a = {.plan = read_plan("random mtbf=1ms seed=1 kinds=partition ranks=2 for=1s", 4),
               .board = make_board(1, 4)};
    pthread_create(&thread, NULL, serve, &a);
    CHECK_INT(poe_fault_plan_attach(a.plan, 1, a.board), POE_OK);
    poe_capture_begin();
    poe_moment(POE_PHASE_FORWARD, 1, 0);
    usleep(20000);
    poe_moment(POE_PHASE_FORWARD, 1, 1);
    check_peers(&a, "..x.");
    char *said = poe_capture_end();
    CHECK(strstr(said, "fault: partition rank=1 ranks=2 step=1 micro=1 phase=forward for=1s\n"));
    free(said);
    poe_moment_observe(NULL, NULL);
    a.ends = true;
    pthread_join(thread, NULL);
    munmap(a.board, sizeof(*a.board));
    poe_fault_plan_free(a.plan);
}

static void check_requests(void)
{
    const poe_fault_request in = {.kind = POE_FAULT_PARTITION, .argument = POE_FAULT_ALONE + 127, .seconds = 3600};
    poe_fault_request out = poe_fault_request_decode(poe_fault_request_encode(in));
    CHECK(out.kind == in.kind && out.argument == in.argument);
    CHECK_NEAR(out.seconds, 3600, 1e-9, 0);
    CHECK(poe_fault_request_encode((poe_fault_request){0}) != 0);
    poe_fault_plan *plan = read_plan("cut rank=0 to=1 step=0", 2);
    poe_board *board = make_board(0, 2);
    poe_fault_actions nothing = {0};
    poe_fault_serve(plan, board, &nothing); /* nothing is asked */
    board->fault_request = poe_fault_request_encode((poe_fault_request){POE_FAULT_CUT, 1, 0});
    poe_capture_begin();
    poe_fault_serve(plan, board, &nothing);
    char *said = poe_capture_end();
    CHECK(strstr(said, "cut of --fault does not happen"));
    CHECK_INT(board->fault_request, 0);
    free(said);
    munmap(board, sizeof(*board));
    poe_fault_plan_free(plan);
}

/* --- links -------------------------------------------------------------------------------------------------------- */
static void await_both(poe_transport **t, const poe_operation *op)
{
    for (double until = poe_now() + 20; !op->done && poe_now() < until;)
        for (int r = 0; r < 2; r++)
            t[r]->ops->progress(t[r], 0.001);
    CHECK(op->done && op->status == POE_OK);
}

static void make_pair(poe_transport **t)
{
    CHECK_INT(poe_inproc_create(2, t), POE_OK);
    CHECK_INT(poe_fault_link_wrap(&t[0]), POE_OK);
}

static void check_corruption(void)
{
    poe_transport *t[2];
    make_pair(t);
    for (int i = 0; i < 3; i++) { /* credits are left alone, and the damage is done once */
        int channel = i == 0 ? POE_CHANNEL_CREDIT : 1;
        char in[6] = "";
        poe_operation send = {0}, receive = {0};
        if (i == 0)
            poe_fault_link_corrupt(t[0], 1);
        t[1]->ops->receive(t[1], 0, channel, in, 5, &receive);
        t[0]->ops->send(t[0], 1, channel, "hello", 5, &send);
        await_both(t, &receive);
        await_both(t, &send);
        CHECK_STRING(in, i == 1 ? "he|lo" : "hello");
    }
    for (int r = 0; r < 2; r++)
        t[r]->ops->destroy(t[r]);
}

static void check_block(void)
{
    poe_transport *t[2];
    char in[3][2] = {"", "", ""};
    poe_operation send[3] = {{0}}, receive[3] = {{0}};
    make_pair(t);
    for (int i = 0; i < 3; i++)
        t[1]->ops->receive(t[1], 0, 1, in[i], 1, &receive[i]);
    double start = poe_now();
    poe_fault_link_block(t[0], (const bool[]){false, true}, 0.2);
    for (int i = 0; i < 3; i++)
        t[0]->ops->send(t[0], 1, 1, "abc" + i, 1, &send[i]);
    t[0]->ops->cancel(t[0], &send[1]);
    CHECK(send[1].done && send[1].status == POE_PEER_LOST);
    CHECK(!send[0].done);
    await_both(t, &receive[1]);
    CHECK(poe_now() - start >= 0.2);
    CHECK(in[0][0] == 'a' && in[1][0] == 'c' && !receive[2].done);
    await_both(t, &send[2]);
    t[0]->ops->send(t[0], 1, 1, "d", 1, &send[0]); /* as if nothing had been */
    await_both(t, &receive[2]);
    poe_fault_link_block(t[0], (const bool[]){false, true}, 100);
    t[0]->ops->send(t[0], 1, 1, "e", 1, &send[1]);
    send[1].done = false;
    for (int r = 0; r < 2; r++)
        t[r]->ops->destroy(t[r]);
    CHECK(send[1].done && send[1].status == POE_PEER_LOST);
}

int main(void)
{
    int log = mkstemp(log_path);
    close(log);
    check_rules();
    check_sources();
    check_wrong();
    check_too_many();
    check_needs_agent();
    check_sequence();
    check_shared_sequence();
    check_ends();
    check_others();
    check_repetition();
    check_lives();
    check_recovery();
    check_stop();
    check_disk();
    check_random_deaths();
    check_slow();
    check_nan();
    check_checkpoint();
    check_agent();
    check_random_partition();
    check_requests();
    check_corruption();
    check_block();
    unlink(log_path);
    return check_result();
}
