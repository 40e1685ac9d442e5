/* SPDX-License-Identifier: MIT */
#include "src/team.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "src/log.h"

/* How often a thread looks before it sleeps: some ten microseconds, what waking a sleeper costs. */
enum { SPINS = 400 };

struct poe_team {
    int size;
    int spins; /* 0 when there are more threads than processors */
    int started;
    pthread_t *threads; /* size - 1 */
    poe_log *log;       /* of the thread that made the team */
    pthread_mutex_t lock;
    pthread_cond_t work, done;

    /* Written under the lock. A run that is no longer open is not joined: a late riser only sleeps again. */
    atomic_uint run;   /* number of the newest run */
    atomic_int active; /* workers that joined it and have not left */
    bool open, quit;

    /* The run itself: written while no worker is active. */
    poe_team_task task;
    void *arg;
    size_t n_tasks;
    atomic_size_t next;
};

typedef struct worker {
    poe_team *team;
    int thread;
} worker;

static inline void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void take_tasks(poe_team *team, int thread)
{
    for (;;) {
        size_t task = atomic_fetch_add_explicit(&team->next, 1, memory_order_relaxed);
        if (task >= team->n_tasks)
            return;
        team->task(team->arg, task, thread);
    }
}

/* Waits for a run after number `seen` and joins it when it is still open: its number, or `seen` and quit. */
static bool join(poe_team *team, unsigned *seen)
{
    for (int i = 0; i < team->spins && atomic_load_explicit(&team->run, memory_order_relaxed) == *seen; i++)
        relax();
    pthread_mutex_lock(&team->lock);
    while (!team->quit && !(team->open && team->run != *seen))
        pthread_cond_wait(&team->work, &team->lock);
    bool joined = !team->quit;
    if (joined) {
        *seen = team->run;
        team->active++;
    }
    pthread_mutex_unlock(&team->lock);
    return joined;
}

static void leave(poe_team *team)
{
    pthread_mutex_lock(&team->lock);
    if (--team->active == 0)
        pthread_cond_signal(&team->done);
    pthread_mutex_unlock(&team->lock);
}

static void *worker_main(void *arg)
{
    worker self = *(worker *)arg;
    free(arg);
    poe_log_attach(self.team->log);
    unsigned seen = 0;
    while (join(self.team, &seen)) {
        take_tasks(self.team, self.thread);
        leave(self.team);
    }
    poe_log_attach(NULL);
    return NULL;
}

static int start_worker(poe_team *team, int thread)
{
    worker *self = malloc(sizeof(*self));
    if (!self)
        return -1;
    *self = (worker){team, thread};
    int error = pthread_create(&team->threads[thread - 1], NULL, worker_main, self);
    if (error)
        free(self);
    else
        team->started++;
    return error;
}

poe_status poe_team_create(int n_threads, poe_team **out)
{
    poe_team *team = calloc(1, sizeof(*team));
    pthread_t *threads = calloc((size_t)n_threads, sizeof(*threads));
    if (!team || !threads) {
        poe_error("cannot start %d threads: out of memory", n_threads);
        free(team);
        free(threads);
        return POE_FAILED;
    }
    team->size = n_threads;
    team->spins = n_threads <= sysconf(_SC_NPROCESSORS_ONLN) ? SPINS : 0;
    team->threads = threads;
    team->log = poe_log_current();
    pthread_mutex_init(&team->lock, NULL);
    pthread_cond_init(&team->work, NULL);
    pthread_cond_init(&team->done, NULL);
    for (int thread = 1; thread < n_threads; thread++) {
        int error = start_worker(team, thread);
        if (error) {
            poe_error("cannot start thread %d of %d: %s", thread, n_threads, error > 0 ? strerror(error) : "no memory");
            poe_team_destroy(team);
            return POE_FAILED;
        }
    }
    *out = team;
    return POE_OK;
}

void poe_team_destroy(poe_team *team)
{
    if (!team)
        return;
    pthread_mutex_lock(&team->lock);
    team->quit = true;
    pthread_cond_broadcast(&team->work);
    pthread_mutex_unlock(&team->lock);
    for (int i = 0; i < team->started; i++)
        pthread_join(team->threads[i], NULL);
    pthread_cond_destroy(&team->work);
    pthread_cond_destroy(&team->done);
    pthread_mutex_destroy(&team->lock);
    free(team->threads);
    free(team);
}

int poe_team_size(const poe_team *team)
{
    return team->size;
}

static void open_run(poe_team *team)
{
    pthread_mutex_lock(&team->lock);
    atomic_store_explicit(&team->next, 0, memory_order_relaxed);
    team->open = true;
    team->run++;
    pthread_cond_broadcast(&team->work);
    pthread_mutex_unlock(&team->lock);
}

/* Lets nobody in any more and waits for those who are. */
static void close_run(poe_team *team)
{
    pthread_mutex_lock(&team->lock);
    team->open = false;
    pthread_mutex_unlock(&team->lock);
    for (int i = 0; i < team->spins && atomic_load_explicit(&team->active, memory_order_relaxed); i++)
        relax();
    pthread_mutex_lock(&team->lock);
    while (team->active)
        pthread_cond_wait(&team->done, &team->lock);
    pthread_mutex_unlock(&team->lock);
}

void poe_team_run(poe_team *team, size_t n_tasks, poe_team_task task, void *arg)
{
    if (team->size == 1 || n_tasks <= 1) {
        for (size_t i = 0; i < n_tasks; i++)
            task(arg, i, 0);
        return;
    }
    team->task = task;
    team->arg = arg;
    team->n_tasks = n_tasks;
    open_run(team);
    take_tasks(team, 0);
    close_run(team);
}
