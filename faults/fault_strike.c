/* SPDX-License-Identifier: MIT
 * The blows. Each is said, and counted, before it falls; what cannot be done is said instead. */
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "faults/fault_impl.h"
#include "src/clock.h"
#include "src/files.h"
#include "src/log.h"
#include "src/manifest.h"

static void announce(poe_fault_state *s, const poe_fault_rule *rule, int index)
{
    char text[POE_FAULT_RULE_BYTES];
    poe_fault_rule_print(rule, text);
    poe_info("fault: %s", text);
    if (index >= 0)
        atomic_fetch_add(&s->fired[index], 1);
}

static void cannot(const poe_fault_rule *rule, const char *why)
{
    poe_warn("%s of --fault does not happen: %s", poe_fault_kinds[rule->kind].name, why);
}

static void sleep_for(double seconds)
{
    struct timespec t = {.tv_sec = (time_t)seconds, .tv_nsec = (long)((seconds - floor(seconds)) * 1e9)};
    while (nanosleep(&t, &t) != 0 && errno == EINTR)
        ;
}

/* --- ends of the process ------------------------------------------------------------------------------------------ */
static _Noreturn void kill_self(void)
{
    for (;;) {
        kill(getpid(), SIGKILL);
        pause();
    }
}

/* A write to a page that nobody may touch: the kernel's own SIGSEGV. */
static void violate(const poe_fault_rule *rule)
{
    volatile char *page = mmap(NULL, 1, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED)
        cannot(rule, strerror(errno));
    else
        *page = 1;
}

/* Address space in use, in bytes. */
static uint64_t address_space(void)
{
    unsigned long long pages = 0;
    FILE *f = fopen("/proc/self/statm", "r");
    if (f && fscanf(f, "%llu", &pages) != 1)
        pages = 0;
    if (f)
        fclose(f);
    return pages * (uint64_t)sysconf(_SC_PAGESIZE);
}

/* Takes memory, and writes to it, until there is none for this process; the kernel's OOM killer sends SIGKILL too. */
static _Noreturn void exhaust(uint64_t cap)
{
    const size_t chunk = (size_t)1 << 20;
    struct rlimit limit;
    getrlimit(RLIMIT_AS, &limit);
    rlim_t most = address_space() + cap;
    limit.rlim_cur = most < limit.rlim_cur ? most : limit.rlim_cur;
    if (setrlimit(RLIMIT_AS, &limit) != 0)
        kill_self();
    for (uint64_t taken = 0; taken < cap; taken += chunk) {
        void *memory = mmap(NULL, chunk, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED)
            break;
        memset(memory, 1, chunk);
    }
    kill_self();
}

/* --- what the process survives ------------------------------------------------------------------------------------ */
/* The stopped process cannot wake itself: a child does, which holds nothing open. _Fork() runs no library's handlers,
 * as other threads may be in the middle of anything. */
static void stop(const poe_fault_rule *rule)
{
    pid_t self = getpid(), child = _Fork();
    if (child < 0) {
        cannot(rule, strerror(errno));
        return;
    }
    if (child == 0) {
        close_range(0, ~0U, 0);
        sleep_for(rule->duration);
        if (getppid() == self)
            kill(self, SIGCONT);
        _exit(0);
    }
    kill(self, SIGSTOP);
    while (waitpid(child, NULL, 0) < 0 && errno == EINTR)
        ;
}

static void begin_slowness(poe_fault_state *s, const poe_fault_rule *rule)
{
    s->slow_since = poe_now();
    s->slow_until = s->slow_since + rule->duration;
    s->duty = rule->duty;
}

typedef struct full_disk {
    rlim_t before;
    double seconds;
} full_disk;

static void empty_disk(const full_disk *disk)
{
    struct rlimit limit;
    getrlimit(RLIMIT_FSIZE, &limit);
    limit.rlim_cur = disk->before;
    setrlimit(RLIMIT_FSIZE, &limit);
}

static void *empty_disk_later(void *arg)
{
    full_disk *disk = arg;
    sleep_for(disk->seconds);
    empty_disk(disk);
    free(disk);
    return NULL;
}

/* Files of no byte are all that may be written from now on. A disk that is full already stays full for as long as was
 * said then. */
static void fill_disk(const poe_fault_rule *rule)
{
    struct rlimit limit;
    pthread_t thread;
    getrlimit(RLIMIT_FSIZE, &limit);
    full_disk *disk = limit.rlim_cur > 0 ? malloc(sizeof(*disk)) : NULL;
    if (!disk) {
        cannot(rule, limit.rlim_cur > 0 ? "out of memory" : "the disk is full already");
        return;
    }
    *disk = (full_disk){.before = limit.rlim_cur, .seconds = rule->duration};
    signal(SIGXFSZ, SIG_IGN);
    limit.rlim_cur = 0;
    setrlimit(RLIMIT_FSIZE, &limit);
    int error = pthread_create(&thread, NULL, empty_disk_later, disk);
    if (error) {
        empty_disk(disk);
        free(disk);
        cannot(rule, strerror(error));
    } else {
        pthread_detach(thread);
    }
}

/* --- checkpoints -------------------------------------------------------------------------------------------------- */
/* The rank's file in the newest checkpoint of its run. False: there is none. */
static bool newest_file(const poe_fault_state *s, char path[POE_PATH_MAX])
{
    char folder[POE_PATH_MAX];
    int64_t *steps;
    int count;
    bool found = false;
    if (poe_path(folder, "%s/checkpoints", s->hooks.run) != POE_OK || access(folder, F_OK) != 0 ||
        poe_checkpoint_list(folder, &steps, &count) != POE_OK)
        return false;
    if (count > 0)
        found = poe_path(path, "%s/step-%08lld/stage-%03d.h5", folder, (long long)steps[0], s->hooks.stage) == POE_OK;
    free(steps);
    return found && access(path, F_OK) == 0;
}

/* Changes the byte in the middle. */
static bool flip_byte(const char *path)
{
    unsigned char byte;
    int file = open(path, O_RDWR | O_CLOEXEC);
    off_t middle = file < 0 ? 0 : lseek(file, 0, SEEK_END) / 2;
    bool done = file >= 0 && pread(file, &byte, 1, middle) == 1;
    byte ^= 0x10;
    done = done && pwrite(file, &byte, 1, middle) == 1 && fsync(file) == 0;
    if (file >= 0)
        close(file);
    return done;
}

/* As long as there is no checkpoint, a rule counts nothing and waits; what was drawn does not come again. */
static void damage_checkpoint(poe_fault_state *s, const poe_fault_rule *rule, int index)
{
    char path[POE_PATH_MAX];
    if (!s->hooks.run || !newest_file(s, path)) {
        if (index < 0)
            cannot(rule, "there is no checkpoint yet");
        return;
    }
    announce(s, rule, index);
    if (!flip_byte(path))
        poe_warn("cannot damage %s: %s", path, strerror(errno));
}

/* --- the agent's -------------------------------------------------------------------------------------------------- */
static int argument_of(const poe_fault_rule *rule, int index)
{
    int side = 0;
    if (rule->kind != POE_FAULT_PARTITION || index >= 0)
        return rule->kind == POE_FAULT_PARTITION ? index : rule->to;
    while (!rule->ranks[side])
        side++;
    return POE_FAULT_ALONE + side;
}

static void ask(poe_fault_state *s, const poe_fault_rule *rule, int index)
{
    poe_fault_request request = {.kind = rule->kind, .argument = argument_of(rule, index), .seconds = rule->duration};
    if (!poe_fault_ask(s, request))
        cannot(rule, "the rank's agent does not answer");
}

/* From this step on, or from the next one when this one has begun. */
static void take_out(poe_fault_state *s, const poe_fault_rule *rule)
{
    if (s->rank == 0)
        cannot(rule, "without the first stage there is nothing to train on");
    else if (rule->steps)
        atomic_store(&s->board->absent_until, rule->step + rule->steps);
    else
        atomic_store(&s->board->absent_until_time, poe_now() + rule->duration);
}

void poe_fault_strike(poe_fault_state *s, const poe_fault_rule *rule, int index)
{
    if (rule->kind == POE_FAULT_CORRUPT_CHECKPOINT) {
        damage_checkpoint(s, rule, index);
        return;
    }
    announce(s, rule, index);
    switch (rule->kind) {
    case POE_FAULT_KILL:
        kill_self();
    case POE_FAULT_SEGFAULT:
        violate(rule);
        break;
    case POE_FAULT_EXIT:
        _exit(rule->code);
    case POE_FAULT_STOP:
        stop(rule);
        break;
    case POE_FAULT_SLOW:
        begin_slowness(s, rule);
        break;
    case POE_FAULT_MEMORY:
        exhaust(rule->cap);
    case POE_FAULT_DISK:
        fill_disk(rule);
        break;
    case POE_FAULT_NAN:
        if (s->hooks.nan)
            s->hooks.nan(s->hooks.context);
        else
            cannot(rule, "this rank has no gradients here");
        break;
    case POE_FAULT_ABSENT:
        take_out(s, rule);
        break;
    default:
        ask(s, rule, index);
    }
}
