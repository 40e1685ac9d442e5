/* SPDX-License-Identifier: MIT */
#include "src/moment.h"

#include <stddef.h>

static _Thread_local struct {
    poe_moment_observer call;
    void *context;
} observer;

const char *poe_phase_name(poe_phase phase)
{
    static const char *const names[POE_PHASE_COUNT] = {"receive",   "forward",  "backward",   "reduce",
                                                       "optimizer", "snapshot", "checkpoint", "recovery"};
    return names[phase];
}

void poe_moment_observe(poe_moment_observer call, void *context)
{
    observer.call = call;
    observer.context = context;
}

void poe_moment(poe_phase phase, int64_t step, int micro)
{
    if (observer.call)
        observer.call(observer.context, phase, step, micro);
}
