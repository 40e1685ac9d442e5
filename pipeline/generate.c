/* SPDX-License-Identifier: MIT */
#include "pipeline/generate.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "src/log.h"
#include "src/rng.h"

static int descending(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

/* The smallest value that is still among the `k` largest. */
static float kth_largest(const float *values, size_t v, size_t k)
{
    float *sorted = malloc(v * sizeof(float));
    if (!sorted)
        return -INFINITY; /* no memory to choose by: all tokens stay */
    memcpy(sorted, values, v * sizeof(float));
    qsort(sorted, v, sizeof(float), descending);
    float least = sorted[k - 1];
    free(sorted);
    return least;
}

int32_t poe_sample(float *lp, size_t v, double temperature, int top_k, double uniform)
{
    size_t best = 0;
    for (size_t i = 1; i < v; i++)
        best = lp[i] > lp[best] ? i : best;
    if (temperature <= 0)
        return (int32_t)best;
    float least = top_k > 0 && (size_t)top_k < v ? kth_largest(lp, v, (size_t)top_k) : -INFINITY;
    double top = lp[best], sum = 0;
    for (size_t i = 0; i < v; i++) {
        double p = lp[i] >= least ? exp((lp[i] - top) / temperature) : 0;
        lp[i] = (float)p;
        sum += lp[i];
    }
    double left = uniform * sum;
    for (size_t i = 0; i < v; i++) {
        left -= lp[i];
        if (left < 0)
            return (int32_t)i;
    }
    return (int32_t)best;
}

/* The last position's aggregate: this stage's term, if it takes part, added to the running sums that ride forward. */
static poe_status add_term(poe_evaluator *ev, const poe_sampling *sampling, const poe_batch *batch)
{
    size_t v = (size_t)ev->corpus->vocab_size;
    int k = ev->streams->stage;
    poe_status status = poe_streams_receive_aggregate(ev->streams, batch->step, 0, 1, v);
    if (status != POE_OK)
        return status;
    if (k >= sampling->first && k <= sampling->last) {
        poe_stage_logits(ev->stage, batch->rows * batch->t - 1, 1, ev->z);
        poe_aggregate_add(ev->aggregate, ev->streams->aggregate, ev->lp, ev->z, 1, v);
    }
    return poe_streams_send_aggregate(ev->streams, batch->step, 0, 1, v);
}

static poe_status forward_context(poe_evaluator *ev, const poe_sampling *sampling, poe_batch *batch,
                                  const int32_t *context)
{
    poe_streams *streams = ev->streams;
    poe_status status = POE_OK;
    if (streams->source >= 0) {
        status = poe_streams_receive_batch(streams, batch);
    } else {
        poe_streams_own_tokens(streams, 0, batch);
        memcpy(batch->idx, context, batch->t * sizeof(int32_t));
        memset(batch->targets, 0xff, batch->t * sizeof(int32_t));
    }
    poe_crossing out;
    if (status == POE_OK)
        status = poe_streams_output(streams, batch, &out);
    if (status != POE_OK)
        return status;
    poe_stage_forward(ev->stage, 0, batch->rows, batch->t, batch->idx, poe_crossing_or_null(&batch->in),
                      poe_crossing_or_null(&out));
    status = poe_streams_send_batch(streams, batch);
    if (status == POE_OK)
        status = add_term(ev, sampling, batch);
    poe_streams_release_batch(streams);
    return status;
}

/* Who has the aggregate: the last rank; of replicas the first one does it all. */
static int drawing_rank(const poe_evaluator *ev)
{
    return ev->replicated ? 0 : poe_comm_size(ev->comm) - 1;
}

/* Every rank learns the token that one draws. */
static poe_status draw(poe_evaluator *ev, const poe_sampling *sampling, poe_rng *rng, int32_t *token)
{
    int last = drawing_rank(ev);
    size_t v = (size_t)ev->corpus->vocab_size;
    if (poe_comm_rank(ev->comm) == last) {
        poe_aggregate_finish(ev->aggregate, ev->lp, ev->streams->aggregate, sampling->last - sampling->first + 1, 1, v);
        *token = poe_sample(ev->lp, v, sampling->temperature, sampling->top_k, poe_rng_uniform(rng));
    }
    return poe_comm_broadcast(ev->comm, last, token, sizeof(*token));
}

poe_status poe_generate(poe_evaluator *ev, const poe_sampling *sampling, const int32_t *prompt, int32_t n_prompt,
                        int32_t bos, poe_emit emit, void *arg)
{
    int32_t facts[2] = {n_prompt, bos};
    poe_status status = poe_comm_broadcast(ev->comm, 0, facts, sizeof(facts));
    if (status != POE_OK)
        return status;
    int32_t length = facts[0];
    int32_t *context = calloc((size_t)length + (size_t)sampling->max_tokens, sizeof(int32_t));
    if (!context) {
        poe_error("out of memory for a text of %d tokens", length + sampling->max_tokens);
        return POE_FAILED;
    }
    if (poe_comm_rank(ev->comm) == 0)
        memcpy(context, prompt, (size_t)length * sizeof(int32_t));
    poe_rng rng;
    poe_rng_init(&rng, sampling->seed, "generate");
    int32_t most = (int32_t)ev->streams->t;
    for (int i = 0; status == POE_OK && i < sampling->max_tokens; i++) {
        int32_t used = length < most ? length : most, token = -1;
        poe_batch batch = {.kind = POE_KIND_GENERATE, .step = i, .rows = 1, .t = (size_t)used};
        poe_comm_doing(ev->comm, "generation", i, 0);
        if (!ev->replicated || poe_comm_rank(ev->comm) == drawing_rank(ev))
            status = forward_context(ev, sampling, &batch, context + length - used);
        if (status == POE_OK)
            status = draw(ev, sampling, &rng, &token);
        if (status != POE_OK || token == facts[1])
            break;
        context[length++] = token;
        if (poe_comm_rank(ev->comm) == 0)
            emit(arg, token);
    }
    free(context);
    return status;
}

void poe_emit_text(void *tokenizer, int32_t token)
{
    size_t length;
    const char *bytes = poe_tokenizer_bytes(tokenizer, token, &length);
    fwrite(bytes, 1, length, stdout);
    fflush(stdout);
}
