/* SPDX-License-Identifier: MIT
 * The team of threads: every task exactly once, in every size, again and again, nothing left running in between. */
#include <stdatomic.h>
#include <time.h>

#include "src/team.h"
#include "tests/check.h"

enum { MAX_TASKS = 1000, RUNS = 2000 };

typedef struct count {
    int plain[MAX_TASKS]; /* not atomic: a task that ran twice or late would be a race */
    int size;
    atomic_int wrong_thread;
} count;

static void count_task(void *arg, size_t task, int thread)
{
    count *c = arg;
    c->plain[task]++;
    if (thread < 0 || thread >= c->size)
        c->wrong_thread++;
}

static void test_every_task_once(int n_threads)
{
    static count c;
    c = (count){.size = n_threads};
    poe_team *team = NULL;
    CHECK_INT(poe_team_create(n_threads, &team), POE_OK);
    CHECK_INT(poe_team_size(team), n_threads);
    int expected[MAX_TASKS] = {0};
    for (size_t run = 0; run < RUNS; run++) {
        size_t n = run % 7 == 0 ? run % MAX_TASKS : run % 9;
        poe_team_run(team, n, count_task, &c);
        for (size_t i = 0; i < n; i++)
            expected[i]++;
    }
    int wrong = 0;
    for (size_t i = 0; i < MAX_TASKS; i++)
        wrong += c.plain[i] != expected[i];
    CHECK_INT(wrong, 0);
    CHECK_INT(c.wrong_thread, 0);
    poe_team_destroy(team);
}

static double cpu_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void test_idle_threads_sleep(void)
{
    static count c;
    c = (count){.size = 4};
    poe_team *team = NULL;
    CHECK_INT(poe_team_create(4, &team), POE_OK);
    poe_team_run(team, 100, count_task, &c);
    double before = cpu_seconds();
    nanosleep(&(struct timespec){.tv_nsec = 200000000}, NULL);
    CHECK(cpu_seconds() - before < 0.05); /* of 0.2 s: spinning threads would use them all */
    poe_team_destroy(team);
}

int main(void)
{
    for (int n_threads = 1; n_threads <= 5; n_threads++)
        test_every_task_once(n_threads);
    test_idle_threads_sleep();
    poe_team_destroy(NULL);
    return check_result();
}
