/* SPDX-License-Identifier: MIT
 * A letter is a head and, when it has data, that in a message on a channel of its own. The post's thread alone touches
 * the transport. */
#include "comm/agent/post.h"

#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "src/clock.h"
#include "src/log.h"

enum { HEADS = 0, DATA = 1 }; /* channels */

static const double nap = 60;     /* between looks when nothing happens */
static const double farewell = 2; /* for letters that are not sent off when the post closes */

/* As it travels, between processes of one build. */
typedef struct head {
    int32_t kind, rank, place, filler;
    double seconds;
    uint64_t bytes;
} head;

typedef struct envelope {
    struct envelope *next;
    poe_letter letter;
    int to;
    head head;
    poe_operation operations[2]; /* head, data */
} envelope;

typedef struct envelopes {
    envelope *first, **end;
} envelopes;

/* What comes from one agent. */
typedef struct slit {
    head head;
    envelope *coming; /* its data is on its way; NULL: a head is waited for */
    poe_operation operation;
    bool closed; /* nothing more will come */
} slit;

struct poe_post {
    poe_transport *below;
    int rank, size;
    poe_log *log;
    pthread_t thread;
    slit *slits; /* (size) the thread's, as is: */
    envelopes under_way;
    pthread_mutex_t lock; /* guards: */
    pthread_cond_t arrived;
    envelopes out, in;
    bool quit;
    void (*ring)(void *context);
    void *context;
};

/* --- lists -------------------------------------------------------------------------------------------------------- */
static void start_list(envelopes *list)
{
    *list = (envelopes){.end = &list->first};
}

static void append(envelopes *list, envelope *e)
{
    e->next = NULL;
    *list->end = e;
    list->end = &e->next;
}

static envelope *take(envelopes *list)
{
    envelope *e = list->first;
    if (e && !(list->first = e->next))
        list->end = &list->first;
    return e;
}

static void discard(envelope *e)
{
    free(e->letter.data);
    free(e);
}

static void discard_all(envelopes *list)
{
    for (envelope *e; (e = take(list));)
        discard(e);
}

/* --- the thread: in ----------------------------------------------------------------------------------------------- */
static void deliver(poe_post *post, envelope *e)
{
    pthread_mutex_lock(&post->lock);
    append(&post->in, e);
    pthread_cond_signal(&post->arrived);
    if (post->ring)
        post->ring(post->context);
    pthread_mutex_unlock(&post->lock);
}

static void receive(poe_post *post, int from, int channel, void *data, size_t bytes)
{
    slit *s = &post->slits[from];
    s->operation = (poe_operation){0};
    post->below->ops->receive(post->below, from, channel, data, bytes, &s->operation);
}

static void expect_head(poe_post *post, int from)
{
    post->slits[from].coming = NULL;
    receive(post, from, HEADS, &post->slits[from].head, sizeof(head));
}

static void take_head(poe_post *post, int from)
{
    slit *s = &post->slits[from];
    envelope *e = calloc(1, sizeof(*e));
    unsigned char *data = s->head.bytes ? malloc(s->head.bytes) : NULL;
    if (!e || (s->head.bytes && !data)) {
        poe_error("out of memory for %zu bytes from the agent of rank %d", (size_t)s->head.bytes, from);
        free(e);
        free(data);
        s->closed = true;
        return;
    }
    e->letter = (poe_letter){.from = from,
                             .kind = s->head.kind,
                             .rank = s->head.rank,
                             .place = s->head.place,
                             .seconds = s->head.seconds,
                             .data = data,
                             .bytes = s->head.bytes};
    if (data) {
        s->coming = e;
        receive(post, from, DATA, data, e->letter.bytes);
    } else {
        deliver(post, e);
        expect_head(post, from);
    }
}

static bool take_in(poe_post *post)
{
    bool any = false;
    for (int from = 0; from < post->size; from++) {
        slit *s = &post->slits[from];
        if (from == post->rank || s->closed || !s->operation.done)
            continue;
        any = true;
        if (s->operation.status != POE_OK) {
            s->closed = true;
        } else if (!s->coming) {
            take_head(post, from);
        } else {
            deliver(post, s->coming);
            expect_head(post, from);
        }
    }
    return any;
}

/* --- the thread: out ---------------------------------------------------------------------------------------------- */
static void start(poe_post *post, envelope *e)
{
    poe_transport *below = post->below;
    append(&post->under_way, e);
    below->ops->send(below, e->to, HEADS, &e->head, sizeof(e->head), &e->operations[0]);
    if (e->letter.bytes)
        below->ops->send(below, e->to, DATA, e->letter.data, e->letter.bytes, &e->operations[1]);
    else
        e->operations[1].done = true;
}

static bool send_off(poe_post *post)
{
    envelopes all, rest;
    bool any = false;
    start_list(&all);
    start_list(&rest);
    pthread_mutex_lock(&post->lock);
    for (envelope *e; (e = take(&post->out));)
        append(&all, e);
    pthread_mutex_unlock(&post->lock);
    for (envelope *e; (e = take(&all)); any = true)
        start(post, e);
    for (envelope *e; (e = take(&post->under_way));)
        if (e->operations[0].done && e->operations[1].done)
            discard(e);
        else
            append(&rest, e);
    for (envelope *e; (e = take(&rest));)
        append(&post->under_way, e);
    return any;
}

static bool wants_to_go_on(poe_post *post, double *until)
{
    pthread_mutex_lock(&post->lock);
    bool quit = post->quit, waiting = post->out.first != NULL;
    pthread_mutex_unlock(&post->lock);
    if (!quit)
        return true;
    if (!(*until > 0))
        *until = poe_now() + farewell;
    return (waiting || post->under_way.first) && poe_now() < *until;
}

static void *carry(void *arg)
{
    poe_post *post = arg;
    double until = 0;
    poe_log_attach(post->log);
    for (int from = 0; from < post->size; from++)
        if (from != post->rank)
            expect_head(post, from);
    while (wants_to_go_on(post, &until)) {
        bool moved = send_off(post);
        moved |= take_in(post);
        post->below->ops->progress(post->below, moved ? 0 : until > 0 ? 0.05 : nap);
    }
    poe_log_attach(NULL);
    return NULL;
}

/* --- from outside ------------------------------------------------------------------------------------------------- */
static void free_post(poe_post *post)
{
    discard_all(&post->in);
    discard_all(&post->out);
    discard_all(&post->under_way);
    for (int from = 0; from < post->size; from++)
        if (post->slits[from].coming)
            discard(post->slits[from].coming);
}

poe_status poe_post_create(poe_transport *below, void (*ring)(void *context), void *context, poe_post **post)
{
    poe_post *p = calloc(1, sizeof(*p));
    slit *slits = calloc((size_t)below->size, sizeof(*slits));
    pthread_condattr_t monotonic;
    if (!p || !slits) {
        poe_error("out of memory for letters between agents");
        goto unmade;
    }
    *p = (poe_post){.below = below,
                    .rank = below->rank,
                    .size = below->size,
                    .slits = slits,
                    .log = poe_log_current(),
                    .ring = ring,
                    .context = context};
    start_list(&p->under_way);
    start_list(&p->out);
    start_list(&p->in);
    pthread_mutex_init(&p->lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&p->arrived, &monotonic);
    pthread_condattr_destroy(&monotonic);
    int error = pthread_create(&p->thread, NULL, carry, p);
    if (error) {
        poe_error("cannot start the thread for letters between agents: %s", strerror(error));
        goto unmade;
    }
    *post = p;
    return POE_OK;

unmade:
    free(slits);
    free(p);
    below->ops->destroy(below);
    return POE_FAILED;
}

void poe_post_destroy(poe_post *post)
{
    if (!post)
        return;
    pthread_mutex_lock(&post->lock);
    post->quit = true;
    post->ring = NULL;
    pthread_mutex_unlock(&post->lock);
    post->below->ops->wake(post->below);
    pthread_join(post->thread, NULL);
    post->below->ops->destroy(post->below);
    free_post(post);
    pthread_mutex_destroy(&post->lock);
    pthread_cond_destroy(&post->arrived);
    free(post->slits);
    free(post);
}

void poe_post_send(poe_post *post, int to, const poe_letter *letter)
{
    envelope *e = calloc(1, sizeof(*e));
    if (!e) {
        poe_error("out of memory for a letter to the agent of rank %d", to);
        free(letter->data);
        return;
    }
    *e = (envelope){.letter = *letter,
                    .to = to,
                    .head = {.kind = letter->kind,
                             .rank = letter->rank,
                             .place = letter->place,
                             .seconds = letter->seconds,
                             .bytes = letter->bytes}};
    e->letter.from = post->rank;
    if (to == post->rank) {
        deliver(post, e);
        return;
    }
    pthread_mutex_lock(&post->lock);
    append(&post->out, e);
    pthread_mutex_unlock(&post->lock);
    post->below->ops->wake(post->below);
}

bool poe_post_next(poe_post *post, poe_letter *letter)
{
    pthread_mutex_lock(&post->lock);
    envelope *e = take(&post->in);
    pthread_mutex_unlock(&post->lock);
    if (!e)
        return false;
    *letter = e->letter;
    free(e);
    return true;
}

void poe_post_wait(poe_post *post, double seconds)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    double end = (double)until.tv_nsec * 1e-9 + seconds;
    until.tv_sec += (time_t)end;
    until.tv_nsec = (long)((end - (double)(time_t)end) * 1e9);
    pthread_mutex_lock(&post->lock);
    for (int error = 0; !post->in.first && error == 0;)
        error = pthread_cond_timedwait(&post->arrived, &post->lock, &until);
    pthread_mutex_unlock(&post->lock);
}

void poe_post_silence(poe_post *post)
{
    pthread_mutex_lock(&post->lock);
    post->ring = NULL;
    pthread_mutex_unlock(&post->lock);
}
