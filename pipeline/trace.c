/* SPDX-License-Identifier: MIT */
#include "pipeline/trace.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pipeline/streams.h"
#include "src/files.h"
#include "src/log.h"

enum { PIECE = 2048, SENT = POE_ACCOUNT_OUTSIDE + 1, RECEIVED }; /* events per message; kinds of events beyond accounts */

typedef struct event {
    double from, to;  /* a message: `to` is unused */
    int64_t step;
    uint32_t number;  /* of the message on its link */
    int32_t micro;
    int16_t peer;
    uint8_t kind;     /* an account, SENT or RECEIVED */
    uint8_t channel;
} event;

struct poe_trace {
    poe_comm *comm;
    uint64_t run;
    poe_clock clock;
    poe_clock_reading readings[2]; /* before the first event, after the last */
    event *events;
    size_t count, room;
    double full; /* when the last one was kept that there was room for; INFINITY: not yet */
    uint32_t numbers[2][POE_MAX_STAGES][POE_ACCOUNT_CHANNELS]; /* messages so far: received, sent */
};

static poe_status allocate(poe_comm *comm, uint64_t run, size_t events, poe_trace **trace)
{
    poe_trace *t = calloc(1, sizeof(*t));
    event *memory = malloc(events * sizeof(*memory));
    if (!t || !memory) {
        poe_error("out of memory for a trace of %zu events", events);
        free(t);
        free(memory);
        return POE_FAILED;
    }
    t->comm = comm;
    t->run = run;
    t->events = memory;
    t->room = events;
    t->full = INFINITY;
    *trace = t;
    return POE_OK;
}

poe_status poe_trace_create(poe_comm *comm, uint64_t run, uint64_t machine, size_t events, poe_trace **trace)
{
    poe_status status = poe_comm_agree(comm, allocate(comm, run, events, trace));
    if (status == POE_OK)
        status = poe_clock_open(&(*trace)->clock, comm, machine, run);
    return status == POE_OK ? poe_clock_read(&(*trace)->clock, &(*trace)->readings[0]) : status;
}

void poe_trace_destroy(poe_trace *t)
{
    if (!t)
        return;
    poe_clock_close(&t->clock);
    free(t->events);
    free(t);
}

/* --- recording ---------------------------------------------------------------------------------------------------------------- */

static void add(poe_trace *t, const event *e)
{
    if (t->count == t->room) {
        t->full = fmin(t->full, e->from);
        return;
    }
    t->events[t->count++] = *e;
}

void poe_trace_slice(poe_trace *t, poe_account account, int64_t step, int micro, double from, double to)
{
    event *last = t->count ? &t->events[t->count - 1] : NULL;
    if (last && last->kind == account && last->step == step && last->micro == micro && last->to == from)
        last->to = to;
    else if (to > from)
        add(t, &(event){.from = from, .to = to, .step = step, .micro = micro, .kind = (uint8_t)account});
}

void poe_trace_message(poe_trace *t, bool sent, int peer, int channel, const poe_message *message, double at)
{
    add(t, &(event){.from = at,
                    .to = at,
                    .step = message->step,
                    .number = t->numbers[sent][peer][channel]++,
                    .micro = message->micro,
                    .peer = (int16_t)peer,
                    .kind = sent ? SENT : RECEIVED,
                    .channel = (uint8_t)channel});
}

/* --- one rank's events on rank 0's clock ---------------------------------------------------------------------------------------- */

/* What rank 0 must know of a rank beside its events. */
typedef struct rank_facts {
    uint64_t count;
    double first, full;
    poe_clock_reading readings[2];
    char host[64];
} rank_facts;

/* The offset from the clock of rank k to that of rank k - 1 at `time`, drifting evenly between the two readings. */
static double offset_at(const poe_clock_reading readings[2], double time)
{
    double span = readings[1].at - readings[0].at;
    double share = span > 0 ? (time - readings[0].at) / span : 0;
    return readings[0].offset + share * (readings[1].offset - readings[0].offset);
}

static double on_first_clock(const rank_facts *all, int rank, double time)
{
    for (; rank > 0; rank--)
        time += offset_at(all[rank].readings, time);
    return time;
}

static double clock_error(const rank_facts *all, int rank)
{
    double error = 0;
    for (; rank > 0; rank--)
        error += fmax(all[rank].readings[0].error, all[rank].readings[1].error);
    return error;
}

/* --- the file ------------------------------------------------------------------------------------------------------------------ */

/* One end of a message. */
typedef struct message_end {
    double at;
    int64_t step;
    uint32_t number;
    int32_t micro;
    int16_t from, to; /* ranks */
    uint8_t channel;
    bool received;
} message_end;

typedef struct writer {
    FILE *file;
    char temporary[POE_PATH_MAX];
    const rank_facts *all;
    double start, end; /* rank 0's clock: the zero of the file; nothing later is written */
    message_end *ends;
    size_t n_ends, room;
} writer;

static double microseconds(const writer *w, double time)
{
    return (time - w->start) * 1e6;
}

static void put_place(writer *w, int64_t step, int micro)
{
    fprintf(w->file, "\"args\":{\"step\":%" PRId64, step);
    if (micro >= 0)
        fprintf(w->file, ",\"micro_batch\":%d", micro);
    fputs("}}", w->file);
}

static void put_slice(writer *w, int rank, const event *e)
{
    double from = on_first_clock(w->all, rank, e->from), to = on_first_clock(w->all, rank, e->to);
    if (from >= w->end)
        return;
    to = fmin(to, w->end);
    fprintf(w->file, ",\n{\"ph\":\"X\",\"name\":\"%s\",\"cat\":\"account\",\"pid\":1,\"tid\":%d,\"ts\":%.3f,\"dur\":%.3f,",
            poe_account_name((poe_account)e->kind), rank + 1, microseconds(w, from), (to - from) * 1e6);
    put_place(w, e->step, e->micro);
}

static poe_status keep_end(writer *w, int rank, const event *e)
{
    if (w->n_ends == w->room) {
        size_t room = w->room ? 2 * w->room : 4096;
        message_end *grown = realloc(w->ends, room * sizeof(*grown));
        if (!grown) {
            poe_error("out of memory for the %zu messages of a trace", room);
            return POE_FAILED;
        }
        w->ends = grown;
        w->room = room;
    }
    bool received = e->kind == RECEIVED;
    w->ends[w->n_ends++] = (message_end){.at = on_first_clock(w->all, rank, e->from),
                                         .step = e->step,
                                         .number = e->number,
                                         .micro = e->micro,
                                         .from = (int16_t)(received ? e->peer : rank),
                                         .to = (int16_t)(received ? rank : e->peer),
                                         .channel = e->channel,
                                         .received = received};
    return POE_OK;
}

static poe_status put_events(writer *w, int rank, const event *events, size_t n)
{
    poe_status status = POE_OK;
    for (size_t i = 0; status == POE_OK && i < n; i++) {
        if (events[i].kind < SENT)
            put_slice(w, rank, &events[i]);
        else
            status = keep_end(w, rank, &events[i]);
    }
    return status;
}

static int compare(const void *x, const void *y)
{
    const message_end *a = x, *b = y;
    if (a->from != b->from)
        return a->from - b->from;
    if (a->to != b->to)
        return a->to - b->to;
    if (a->channel != b->channel)
        return a->channel - b->channel;
    if (a->number != b->number)
        return a->number < b->number ? -1 : 1;
    return a->received - b->received;
}

static void put_end(writer *w, const message_end *e, size_t id)
{
    fprintf(w->file, ",\n{\"ph\":\"%s\",\"name\":\"%s\",\"cat\":\"message\",\"id\":%zu,\"pid\":1,\"tid\":%d,\"ts\":%.3f,",
            e->received ? "f\",\"bp\":\"e" : "s", poe_channel_name((poe_channel)e->channel), id,
            (e->received ? e->to : e->from) + 1, microseconds(w, e->at));
    put_place(w, e->step, e->micro);
}

/* The messages of which both ends are in the file. */
static void put_messages(writer *w)
{
    if (w->n_ends)
        qsort(w->ends, w->n_ends, sizeof(*w->ends), compare);
    for (size_t i = 0; i + 1 < w->n_ends; i++) {
        const message_end *sent = &w->ends[i], *received = &w->ends[i + 1];
        bool pair = !sent->received && received->received && sent->from == received->from && sent->to == received->to &&
                    sent->channel == received->channel && sent->number == received->number;
        if (!pair || received->at >= w->end)
            continue;
        put_end(w, sent, i);
        put_end(w, received, i);
    }
}

static void put_rows(writer *w, int size)
{
    fputs("{\"ph\":\"M\",\"name\":\"process_name\",\"pid\":1,\"tid\":1,\"args\":{\"name\":\"poe-pipe\"}}", w->file);
    for (int k = 0; k < size; k++)
        fprintf(w->file,
                ",\n{\"ph\":\"M\",\"name\":\"thread_name\",\"pid\":1,\"tid\":%d,\"args\":{\"name\":\"rank %d on %s\"}}"
                ",\n{\"ph\":\"M\",\"name\":\"thread_sort_index\",\"pid\":1,\"tid\":%d,\"args\":{\"sort_index\":%d}}",
                k + 1, k, w->all[k].host, k + 1, k);
}

static void put_metadata(writer *w, int size, const char *emulated)
{
    json_t *errors = json_array();
    for (int k = 0; k < size; k++)
        json_array_append_new(errors, json_real(clock_error(w->all, k) * 1e6));
    json_t *about = json_pack("{s:s, s:i, s:o, s:s?, s:o}", "program", "poe-pipe " POE_VERSION, "ranks", size,
                              "clock_error_us", errors, "emulated", emulated, "ended_early_at_us",
                              isfinite(w->end) ? json_real(microseconds(w, w->end)) : json_null());
    fputs("\n],\n\"displayTimeUnit\":\"ms\",\n\"otherData\":", w->file);
    json_dumpf(about, w->file, JSON_COMPACT);
    fputs("}\n", w->file);
    json_decref(about);
}

/* --- bringing the events together ----------------------------------------------------------------------------------------------- */

/* The end of the link from rank `from` to rank 0 that is this rank's. */
static poe_status open_link(const poe_trace *t, int from, poe_link **link)
{
    bool outgoing = poe_comm_rank(t->comm) == from;
    return poe_channel_open(t->comm, outgoing ? 0 : from, POE_CHANNEL_TRACE, outgoing, PIECE * sizeof(event), 2, t->run,
                            link);
}

/* The piece of a rank's `count` events that begins with event `first`; returns its events. */
static size_t piece_at(int rank, size_t count, size_t first, poe_message *message)
{
    size_t n = count - first < PIECE ? count - first : PIECE;
    *message = (poe_message){.kind = POE_KIND_TRACE,
                             .step = (int64_t)(first / PIECE),
                             .stage = rank,
                             .shape = {(uint32_t)n, 0, 0, 0},
                             .bytes = n * sizeof(event)};
    return n;
}

static poe_status send_events(const poe_trace *t)
{
    poe_link *link;
    poe_message message;
    poe_status status = open_link(t, poe_comm_rank(t->comm), &link);
    if (status != POE_OK)
        return status;
    for (size_t first = 0, n; status == POE_OK && first < t->count; first += n) {
        n = piece_at(poe_comm_rank(t->comm), t->count, first, &message);
        status = poe_link_send_copy(link, &message, &t->events[first]);
    }
    if (status == POE_OK)
        status = poe_comm_barrier(t->comm, "the trace");
    poe_link_close(link);
    return status;
}

/* *written: what writing says, which must not keep the other ranks waiting. */
static poe_status receive_events(const poe_trace *t, int rank, writer *w, poe_status *written)
{
    poe_link *link;
    poe_message message;
    poe_status status = open_link(t, rank, &link);
    if (status != POE_OK)
        return status;
    for (size_t first = 0, n, count = w->all[rank].count; status == POE_OK && first < count; first += n) {
        n = piece_at(rank, count, first, &message);
        void *payload;
        status = poe_link_receive(link, &message, NULL, &payload);
        if (status != POE_OK)
            break;
        if (*written == POE_OK)
            *written = put_events(w, rank, payload, n);
        poe_link_release(link);
    }
    poe_link_close(link);
    return status;
}

static poe_status write_all(const poe_trace *t, writer *w, poe_status *written)
{
    poe_status status = POE_OK;
    put_rows(w, poe_comm_size(t->comm));
    *written = put_events(w, 0, t->events, t->count);
    for (int k = 1; status == POE_OK && k < poe_comm_size(t->comm); k++)
        status = receive_events(t, k, w, written);
    put_messages(w);
    return status == POE_OK ? poe_comm_barrier(t->comm, "the trace") : status;
}

/* Where the trace begins, and where it ends for all if one of them could not keep it. */
static void find_times(const poe_trace *t, writer *w)
{
    w->start = w->end = INFINITY;
    for (int k = 0; k < poe_comm_size(t->comm); k++) {
        w->start = fmin(w->start, on_first_clock(w->all, k, w->all[k].first));
        if (isfinite(w->all[k].full))
            w->end = fmin(w->end, on_first_clock(w->all, k, w->all[k].full));
    }
    if (isfinite(w->end))
        poe_warn("--trace ends %.1f s after the start, when a rank had %zu events, which is all that one keeps",
                 w->end - w->start, t->room);
}

static poe_status begin(const poe_trace *t, const char *path, writer *w)
{
    poe_status status = poe_path(w->temporary, "%s.tmp", path);
    if (status != POE_OK)
        return status;
    poe_temporary_register(w->temporary);
    w->file = fopen(w->temporary, "w");
    if (!w->file) {
        poe_error("--trace: cannot write %s: %s", w->temporary, strerror(errno));
        poe_temporary_forget(w->temporary);
        return POE_FAILED;
    }
    find_times(t, w);
    fputs("{\"traceEvents\":[\n", w->file);
    return POE_OK;
}

static poe_status finish(writer *w, const char *path, poe_status status)
{
    bool bad = ferror(w->file);
    bad |= fclose(w->file) != 0;
    free(w->ends);
    if (bad && status == POE_OK) {
        poe_error("--trace: cannot write %s: %s", w->temporary, strerror(errno));
        status = POE_FAILED;
    }
    if (status == POE_OK)
        return poe_replace_file(w->temporary, path);
    unlink(w->temporary);
    poe_temporary_forget(w->temporary);
    return status;
}

static poe_status gather_facts(poe_trace *t, rank_facts *all)
{
    poe_status status = poe_clock_read(&t->clock, &t->readings[1]);
    if (status != POE_OK)
        return status;
    rank_facts mine = {.count = t->count,
                       .first = t->count ? t->events[0].from : t->readings[1].at,
                       .full = t->full,
                       .readings = {t->readings[0], t->readings[1]}};
    gethostname(mine.host, sizeof(mine.host) - 1);
    return poe_comm_gather(t->comm, &mine, all, sizeof(mine));
}

poe_status poe_trace_write(poe_trace *t, const char *emulated, const char *path)
{
    rank_facts all[POE_MAX_STAGES];
    bool writes = poe_comm_rank(t->comm) == 0;
    writer w = {.all = all};
    poe_status status = gather_facts(t, all);
    if (status == POE_OK)
        status = poe_comm_agree(t->comm, writes ? begin(t, path, &w) : POE_OK);
    if (status != POE_OK)
        return status;
    poe_status written = POE_OK;
    status = writes ? write_all(t, &w, &written) : send_events(t);
    if (writes) {
        put_metadata(&w, poe_comm_size(t->comm), emulated);
        written = finish(&w, path, status == POE_OK ? written : status);
    }
    return status == POE_OK ? poe_comm_agree(t->comm, written) : status;
}
