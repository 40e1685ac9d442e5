/* SPDX-License-Identifier: MIT */
#include "pipeline/evaluate.h"

#include <math.h>
#include <string.h>

enum { CHUNK_ROWS = 64 };

poe_aggregate poe_aggregate_parse(const char *text)
{
    if (strcmp(text, "sum") == 0)
        return POE_AGGREGATE_SUM;
    return strcmp(text, "mean-raw") == 0 ? POE_AGGREGATE_MEAN_RAW : POE_AGGREGATE_MEAN;
}

size_t poe_evaluate_chunk_rows(const poe_stage *stage)
{
    size_t most = poe_stage_logit_rows(stage);
    return most < CHUNK_ROWS ? most : CHUNK_ROWS;
}

/* out = z - log(sum(exp(z))), over v values; out may be z. */
static void log_softmax(float *out, const float *z, size_t v)
{
    float top = z[0];
    for (size_t i = 1; i < v; i++)
        top = z[i] > top ? z[i] : top;
    double sum = 0;
    for (size_t i = 0; i < v; i++)
        sum += expf(z[i] - top);
    double shift = top + log(sum);
    for (size_t i = 0; i < v; i++)
        out[i] = (float)(z[i] - shift);
}

void poe_aggregate_add(poe_aggregate how, float *sums, float *lp, const float *z, size_t n, size_t v)
{
    for (size_t r = 0; r < n; r++) {
        log_softmax(lp + r * v, z + r * v, v);
        const float *term = how == POE_AGGREGATE_SUM ? z + r * v : lp + r * v;
        for (size_t i = 0; i < v; i++)
            sums[r * v + i] += term[i];
    }
}

void poe_aggregate_finish(poe_aggregate how, float *out, const float *sums, int n_stages, size_t n, size_t v)
{
    float scale = how == POE_AGGREGATE_SUM ? 1.0f : 1.0f / (float)n_stages;
    for (size_t i = 0; i < n * v; i++)
        out[i] = scale * sums[i];
    for (size_t r = 0; how != POE_AGGREGATE_MEAN_RAW && r < n; r++)
        log_softmax(out + r * v, out + r * v, v);
}

static size_t best_of(const float *lp, size_t v)
{
    size_t best = 0;
    for (size_t i = 1; i < v; i++)
        best = lp[i] > lp[best] ? i : best;
    return best;
}

static void score_rows(poe_score *score, const float *lp, const int32_t *targets, const int32_t *token_bytes, size_t n,
                       size_t v)
{
    for (size_t r = 0; r < n; r++) {
        int32_t target = targets[r];
        if (target < 0 || !token_bytes[target])
            continue;
        score->nats -= lp[r * v + (size_t)target];
        score->right += best_of(lp + r * v, v) == (size_t)target;
    }
}

static void count_targets(poe_evaluation *e, const int32_t *targets, const int32_t *token_bytes, size_t n)
{
    for (size_t r = 0; r < n; r++) {
        if (targets[r] < 0 || !token_bytes[targets[r]])
            continue;
        e->targets++;
        e->bytes += token_bytes[targets[r]];
    }
}

/* No scores from here on: the running sums are passed on as they are. */
static poe_status pass_sums(poe_evaluator *ev, const poe_batch *batch, poe_evaluation *e)
{
    int k = ev->streams->stage - ev->first_head;
    size_t v = (size_t)ev->corpus->vocab_size, total = batch->rows * batch->t;
    e->stage[k].nats = e->prefix[k].nats = NAN;
    for (size_t first = 0; first < total; first += ev->chunk, ev->next.chunk++) {
        size_t n = total - first < ev->chunk ? total - first : ev->chunk;
        poe_status status = poe_streams_receive_aggregate(ev->streams, batch->step, ev->next.chunk, n, v);
        if (status == POE_OK)
            status = poe_streams_send_aggregate(ev->streams, batch->step, ev->next.chunk, n, v);
        if (status != POE_OK)
            return status;
    }
    return POE_OK;
}

/* Scores the micro-batch that was forwarded last, by chunks, which are numbered over the whole evaluation. */
static poe_status score_batch(poe_evaluator *ev, const poe_batch *batch, poe_evaluation *e)
{
    int k = ev->streams->stage - ev->first_head;
    size_t v = (size_t)ev->corpus->vocab_size, total = batch->rows * batch->t;
    for (size_t first = 0; first < total; first += ev->chunk, ev->next.chunk++) {
        size_t n = total - first < ev->chunk ? total - first : ev->chunk;
        const int32_t *targets = batch->targets + first;
        poe_stage_logits(ev->stage, first, n, ev->z);
        poe_status status = poe_streams_receive_aggregate(ev->streams, batch->step, ev->next.chunk, n, v);
        if (status != POE_OK)
            return status;
        float *sums = ev->streams->aggregate;
        poe_aggregate_add(ev->aggregate, sums, ev->lp, ev->z, n, v);
        status = poe_streams_send_aggregate(ev->streams, batch->step, ev->next.chunk, n, v);
        if (status != POE_OK)
            return status;
        score_rows(&e->stage[k], ev->lp, targets, ev->corpus->token_bytes, n, v);
        poe_aggregate_finish(ev->aggregate, ev->lp, sums, k + 1, n, v);
        score_rows(&e->prefix[k], ev->lp, targets, ev->corpus->token_bytes, n, v);
    }
    return POE_OK;
}

static poe_status next_batch(poe_evaluator *ev, poe_batch *batch)
{
    if (ev->streams->source >= 0)
        return poe_streams_receive_batch(ev->streams, batch);
    size_t rows;
    poe_streams_own_tokens(ev->streams, 0, batch);
    return poe_feed_next(ev->corpus->eval, batch->idx, batch->targets, &rows);
}

/* True when another replica scores it. */
static bool passes_over(const poe_evaluator *ev, const poe_batch *batch)
{
    return ev->replicated && batch->micro % poe_comm_size(ev->comm) != poe_comm_rank(ev->comm);
}

static poe_status evaluate_batch(poe_evaluator *ev, poe_batch *batch, poe_evaluation *e)
{
    poe_crossing out;
    poe_status status = next_batch(ev, batch);
    if (status != POE_OK || passes_over(ev, batch))
        return status;
    if (ev->absent)
        batch->flags |= POE_FLAG_ABSENT;
    bool absent = batch->flags & POE_FLAG_ABSENT;
    status = poe_streams_output(ev->streams, batch, &out);
    if (status != POE_OK)
        return status;
    if (!absent)
        poe_stage_forward(ev->stage, 0, batch->rows, batch->t, batch->idx, poe_crossing_or_null(&batch->in),
                          poe_crossing_or_null(&out));
    status = poe_streams_send_batch(ev->streams, batch);
    if (status == POE_OK && ev->streams->stage >= ev->first_head)
        status = (absent ? pass_sums : score_batch)(ev, batch, e);
    count_targets(e, batch->targets, ev->corpus->token_bytes, batch->rows * batch->t);
    poe_streams_release_batch(ev->streams);
    return status;
}

/* What a rank knows: the scores of its own stage. */
typedef struct own_scores {
    poe_score stage, prefix;
    int64_t targets, bytes;
} own_scores;

static void add_score(poe_score *sum, const poe_score *more)
{
    sum->nats += more->nats;
    sum->right += more->right;
}

static void add_replicas(poe_evaluation *e, const own_scores *all, int n)
{
    e->stage[0] = e->prefix[0] = (poe_score){0};
    e->targets = e->bytes = 0;
    for (int r = 0; r < n; r++) {
        add_score(&e->stage[0], &all[r].stage);
        add_score(&e->prefix[0], &all[r].prefix);
        e->targets += all[r].targets;
        e->bytes += all[r].bytes;
    }
}

static poe_status share_scores(poe_evaluator *ev, poe_evaluation *e)
{
    own_scores mine = {.targets = e->targets, .bytes = e->bytes}, all[POE_MAX_STAGES];
    int k = ev->streams->stage - ev->first_head;
    if (k >= 0) {
        mine.stage = e->stage[k];
        mine.prefix = e->prefix[k];
    }
    poe_status status = poe_comm_gather(ev->comm, &mine, all, sizeof(mine));
    if (status == POE_OK && ev->replicated)
        add_replicas(e, all, poe_comm_size(ev->comm));
    for (k = 0; status == POE_OK && !ev->replicated && k < e->n_stages; k++) {
        e->stage[k] = all[ev->first_head + k].stage;
        e->prefix[k] = all[ev->first_head + k].prefix;
    }
    return status;
}

static poe_batch batch_of(const poe_evaluator *ev, int64_t step, int micro)
{
    return (poe_batch){.kind = POE_KIND_EVALUATE,
                       .step = step,
                       .micro = micro,
                       .rows = (size_t)ev->corpus->eval_rows[micro],
                       .t = ev->streams->t};
}

/* Reading starts at the beginning, and passes over what is done. */
static poe_status seek(poe_evaluator *ev, int64_t step)
{
    if (!ev->corpus->eval)
        return POE_OK;
    poe_status status = poe_feed_seek(ev->corpus->eval, ev->corpus->eval_start);
    for (int micro = 0; status == POE_OK && micro < ev->next.micro; micro++) {
        poe_batch batch = batch_of(ev, step, micro);
        status = next_batch(ev, &batch);
    }
    return status;
}

poe_status poe_evaluate(poe_evaluator *ev, int64_t step, poe_evaluation *e)
{
    if (!ev->next.micro)
        *e = (poe_evaluation){.n_stages = ev->heads};
    poe_status status = seek(ev, step);
    while (status == POE_OK && ev->next.micro < ev->corpus->n_eval) {
        poe_batch batch = batch_of(ev, step, ev->next.micro);
        poe_comm_doing(ev->comm, "evaluation", step, ev->next.micro);
        status = evaluate_batch(ev, &batch, e);
        ev->next.micro++;
        if (status == POE_OK && ev->between)
            status = ev->between(ev->context, step);
    }
    ev->next.micro = ev->next.chunk = 0;
    return status == POE_OK ? share_scores(ev, e) : status;
}

double poe_evaluation_bpb(const poe_evaluation *e, const poe_score *score)
{
    return score->nats / (M_LN2 * (double)e->bytes);
}

double poe_evaluation_nats(const poe_evaluation *e, const poe_score *score)
{
    return score->nats / (double)e->targets;
}

double poe_evaluation_accuracy(const poe_evaluation *e, const poe_score *score)
{
    return isnan(score->nats) ? NAN : (double)score->right / (double)e->targets;
}

typedef double (*measure)(const poe_evaluation *, const poe_score *);

/* NaN has no place in JSON: null stands for it. */
static json_t *number(double x)
{
    return isfinite(x) ? json_real(x) : json_null();
}

static json_t *views_json(const poe_evaluation *e, measure of)
{
    json_t *stage = json_array(), *prefix = json_array();
    for (int k = 0; k < e->n_stages; k++) {
        json_array_append_new(stage, number(of(e, &e->stage[k])));
        json_array_append_new(prefix, number(of(e, &e->prefix[k])));
    }
    return json_pack("{s:o, s:o, s:o}", "stage", stage, "prefix", prefix, "aggregate",
                     number(of(e, &e->prefix[e->n_stages - 1])));
}

json_t *poe_evaluation_json(const poe_evaluation *e, int64_t step, bool has_tokenizer)
{
    return json_pack("{s:I, s:o, s:o, s:I}", "step", (json_int_t)step, has_tokenizer ? "bpb" : "nats",
                     views_json(e, has_tokenizer ? poe_evaluation_bpb : poe_evaluation_nats), "accuracy",
                     views_json(e, poe_evaluation_accuracy), "targets", (json_int_t)e->targets);
}
