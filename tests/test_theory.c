/* SPDX-License-Identifier: MIT
 * The solver of dependency graphs against cases solved by hand and against the closed forms, where they hold and where
 * they do not. Times are small whole numbers, so that sums of them are exact. */
#include "pipeline/theory.h"
#include "tests/check.h"

static void fill_job(poe_theory_job *job, poe_schedule schedule, int n_ranks, int n_micro)
{
    *job = (poe_theory_job){
        .order = {.schedule = schedule, .n_ranks = n_ranks, .n_virtual = 1, .n_micro = n_micro}};
    for (int r = 0; r < n_ranks; r++)
        job->ranks[r] = (poe_theory_rank){.forward = 1, .backward = 2, .backward_input = 1, .backward_weight = 1};
    job->shares = schedule == POE_SCHEDULE_POE || schedule == POE_SCHEDULE_DDP;
}

static void set_latency(poe_theory_job *job, double latency)
{
    for (int r = 0; r < job->order.n_ranks; r++)
        job->down[r].latency = job->up[r].latency = latency;
}

static void set_bandwidth(poe_theory_job *job, double bandwidth)
{
    for (int r = 0; r < job->order.n_ranks; r++)
        job->down[r].bandwidth = job->up[r].bandwidth = bandwidth;
}

static void set_updates(poe_theory_job *job, double own, double shared)
{
    for (int r = 0; r < job->order.n_ranks; r++) {
        job->ranks[r].update_own = own;
        job->ranks[r].update_shared = shared;
    }
}

static poe_theory_result solve_steps(poe_theory_job *job, int settled, int n_steps)
{
    poe_theory_result result = {0};
    job->settled = settled;
    job->n_steps = n_steps;
    CHECK_INT(poe_theory_solve(job, &result), POE_OK);
    return result;
}

static poe_theory_result solve(poe_theory_job *job)
{
    poe_theory_horizon(job);
    return solve_steps(job, job->settled, job->n_steps);
}

/* Where the formula is said to be valid it is the graph's answer; returns whether it is. */
static bool check_closed(poe_theory_job *job, const char *what)
{
    double step;
    if (!poe_theory_closed_form(job, &step))
        return false;
    poe_theory_result result = solve(job);
    if (!(fabs(result.step - step) <= 1e-9 * step)) {
        fprintf(stderr, "%s: %s, %d ranks, %d micro-batches, delay %d\n", what, poe_schedule_name(job->order.schedule),
                job->order.n_ranks, job->order.n_micro, job->delay);
        CHECK_NEAR(result.step, step, 1e-9, 0);
    }
    return true;
}

/* Processors with several ranks each: by the formula where P/V divides M, else never faster than it, nor two at once. */
static void test_interleaved(void)
{
    static poe_theory_job job;
    for (int n_virtual = 2; n_virtual <= 4; n_virtual++)
        for (int processors = 1; processors <= 8; processors *= 2)
            for (int n_micro = 1; n_micro <= 17; n_micro++) {
                fill_job(&job, POE_SCHEDULE_INTERLEAVED, processors * n_virtual, n_micro);
                job.order.n_virtual = n_virtual;
                set_updates(&job, 5, 0);
                CHECK_INT(check_closed(&job, "interleaved"), n_micro % processors == 0);
                poe_theory_result result = solve(&job);
                double busy = n_virtual * (3.0 * n_micro + 5);
                CHECK_NEAR(result.idle, 1 - busy / result.step, 1e-9, 1e-12);
                CHECK(result.step >= busy + (processors > 1));
                set_latency(&job, 1);
                CHECK(solve(&job).step >= result.step);
            }
}

static void test_closed_forms(void)
{
    static const int ranks[] = {1, 2, 3, 4, 7, 8, 16};
    static poe_theory_job job;
    int valid[POE_SCHEDULE_COUNT] = {0};
    for (int s = 0; s < POE_SCHEDULE_COUNT; s++) {
        for (size_t i = 0; i < sizeof(ranks) / sizeof(ranks[0]); i++) {
            for (int n_micro = 1; n_micro <= 33; n_micro += n_micro < 9 ? 1 : 6) {
                fill_job(&job, (poe_schedule)s, ranks[i], n_micro);
                valid[s] += check_closed(&job, "bare");
                set_latency(&job, 3);
                valid[s] += check_closed(&job, "with latency");
                set_updates(&job, 5, 2);
                check_closed(&job, "with latency and updates");
                job.own_first = true;
                check_closed(&job, "with per-stage heads");
                set_latency(&job, 0);
                check_closed(&job, "with updates");
            }
        }
    }
    for (int s = 0; s < POE_SCHEDULE_COUNT; s++)
        CHECK(valid[s] > 10);
}

static void test_stale(void)
{
    static const int ranks[] = {2, 4, 9}, delays[] = {1, 2, 3, 8};
    static poe_theory_job job;
    for (size_t i = 0; i < 3; i++) {
        for (size_t d = 0; d < 4; d++) {
            for (int n_micro = 1; n_micro <= 8; n_micro *= 2) {
                fill_job(&job, POE_SCHEDULE_POE, ranks[i], n_micro);
                job.delay = delays[d];
                set_latency(&job, 2);
                CHECK(check_closed(&job, "stale"));
                set_updates(&job, 1, 3);
                CHECK(check_closed(&job, "stale with updates"));
            }
        }
    }
}

/* The D that is promised never to stall does not, and one less does. */
static void test_smallest_delay(void)
{
    static poe_theory_job job;
    for (int n_ranks = 2; n_ranks <= 32; n_ranks *= 2) {
        for (int n_micro = 1; n_micro <= 8; n_micro *= 2) {
            fill_job(&job, POE_SCHEDULE_POE, n_ranks, n_micro);
            set_latency(&job, 1.5);
            job.delay = poe_theory_smallest_delay(&job);
            CHECK_NEAR(solve(&job).idle, 0, 0, 1e-9);
            if (job.delay-- > 1)
                CHECK(solve(&job).idle > 1e-6);
        }
    }
    /* 96 ranks, one micro-batch, backward twice the forward: (95) f <= D 3 f. */
    fill_job(&job, POE_SCHEDULE_POE, 96, 1);
    CHECK_INT(poe_theory_smallest_delay(&job), 32);
    job.delay = 32;
    CHECK_NEAR(solve(&job).idle, 0, 0, 1e-9);
    /* The sum's bytes count too. */
    fill_job(&job, POE_SCHEDULE_POE, 4, 4);
    set_bandwidth(&job, 100);
    job.forward_bytes = 10;
    job.shared_bytes = 1000;
    job.shared_chunk = 10;
    job.delay = poe_theory_smallest_delay(&job);
    CHECK_INT(job.delay, 2); /* 12 < 3 (1 + 0.1 + 0.1 + 0.1) + 9.9 = 13.8 <= 2 * 12 */
    CHECK_NEAR(solve(&job).idle, 0, 0, 1e-9);
    job.delay = 1;
    CHECK(solve(&job).idle > 0.05);
}

/* With jitter everything may come as late as can be: D covers that, and the graph with such latencies is not idle. */
static void test_smallest_delay_with_jitter(void)
{
    static poe_theory_job job;
    fill_job(&job, POE_SCHEDULE_POE, 4, 4);
    set_latency(&job, 4);
    CHECK_INT(poe_theory_smallest_delay(&job), 3); /* 3 (1 + 2 * 4) = 27 <= 3 * 12 */
    for (int k = 0; k < 4; k++)
        job.down[k].jitter = job.up[k].jitter = 2;
    job.delay = poe_theory_smallest_delay(&job); /* 3 (1 + 2 * 6) = 39 */
    CHECK_INT(job.delay, 4);
    CHECK_NEAR(solve(&job).idle, 0, 0, 1e-9);
    set_latency(&job, 6);
    CHECK_NEAR(solve(&job).idle, 0, 0, 1e-9);
}

/* One long link among short ones, or any: with the window that is promised never to be short nobody waits, and with one
 * less somebody does. */
static void test_smallest_window(void)
{
    static poe_theory_job job;
    int window;
    for (int n_micro = 1; n_micro <= 4; n_micro *= 2) {
        fill_job(&job, POE_SCHEDULE_POE, 4, n_micro);
        job.down[1].latency = job.up[1].latency = 20;
        job.delay = poe_theory_smallest_delay(&job);
        CHECK_INT(poe_theory_smallest_window(&job, &window), POE_OK);
        CHECK_INT(window, 15); /* forward, there, forward and backward, back: 1 + 20 + 3 + 20 <= 15 * 3 */
        job.window = window;
        CHECK_NEAR(solve(&job).idle, 0, 0, 1e-9);
        job.window--;
        CHECK(solve(&job).idle > 0.01);
    }
    job.down[1].jitter = job.up[1].jitter = 6;
    job.delay = poe_theory_smallest_delay(&job);
    CHECK_INT(poe_theory_smallest_window(&job, &window), POE_OK);
    CHECK_INT(window, 19);
}

/* What is said about idle shares: PoE exact (P-1)/(3M+P-1), gpipe and 1f1b (P-1)/(M+P-1), zb-h1 (P-1)/(3M+P-1). */
static void test_idle_shares(void)
{
    static poe_theory_job job;
    const double p = 8, m = 16;
    fill_job(&job, POE_SCHEDULE_POE, 8, 16);
    CHECK_NEAR(solve(&job).idle, (p - 1) / (3 * m + p - 1), 1e-12, 0);
    fill_job(&job, POE_SCHEDULE_GPIPE, 8, 16);
    CHECK_NEAR(solve(&job).idle, (p - 1) / (m + p - 1), 1e-12, 0);
    fill_job(&job, POE_SCHEDULE_1F1B, 8, 16);
    CHECK_NEAR(solve(&job).idle, (p - 1) / (m + p - 1), 1e-12, 0);
    fill_job(&job, POE_SCHEDULE_ZB_H1, 8, 16);
    CHECK_NEAR(solve(&job).idle, (p - 1) / (3 * m + p - 1), 1e-12, 0);
    fill_job(&job, POE_SCHEDULE_ZB_H2, 8, 16);
    CHECK_NEAR(solve(&job).idle, 0, 0, 1e-12);
}

/* Outside of the formulas: too few micro-batches for the zero bubble, and latency under 1f1b. */
static void test_where_formulas_end(void)
{
    static poe_theory_job job;
    double step;
    fill_job(&job, POE_SCHEDULE_ZB_H2, 4, 4);
    CHECK(!poe_theory_closed_form(&job, &step));
    CHECK(solve(&job).idle > 0.1);
    /* One micro-batch of zb-h1: four forwards, four first halves, then rank 0's second half: 9, not 3 + 3. */
    fill_job(&job, POE_SCHEDULE_ZB_H1, 4, 1);
    CHECK(!poe_theory_closed_form(&job, &step));
    CHECK_NEAR(solve(&job).step, 9, 1e-12, 0);
    fill_job(&job, POE_SCHEDULE_1F1B, 4, 8);
    set_latency(&job, 1);
    CHECK(!poe_theory_closed_form(&job, &step));
    CHECK(solve(&job).step > (8 + 3) * 3 + 3 * 2); /* more than the latencies of one trip there and back */
}

/* Two ranks, PoE exact, M = 2, f = 1, b = 2, latency 10. Rank 0 computes 0..6, rank 1 from 11: 11..17. A sum of two
 * chunks, 5 s each on the link. Rank 0's chunks leave at 6, arrive at 21 and 26, and come back at 36 and 41. */
static void test_chain_by_hand(void)
{
    static poe_theory_job job;
    fill_job(&job, POE_SCHEDULE_POE, 2, 2);
    set_latency(&job, 10);
    set_bandwidth(&job, 2);
    job.shared_bytes = 20;
    job.shared_chunk = 10;
    poe_theory_result r = solve_steps(&job, 0, 1);
    CHECK_NEAR(r.wall, 41, 1e-12, 0);
    CHECK_NEAR(r.fill, 11, 1e-12, 0);
    CHECK_NEAR(r.step, 41, 1e-12, 0);
    CHECK_NEAR(r.whole_idle, 1 - 12.0 / 82, 1e-12, 0);
    /* Own updates of 7 hide behind the sum; with per-stage heads they come first, and the sum 7 later. */
    set_updates(&job, 7, 1);
    CHECK_NEAR(solve_steps(&job, 0, 1).wall, 42, 1e-12, 0);
    job.own_first = true;
    CHECK_NEAR(solve_steps(&job, 0, 1).wall, 49, 1e-12, 0);
    /* every:2 of two steps: steps of 6 + 7 each, rank 0's sum starts at 26. */
    job.every = 2;
    CHECK_NEAR(solve_steps(&job, 0, 2).wall, 26 + 35 + 1, 1e-12, 0);
    /* stale:1 without updates: rank 0 goes on at once (6..12) and then waits for the first total until 41. Its new
     * activations queue behind the sum's chunks (6..16), so that rank 1 has them at 26 and is done at 32. What is left
     * over, the second sum, came to rank 1 at 31 and 36, is turned round at 32 and 37, and is back at 47 and 52. */
    fill_job(&job, POE_SCHEDULE_POE, 2, 2);
    set_latency(&job, 10);
    set_bandwidth(&job, 2);
    job.shared_bytes = 20;
    job.shared_chunk = 10;
    job.delay = 1;
    r = solve_steps(&job, 0, 2);
    CHECK_NEAR(r.step, 41.0 / 2, 1e-12, 0);
    CHECK_NEAR(r.wall, 52, 1e-12, 0);
}

/* Activations of 6 s on a link whose rank computes 3 s per micro-batch: the link is the bottleneck. */
static void test_bandwidth(void)
{
    static poe_theory_job job;
    fill_job(&job, POE_SCHEDULE_POE, 3, 4);
    job.shares = false;
    job.forward_bytes = 60;
    set_bandwidth(&job, 10);
    job.window = 4;
    CHECK_NEAR(solve(&job).step, 24, 1e-9, 0);
    CHECK_NEAR(solve(&job).idle, 0.5, 1e-9, 0);
    job.forward_bytes = 30;
    CHECK_NEAR(solve(&job).idle, 0, 0, 1e-9);
}

/* One credit: a micro-batch leaves when the one before it was given back, f + b + the round trip later. */
static void test_window(void)
{
    static poe_theory_job job;
    fill_job(&job, POE_SCHEDULE_POE, 2, 4);
    job.shares = false;
    set_latency(&job, 5);
    job.window = 1;
    CHECK_NEAR(solve(&job).step, 4 * (1 + 5 + 3 + 5), 1e-9, 0);
    job.window = 5;
    CHECK_NEAR(solve(&job).idle, 0, 0, 1e-9);
    /* So long as credits suffice the formula holds. */
    double step;
    CHECK(poe_theory_closed_form(&job, &step) && step == 12);
    job.window = 4;
    CHECK(!poe_theory_closed_form(&job, &step) && solve(&job).step > 12.5);
}

/* Unequal stages are bounded by the largest: 16,6,5,5 layers on four ranks are half idle. */
static void test_unequal(void)
{
    static const double layers[] = {16, 6, 5, 5};
    static poe_theory_job job;
    fill_job(&job, POE_SCHEDULE_POE, 4, 4);
    for (int r = 0; r < 4; r++)
        job.ranks[r] = (poe_theory_rank){.forward = layers[r], .backward = 2 * layers[r]};
    job.delay = poe_theory_smallest_delay(&job);
    poe_theory_result result = solve(&job);
    CHECK_NEAR(result.step, 4 * 48, 1e-12, 0);
    CHECK_NEAR(result.idle, 0.5, 1e-12, 0);
    CHECK_NEAR(result.busy[1], 4 * 18, 1e-12, 0);
    double step;
    CHECK(!poe_theory_closed_form(&job, &step));
}

/* Three ranks share six micro-batches; a ring of four rounds of a third of the bytes each, 10 s on the link and 1 in
 * it: 2 * 3 + 4 * 11 + 5. */
static void test_ring(void)
{
    static poe_theory_job job;
    fill_job(&job, POE_SCHEDULE_DDP, 3, 6);
    set_latency(&job, 1);
    set_bandwidth(&job, 3);
    set_updates(&job, 0, 5);
    job.shared_bytes = 90;
    CHECK_NEAR(solve(&job).step, 6 + 44 + 5, 1e-12, 0);
    CHECK_NEAR(solve(&job).busy[2], 11, 1e-12, 0);
    job.window = 2; /* as many as equal links need */
    CHECK_NEAR(solve(&job).step, 6 + 44 + 5, 1e-12, 0);
}

/* Every second link of four is long: of six rounds three wait for it, unless its credits are too few: then the sender
 * of a long one waits for a round trip every other round. */
static void test_ring_with_long_links(void)
{
    static poe_theory_job job;
    fill_job(&job, POE_SCHEDULE_DDP, 4, 40);
    for (int k = 1; k < 4; k += 2)
        job.down[k].latency = job.up[k].latency = 10;
    CHECK_NEAR(solve(&job).step, 30 + 30, 1e-12, 0);
    job.window = 6;
    CHECK_NEAR(solve(&job).step, 30 + 30, 1e-12, 0);
    job.window = 2;
    CHECK_NEAR(solve(&job).step, 30 + 50, 1e-12, 0);
}

int main(void)
{
    test_closed_forms();
    test_interleaved();
    test_stale();
    test_smallest_delay();
    test_smallest_delay_with_jitter();
    test_smallest_window();
    test_idle_shares();
    test_where_formulas_end();
    test_chain_by_hand();
    test_bandwidth();
    test_window();
    test_unequal();
    test_ring();
    test_ring_with_long_links();
    return check_result();
}
