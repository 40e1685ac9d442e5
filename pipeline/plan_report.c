/* SPDX-License-Identifier: MIT
 * A plan for people, and for scripts. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "pipeline/plan.h"

/* Of the rank's processor. */
static double share_idle(const poe_plan_case *c, int rank)
{
    int processors = poe_schedule_processors(&c->job.order);
    double busy = 0;
    for (int k = rank % processors; k < c->job.order.n_ranks; k += processors)
        busy += c->result.busy[k];
    return c->result.step > 0 ? 1 - busy / c->result.step : 0;
}

static const char *time_text(double seconds, char text[32])
{
    if (seconds < 1e-3)
        snprintf(text, 32, "%.1f us", seconds * 1e6);
    else
        snprintf(text, 32, seconds < 1 ? "%.2f ms" : "%.2f s", seconds < 1 ? seconds * 1e3 : seconds);
    return text;
}

static const char *bytes_text(double bytes, char text[32])
{
    if (bytes >= 10 * 0x1p30)
        snprintf(text, 32, "%.1f GiB", bytes / 0x1p30);
    else
        snprintf(text, 32, "%.1f MiB", bytes / 0x1p20);
    return text;
}

/* As --stages takes it; equal stages are drawn together. */
static const char *layout_text(const poe_stage_list *layout, char text[512])
{
    size_t used = 0;
    text[0] = '\0';
    for (int k = 0, times; k < layout->count && used < 480; k += times) {
        for (times = 1; k + times < layout->count && layout->layers[k + times] == layout->layers[k]; times++)
            ;
        const char *comma = k ? "," : "";
        if (times > 3)
            used += (size_t)snprintf(text + used, 512 - used, "%s%dx%d", comma, layout->layers[k], times);
        for (int i = 0; times <= 3 && i < times; i++)
            used += (size_t)snprintf(text + used, 512 - used, "%s%d", i ? "," : comma, layout->layers[k]);
    }
    return text;
}

static const char *rule_text(const poe_theory_job *job, char text[32])
{
    if (job->delay)
        snprintf(text, 32, "stale:%d", job->delay);
    else if (job->every)
        snprintf(text, 32, "every:%d", job->every);
    else
        snprintf(text, 32, job->shares ? "exact" : "-");
    return text;
}

static int layers_at(const poe_plan *plan, int rank)
{
    const poe_stage_list *layout = &plan->cases[0].layout;
    return layout->layers[rank < layout->count ? rank : 0];
}

static double memory_at(const poe_plan *plan, int rank)
{
    return (double)(poe_run_memory_total(&plan->memory[rank]) + plan->memory[rank].snapshots);
}

static bool alike(const poe_plan *plan, int a, int b)
{
    const poe_plan_case *asked = &plan->cases[0];
    return layers_at(plan, a) == layers_at(plan, b) && memory_at(plan, a) == memory_at(plan, b) &&
           fabs(asked->result.busy[a] - asked->result.busy[b]) <= 1e-9 * asked->result.step &&
           memcmp(&asked->job.ranks[a], &asked->job.ranks[b], sizeof(asked->job.ranks[a])) == 0;
}

static void print_rank(const poe_plan *plan, const char *name, int k)
{
    const poe_plan_case *asked = &plan->cases[0];
    const poe_theory_rank *rank = &asked->job.ranks[k];
    char a[32], b[32], c[32], d[32], e[32];
    printf("%6s %7d %11s %11s %11s %12s %7.1f %% %11s\n", name, layers_at(plan, k), time_text(rank->forward, a),
           time_text(rank->backward, b), time_text(rank->update_own + rank->update_shared, c),
           time_text(asked->result.busy[k], d), 100 * share_idle(asked, k), bytes_text(memory_at(plan, k), e));
}

/* Ranks that are alike in a row share a line. */
static void print_ranks(const poe_plan_settings *s, const poe_plan *plan)
{
    printf("\n  rank  layers     forward    backward      update    busy/step     idle      memory\n");
    for (int first = 0, end; first < s->n_ranks; first = end) {
        char name[32];
        for (end = first + 1; end < s->n_ranks && alike(plan, first, end); end++)
            ;
        if (end - first > 1)
            snprintf(name, sizeof(name), "%d-%d", first, end - 1);
        else
            snprintf(name, sizeof(name), "%d", first);
        print_rank(plan, name, first);
    }
}

static void print_cases(const poe_plan *plan)
{
    printf("\n                  schedule  --sync         step     tokens/s     idle     formula   stages\n");
    for (int i = 0; i < plan->n_cases; i++) {
        const poe_plan_case *c = &plan->cases[i];
        char rule[32], step[32], closed[32], layout[512];
        printf("%-16s  %-8s  %-10s %9s %12.0f %6.1f %% %11s   %s\n", c->name, poe_schedule_name(c->job.order.schedule),
               rule_text(&c->job, rule), time_text(c->result.step, step), plan->tokens / c->result.step,
               100 * c->result.idle, c->closed > 0 ? time_text(c->closed, closed) : "-",
               layout_text(&c->layout, layout));
    }
}

static void print_until(int until)
{
    if (until == 0)
        printf("     never");
    else if (until >= POE_PLAN_MOST_MICRO)
        printf("    always");
    else
        printf("   M <= %-3d", until);
}

static void print_balance(const poe_plan_balance *balance, const double *ratios, const char *rule, int until)
{
    printf("%6d  %-6s", balance->n_ranks, rule);
    for (int i = 0; i < POE_PLAN_MICRO; i++)
        printf(" %6.2f", ratios[i]);
    print_until(until);
    putchar('\n');
}

static void print_balances(const poe_plan_settings *s, const poe_plan *plan)
{
    if (!plan->n_balances)
        return;
    printf("\npoe beside 1f1b: tokens/s of poe over those of 1f1b, %s, M micro-batches a step\n",
           s->calibration ? "both in their most even stages" : "both at the given times");
    printf(" ranks  --sync");
    for (int i = 0; i < POE_PLAN_MICRO; i++)
        printf("   M %-3d", poe_plan_micro[i]);
    printf(" poe is ahead\n");
    for (int i = 0; i < plan->n_balances; i++) {
        const poe_plan_balance *b = &plan->balances[i];
        print_balance(b, b->exact, "exact", b->until_exact);
        print_balance(b, b->stale, "stale", b->until_stale);
    }
}

static void print_advice(const poe_plan *plan)
{
    const poe_plan_case *asked = &plan->cases[0];
    char a[32], b[32];
    printf("\nlinks     %s per step from a rank to the next, %s back; messages of %.2f MiB\n",
           bytes_text(plan->down_bytes, a), bytes_text(plan->up_bytes, b), asked->job.forward_bytes / 0x1p20);
    if (asked->job.order.n_ranks > 1)
        printf("fill      %s until the last rank has its first input; %s\n", time_text(asked->result.fill, a),
               asked->job.delay || asked->job.order.schedule == POE_SCHEDULE_ZB_H2 ? "once a run" : "once a step");
    if (plan->smallest_delay > POE_OPTION_DELAY)
        printf("streaming would need --sync stale:%d; at most %d are allowed\n", plan->smallest_delay,
               POE_OPTION_DELAY);
    else if (plan->smallest_delay)
        printf("streaming --sync stale:%d is the least that never waits for a total: (P-1)(forward + round trip) + "
               "transfer <= D steps\n",
               plan->smallest_delay);
    if (plan->link_window)
        printf("          and --link-window %d the least with which it never waits for a credit\n", plan->link_window);
}

void poe_plan_print(const poe_plan_settings *s, const poe_plan *plan, const char *rates, const char *network)
{
    const poe_options *o = s->options;
    const poe_theory_job *job = &plan->cases[0].job;
    char layout[512];
    printf("plan      %d ranks, stages %s, --objective %s, %d micro-batches of %d x %d tokens a step\n", s->n_ranks,
           layout_text(&plan->cases[0].layout, layout), o->objective, job->order.n_micro, o->device_batch_size,
           o->sequence_len);
    printf("rates     %s\n", rates);
    printf("network   %s\n", network);
    print_ranks(s, plan);
    print_advice(plan);
    print_cases(plan);
    print_balances(s, plan);
}

/* --- JSON ----------------------------------------------------------------------------------------------------------------- */

static json_t *layout_json(const poe_stage_list *layout)
{
    json_t *list = json_array();
    for (int k = 0; k < layout->count; k++)
        json_array_append_new(list, json_integer(layout->layers[k]));
    return list;
}

static json_t *case_json(const poe_plan *plan, const poe_plan_case *c)
{
    const poe_theory_result *result = &c->result;
    char rule[32];
    return json_pack("{s:s, s:o, s:s, s:s, s:i, s:i, s:f, s:f, s:f, s:f, s:o}", "name", c->name, "stages",
                     layout_json(&c->layout), "schedule", poe_schedule_name(c->job.order.schedule), "sync",
                     rule_text(&c->job, rule), "ranks", c->job.order.n_ranks, "micro_batches", c->job.order.n_micro, "step",
                     result->step, "tokens_per_second", plan->tokens / result->step, "idle", result->idle, "fill",
                     result->fill, "formula", c->closed > 0 ? json_real(c->closed) : json_null());
}

static json_t *memory_json(const poe_run_memory *m)
{
    return json_pack("{s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:s}", "parameters", (double)m->parameters, "gradients",
                     (double)m->gradients, "optimizer", (double)m->optimizer, "activations", (double)m->activations,
                     "pending", (double)m->pending, "messages", (double)m->messages, "scratch", (double)m->scratch,
                     "snapshots", (double)m->snapshots, "recompute", poe_recompute_name(m->recompute));
}

static json_t *ranks_json(const poe_plan_settings *s, const poe_plan *plan)
{
    const poe_plan_case *asked = &plan->cases[0];
    json_t *list = json_array();
    for (int k = 0; k < s->n_ranks; k++) {
        const poe_theory_rank *rank = &asked->job.ranks[k];
        json_array_append_new(
            list, json_pack("{s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:o}", "forward", rank->forward, "backward",
                            rank->backward, "backward_input", rank->backward_input, "backward_weight",
                            rank->backward_weight, "update_own", rank->update_own, "update_shared", rank->update_shared,
                            "busy", asked->result.busy[k], "idle", share_idle(asked, k), "memory",
                            memory_at(plan, k), "memory_parts", memory_json(&plan->memory[k])));
    }
    return list;
}

static json_t *links_json(const poe_theory_job *job)
{
    json_t *list = json_array();
    for (int k = 0; k + 1 < job->order.n_ranks; k++)
        json_array_append_new(
            list, json_pack("{s:f, s:f, s:f, s:f}", "down_latency", job->down[k].latency, "down_bandwidth",
                            job->down[k].bandwidth, "up_latency", job->up[k].latency, "up_bandwidth",
                            job->up[k].bandwidth));
    return list;
}

static json_t *balance_json(const poe_plan_balance *b)
{
    json_t *ratios = json_array();
    for (int i = 0; i < POE_PLAN_MICRO; i++)
        json_array_append_new(ratios, json_pack("{s:i, s:f, s:f}", "micro_batches", poe_plan_micro[i], "exact",
                                                b->exact[i], "stale", b->stale[i]));
    return json_pack("{s:i, s:o, s:i, s:i}", "ranks", b->n_ranks, "over_1f1b", ratios, "ahead_until_exact",
                     b->until_exact, "ahead_until_stale", b->until_stale);
}

json_t *poe_plan_json(const poe_plan_settings *s, const poe_plan *plan, const char *rates, const char *network)
{
    const poe_theory_job *job = &plan->cases[0].job;
    json_t *cases = json_array(), *balances = json_array();
    for (int i = 0; i < plan->n_cases; i++)
        json_array_append_new(cases, case_json(plan, &plan->cases[i]));
    for (int i = 0; i < plan->n_balances; i++)
        json_array_append_new(balances, balance_json(&plan->balances[i]));
    return json_pack("{s:s, s:s, s:f, s:o, s:o, s:f, s:f, s:f, s:f, s:f, s:i, s:i, s:o, s:o}", "rates", rates,
                     "network", network, "tokens", plan->tokens, "ranks", ranks_json(s, plan), "links", links_json(job),
                     "forward_bytes", job->forward_bytes, "backward_bytes", job->backward_bytes, "shared_bytes",
                     job->shares ? job->shared_bytes : 0.0, "down_bytes", plan->down_bytes, "up_bytes", plan->up_bytes,
                     "smallest_delay", plan->smallest_delay, "link_window", plan->link_window, "cases", cases,
                     "balance", balances);
}
