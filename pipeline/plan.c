/* SPDX-License-Identifier: MIT */
#include "pipeline/plan.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "pipeline/layout.h"
#include "pipeline/run.h"
#include "pipeline/settings.h"
#include "src/log.h"

const int poe_plan_micro[POE_PLAN_MICRO] = {1, 2, 4, 8, 16, 32, 64};

static poe_status out_of_memory(void)
{
    poe_error("out of memory for the plan");
    return POE_FAILED;
}

/* The caller frees *model in any case. */
static poe_status new_model(const poe_options *o, poe_model **model)
{
    *model = malloc(sizeof(**model));
    return *model ? poe_settings_model(o, o->vocab_size, *model) : out_of_memory();
}

/* --- what a stage takes ------------------------------------------------------------------------------------------------ */

static double updates_of(const poe_calibration *c, const poe_tensor_table *table)
{
    double seconds = 0;
    for (size_t i = 0; i < table->count; i++) {
        const poe_tensor *tensor = &table->rows[i];
        if (!tensor->trained)
            continue;
        seconds += tensor->group == POE_GROUP_MATRIX ? c->muon * poe_muon_flops(tensor->rows, tensor->cols)
                                                     : c->adamw * (double)(tensor->rows * tensor->cols);
    }
    return seconds;
}

static poe_part_time layer_time(const poe_calibration *c, const poe_model *model, int layer)
{
    const poe_layer_shape *shape = &model->layers[layer];
    return c->layers[shape->has_value_embed][shape->window >= model->config.sequence_len];
}

static void add_part(poe_theory_rank *rank, poe_part_time part)
{
    rank->forward += part.forward;
    rank->backward += part.backward;
}

/* Whether stage k makes x0 from the tokens: all do under poe, the first where x0 crosses boundaries. */
static bool embeds(const poe_model *model, int k)
{
    return k == 0 || !poe_model_crosses_x0(model, k - 1);
}

static poe_status rank_times(const poe_calibration *c, const poe_model *model, int k, poe_theory_rank *rank)
{
    *rank = (poe_theory_rank){0};
    for (int i = model->first_layer[k]; i < model->first_layer[k + 1]; i++)
        add_part(rank, layer_time(c, model, i));
    if (embeds(model, k))
        add_part(rank, c->embedding);
    if (poe_model_has_head(model, k))
        add_part(rank, c->head);
    rank->backward_input = rank->backward_weight = rank->backward / 2;
    poe_tensor_table own, shared;
    poe_status status = poe_model_tensors(model, k, &own);
    if (status != POE_OK)
        return status;
    rank->update_own = updates_of(c, &own);
    poe_tensor_table_free(&own);
    status = poe_model_tensors(model, -1, &shared);
    if (status != POE_OK)
        return status;
    rank->update_shared = updates_of(c, &shared);
    poe_tensor_table_free(&shared);
    return POE_OK;
}

/* --- a job ------------------------------------------------------------------------------------------------------------- */

/* What is summed: all gradients under ddp, else those of the shared tensors, whose parts are sums of their own. */
static poe_status sum_bytes(const poe_model *model, poe_wire wire, bool replicated, poe_theory_job *job)
{
    poe_tensor_table table;
    size_t largest = 0;
    poe_status status = poe_model_tensors(model, replicated ? 0 : -1, &table);
    if (status != POE_OK)
        return status;
    for (poe_shared_part p = 0; !replicated && p < POE_SHARED_PARTS; p++) {
        size_t floats = poe_stage_shared_extent(&table, p).floats;
        largest = floats > largest ? floats : largest;
    }
    job->shared_bytes = (double)poe_wire_bytes(wire, 1, table.floats);
    job->shared_chunk = fmin((double)poe_wire_bytes(wire, 1, largest), POE_THEORY_CHUNK);
    poe_tensor_table_free(&table);
    return POE_OK;
}

/* Of the first boundary: h, x0 where it crosses, and on the way forward tokens and targets. */
static void message_bytes(const poe_options *o, const poe_model *model, poe_theory_job *job)
{
    size_t rows = (size_t)o->device_batch_size * (size_t)o->sequence_len;
    double n = (double)rows, crossing = (double)poe_wire_bytes(poe_wire_parse(o->wire), rows, (size_t)o->n_embd);
    bool chained = poe_schedule_chained(job->order.schedule);
    if (model->config.n_stages > 1 && poe_model_crosses_x0(model, 0))
        crossing *= 2;
    job->forward_bytes = crossing + 2 * n * sizeof(int32_t);
    job->backward_bytes = chained ? crossing : 0;
}

static void set_links(const poe_plan_settings *s, poe_theory_job *job)
{
    for (int k = 0; k < job->order.n_ranks; k++) {
        poe_theory_link here = {0};
        if (s->calibration)
            here = (poe_theory_link){.latency = s->calibration->latency, .bandwidth = s->calibration->bandwidth};
        /* Other numbers of ranks than the network was described for have its first link throughout. */
        int link = job->order.n_ranks == s->n_ranks ? k : 0;
        job->down[k] = s->down ? s->down[link] : here;
        job->up[k] = s->up ? s->up[link] : here;
    }
}

/* Of the run that `o` describes: its stages, objective, schedule, rule and batch. */
static poe_status make_job(const poe_plan_settings *s, const poe_options *o, int n_ranks, poe_theory_job *job)
{
    poe_model *model;
    poe_status status = new_model(o, &model);
    poe_layout layout;
    poe_layout_init(&layout, o, n_ranks);
    *job = (poe_theory_job){.order = layout.order,
                            .delay = o->sync_delay,
                            .every = o->sync_every,
                            .own_first = strcmp(o->head, "ps") == 0};
    job->window = poe_schedule_chained(job->order.schedule) ? 0 : poe_layout_window(&layout, 0);
    bool replicated = poe_layout_replicated(&layout);
    for (int k = 0; status == POE_OK && k < n_ranks; k++) {
        if (s->given)
            job->ranks[k] = s->given[k];
        else
            status = rank_times(s->calibration, model, poe_layout_stage(&layout, k), &job->ranks[k]);
    }
    if (status == POE_OK)
        status = sum_bytes(model, poe_wire_parse(o->wire_shared), replicated, job);
    job->shares = job->shared_bytes > 0 && n_ranks > 1;
    if (status == POE_OK) {
        message_bytes(o, model, job);
        set_links(s, job);
    }
    free(model);
    return status;
}

static poe_status solve_case(const poe_plan_settings *s, const poe_options *o, int n_ranks, const char *name,
                             poe_plan_case *c)
{
    *c = (poe_plan_case){.name = name, .layout = o->stages};
    poe_status status = make_job(s, o, n_ranks, &c->job);
    if (status != POE_OK)
        return status;
    poe_theory_horizon(&c->job);
    if (!poe_theory_closed_form(&c->job, &c->closed))
        c->closed = 0;
    return poe_theory_solve(&c->job, &c->result);
}

/* --- layouts ------------------------------------------------------------------------------------------------------------ */

/* Fills stages from the front up to `limit`; the layers that each later stage needs are left to it. */
static bool fill_up_to(const double *costs, int n_layers, int n_stages, const double beside[3], double limit,
                       poe_stage_list *layout)
{
    int layer = 0;
    layout->count = n_stages;
    for (int k = 0; k < n_stages; k++) {
        double sum = beside[k + 1 == n_stages ? 2 : k > 0];
        int last = n_layers - (n_stages - 1 - k), first = layer;
        while (layer < last && sum + costs[layer] <= limit)
            sum += costs[layer++];
        layout->layers[k] = layer - first;
        if (layer == first)
            return false;
    }
    return layer == n_layers;
}

void poe_plan_even(const double *costs, int n_layers, int n_stages, const double beside[3], poe_stage_list *layout)
{
    double high = beside[0] + beside[1] + beside[2], low = 0;
    for (int i = 0; i < n_layers; i++)
        high += costs[i];
    for (int turn = 0; turn < 60; turn++) {
        double middle = (low + high) / 2;
        if (fill_up_to(costs, n_layers, n_stages, beside, middle, layout))
            high = middle;
        else
            low = middle;
    }
    fill_up_to(costs, n_layers, n_stages, beside, high * (1 + 1e-12), layout);
}

static double whole(poe_part_time part)
{
    return part.forward + part.backward;
}

static int layers_of(const poe_options *o)
{
    int n = 0;
    for (int k = 0; k < o->stages.count; k++)
        n += o->stages.layers[k];
    return n;
}

/* Sets o->stages to the most even ones over n_ranks. */
static poe_status spread(const poe_plan_settings *s, poe_options *o, int n_ranks)
{
    poe_model *model;
    poe_status status = new_model(o, &model);
    if (status == POE_OK) {
        const poe_calibration *c = s->calibration;
        bool local = strcmp(o->objective, "poe") == 0, all_predict = strcmp(o->objective, "bp") != 0;
        double costs[POE_MAX_LAYERS], embedding = whole(c->embedding), head = whole(c->head);
        for (int i = 0; i < model->n_layers; i++)
            costs[i] = whole(layer_time(c, model, i));
        double beside[3] = {embedding + (all_predict ? head : 0), (local ? embedding : 0) + (all_predict ? head : 0),
                            (local || n_ranks == 1 ? embedding : 0) + head};
        poe_plan_even(costs, model->n_layers, n_ranks, beside, &o->stages);
    }
    free(model);
    return status;
}

/* --- beside 1f1b --------------------------------------------------------------------------------------------------------- */

static void as_baseline(poe_options *o)
{
    strcpy(o->objective, "bp");
    strcpy(o->backout, "off");
    strcpy(o->schedule, "1f1b");
    strcpy(o->sync, "exact");
    o->sync_delay = o->sync_every = 0;
}

static void as_poe(poe_options *o, int delay)
{
    strcpy(o->objective, "poe");
    strcpy(o->schedule, "poe");
    o->sync_delay = delay;
    o->sync_every = 0;
}

static void set_micro_batches(poe_options *o, int n_micro)
{
    o->total_batch_size = (int64_t)n_micro * o->device_batch_size * o->sequence_len;
}

/* Three runs of the same layers on the same ranks; those of `base` are laid out already. */
typedef struct rivals {
    const poe_plan_settings *settings;
    poe_options poe, base;
    int n_ranks;
} rivals;

static poe_status compare(rivals *r, int n_micro, double *exact, double *stale)
{
    poe_plan_case *cases = malloc(3 * sizeof(*cases));
    set_micro_batches(&r->poe, n_micro);
    set_micro_batches(&r->base, n_micro);
    as_poe(&r->poe, 0);
    poe_status status = cases ? solve_case(r->settings, &r->base, r->n_ranks, "1f1b", &cases[0]) : out_of_memory();
    if (status == POE_OK)
        status = solve_case(r->settings, &r->poe, r->n_ranks, "exact", &cases[1]);
    if (status == POE_OK) {
        int delay = poe_theory_smallest_delay(&cases[1].job);
        as_poe(&r->poe, delay < POE_OPTION_DELAY ? delay : POE_OPTION_DELAY);
        status = solve_case(r->settings, &r->poe, r->n_ranks, "stale", &cases[2]);
    }
    if (status == POE_OK) {
        *exact = cases[0].result.step / cases[1].result.step;
        *stale = cases[0].result.step / cases[2].result.step;
    }
    free(cases);
    return status;
}

/* The largest M at which a ratio that falls with M is at least 1. */
static poe_status find_until(rivals *r, bool stale, int *until)
{
    int low = 0, high = POE_PLAN_MOST_MICRO + 1;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        double ratios[2];
        poe_status status = compare(r, middle, &ratios[0], &ratios[1]);
        if (status != POE_OK)
            return status;
        if (ratios[stale] >= 1)
            low = middle;
        else
            high = middle;
    }
    *until = low;
    return POE_OK;
}

static poe_status weigh(const poe_plan_settings *s, int n_ranks, poe_plan_balance *balance)
{
    rivals r = {.settings = s, .poe = *s->options, .base = *s->options, .n_ranks = n_ranks};
    *balance = (poe_plan_balance){.n_ranks = n_ranks};
    as_baseline(&r.base);
    as_poe(&r.poe, 0);
    poe_status status = POE_OK;
    if (s->calibration) {
        status = spread(s, &r.poe, n_ranks);
        if (status == POE_OK)
            status = spread(s, &r.base, n_ranks);
    }
    for (int i = 0; status == POE_OK && i < POE_PLAN_MICRO; i++)
        status = compare(&r, poe_plan_micro[i], &balance->exact[i], &balance->stale[i]);
    if (status == POE_OK)
        status = find_until(&r, false, &balance->until_exact);
    return status == POE_OK ? find_until(&r, true, &balance->until_stale) : status;
}

/* At 2, 4, 8, ... ranks that the layers allow, and at the number that was asked for; given times hold for it alone. */
static poe_status weigh_all(const poe_plan_settings *s, poe_plan *plan)
{
    int layers = layers_of(s->options), most = layers < 64 ? layers : 64;
    poe_status status = POE_OK;
    bool asked = s->n_ranks < 2;
    for (int p = 2; status == POE_OK && s->calibration && p <= most && plan->n_balances < POE_PLAN_RANKS - 1; p *= 2) {
        if (!asked && s->n_ranks < p) {
            status = weigh(s, s->n_ranks, &plan->balances[plan->n_balances++]);
            asked = true;
        }
        if (status == POE_OK)
            status = weigh(s, p, &plan->balances[plan->n_balances++]);
        asked |= p == s->n_ranks;
    }
    if (status == POE_OK && !asked)
        status = weigh(s, s->n_ranks, &plan->balances[plan->n_balances++]);
    return status;
}

/* --- the plan ------------------------------------------------------------------------------------------------------------ */

static poe_status add_case(const poe_plan_settings *s, const poe_options *o, const char *name, poe_plan *plan)
{
    poe_status status = solve_case(s, o, s->n_ranks, name, &plan->cases[plan->n_cases]);
    plan->n_cases += status == POE_OK;
    return status;
}

/* Where one link is much longer than the others, its share of the delay is less than its round trip takes. */
static poe_status widen_links(const poe_plan_settings *s, poe_options *o, int *link_window)
{
    poe_theory_job job;
    int window;
    poe_status status = make_job(s, o, s->n_ranks, &job);
    if (status == POE_OK)
        status = poe_theory_smallest_window(&job, &window);
    *link_window = status == POE_OK && window > job.window ? window : 0;
    if (*link_window)
        o->link_window = *link_window;
    return status;
}

/* The rule that never waits for a total, unless it is what was asked for. */
static poe_status add_streaming(const poe_plan_settings *s, const poe_options *asked, poe_plan *plan)
{
    poe_options o = *asked;
    o.sync_delay = plan->smallest_delay;
    o.sync_every = 0;
    poe_status status = widen_links(s, &o, &plan->link_window);
    bool same = asked->sync_delay == o.sync_delay && asked->link_window == o.link_window;
    return status != POE_OK || same ? status : add_case(s, &o, "streaming", plan);
}

static int capped_delay(const poe_theory_job *job)
{
    int delay = poe_theory_smallest_delay(job);
    return delay < POE_OPTION_DELAY ? delay : POE_OPTION_DELAY;
}

static bool same_layout(const poe_stage_list *a, const poe_stage_list *b)
{
    return a->count == b->count && memcmp(a->layers, b->layers, (size_t)a->count * sizeof(a->layers[0])) == 0;
}

static poe_status add_even_cases(const poe_plan_settings *s, const poe_options *asked, poe_plan *plan)
{
    poe_options o = *asked;
    poe_status status = spread(s, &o, s->n_ranks);
    if (status != POE_OK || same_layout(&o.stages, &asked->stages))
        return status;
    status = add_case(s, &o, "even", plan);
    const poe_theory_job *job = &plan->cases[plan->n_cases - 1].job;
    if (status == POE_OK && job->order.schedule == POE_SCHEDULE_POE && job->shares) {
        o.sync_delay = capped_delay(job);
        o.sync_every = 0;
        status = add_case(s, &o, "even streaming", plan);
    }
    return status;
}

static poe_status add_baseline(const poe_plan_settings *s, const poe_options *asked, poe_plan *plan)
{
    poe_options o = *asked;
    as_baseline(&o);
    poe_status status = s->calibration ? spread(s, &o, s->n_ranks) : POE_OK;
    return status == POE_OK ? add_case(s, &o, "1f1b", plan) : status;
}

static poe_status measure_memory(const poe_plan_settings *s, const poe_options *o, poe_plan *plan)
{
    poe_model *model;
    poe_status status = new_model(o, &model);
    int threads = poe_run_threads(o, s->n_ranks);
    poe_layout layout;
    poe_layout_init(&layout, o, s->n_ranks);
    bool agents = poe_options_agents(o, s->n_ranks);
    for (int k = 0; status == POE_OK && k < s->n_ranks; k++)
        status = poe_run_size(o, model, &layout, poe_layout_stage(&layout, k), threads, agents, &plan->memory[k]);
    free(model);
    return status;
}

static void count_bytes(const poe_theory_job *job, poe_plan *plan)
{
    double sums = !job->shares ? 0 : job->shared_bytes / (job->every ? job->every : 1);
    if (job->order.schedule == POE_SCHEDULE_DDP) {
        plan->down_bytes = 2 * sums * (job->order.n_ranks - 1) / job->order.n_ranks;
        return;
    }
    bool linked = job->order.n_ranks > 1;
    plan->down_bytes = linked ? job->order.n_micro * job->forward_bytes + sums : 0;
    plan->up_bytes = linked ? job->order.n_micro * job->backward_bytes + sums : 0;
}

poe_status poe_plan_make(const poe_plan_settings *s, poe_plan *plan)
{
    poe_options asked = *s->options;
    *plan = (poe_plan){.tokens = (double)asked.total_batch_size};
    bool replicated = strcmp(asked.schedule, "ddp") == 0, fits = replicated || asked.stages.count == s->n_ranks;
    poe_status status = fits ? POE_OK : spread(s, &asked, s->n_ranks);
    if (status == POE_OK)
        status = add_case(s, &asked, "asked", plan);
    if (status == POE_OK)
        status = measure_memory(s, &asked, plan);
    if (status != POE_OK)
        return status;
    const poe_theory_job *job = &plan->cases[0].job;
    count_bytes(job, plan);
    bool poe = job->order.schedule == POE_SCHEDULE_POE;
    plan->smallest_delay = poe && job->shares ? poe_theory_smallest_delay(job) : 0;
    if (plan->smallest_delay && plan->smallest_delay <= POE_OPTION_DELAY)
        status = add_streaming(s, &asked, plan);
    if (status == POE_OK && s->calibration && !replicated)
        status = add_even_cases(s, &asked, plan);
    if (status == POE_OK && poe && s->n_ranks > 1)
        status = add_baseline(s, &asked, plan);
    return status == POE_OK && poe ? weigh_all(s, plan) : status;
}
