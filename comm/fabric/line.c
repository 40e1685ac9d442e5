/* SPDX-License-Identifier: MIT
 * Connections: made on first use by whoever needs one first, made anew when they break. When both sides dial at once,
 * the lower rank's call is the one that counts. A call says how many connections these two have had, so that one that
 * was given up long ago is not taken for a new one. */
#include <netinet/in.h>
#include <pthread.h>
#include <rdma/fi_ext.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "comm/fabric/impl.h"
#include "src/clock.h"
#include "src/log.h"

enum { HALF = POE_SECRET_BYTES / 2, SAID_STRANGERS = 16 };

static const double answer = 3;   /* seconds to wait for one: a stopped rank's host accepts, and nothing follows */
static const double soon = 1;
static const double longest = 1;  /* between two calls */
static const double quiet = 10;   /* without a sign of who owes one: TCP itself would wait for as long again as an outage has lasted */
static const double quietest = 80; /* a long message on a slow link looks the same: the time doubles each time ... */
static const double at_ease = 600; /* ... until the connection has been there for so long */
static const double gone = 5;     /* an address that refuses calls for so long has lost its rank */

/* --- tokens ------------------------------------------------------------------------------------------------------- */
static token *take_token(fabric *f)
{
    token *t = f->tokens;
    if (t)
        f->tokens = t->next;
    else
        t = malloc(sizeof(*t));
    return t;
}

void poe_line_return(token *t)
{
    line *l = t->line;
    fabric *f = l->peer->fabric;
    if (t->registered)
        fi_close(&t->registered->fid);
    l->tokens--;
    t->next = f->tokens;
    f->tokens = t;
}

static int register_memory(fabric *f, void *data, size_t bytes, uint64_t access, struct fid_mr **registered)
{
    *registered = NULL;
    return f->registers ? fi_mr_reg(f->domain, data, bytes, access, 0, f->key++, 0, registered, NULL) : 0;
}

/* Word is asked for: the endpoint gives none unless told to. */
static ssize_t ask(token *t, void *data, size_t bytes)
{
    struct iovec memory = {.iov_base = data, .iov_len = bytes};
    void *descriptor = t->registered ? fi_mr_desc(t->registered) : NULL;
    struct fi_msg request = {.msg_iov = &memory, .desc = &descriptor, .iov_count = 1, .context = t};
    return t->kind == SENT_BODY ? fi_sendmsg(t->line->ep, &request, FI_COMPLETION)
                                : fi_recv(t->line->ep, data, bytes, descriptor, 0, t);
}

bool poe_line_post(peer *p, token_kind kind, slot *of, void *data, size_t bytes)
{
    fabric *f = p->fabric;
    token *t = take_token(f);
    if (!t) {
        p->broken = true;
        return false;
    }
    *t = (token){.kind = kind, .line = p->line, .slot = of, .bytes = bytes};
    p->line->tokens++;
    ssize_t result = register_memory(f, data, bytes, kind == SENT_BODY ? FI_SEND : FI_RECV, &t->registered);
    if (result == 0)
        result = ask(t, data, bytes);
    if (result != 0) {
        poe_line_return(t);
        p->broken |= result != -FI_EAGAIN;
        return false;
    }
    f->quiet = false;
    if (of) {
        of->posted = true;
        p->under_way += bytes;
    }
    return true;
}

static ssize_t say(peer *p, const struct iovec *parts, int n)
{
    void *descriptor = p->registered ? fi_mr_desc(p->registered) : NULL, *descriptors[MAX_PARTS];
    for (int i = 0; i < n; i++)
        descriptors[i] = descriptor;
    if (n == 1 && parts->iov_len <= POE_UNIT_HEADER)
        return fi_inject(p->line->ep, parts->iov_base, parts->iov_len, 0);
    return fi_sendv(p->line->ep, parts, descriptors, (size_t)n, 0, NULL);
}

bool poe_line_say(peer *p, const struct iovec *parts, int n)
{
    ssize_t result = say(p, parts, n);
    if (result == 0)
        p->fabric->quiet = false;
    p->broken |= result != 0 && result != -FI_EAGAIN;
    return result == 0;
}

/* --- peers -------------------------------------------------------------------------------------------------------- */
peer *poe_peer_of(fabric *f, int rank)
{
    if (f->peers[rank])
        return f->peers[rank];
    peer *p = calloc(1, sizeof(*p));
    size_t bytes = (size_t)(SLOTS + 1) * POE_UNIT_SLOT;
    unsigned char *wires = aligned_alloc(64, bytes);
    struct fid_mr *registered = NULL;
    if (!p || !wires || register_memory(f, wires, bytes, FI_SEND, &registered) != 0) {
        poe_error("out of memory for a connection to rank %d", rank);
        free(wires);
        free(p);
        return NULL;
    }
    p->fabric = f;
    p->rank = rank;
    p->wires = wires;
    p->registered = registered;
    p->due = HUGE_VAL;
    p->patience = quiet;
    for (int i = 0; i < POE_CHANNELS; i++)
        p->channels[i].allowed = p->channels[i].offered = p->channels[i].told = SLACK;
    f->peers[rank] = p;
    return p;
}

void poe_peer_free(peer *p)
{
    if (p->registered)
        fi_close(&p->registered->fid);
    free(p->wires);
    free(p);
}

static bool is_lower(const peer *p)
{
    return p->rank < p->fabric->base.rank;
}

/* --- calling ------------------------------------------------------------------------------------------------------ */
static bool open_endpoint(peer *p, struct fi_info *info)
{
    fabric *f = p->fabric;
    line *l = calloc(1, sizeof(*l));
    if (!l)
        return false;
    l->peer = p;
    if (fi_endpoint(f->domain, info, &l->ep, l) != 0) {
        free(l);
        return false;
    }
    p->line = l;
    p->broken = false;
    int result = fi_ep_bind(l->ep, &f->eq->fid, 0);
    if (result == 0)
        result = fi_ep_bind(l->ep, &f->cq->fid, FI_TRANSMIT | FI_SELECTIVE_COMPLETION);
    if (result == 0)
        result = fi_ep_bind(l->ep, &f->cq->fid, FI_RECV);
    if (result == 0)
        result = fi_enable(l->ep);
    if (result == 0)
        p->listening = poe_line_post(p, GOT_HEADER, NULL, l->heard, POE_UNIT_SLOT);
    return result == 0 && p->listening;
}

static void greet(const peer *p, const unsigned char *half, unsigned char wire[POE_GREETING_BYTES])
{
    poe_greeting greeting = {
        .from = p->fabric->base.rank, .to = p->rank, .epoch = p->epoch, .received = p->received};
    poe_greeting_encode(&greeting, half, wire);
}

/* 0, or what was wrong. */
static int dial(peer *p, double now)
{
    fabric *f = p->fabric;
    const fabric_name *name = &f->names[p->rank];
    unsigned char wire[POE_GREETING_BYTES];
    struct fi_info *info = f->library->dupinfo(f->info);
    void *address = malloc(NAME_BYTES);
    if (!info || !address) {
        f->library->freeinfo(info);
        free(address);
        return FI_ENOMEM;
    }
    info->dest_addr = memcpy(address, name->address, NAME_BYTES);
    info->dest_addrlen = name->bytes;
    p->state = DIALLING;
    p->due = now + answer;
    bool opened = open_endpoint(p, info);
    f->library->freeinfo(info);
    greet(p, f->secret, wire);
    return opened ? -fi_connect(p->line->ep, name->address, wire, sizeof(wire)) : FI_EOTHER;
}

void poe_line_want(peer *p)
{
    if (p->state == APART && p->due == HUGE_VAL && !p->ended && !p->parked)
        p->due = 0;
}

static bool owes(const peer *p)
{
    return p->acknowledged < p->cursor;
}

void poe_line_sent(peer *p)
{
    if (p->due == HUGE_VAL && owes(p))
        p->due = poe_now() + p->patience;
}

void poe_line_heard(peer *p)
{
    double now = poe_now();
    if (now - p->joined_at > at_ease)
        p->patience = quiet;
    p->due = owes(p) ? now + p->patience : HUGE_VAL;
}

/* The lower rank calls at once, the other one only if no call comes. */
static void call_again(peer *p, bool was_joined, double now)
{
    double first = is_lower(p) ? 0.03 : 0.001;
    p->due = HUGE_VAL;
    if (p->ended || p->failed || p->parked)
        return;
    p->backoff = was_joined ? first : fmin(fmax(2 * p->backoff, first), longest);
    p->due = now + p->backoff;
}

static void forget(line *l)
{
    if (l->tokens == 0) {
        free(l);
        return;
    }
    l->next = l->peer->fabric->closed;
    l->peer->fabric->closed = l;
}

void poe_line_drop(peer *p)
{
    line *l = p->line;
    bool was_joined = p->state == JOINED;
    double now = poe_now();
    p->line = NULL;
    p->state = APART;
    p->broken = false;
    if (l) {
        l->closed = true;
        if (l->ep)
            fi_close(&l->ep->fid);
        poe_stream_apart(p);
        forget(l);
    }
    if (was_joined)
        p->apart_since = now;
    call_again(p, was_joined, now);
}

void poe_line_fail(peer *p, const char *format, ...)
{
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    poe_error("%s", text);
    p->failed = true;
    poe_line_drop(p);
    poe_stream_fail(p);
}

/* --- answering ---------------------------------------------------------------------------------------------------- */
static void refuse(fabric *f, struct fi_info *info)
{
    fi_reject(f->door, info->handle, NULL, 0);
}

static void report_stranger(fabric *f, const char *who, const char *why)
{
    if (f->strangers++ < SAID_STRANGERS)
        poe_warn("refused a connection from %s that is not one of this run's: %s%s", who, why,
                 f->strangers == SAID_STRANGERS ? "; more of them will not be reported" : "");
}

/* Who does not even speak libfabric's protocol is known to the provider alone, which tells nobody but its log. While
 * this rank itself calls somebody, what is said there may be about that. */
static _Thread_local fabric *listening;

static bool calls_out(const fabric *f)
{
    for (int rank = 0; rank < f->base.size; rank++)
        if (f->peers[rank] && f->peers[rank]->state == DIALLING)
            return true;
    return false;
}

static int is_logged(const struct fi_provider *provider, enum fi_log_level level, enum fi_log_subsys subsystem,
                     uint64_t flags)
{
    (void)provider, (void)flags;
    return level == FI_LOG_WARN && subsystem == FI_LOG_EP_CTRL && listening && !calls_out(listening);
}

static int is_log_ready(const struct fi_provider *provider, enum fi_log_level level, enum fi_log_subsys subsystem,
                        uint64_t flags, uint64_t *time)
{
    (void)time;
    return is_logged(provider, level, subsystem, flags);
}

static void hear_log(const struct fi_provider *provider, enum fi_log_level level, enum fi_log_subsys subsystem,
                     const char *function, int number, const char *text)
{
    (void)provider, (void)level, (void)subsystem, (void)function, (void)number;
    char why[POE_WIRE_WHY];
    if (!listening || !strstr(text, "cm "))
        return;
    snprintf(why, sizeof(why), "%.*s", (int)strcspn(text, "\n"), text);
    report_stranger(listening, "a stranger", why);
}

/* Whoever asks libfabric for its log by FI_LOG_LEVEL gets it. */
static void hear_logs(void)
{
    static struct fi_ops_log ops = {
        .size = sizeof(ops), .enabled = is_logged, .ready = is_log_ready, .log = hear_log};
    static struct fid_logging logging = {.fid.fclass = FI_CLASS_LOG, .ops = &ops};
    const poe_libfabric *library = poe_libfabric_load();
    struct fid *log;
    if (getenv("FI_LOG_LEVEL") || library->open(FI_VERSION(1, 14), "logging", NULL, 0, 0, &log, &logging) != 0)
        return;
    fi_import_fid(log, &logging.fid, 0);
    fi_close(log);
}

void poe_line_listen(fabric *f)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    listening = f;
    if (f)
        pthread_once(&once, hear_logs);
}

/* True when the call is to be taken instead of what there is. An own call that is not answered soon may never be. */
static bool is_better(const peer *p, const poe_greeting *greeting)
{
    if (p->state == DIALLING)
        return is_lower(p) || p->due - poe_now() < answer - soon;
    return p->state != JOINED || greeting->epoch >= p->epoch;
}

static void accept_call(peer *p, struct fi_info *info, const poe_greeting *greeting)
{
    unsigned char wire[POE_GREETING_BYTES];
    if (p->line)
        poe_line_drop(p);
    p->state = ANSWERING;
    p->due = poe_now() + answer;
    p->epoch = (p->epoch > greeting->epoch ? p->epoch : greeting->epoch) + 1;
    p->greeted = greeting->received;
    bool opened = open_endpoint(p, info);
    greet(p, p->fabric->secret + HALF, wire);
    if (!opened || fi_accept(p->line->ep, wire, sizeof(wire)) != 0)
        poe_line_drop(p);
}

static void hear_call(fabric *f, struct fi_info *info, const unsigned char *data, size_t bytes)
{
    poe_greeting greeting;
    char why[POE_WIRE_WHY], who[64];
    if (!poe_greeting_decode(data, bytes, f->secret, &greeting, why)) {
        poe_fabric_address_text(info->dest_addr, info->dest_addrlen, who);
        report_stranger(f, who, why);
        refuse(f, info);
        return;
    }
    bool known = greeting.to == f->base.rank && greeting.from < f->base.size && greeting.from != greeting.to;
    peer *p = known ? poe_peer_of(f, greeting.from) : NULL;
    if (p && !p->failed && !p->ended && !p->parked && is_better(p, &greeting))
        accept_call(p, info, &greeting);
    else
        refuse(f, info);
}

/* --- events ------------------------------------------------------------------------------------------------------- */
static void joined(peer *p, uint64_t received)
{
    double now = poe_now();
    p->state = JOINED;
    p->due = HUGE_VAL;
    p->joined_at = now;
    p->backoff = p->refused_since = 0;
    if (p->apart_since > 0 && !is_lower(p) && !p->moved)
        poe_info("the connection to rank %d broke and was made anew after %.3g s", p->rank, now - p->apart_since);
    p->apart_since = 0;
    p->moved = false;
    poe_stream_joined(p, received);
}

static void hear_answer(peer *p, const unsigned char *data, size_t bytes)
{
    poe_greeting greeting;
    char why[POE_WIRE_WHY];
    if (p->state == ANSWERING) {
        joined(p, p->greeted);
    } else if (!poe_greeting_decode(data, bytes, p->fabric->secret + HALF, &greeting, why)) {
        poe_warn("what answers at the address of rank %d is not it: %s", p->rank, why);
        poe_line_drop(p);
    } else {
        p->epoch = greeting.epoch;
        joined(p, greeting.received);
    }
}

static peer *peer_with(fabric *f, const struct fid *fid)
{
    for (int rank = 0; rank < f->base.size; rank++) {
        peer *p = f->peers[rank];
        if (p && p->line && p->line->ep && &p->line->ep->fid == fid)
            return p;
    }
    return NULL;
}

/* A rank listens as long as it lives. */
static bool is_gone(peer *p, int error)
{
    double now = poe_now();
    if (error != FI_ECONNREFUSED)
        p->refused_since = 0;
    else if (!(p->refused_since > 0))
        p->refused_since = now;
    return p->refused_since > 0 && now - p->refused_since > gone;
}

static void hear_refusal(peer *p, int error)
{
    const fabric_name *name = &p->fabric->names[p->rank];
    char text[64];
    p->epoch++; /* the other side may have had a connection that this one never saw */
    if (p->fabric->leaving) {
        p->ended = true;
        poe_line_drop(p);
    } else if (is_gone(p, error)) {
        poe_fabric_address_text(name->address, name->bytes, text);
        poe_line_fail(p, "rank %d is gone: nothing answers at %s any more", p->rank, text);
    } else {
        poe_line_drop(p);
    }
}

static void hear_error(fabric *f)
{
    struct fi_eq_err_entry entry = {0};
    if (fi_eq_readerr(f->eq, &entry, 0) < 0)
        return;
    peer *p = peer_with(f, entry.fid);
    if (p && p->state == DIALLING)
        hear_refusal(p, entry.err);
    else if (p)
        poe_line_drop(p);
}

void poe_line_events(fabric *f)
{
    union {
        struct fi_eq_cm_entry entry;
        unsigned char bytes[sizeof(struct fi_eq_cm_entry) + 256];
    } event;
    uint32_t kind;
    for (;;) {
        ssize_t bytes = fi_eq_read(f->eq, &kind, &event, sizeof(event), 0);
        if (bytes == -FI_EAVAIL) {
            hear_error(f);
            continue;
        }
        if (bytes < (ssize_t)sizeof(event.entry))
            return;
        size_t more = (size_t)bytes - sizeof(event.entry);
        peer *p = kind == FI_CONNREQ ? NULL : peer_with(f, event.entry.fid);
        if (kind == FI_CONNREQ) {
            hear_call(f, event.entry.info, event.entry.data, more);
            f->library->freeinfo(event.entry.info);
        } else if (p && kind == FI_CONNECTED) {
            hear_answer(p, event.entry.data, more);
        } else if (p && kind == FI_SHUTDOWN) {
            poe_line_drop(p);
        }
    }
}

void poe_line_timers(fabric *f, double now)
{
    f->due = HUGE_VAL;
    for (int rank = 0; rank < f->base.size; rank++) {
        peer *p = f->peers[rank];
        if (!p)
            continue;
        bool late = p->state != APART && now >= p->due;
        if (late && p->state == JOINED)
            p->patience = fmin(2 * p->patience, quietest);
        if (p->broken || late)
            poe_line_drop(p);
        int error = p->state == APART && now >= p->due ? dial(p, now) : 0;
        if (error)
            hear_refusal(p, error);
        f->due = fmin(f->due, p->due);
    }
}
