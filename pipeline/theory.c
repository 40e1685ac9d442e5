/* SPDX-License-Identifier: MIT */
#include "pipeline/theory.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "src/log.h"
#include "src/min_heap.h"

/* As comm/reduce.c: how many chunks a rank has under way to a neighbour. */
enum { CHUNKS_UNDER_WAY = 4 };

/* What a rank does in a step: its tasks, then what the rule wants. */
typedef enum act_kind {
    ACT_TASK, /* computes a poe_task */
    ACT_UPDATE_OWN,
    ACT_BEGIN, /* hands its gradients to the sum */
    ACT_WAIT,  /* for the oldest total */
    ACT_UPDATE_SHARED,
} act_kind;

typedef struct act {
    act_kind kind;
    poe_task task;
} act;

typedef enum event_kind {
    DONE, /* what the rank computed */
    FORWARD_IN,
    BACKWARD_IN,
    FORWARD_CREDIT,
    BACKWARD_CREDIT,
    PARTIAL_IN, /* a chunk of the sum on its way down */
    TOTAL_IN,   /* on its way up */
    PARTIAL_LEFT,
    TOTAL_LEFT, /* its buffer is free again */
    RING_IN,
    RING_CREDIT,
    TURN, /* the rank's, on a processor that it shares */
} event_kind;

/* Everything that is counted is counted from the start of the run. */
typedef struct rank_state {
    act *acts;
    int n_acts, at;
    poe_turn *turns; /* (n_acts) where ranks share processors; else NULL */
    bool waits;      /* for its turn */
    int step;
    bool computing, ended;
    double busy, settled_at, settled_busy, step_end, step_busy;
    int64_t forwards_in, backwards_in;           /* messages that came */
    int64_t forwards_out, backwards_out;         /* that left */
    int64_t forwards_credited, backwards_credited; /* of these, given back */
    int64_t begun, waited, finished;             /* sums */
    int64_t partials_in, partials_done, partials_left; /* chunks */
    int64_t totals_in, totals_done, totals_sent, totals_left;
    int64_t ring_in, ring_out, ring_taken, ring_credited;
} rank_state;

typedef struct simulation {
    const poe_theory_job *job;
    double now;
    poe_min_heap events;
    size_t room;
    bool out_of_memory;
    int64_t chunks; /* of one sum */
    double fill;
    rank_state ranks[POE_THEORY_RANKS];
    double down_free[POE_THEORY_RANKS], up_free[POE_THEORY_RANKS]; /* when a link has sent what it was given */
} simulation;

/* --- events and links -------------------------------------------------------------------------------------------- */

/* Times are not negative, so that their bits are ordered as they are. */
static uint64_t bits_of(double time)
{
    uint64_t bits;
    memcpy(&bits, &time, sizeof(bits));
    return bits;
}

static double time_of(uint64_t bits)
{
    double time;
    memcpy(&time, &bits, sizeof(time));
    return time;
}

static void schedule_event(simulation *s, double time, event_kind kind, int rank)
{
    if (s->events.count == s->room) {
        size_t room = 2 * s->room + 1024;
        poe_heap_item *items = realloc(s->events.items, room * sizeof(*items));
        s->out_of_memory |= !items;
        if (!items)
            return;
        s->events.items = items;
        s->room = room;
    }
    poe_heap_push(&s->events, (poe_heap_item){bits_of(time), (uint64_t)kind * POE_THEORY_RANKS + (uint64_t)rank});
}

/* A message queues behind what its link was given before. */
static void send(simulation *s, const poe_theory_link *link, double *free_at, double bytes, event_kind kind, int to)
{
    double start = fmax(s->now, *free_at);
    *free_at = start + (link->bandwidth > 0 ? bytes / link->bandwidth : 0);
    schedule_event(s, *free_at + link->latency, kind, to);
}

static void send_down(simulation *s, int from, double bytes, event_kind kind)
{
    send(s, &s->job->down[from], &s->down_free[from], bytes, kind, (from + 1) % s->job->order.n_ranks);
}

static void send_up(simulation *s, int from, double bytes, event_kind kind)
{
    send(s, &s->job->up[from - 1], &s->up_free[from - 1], bytes, kind, from - 1);
}

static bool has_room(const simulation *s, int64_t out, int64_t credited)
{
    return !s->job->window || out - credited < s->job->window;
}

/* --- sums ------------------------------------------------------------------------------------------------------------ */

static double chunk_size(const poe_theory_job *job)
{
    return job->shared_chunk > 0 ? job->shared_chunk : POE_THEORY_CHUNK;
}

static double chunk_bytes(const simulation *s, int64_t chunk)
{
    double size = chunk_size(s->job), before = (double)(chunk % s->chunks) * size;
    return fmin(size, s->job->shared_bytes - before);
}

static void pass_partial_down(simulation *s, int r)
{
    send_down(s, r, chunk_bytes(s, s->ranks[r].partials_done), PARTIAL_IN);
    schedule_event(s, s->down_free[r], PARTIAL_LEFT, r);
}

static void pass_total_up(simulation *s, int r, int64_t chunk)
{
    s->ranks[r].totals_sent++;
    send_up(s, r, chunk_bytes(s, chunk), TOTAL_IN);
    schedule_event(s, s->up_free[r - 1], TOTAL_LEFT, r);
}

/* Down: own values are added to the chunk that came; the last rank turns it round; up: it is passed on. */
static void advance_chain(simulation *s, int r)
{
    rank_state *me = &s->ranks[r];
    bool first = r == 0, last = r + 1 == s->job->order.n_ranks;
    while (me->partials_done < me->begun * s->chunks && (first || me->partials_done < me->partials_in) &&
           me->partials_done - me->partials_left < CHUNKS_UNDER_WAY) {
        if (last && !first)
            pass_total_up(s, r, me->partials_done);
        else if (!last)
            pass_partial_down(s, r);
        me->partials_done++;
        me->partials_left += last && first;
    }
    while (!last && me->totals_done < me->totals_in && me->totals_sent - me->totals_left < CHUNKS_UNDER_WAY) {
        if (!first)
            pass_total_up(s, r, me->totals_done);
        me->totals_done++;
    }
    me->finished = (last ? me->partials_done : me->totals_done) / s->chunks;
}

/* ddp: P-1 rounds that add and P-1 that spread, each with one P-th of the gradients. What came in a round is taken, and
 * its credit given back, once the rank's own message of that round has left. */
static void advance_ring(simulation *s, int r)
{
    rank_state *me = &s->ranks[r];
    int n = s->job->order.n_ranks, previous = (r + n - 1) % n;
    int64_t rounds = 2 * ((int64_t)n - 1);
    while (me->ring_out < me->begun * rounds && (me->ring_out % rounds == 0 || me->ring_out <= me->ring_in) &&
           has_room(s, me->ring_out, me->ring_credited)) {
        send_down(s, r, s->job->shared_bytes / n, RING_IN);
        me->ring_out++;
    }
    for (; me->ring_taken < me->ring_in && me->ring_taken < me->ring_out; me->ring_taken++)
        schedule_event(s, s->now + s->job->up[previous].latency, RING_CREDIT, previous);
    me->finished = rounds ? me->ring_taken / rounds : me->begun;
}

static void advance_sum(simulation *s, int r)
{
    if (s->job->order.schedule == POE_SCHEDULE_DDP)
        advance_ring(s, r);
    else
        advance_chain(s, r);
}

/* --- one rank -------------------------------------------------------------------------------------------------------- */

static bool has_previous(const simulation *s, int r)
{
    return r > 0 && s->job->order.schedule != POE_SCHEDULE_DDP;
}

static bool has_next(const simulation *s, int r)
{
    return r + 1 < s->job->order.n_ranks && s->job->order.schedule != POE_SCHEDULE_DDP;
}

static bool may_start_task(const simulation *s, int r, poe_task task)
{
    const rank_state *me = &s->ranks[r];
    int64_t number = (int64_t)me->step * s->job->order.n_micro + task.micro;
    bool chained = poe_schedule_chained(s->job->order.schedule);
    switch (task.kind) {
    case POE_TASK_FORWARD:
        return (!has_previous(s, r) || me->forwards_in > number) &&
               (!has_next(s, r) || has_room(s, me->forwards_out, me->forwards_credited));
    case POE_TASK_BACKWARD_WEIGHT:
        return true;
    default:
        return !chained || ((!has_next(s, r) || me->backwards_in > number) &&
                            (!has_previous(s, r) || has_room(s, me->backwards_out, me->backwards_credited)));
    }
}

static double task_seconds(const poe_theory_rank *rank, poe_task_kind kind)
{
    switch (kind) {
    case POE_TASK_FORWARD:
        return rank->forward;
    case POE_TASK_BACKWARD:
        return rank->backward;
    case POE_TASK_BACKWARD_INPUT:
        return rank->backward_input;
    default:
        return rank->backward_weight;
    }
}

static void finish_task(simulation *s, int r, poe_task_kind kind)
{
    rank_state *me = &s->ranks[r];
    bool chained = poe_schedule_chained(s->job->order.schedule), splits = poe_schedule_splits(s->job->order.schedule);
    if (kind == POE_TASK_FORWARD && has_next(s, r)) {
        me->forwards_out++;
        send_down(s, r, s->job->forward_bytes, FORWARD_IN);
    }
    bool goes_back = kind == POE_TASK_BACKWARD || kind == POE_TASK_BACKWARD_INPUT;
    if (goes_back && chained && has_previous(s, r)) {
        me->backwards_out++;
        send_up(s, r, s->job->backward_bytes, BACKWARD_IN);
    }
    if (!s->job->window)
        return;
    if (goes_back && chained && has_next(s, r))
        schedule_event(s, s->now + s->job->down[r].latency, BACKWARD_CREDIT, r + 1);
    if (kind == (splits ? POE_TASK_BACKWARD_WEIGHT : POE_TASK_BACKWARD) && has_previous(s, r))
        schedule_event(s, s->now + s->job->up[r - 1].latency, FORWARD_CREDIT, r - 1);
}

static bool sum_is_due(const poe_theory_job *job, int step)
{
    return !job->every || (step + 1) % job->every == 0 || step + 1 == job->n_steps;
}

/* Under stale:D the first D steps apply no total. */
static bool applies(const rank_state *me, const poe_theory_job *job)
{
    return job->shares && sum_is_due(job, me->step) && me->step >= job->delay;
}

static void compute(simulation *s, int r, double seconds)
{
    rank_state *me = &s->ranks[r];
    me->computing = true;
    me->busy += seconds;
    schedule_event(s, s->now + seconds, DONE, r);
}

static void end_step(simulation *s, rank_state *me)
{
    me->at = 0;
    me->step++;
    me->step_end = s->now;
    me->step_busy = me->busy;
    if (me->step == s->job->settled) {
        me->settled_at = s->now;
        me->settled_busy = me->busy;
    }
}

/* After the last step: what stale:D left over, one after the other. */
static bool drain(simulation *s, int r)
{
    rank_state *me = &s->ranks[r];
    if (me->waited == me->begun || me->finished == me->waited) {
        me->ended = me->waited == me->begun;
        return false;
    }
    me->waited++;
    compute(s, r, s->job->ranks[r].update_shared);
    return false;
}

/* Starts or passes over the rank's next act; false: it has to wait, or computes. */
static bool advance_rank(simulation *s, int r)
{
    rank_state *me = &s->ranks[r];
    const poe_theory_rank *rates = &s->job->ranks[r];
    if (me->computing || me->ended)
        return false;
    if (me->step == s->job->n_steps)
        return drain(s, r);
    if (me->waits)
        return false;
    const act *a = &me->acts[me->at];
    switch (a->kind) {
    case ACT_TASK:
        if (!may_start_task(s, r, a->task))
            return false;
        if (r + 1 == s->job->order.n_ranks && me->busy <= 0 && me->at == 0)
            s->fill = s->now;
        compute(s, r, task_seconds(rates, a->task.kind));
        return false;
    case ACT_UPDATE_OWN:
        compute(s, r, rates->update_own);
        return false;
    case ACT_BEGIN:
        if (sum_is_due(s->job, me->step)) {
            me->begun++;
            advance_sum(s, r);
        }
        break;
    case ACT_WAIT:
        if (applies(me, s->job) && me->finished == me->waited)
            return false;
        me->waited += applies(me, s->job);
        break;
    case ACT_UPDATE_SHARED:
        if (applies(me, s->job)) {
            compute(s, r, rates->update_shared);
            return false;
        }
    }
    if (++me->at == me->n_acts)
        end_step(s, me);
    return true;
}

/* To whom it is next on the same processor, if that is another rank. */
static void pass_turn(simulation *s, rank_state *me)
{
    int after = me->turns ? me->turns[me->at].after : -1;
    if (after < 0)
        return;
    me->waits = true;
    schedule_event(s, s->now, TURN, after);
}

static void take_event(simulation *s, event_kind kind, int r)
{
    rank_state *me = &s->ranks[r];
    switch (kind) {
    case DONE:
        me->computing = false;
        if (me->step == s->job->n_steps)
            break;
        if (me->acts[me->at].kind == ACT_TASK)
            finish_task(s, r, me->acts[me->at].task.kind);
        pass_turn(s, me);
        if (++me->at == me->n_acts)
            end_step(s, me);
        break;
    case FORWARD_IN:
        me->forwards_in++;
        break;
    case BACKWARD_IN:
        me->backwards_in++;
        break;
    case FORWARD_CREDIT:
        me->forwards_credited++;
        break;
    case BACKWARD_CREDIT:
        me->backwards_credited++;
        break;
    case PARTIAL_IN:
        me->partials_in++;
        advance_sum(s, r);
        break;
    case TOTAL_IN:
        me->totals_in++;
        advance_sum(s, r);
        break;
    case PARTIAL_LEFT:
        me->partials_left++;
        advance_sum(s, r);
        break;
    case TOTAL_LEFT:
        me->totals_left++;
        me->partials_left += r + 1 == s->job->order.n_ranks; /* turned round in the buffer that it came in */
        advance_sum(s, r);
        break;
    case RING_IN:
        me->ring_in++;
        advance_sum(s, r);
        break;
    case RING_CREDIT:
        me->ring_credited++;
        advance_sum(s, r);
        break;
    case TURN:
        me->waits = false;
        break;
    }
    while (advance_rank(s, r))
        ;
}

/* --- the whole -------------------------------------------------------------------------------------------------------- */

static void add_act(rank_state *me, act_kind kind)
{
    me->acts[me->n_acts++] = (act){.kind = kind};
}

/* Mirrors poe_shared_step(); under ddp nothing can be updated before the sum is there. */
static void add_sum(const poe_theory_job *job, rank_state *me)
{
    bool ring = job->order.schedule == POE_SCHEDULE_DDP, own_first = job->every || (job->own_first && !job->delay);
    if (!ring && own_first)
        add_act(me, ACT_UPDATE_OWN);
    add_act(me, ACT_BEGIN);
    if (!ring && !own_first)
        add_act(me, ACT_UPDATE_OWN);
    add_act(me, ACT_WAIT);
    if (ring)
        add_act(me, ACT_UPDATE_OWN);
    add_act(me, ACT_UPDATE_SHARED);
}

/* The first rank of each processor begins. */
static poe_status write_turns(const poe_theory_job *job, int r, rank_state *me)
{
    me->turns = malloc((size_t)me->n_acts * sizeof(*me->turns));
    if (!me->turns)
        return POE_FAILED;
    poe_schedule_turns(&job->order, r, me->turns);
    me->waits = r >= poe_schedule_processors(&job->order);
    return POE_OK;
}

static poe_status write_program(const poe_theory_job *job, int r, rank_state *me)
{
    size_t most = 3 * (size_t)job->order.n_micro;
    poe_task *tasks = malloc(most * sizeof(*tasks));
    me->acts = malloc((most + 4) * sizeof(*me->acts));
    if (!tasks || !me->acts) {
        free(tasks);
        return POE_FAILED;
    }
    int n = poe_schedule_tasks(&job->order, r, tasks);
    for (int i = 0; i < n; i++)
        me->acts[me->n_acts++] = (act){.kind = ACT_TASK, .task = tasks[i]};
    free(tasks);
    if (job->shares)
        add_sum(job, me);
    else
        add_act(me, ACT_UPDATE_OWN);
    return job->order.n_virtual > 1 ? write_turns(job, r, me) : POE_OK;
}

static void run(simulation *s)
{
    for (int r = 0; r < s->job->order.n_ranks; r++)
        while (advance_rank(s, r))
            ;
    while (s->events.count && !s->out_of_memory) {
        poe_heap_item event = poe_heap_pop(&s->events);
        s->now = time_of(event.major);
        take_event(s, (event_kind)(event.minor / POE_THEORY_RANKS), (int)(event.minor % POE_THEORY_RANKS));
    }
}

static void summarise(const simulation *s, poe_theory_result *result)
{
    const poe_theory_job *job = s->job;
    double steps = job->n_steps - job->settled, busy = 0, whole = 0;
    *result = (poe_theory_result){.wall = s->now, .fill = s->fill};
    for (int r = 0; r < job->order.n_ranks; r++) {
        const rank_state *me = &s->ranks[r];
        result->step = fmax(result->step, (me->step_end - me->settled_at) / steps);
        result->busy[r] = (me->step_busy - me->settled_busy) / steps;
        busy += result->busy[r];
        whole += me->busy;
    }
    int processors = poe_schedule_processors(&job->order);
    result->idle = result->step > 0 ? 1 - busy / (processors * result->step) : 0;
    result->whole_idle = s->now > 0 ? 1 - whole / (processors * s->now) : 0;
}

poe_status poe_theory_solve(const poe_theory_job *job, poe_theory_result *result)
{
    simulation *s = calloc(1, sizeof(*s));
    poe_status status = s ? POE_OK : POE_FAILED;
    for (int r = 0; status == POE_OK && r < job->order.n_ranks; r++)
        status = write_program(job, r, &s->ranks[r]);
    if (status == POE_OK) {
        s->job = job;
        s->chunks = (int64_t)fmax(1, ceil(job->shared_bytes / chunk_size(job)));
        run(s);
        status = s->out_of_memory ? POE_FAILED : POE_OK;
    }
    if (status == POE_OK)
        summarise(s, result);
    else
        poe_error("out of memory while solving the graph of %d ranks and %d micro-batches", job->order.n_ranks, job->order.n_micro);
    for (int r = 0; s && r < job->order.n_ranks; r++) {
        free(s->ranks[r].acts);
        free(s->ranks[r].turns);
    }
    if (s)
        free(s->events.items);
    free(s);
    return status;
}

/* A turn is what repeats: D + 1 steps, or N. Full links and windows show after the first few. */
void poe_theory_horizon(poe_theory_job *job)
{
    int turn = job->every ? job->every : job->delay + 1;
    job->settled = 4 * turn;
    job->n_steps = job->settled + 4 * turn;
}

/* --- closed forms ------------------------------------------------------------------------------------------------------ */

static bool same(double a, double b)
{
    return fabs(a - b) <= 1e-12 * fmax(fabs(a), fabs(b));
}

static bool all_equal(const poe_theory_job *job)
{
    const poe_theory_rank *first = &job->ranks[0];
    bool chained = poe_schedule_chained(job->order.schedule), equal = true;
    for (int r = 0; r < job->order.n_ranks; r++) {
        const poe_theory_rank *rank = &job->ranks[r];
        const poe_theory_link *down = &job->down[r], *up = &job->up[r];
        equal &= same(rank->forward, first->forward) && same(rank->update_own, first->update_own) &&
                 same(rank->update_shared, first->update_shared);
        equal &= poe_schedule_splits(job->order.schedule)
                     ? same(rank->backward_input, first->forward) && same(rank->backward_weight, first->forward)
                     : same(rank->backward, first->backward);
        bool down_used = r + 1 < job->order.n_ranks || job->order.schedule == POE_SCHEDULE_DDP, up_used = r + 1 < job->order.n_ranks;
        equal &= !down_used || (same(down->latency, job->down[0].latency) && !(down->bandwidth > 0));
        equal &= !up_used || (same(up->latency, job->down[0].latency) && !(up->bandwidth > 0));
    }
    return equal && !(chained && job->window);
}

/* A micro-batch is given back a forward, the way, t and the way back after its own forward began; until then the sender
 * goes on with others. */
static bool credits_suffice(const poe_theory_job *job)
{
    const poe_theory_rank *rank = &job->ranks[0];
    double t = rank->forward + rank->backward;
    return !job->window || job->window * t >= rank->forward + t + 2 * job->down[0].latency;
}

/* Seconds of a step that a rank computes whatever others do. */
static double busy_of(const poe_theory_job *job, int r)
{
    const poe_theory_rank *rank = &job->ranks[r];
    bool splits = poe_schedule_splits(job->order.schedule);
    double backward = splits ? rank->backward_input + rank->backward_weight : rank->backward;
    int micro = job->order.schedule == POE_SCHEDULE_DDP ? (job->order.n_micro + job->order.n_ranks - 1) / job->order.n_ranks : job->order.n_micro;
    double shared = !job->shares ? 0 : job->every ? rank->update_shared / job->every : rank->update_shared;
    return micro * (rank->forward + backward) + rank->update_own + shared;
}

/* One turn of poe whose ranks share: D + 1 steps under stale:D. */
static double poe_closed_form(const poe_theory_job *job)
{
    const poe_theory_rank *rank = &job->ranks[0];
    double busy = busy_of(job, 0), trip = (job->order.n_ranks - 1) * (rank->forward + 2 * job->down[0].latency);
    /* From the hand-over of its gradients on, the first rank has its own update to do, and D more steps. */
    bool hidden = job->delay || !job->own_first;
    double meanwhile = job->delay * busy + (hidden ? rank->update_own : 0);
    double waits = trip > meanwhile ? trip - meanwhile : 0;
    return busy + waits / (job->delay + 1);
}

bool poe_theory_closed_form(const poe_theory_job *job, double *step)
{
    double latency = job->order.n_ranks > 1 ? job->down[0].latency : 0;
    double busy = busy_of(job, 0), others = job->order.n_ranks - 1, f = job->ranks[0].forward;
    int processors = poe_schedule_processors(&job->order);
    bool valid = all_equal(job);
    switch (job->order.schedule) {
    case POE_SCHEDULE_POE:
        *step = job->shares ? poe_closed_form(job) : busy;
        return valid && credits_suffice(job) && !job->every;
    case POE_SCHEDULE_GPIPE:
        *step = busy + others * (f + job->ranks[0].backward + 2 * latency);
        return valid && !job->shares;
    case POE_SCHEDULE_1F1B:
        *step = busy + others * (f + job->ranks[0].backward);
        return valid && !job->shares && !(latency > 0);
    case POE_SCHEDULE_ZB_H1:
        *step = busy + others * f;
        return valid && !job->shares && !(latency > 0) && job->order.n_micro >= job->order.n_ranks;
    case POE_SCHEDULE_ZB_H2:
        *step = busy;
        return valid && !job->shares && !(latency > 0) && job->order.n_micro >= 2 * job->order.n_ranks - 1;
    case POE_SCHEDULE_INTERLEAVED:
        *step = job->order.n_virtual * busy + (processors - 1) * (f + job->ranks[0].backward);
        return valid && !job->shares && !(latency > 0) && job->order.n_micro % processors == 0;
    default:
        *step = busy + 2 * others * latency;
        return valid && job->order.n_micro % job->order.n_ranks == 0;
    }
}

/* --- what streams -------------------------------------------------------------------------------------------- */

static double latest(const poe_theory_link *link)
{
    return link->latency + link->jitter;
}

/* The bottleneck of the links in one direction. */
static double slowest(const poe_theory_link *links, int n, double bytes)
{
    double seconds = 0;
    for (int k = 0; k < n; k++)
        seconds = fmax(seconds, links[k].bandwidth > 0 ? bytes / links[k].bandwidth : 0);
    return seconds;
}

/* From the first rank's hand-over of a sum until its total is back: the last rank is later by a forward and a latency
 * per rank; the sum's bytes pass the slowest link once, as chunks go up while others still come down. */
static double round_of(const poe_theory_job *job)
{
    int links = job->order.n_ranks - 1;
    double chunk = fmin(chunk_size(job), job->shared_bytes), seconds = 0;
    for (int k = 0; k < links; k++)
        seconds += job->ranks[k].forward + latest(&job->down[k]) + latest(&job->up[k]) +
                   slowest(&job->down[k], 1, job->forward_bytes) + slowest(&job->up[k], 1, chunk) +
                   slowest(&job->down[k], 1, chunk);
    double rest = job->shared_bytes - chunk;
    return seconds + fmax(slowest(job->down, links, rest), slowest(job->up, links, rest));
}

int poe_theory_smallest_delay(const poe_theory_job *job)
{
    double step = 0;
    for (int r = 0; r < job->order.n_ranks; r++)
        step = fmax(step, busy_of(job, r));
    double turns = step > 0 ? ceil(round_of(job) / step - 1e-9) : 1;
    return turns < 1 ? 1 : turns > INT16_MAX ? INT16_MAX : (int)turns;
}

static poe_status step_with(poe_theory_job *job, int window, double *step)
{
    poe_theory_result result;
    job->window = window;
    poe_status status = poe_theory_solve(job, &result);
    *step = status == POE_OK ? result.step : 0;
    return status;
}

poe_status poe_theory_smallest_window(const poe_theory_job *asked, int *window)
{
    poe_theory_job job = *asked;
    double unlimited, step;
    int low = 0, high = 0, try = 1;
    for (int k = 0; k < job.order.n_ranks; k++) {
        job.down[k].latency = latest(&job.down[k]);
        job.up[k].latency = latest(&job.up[k]);
    }
    poe_theory_horizon(&job);
    poe_status status = step_with(&job, 0, &unlimited);
    while (status == POE_OK && (!high || high - low > 1)) {
        status = step_with(&job, try, &step);
        if (step <= unlimited * (1 + 1e-9))
            high = try;
        else
            low = try;
        try = high ? (low + high) / 2 : 2 * low;
    }
    *window = high;
    return status;
}
