/* SPDX-License-Identifier: MIT
 * The monotonic clock, in seconds. */
#ifndef POE_SRC_CLOCK_H
#define POE_SRC_CLOCK_H

#include <time.h>

static inline double poe_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

#endif
