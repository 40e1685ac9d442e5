/* SPDX-License-Identifier: MIT
 * For authors of transports: a sleep that another thread or a signal handler can end. A ring is never lost: one that
 * comes while nobody sleeps ends the next sleep at once. */
#ifndef POE_COMM_ALARM_H
#define POE_COMM_ALARM_H

#include <linux/futex.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

typedef struct poe_alarm {
    _Atomic uint32_t rung;
} poe_alarm;

static inline void poe_alarm_ring(poe_alarm *alarm)
{
    if (atomic_exchange(&alarm->rung, 1) == 0)
        syscall(SYS_futex, &alarm->rung, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

/* Sleeps at most `seconds`; true when a ring ended the sleep. One sleeper at a time. */
static inline bool poe_alarm_sleep(poe_alarm *alarm, double seconds)
{
    struct timespec t = {.tv_sec = (time_t)seconds, .tv_nsec = (long)((seconds - (double)(time_t)seconds) * 1e9)};
    if (atomic_load(&alarm->rung) == 0)
        syscall(SYS_futex, &alarm->rung, FUTEX_WAIT_PRIVATE, 0, &t, NULL, 0);
    return atomic_exchange(&alarm->rung, 0) != 0;
}

#endif
