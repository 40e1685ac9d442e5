/* SPDX-License-Identifier: MIT */
#include "tools/spares.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "comm/agent/post.h"
#include "comm/fabric/fabric.h"
#include "src/clock.h"
#include "src/log.h"

enum { DESK = 0 }; /* the place that lets stages move */

typedef enum letter_kind {
    WISH = 1, /* to oneself: the user wishes this stage to move */
    ASK,      /* to the desk: may `rank` move? */
    GRANT,    /* from it: to `place` */
    DENY,     /* ... there is none left */
    HOLD,     /* to all: let go of `rank`; `place`: which attempt this is */
    HELD,     /* ... done, at this attempt */
    LUGGAGE,  /* to the spare, with the parcel; `seconds`: how long ago the move began */
    MOVED,    /* to all: `rank` is to be found at `place`, be it as before */
    END,      /* to those without a stage: `place` is the outcome */
} letter_kind;

typedef enum phase { STAYS, ASKED, LEAVES } phase;

/* At the desk. */
typedef struct desk {
    int waiting[POE_OPTION_STAGES]; /* ranks that want to move, in order */
    int n_waiting;
    int moving, to; /* rank that moves, -1: none; and its place */
} desk;

struct poe_spares {
    poe_rank_job *job;
    poe_post *post;
    int place, n_places, n_ranks;
    int rank; /* whose stage is here; -1: none */
    int owners[POE_OPTION_STAGES];
    bool used[2 * POE_OPTION_STAGES]; /* places that are no free spare, or no more */
    atomic_int free;
    bool wish;              /* of the user: to leave */
    atomic_bool busy, idle; /* it is being fulfilled; there is no stage here */
    phase phase;
    double since;          /* when the user asked */
    int to, attempt, held; /* held: of this attempt */
    bool ended;
    poe_status outcome;
    poe_letter luggage; /* kind 0: none has come */
    desk desk;
};

static double patience(const poe_spares *s)
{
    return s->job->options->deadline;
}

static void write_to(poe_spares *s, int to, letter_kind kind, int rank, int place)
{
    poe_post_send(s->post, to, &(poe_letter){.kind = kind, .rank = rank, .place = place});
}

/* To all others, and to oneself. */
static void write_to_all(poe_spares *s, letter_kind kind, int rank, int place)
{
    for (int to = 0; to < s->n_places; to++)
        write_to(s, to, kind, rank, place);
}

/* --- the desk ----------------------------------------------------------------------------------------------------- */
static int free_place(const poe_spares *s)
{
    for (int place = s->n_ranks; place < s->n_places; place++)
        if (!s->used[place])
            return place;
    return -1;
}

static void serve(poe_spares *s)
{
    desk *d = &s->desk;
    while (d->moving < 0 && d->n_waiting > 0) {
        int rank = d->waiting[0], place = free_place(s);
        d->n_waiting--;
        for (int i = 0; i < d->n_waiting; i++)
            d->waiting[i] = d->waiting[i + 1];
        write_to(s, s->owners[rank], place < 0 ? DENY : GRANT, rank, place);
        if (place >= 0) {
            d->moving = rank;
            d->to = place;
        }
    }
}

static void take_question(poe_spares *s, int rank)
{
    if (s->desk.n_waiting < POE_OPTION_STAGES)
        s->desk.waiting[s->desk.n_waiting++] = rank;
    serve(s);
}

/* --- letters ------------------------------------------------------------------------------------------------------ */
static void stay(poe_spares *s)
{
    s->phase = STAYS;
    s->wish = false;
    atomic_store(&s->busy, false);
}

static void take_grant(poe_spares *s, const poe_letter *letter)
{
    if (s->phase != ASKED) { /* too late: nobody waits for it any more */
        write_to_all(s, MOVED, letter->rank, s->place);
        return;
    }
    poe_info("leaves: its stage moves to spare agent %d", letter->place);
    s->phase = LEAVES;
    s->to = letter->place;
    atomic_store(&s->job->board->leave, true);
}

static void take_denial(poe_spares *s)
{
    poe_warn("stays: no spare agent is free any more");
    stay(s);
}

static void hold(poe_spares *s, const poe_letter *letter)
{
    if (s->rank >= 0 && letter->rank != s->rank && poe_fabric_hold(s->job->fabric, letter->rank) != POE_OK)
        return;
    write_to(s, letter->from, HELD, letter->rank, letter->place);
}

static void take_move(poe_spares *s, int rank, int place)
{
    bool elsewhere = s->owners[rank] != place;
    s->owners[rank] = place;
    if (elsewhere && !s->used[place]) {
        s->used[place] = true;
        atomic_fetch_sub(&s->free, 1);
    }
    if (s->rank >= 0 && s->rank != rank)
        poe_fabric_release(s->job->fabric, rank, place);
    if (s->place == DESK && s->desk.moving == rank) {
        s->desk.moving = -1;
        serve(s);
    }
}

static void take_luggage(poe_spares *s, poe_letter *letter)
{
    s->luggage = *letter;
    s->since = poe_now() - letter->seconds;
    letter->data = NULL;
}

static void take_letter(poe_spares *s, poe_letter *letter)
{
    switch ((letter_kind)letter->kind) {
    case WISH:
        s->wish = true;
        break;
    case ASK:
        take_question(s, letter->rank);
        break;
    case GRANT:
        take_grant(s, letter);
        break;
    case DENY:
        take_denial(s);
        break;
    case HOLD:
        hold(s, letter);
        break;
    case HELD:
        s->held += letter->place == s->attempt;
        break;
    case LUGGAGE:
        take_luggage(s, letter);
        break;
    case MOVED:
        take_move(s, letter->rank, letter->place);
        break;
    case END:
        s->ended = true;
        s->outcome = (poe_status)letter->place;
        break;
    }
    free(letter->data);
}

static void take_letters(poe_spares *s)
{
    for (poe_letter letter; poe_post_next(s->post, &letter);)
        take_letter(s, &letter);
}

/* --- leaving ------------------------------------------------------------------------------------------------------ */
bool poe_spares_request_leave(poe_spares *s)
{
    if (atomic_load(&s->idle)) {
        poe_info("this agent has no stage that could move elsewhere");
        return true;
    }
    if (atomic_load(&s->free) == 0 && !atomic_load(&s->busy))
        return false;
    write_to(s, s->place, WISH, 0, 0);
    return true;
}

void poe_spares_attend(poe_spares *s)
{
    take_letters(s);
    if (s->phase == STAYS && s->wish) {
        atomic_store(&s->busy, true);
        s->phase = ASKED;
        s->since = poe_now();
        write_to(s, DESK, ASK, s->rank, s->place);
    } else if (s->phase == ASKED && poe_now() - s->since > patience(s)) {
        poe_warn("stays: other stages are moving, or nobody answers");
        stay(s);
    }
}

/* What had been handed over is sent. */
static bool send_the_rest(poe_spares *s, poe_relay *relay)
{
    double until = poe_now() + patience(s) / 4;
    while (!poe_relay_is_quiet(relay) && poe_now() < until) {
        if (poe_relay_progress(relay, 0.05) != POE_OK)
            return false;
        take_letters(s);
    }
    return poe_relay_is_quiet(relay);
}

/* The others first: who is not held calls whom it has lost. */
static bool let_go(poe_spares *s)
{
    double until = poe_now() + patience(s) / 4;
    s->held = 0;
    write_to_all(s, HOLD, s->rank, ++s->attempt);
    for (double left; s->held < s->n_places && (left = until - poe_now()) > 0; take_letters(s))
        poe_post_wait(s->post, left);
    for (int rank = 0; rank < s->n_ranks; rank++)
        if (rank != s->rank && poe_fabric_hold(s->job->fabric, rank) != POE_OK)
            return false;
    return s->held == s->n_places;
}

static bool pack(poe_spares *s, poe_relay *relay, poe_parcel *luggage)
{
    poe_board_pass(s->job->board, luggage);
    poe_fabric_pass(s->job->fabric, luggage);
    poe_relay_pass(relay, luggage);
    return !luggage->failed;
}

/* All let go already have to take hold again. */
static poe_status go_on_here(poe_spares *s, const char *why)
{
    poe_warn("stays: %s", why);
    for (int rank = 0; rank < s->n_ranks; rank++)
        if (rank != s->rank)
            poe_fabric_release(s->job->fabric, rank, s->owners[rank]);
    atomic_store(&s->job->board->leave, false);
    write_to_all(s, MOVED, s->rank, s->place);
    stay(s);
    return POE_AGAIN;
}

static poe_status hand_over(poe_spares *s, poe_parcel *luggage)
{
    double until = poe_now() + patience(s);
    poe_post_send(s->post, s->to,
                  &(poe_letter){.kind = LUGGAGE,
                                .rank = s->rank,
                                .place = s->place,
                                .seconds = poe_now() - s->since,
                                .data = luggage->data,
                                .bytes = luggage->bytes});
    for (double left; s->owners[s->rank] == s->place && (left = until - poe_now()) > 0; take_letters(s))
        poe_post_wait(s->post, left);
    if (s->owners[s->rank] != s->place)
        return POE_OK;
    poe_error("spare agent %d has not taken over its stage within %.3g s", s->to, patience(s));
    return POE_FAILED;
}

poe_status poe_spares_move(poe_spares *s, poe_relay *relay)
{
    poe_parcel luggage = {0};
    if (!send_the_rest(s, relay))
        return go_on_here(s, "its last messages do not reach the other ranks");
    if (!let_go(s))
        return go_on_here(s, "an agent does not answer");
    if (!pack(s, relay, &luggage)) {
        poe_parcel_free(&luggage);
        return go_on_here(s, "there is no memory for what would have to move");
    }
    poe_status status = hand_over(s, &luggage);
    if (status != POE_OK)
        return status;
    s->rank = -1;
    atomic_store(&s->idle, true);
    stay(s);
    poe_post_silence(s->post);
    return POE_OK;
}

/* --- without a stage ---------------------------------------------------------------------------------------------- */
poe_status poe_spares_wait(poe_spares *s, int *rank, poe_parcel *luggage, double *since)
{
    for (; !s->ended && !s->luggage.kind; take_letters(s))
        poe_post_wait(s->post, 60);
    if (s->ended)
        return s->outcome;
    *rank = s->luggage.rank;
    *since = s->since;
    *luggage = (poe_parcel){.data = s->luggage.data, .bytes = s->luggage.bytes, .unpacks = true};
    s->luggage = (poe_letter){0};
    return POE_AGAIN;
}

const int *poe_spares_owners(const poe_spares *s)
{
    return s->owners;
}

void poe_spares_announce(poe_spares *s, int rank)
{
    s->rank = rank;
    s->phase = STAYS;
    atomic_store(&s->idle, false);
    write_to_all(s, MOVED, rank, s->place);
}

void poe_spares_end(poe_spares *s, poe_status outcome)
{
    bool serves[2 * POE_OPTION_STAGES] = {false};
    for (int rank = 0; rank < s->n_ranks; rank++)
        serves[s->owners[rank]] = true;
    for (int place = 0; place < s->n_places; place++)
        if (!serves[place])
            write_to(s, place, END, 0, outcome);
}

/* --- opening ------------------------------------------------------------------------------------------------------ */
static void ring(void *context)
{
    poe_ring_wake(&((poe_rank_job *)context)->board->to_agent);
}

poe_status poe_spares_open(poe_rank_job *job, poe_spares **spares)
{
    poe_spares *s = calloc(1, sizeof(*s));
    if (!s) {
        poe_error("out of memory for the spare agents");
        job->letters->ops->destroy(job->letters);
        return POE_FAILED;
    }
    s->job = job;
    s->place = job->rank;
    s->n_places = job->size;
    s->n_ranks = job->options->stages.count;
    s->rank = s->place < s->n_ranks ? s->place : -1;
    s->desk.moving = -1;
    for (int k = 0; k < s->n_ranks; k++) {
        s->owners[k] = k;
        s->used[k] = true;
    }
    atomic_store(&s->free, s->n_places - s->n_ranks);
    atomic_store(&s->idle, s->rank < 0);
    poe_status status = poe_post_create(job->letters, ring, job, &s->post);
    if (status != POE_OK) {
        free(s);
        return status;
    }
    *spares = s;
    return POE_OK;
}

void poe_spares_close(poe_spares *s)
{
    if (!s)
        return;
    poe_post_destroy(s->post);
    free(s->luggage.data);
    free(s);
}
