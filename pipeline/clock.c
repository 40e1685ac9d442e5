/* SPDX-License-Identifier: MIT */
#include "pipeline/clock.h"

#include <stdio.h>
#include <string.h>

#include "pipeline/streams.h"
#include "src/clock.h"
#include "src/crc32c.h"

enum { PINGS = 16 };

uint64_t poe_clock_machine(void)
{
    char id[64] = "";
    FILE *file = fopen("/proc/sys/kernel/random/boot_id", "r");
    if (file) {
        if (!fgets(id, sizeof(id), file))
            id[0] = '\0';
        fclose(file);
    }
    return (uint64_t)poe_crc32c(0, id, sizeof(id)) << 32 | poe_crc32c(1, id, sizeof(id));
}

poe_status poe_clock_open(poe_clock *c, poe_comm *comm, uint64_t machine, uint64_t run)
{
    uint64_t machines[POE_MAX_STAGES];
    int rank = poe_comm_rank(comm);
    *c = (poe_clock){.rank = rank};
    poe_status status = poe_comm_gather(comm, &machine, machines, sizeof(machine));
    bool before = status == POE_OK && rank > 0 && machines[rank - 1] != machine;
    bool after = status == POE_OK && rank + 1 < poe_comm_size(comm) && machines[rank + 1] != machine;
    if (before)
        status = poe_channel_open(comm, rank - 1, POE_CHANNEL_CLOCK, true, sizeof(double), 1, run, &c->ping_out);
    if (before && status == POE_OK)
        status = poe_channel_open(comm, rank - 1, POE_CHANNEL_CLOCK, false, sizeof(double), 1, run, &c->answer_in);
    if (after && status == POE_OK)
        status = poe_channel_open(comm, rank + 1, POE_CHANNEL_CLOCK, false, sizeof(double), 1, run, &c->ping_in);
    if (after && status == POE_OK)
        status = poe_channel_open(comm, rank + 1, POE_CHANNEL_CLOCK, true, sizeof(double), 1, run, &c->answer_out);
    return poe_comm_agree(comm, status);
}

void poe_clock_close(poe_clock *c)
{
    poe_link_close(c->ping_out);
    poe_link_close(c->answer_in);
    poe_link_close(c->ping_in);
    poe_link_close(c->answer_out);
    *c = (poe_clock){0};
}

static poe_message message_of(int round, int sender)
{
    return (poe_message){.kind = POE_KIND_CLOCK, .step = round, .stage = sender, .bytes = sizeof(double)};
}

/* Sends this moment. */
static poe_status send_time(poe_link *link, int round, int sender)
{
    poe_message message = message_of(round, sender);
    void *payload;
    poe_status status = poe_link_acquire(link, &message, &payload);
    if (status != POE_OK)
        return status;
    double now = poe_now();
    memcpy(payload, &now, sizeof(now));
    return poe_link_send(link, &message);
}

static poe_status receive_time(poe_link *link, int round, int sender, double *time)
{
    poe_message message = message_of(round, sender);
    return poe_link_receive_copy(link, &message, time);
}

static poe_status ping(poe_clock *c, poe_clock_reading *reading)
{
    poe_status status = POE_OK;
    for (int i = 0; status == POE_OK && i < PINGS; i++) {
        double sent = poe_now(), theirs = 0;
        status = send_time(c->ping_out, i, c->rank);
        if (status == POE_OK)
            status = receive_time(c->answer_in, i, c->rank - 1, &theirs);
        double back = poe_now(), error = (back - sent) / 2;
        if (i == 0 || error < reading->error)
            *reading = (poe_clock_reading){.at = back, .offset = theirs - (sent + back) / 2, .error = error};
    }
    return status;
}

static poe_status answer(poe_clock *c)
{
    poe_status status = POE_OK;
    double theirs;
    for (int i = 0; status == POE_OK && i < PINGS; i++) {
        status = receive_time(c->ping_in, i, c->rank + 1, &theirs);
        if (status == POE_OK)
            status = send_time(c->answer_out, i, c->rank);
    }
    return status;
}

poe_status poe_clock_read(poe_clock *c, poe_clock_reading *reading)
{
    *reading = (poe_clock_reading){.at = poe_now()};
    poe_status status = c->ping_out ? ping(c, reading) : POE_OK;
    return status == POE_OK && c->ping_in ? answer(c) : status;
}
