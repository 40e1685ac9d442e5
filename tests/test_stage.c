/* SPDX-License-Identifier: MIT
 * A stage by itself: gradients against finite differences (on the reference backend, which rounds least), the cpu
 * backend against the reference, and on both the identities of spec 2, evaluation, memory. Where two computations are
 * the same operations on the same numbers, they must agree bit for bit.
 */
#include "stages/stage.h"

#include "src/log.h"
#include "tests/stage_small.h"

/* --- finite differences ----------------------------------------------------------------------------------------- */

static double loss_of_stage(stage_chain *chain, int k)
{
    double loss;
    poe_stage *stage = chain->stages[k];
    poe_stage_parameters_changed(stage);
    chain_forward(chain, k, 0, B, T, idx);
    CHECK_INT(poe_stage_backward(stage, 0, targets, 1, NULL, NULL, &loss), POE_OK);
    return loss;
}

/* What all gradients are of where they flow back (each loss has weight 1 here). Stage 0's replica of what is shared is
 * the one that counts. */
static double loss_of_all(stage_chain *chain)
{
    double losses[POE_MAX_STAGES] = {0}, sum = 0;
    for (int k = 0; k < chain->n_stages; k++) {
        if (k > 0)
            memcpy(poe_stage_shared_values(chain->stages[k]), poe_stage_shared_values(chain->stages[0]),
                   chain->shared_floats * sizeof(float));
        poe_stage_parameters_changed(chain->stages[k]);
    }
    chain_run(chain, B, T, idx, targets, 1, losses);
    for (int k = 0; k < chain->n_stages; k++)
        sum += losses[k];
    return sum;
}

static double loss_of(stage_chain *chain, int k)
{
    return chain_flows_back(chain) ? loss_of_all(chain) : loss_of_stage(chain, k);
}

/* Moves w along half its gradient and half a random direction and compares the change of the loss with the gradient's
 * prediction. The move is such that the loss changes by 2e-3, or by less if it would change the tensor by more than 2
 * %; then single precision leaves noise of about 1e-7 on the losses and curvature a few 1e-3 of the change. */
static void check_direction(stage_chain *chain, int k, const poe_tensor *tensor, float *w, const float *gradient)
{
    size_t n = tensor->rows * tensor->cols;
    float *saved = malloc(n * sizeof(*saved));
    double *move = malloc(n * sizeof(*move)), g_norm = 0, r_norm = 0, w_norm = 0, slope = 0, predicted = 0;
    chain_require(saved && move, "memory");
    poe_rng rng;
    poe_rng_init(&rng, 3, tensor->name);
    for (size_t i = 0; i < n; i++) {
        move[i] = poe_rng_normal(&rng);
        r_norm += move[i] * move[i];
        g_norm += (double)gradient[i] * gradient[i];
        w_norm += (double)w[i] * w[i];
    }
    CHECK(g_norm > 0);
    for (size_t i = 0; i < n; i++) {
        move[i] = gradient[i] / sqrt(g_norm) + move[i] / sqrt(r_norm);
        slope += move[i] * gradient[i];
    }
    memcpy(saved, w, n * sizeof(*saved));
    double h = fmin(1e-3 / fabs(slope), 0.02 * sqrt(w_norm)), change = 0;
    for (int side = 1; side >= -1; side -= 2) {
        for (size_t i = 0; i < n; i++) {
            w[i] = (float)(saved[i] + side * h * move[i]);
            predicted += side * (double)gradient[i] * ((double)w[i] - saved[i]);
        }
        change += side * loss_of(chain, k);
    }
    memcpy(w, saved, n * sizeof(*saved));
    if (!(fabs(change - predicted) <= 5e-3 * fabs(predicted) + 3e-7)) {
        fprintf(stderr, "stage %d, %s: the loss changes by %.6g, its gradient says %.6g\n", k, tensor->name, change,
                predicted);
        check_failures++;
    }
    free(saved);
    free(move);
}

static float *copied(const float *from, size_t floats)
{
    float *copy = malloc((floats + 1) * sizeof(*copy));
    chain_require(copy != NULL, "memory");
    memcpy(copy, from, floats * sizeof(*copy));
    return copy;
}

static void check_own_gradients(stage_chain *chain, int k)
{
    poe_stage *stage = chain->stages[k];
    const poe_tensor_table *own = poe_stage_own_table(stage);
    for (size_t i = 0; i < own->count; i++) {
        if (!own->rows[i].trained)
            continue;
        chain_clear(chain);
        loss_of(chain, k);
        float *gradient = copied(chain_own_gradient(stage, i), own->rows[i].rows * own->rows[i].cols);
        check_direction(chain, k, &own->rows[i], poe_stage_own_values(stage) + own->rows[i].offset, gradient);
        free(gradient);
    }
}

/* `gradients`: laid out as the shared table. */
static void check_shared_gradients(stage_chain *chain, int k, const float *gradients)
{
    const poe_tensor_table *table = poe_stage_shared_table(chain->stages[k]);
    for (size_t i = 0; i < table->count; i++) {
        size_t offset = table->rows[i].offset;
        check_direction(chain, k, &table->rows[i], poe_stage_shared_values(chain->stages[k]) + offset,
                        gradients + offset);
    }
}

/* Under poe all gradients of a stage are those of its own loss with its input held fixed; otherwise those of the sum of
 * all losses. */
static void check_gradients(const poe_model *model)
{
    stage_chain chain;
    open_random(&chain, model, true, &plain);
    float *sum = calloc(chain.shared_floats + 1, sizeof(*sum));
    chain_require(sum != NULL, "memory");
    chain_run(&chain, B, T, idx, NULL, 1, NULL);
    for (int k = 0; k < chain.n_stages; k++) {
        check_own_gradients(&chain, k);
        chain_clear(&chain);
        loss_of(&chain, k);
        chain_sum_shared(&chain, sum);
        if (k == 0 || !chain_flows_back(&chain))
            check_shared_gradients(&chain, k, sum);
    }
    free(sum);
    chain_close(&chain);
}

static void check_finite_differences(void)
{
    poe_model_config config = small_config(2, (int[]){2, 1});
    config.head = POE_HEAD_PER_STAGE;
    poe_model model = small_model(&config);
    check_gradients(&model);
    config = small_config(1, (int[]){3});
    config.objective = POE_OBJECTIVE_BP;
    config.backout = true;
    model = small_model(&config);
    check_gradients(&model);
    config = small_config(3, (int[]){1, 2, 1});
    config.objective = POE_OBJECTIVE_BP;
    config.backout = true;
    model = small_model(&config);
    check_gradients(&model);
    config.objective = POE_OBJECTIVE_HIERARCHICAL;
    model = small_model(&config);
    check_gradients(&model);
    config.head = POE_HEAD_PER_STAGE;
    model = small_model(&config);
    check_gradients(&model);
    config = small_config(1, (int[]){1}); /* backout subtracts the last layer's own output */
    config.objective = POE_OBJECTIVE_BP;
    config.backout = true;
    model = small_model(&config);
    check_gradients(&model);
}

/* --- backends --------------------------------------------------------------------------------------------------- */

static void check_close(const poe_tensor_table *table, const float *a, const float *b, size_t floats)
{
    for (size_t i = 0; i < table->count; i++) {
        const poe_tensor *tensor = &table->rows[i];
        if (tensor->offset >= floats)
            continue;
        double off = relative_distance(a + tensor->offset, b + tensor->offset, tensor->rows * tensor->cols);
        if (!(off <= 2e-5)) { /* single precision, as for the golden runs */
            fprintf(stderr, "%s: the backends' gradients differ by %.3g\n", tensor->name, off);
            check_failures++;
        }
    }
}

/* One step on the reference, on cpu, and on cpu with more threads, which must change nothing. */
static void check_step_on_backends(const poe_model *model)
{
    static const chain_backend *const kinds[3] = {&plain, &cpu, &cpu_threads};
    stage_chain chains[3];
    double losses[3][3] = {{0}};
    for (int i = 0; i < 3; i++) {
        open_random(&chains[i], model, true, kinds[i]);
        chain_run(&chains[i], B, T, idx, targets, 1, losses[i]);
    }
    for (int k = 0; k < model->config.n_stages; k++) {
        poe_stage *a = chains[0].stages[k], *b = chains[1].stages[k], *c = chains[2].stages[k];
        CHECK_NEAR(losses[1][k], losses[0][k], 1e-6, 0);
        CHECK(losses[1][k] == losses[2][k]);
        CHECK(same_gradients(b, c));
        check_close(poe_stage_own_table(a), poe_stage_own_gradients(b), poe_stage_own_gradients(a),
                    own_gradient_floats(a));
        check_close(poe_stage_shared_table(a), poe_stage_shared_gradients(b), poe_stage_shared_gradients(a), SIZE_MAX);
        for (int i = 1; i < 3; i++) {
            poe_stage_update_own(chains[i].stages[k], &some_rates);
            poe_stage_update_shared(chains[i].stages[k], &some_rates, poe_stage_shared_gradients(chains[i].stages[k]));
        }
        CHECK(same_values(b, c));
    }
    for (int i = 0; i < 3; i++)
        chain_close(&chains[i]);
}

static void check_backends(void)
{
    poe_model_config config = small_config(3, (int[]){2, 1, 1});
    config.head = POE_HEAD_PER_STAGE;
    poe_model model = small_model(&config);
    check_step_on_backends(&model);
    config.objective = POE_OBJECTIVE_HIERARCHICAL;
    model = small_model(&config);
    check_step_on_backends(&model);
    config.head = POE_HEAD_SHARED;
    config.objective = POE_OBJECTIVE_BP;
    config.backout = true;
    model = small_model(&config);
    check_step_on_backends(&model);
    config = small_config(1, (int[]){3});
    config.objective = POE_OBJECTIVE_BP;
    config.backout = true;
    model = small_model(&config);
    check_step_on_backends(&model);
}

/* --- identities (spec 2) ---------------------------------------------------------------------------------------- */

/* Losses and gradients of stages 0 and 1 with a third stage behind them, with another one, and with none. */
static void check_prefix(const chain_backend *kind)
{
    poe_model_config config = small_config(3, (int[]){1, 2, 1});
    poe_model whole = small_model(&config);
    config.n_stages = 2;
    poe_model prefix = small_model(&config);
    memcpy(prefix.layers, whole.layers, sizeof(prefix.layers)); /* a layer's properties come with it */
    stage_chain a, b, c;
    open_random(&a, &whole, true, kind);
    open_random(&b, &whole, true, kind);
    open_random(&c, &prefix, true, kind);
    randomise_stage(b.stages[2], 99);
    double loss_a[3] = {0}, loss_b[3] = {0}, loss_c[3] = {0};
    chain_run(&a, B, T, idx, targets, 1, loss_a);
    chain_run(&b, B, T, idx, targets, 1, loss_b);
    chain_run(&c, B, T, idx, targets, 1, loss_c);
    for (int k = 0; k < 2; k++) {
        CHECK(loss_a[k] == loss_b[k] && loss_a[k] == loss_c[k]);
        CHECK(same_gradients(a.stages[k], b.stages[k]));
        /* the prefix's last stage keeps backout_lambda at the end of its own table */
        size_t common = own_gradient_floats(a.stages[k]);
        CHECK(same_floats(poe_stage_own_gradients(a.stages[k]), poe_stage_own_gradients(c.stages[k]), common));
    }
    CHECK(loss_a[2] != loss_b[2]);
    chain_close(&a);
    chain_close(&b);
    chain_close(&c);
}

/* pi = (L) with a shared head is bp without backout, updates included. */
static void check_single_stage_is_bp(const chain_backend *kind)
{
    poe_model_config config = small_config(1, (int[]){3});
    config.alpha = 0;
    poe_model poe = small_model(&config);
    config.objective = POE_OBJECTIVE_BP;
    poe_model bp = small_model(&config);
    stage_chain a, b;
    open_random(&a, &poe, true, kind);
    open_random(&b, &bp, true, kind);
    double loss_a = 0, loss_b = 0;
    chain_run(&a, B, T, idx, targets, 1, &loss_a);
    chain_run(&b, B, T, idx, targets, 1, &loss_b);
    CHECK(loss_a == loss_b);
    check_same_tensors(&a, &b);
    chain_update_own(&a, &some_rates);
    chain_update_own(&b, &some_rates);
    chain_update_shared(&a, &some_rates, poe_stage_shared_gradients(a.stages[0]));
    check_same_tensors(&a, &b);
    chain_close(&a);
    chain_close(&b);
}

static float *head_of(poe_stage *stage, bool own)
{
    const poe_tensor_table *table = own ? poe_stage_own_table(stage) : poe_stage_shared_table(stage);
    return (own ? poe_stage_own_values(stage) : poe_stage_shared_values(stage)) +
           poe_tensor_find(table, own ? "lm_head_stages.0.weight" : "lm_head.weight")->offset;
}

/* ps at K = 1 is one head W_head + W_head_0, and both get its gradient: equal heads stay equal. */
static void check_own_head(const chain_backend *kind)
{
    poe_model_config config = small_config(1, (int[]){2});
    poe_model shared = small_model(&config);
    config.head = POE_HEAD_PER_STAGE;
    poe_model per_stage = small_model(&config);
    stage_chain sh, ps;
    open_random(&sh, &shared, true, kind);
    open_random(&ps, &per_stage, true, kind);
    size_t n = shared.vocab_padded * C;
    float *whole = head_of(sh.stages[0], false), *half = head_of(ps.stages[0], false),
          *own = head_of(ps.stages[0], true);
    for (size_t i = 0; i < n; i++)
        half[i] = own[i] = whole[i] / 2; /* exact */
    poe_stage_parameters_changed(ps.stages[0]);
    double loss_sh = 0, loss_ps = 0;
    chain_run(&sh, B, T, idx, targets, 1, &loss_sh);
    chain_run(&ps, B, T, idx, targets, 1, &loss_ps);
    CHECK(loss_sh == loss_ps);
    CHECK(same_gradients(sh.stages[0], ps.stages[0]));
    chain_update_own(&ps, &some_rates);
    CHECK(!same_floats(half, own, n));
    chain_update_shared(&ps, &some_rates, poe_stage_shared_gradients(ps.stages[0]));
    CHECK(same_floats(half, own, n));
    double after = 0; /* the sum of the heads follows the update */
    chain_run(&ps, B, T, idx, targets, 1, &after);
    CHECK(after < loss_ps);
    chain_close(&sh);
    chain_close(&ps);
}

/* --- steps ------------------------------------------------------------------------------------------------------ */

/* The mean over two micro-batches is the mean of their gradients; 1e-5: the sums are taken in another order. */
static void check_micro_batches(const chain_backend *kind)
{
    poe_model_config config = small_config(1, (int[]){2});
    config.alpha = 0;
    poe_model model = small_model(&config);
    stage_chain chain;
    open_random(&chain, &model, true, kind);
    poe_stage *stage = chain.stages[0];
    size_t n = own_gradient_floats(stage);
    float *mean = calloc(n, sizeof(*mean));
    chain_require(mean != NULL, "memory");
    const float *gradients = poe_stage_own_gradients(stage);
    double loss = 0;
    for (int m = 0; m < 2; m++) {
        chain_clear(&chain);
        chain_run(&chain, 1, T, idx + m * T, targets + m * T, 1, &loss);
        for (size_t i = 0; i < n; i++)
            mean[i] += gradients[i] / 2;
    }
    chain_clear(&chain);
    for (int m = 0; m < 2; m++)
        chain_run(&chain, 1, T, idx + m * T, targets + m * T, 2, &loss);
    CHECK_NEAR(relative_distance(gradients, mean, n), 0, 0, 1e-5);
    free(mean);
    chain_close(&chain);
}

/* Evaluation keeps less, and computes the same; so does a shorter context, whose positions see the same past. */
static void check_evaluation(const chain_backend *kind, bool bp)
{
    poe_model_config config = small_config(bp ? 1 : 2, bp ? (int[]){4} : (int[]){2, 3});
    config.objective = bp ? POE_OBJECTIVE_BP : POE_OBJECTIVE_POE;
    config.head = POE_HEAD_PER_STAGE;
    config.backout = bp;
    poe_model model = small_model(&config);
    stage_chain train, eval;
    open_random(&train, &model, true, kind);
    open_random(&eval, &model, false, kind);
    float a[B * T * V], b[B * T * V];
    double losses[2] = {0}, sum = 0;
    int counted = 0, last = train.n_stages - 1;
    chain_run(&train, B, T, idx, targets, 1, losses);
    chain_run(&eval, B, T, idx, NULL, 1, NULL);
    CHECK_INT(poe_stage_logit_rows(eval.stages[last]), B * T);
    poe_stage_logits(train.stages[last], 0, B * T, a);
    poe_stage_logits(eval.stages[last], 0, B * T, b);
    CHECK(same_floats(a, b, B * T * V));
    CHECK(same_floats(train.out[last][0].h, eval.out[last][0].h, B * T * C));
    for (int r = 0; r < B * T; r++) {
        double total = 0;
        for (int j = 0; j < V; j++)
            total += exp(a[r * V + j]);
        counted += targets[r] >= 0;
        sum += targets[r] >= 0 ? log(total) - a[r * V + targets[r]] : 0;
    }
    CHECK_NEAR(losses[last], sum / counted, 2e-6, 0); /* logits are rounded to single precision */
    chain_run(&eval, 1, 5, idx, NULL, 1, NULL);
    poe_stage_logits(eval.stages[last], 2, 3, b);
    for (int i = 0; i < 3 * V; i++) /* fewer rows: other tiles, another order of sums */
        CHECK_NEAR(b[i], a[2 * V + i], 1e-5, 1e-5);
    chain_close(&train);
    chain_close(&eval);
}

/* Two micro-batches of different shapes, with a forward in between whose backward never comes, as in an evaluation. */
static void run_mixed(stage_chain *chain, double *losses)
{
    chain_run(chain, B, T, idx, targets, 2, losses);
    chain_run(chain, B, T - 1, idx + 1, NULL, 1, NULL);
    chain_run(chain, 1, 7, idx + T, targets + T, 2, losses);
}

/* Whatever is kept or made again: losses, gradients, outputs and logits are the same, in less memory. */
static void check_recompute_of(const poe_model *model, const chain_backend *kind)
{
    stage_chain chains[POE_RECOMPUTE_COUNT];
    double losses[POE_RECOMPUTE_COUNT][3] = {{0}};
    for (int r = 0; r < POE_RECOMPUTE_COUNT; r++) {
        open_random_recomputing(&chains[r], model, true, kind, (poe_recompute)r);
        run_mixed(&chains[r], losses[r]);
    }
    for (int r = 1; r < POE_RECOMPUTE_COUNT; r++) {
        for (int k = 0; k < model->config.n_stages; k++) {
            poe_stage *a = chains[0].stages[k], *b = chains[r].stages[k];
            float z[2][7 * V];
            poe_stage_logits(a, 0, 7, z[0]);
            poe_stage_logits(b, 0, 7, z[1]);
            CHECK(losses[r][k] == losses[0][k]);
            CHECK(same_gradients(a, b));
            CHECK(same_floats(chains[r].out[k][0].h, chains[0].out[k][0].h, B * T * C));
            CHECK(same_floats(z[0], z[1], 7 * V));
        }
    }
    for (int r = 0; r < POE_RECOMPUTE_COUNT; r++)
        chain_close(&chains[r]);
}

static void check_recompute_memory(const poe_model *model)
{
    uint64_t before = UINT64_MAX;
    for (int r = 0; r < POE_RECOMPUTE_COUNT; r++) {
        poe_stage_settings settings = {.rows = B, .slots = 1, .training = true, .recompute = (poe_recompute)r};
        poe_stage_memory size;
        CHECK_INT(poe_stage_size(model, &settings, &size), POE_OK);
        CHECK(size.activations < before);
        before = size.activations;
    }
}

static void check_recompute(const chain_backend *kind)
{
    poe_model_config config = small_config(3, (int[]){3, 1, 2});
    config.head = POE_HEAD_PER_STAGE;
    poe_model model = small_model(&config);
    check_recompute_of(&model, kind);
    check_recompute_memory(&model);
    for (int n_layers = 1; n_layers <= 4; n_layers++) { /* backout's layer: the last, the middle */
        config = small_config(1, &n_layers);
        config.objective = POE_OBJECTIVE_BP;
        config.backout = true;
        model = small_model(&config);
        check_recompute_of(&model, kind);
    }
}

/* --- parts of the shared tensors -------------------------------------------------------------------------------- */
typedef struct head_copy {
    poe_stage *stage;
    float *gradient;
    size_t floats;
    int calls;
} head_copy;

static void copy_head(void *arg)
{
    head_copy *copy = arg;
    poe_shared_extent head = poe_stage_shared_extent(poe_stage_shared_table(copy->stage), POE_SHARED_HEAD);
    copy->floats = head.floats;
    memcpy(copy->gradient, poe_stage_shared_gradients(copy->stage) + head.offset, head.floats * sizeof(float));
    copy->calls++;
}

static void update_in_parts(poe_stage *stage, const float *sum)
{
    static const poe_shared_part order[] = {POE_SHARED_SMEAR, POE_SHARED_HEAD, POE_SHARED_WTE};
    ++*poe_stage_shared_updates(stage);
    for (int i = 0; i < 3; i++)
        poe_stage_update_shared_part(stage, order[i], &some_rates,
                                     sum + poe_stage_shared_extent(poe_stage_shared_table(stage), order[i]).offset);
}

/* The head's gradient is final when it is said to be, and three updates of parts are the one of the whole. */
static void check_parts(const chain_backend *kind)
{
    poe_model_config config = small_config(1, (int[]){2});
    poe_model model = small_model(&config);
    stage_chain whole, parts;
    open_random(&whole, &model, true, kind);
    open_random(&parts, &model, true, kind);
    poe_stage *stage = parts.stages[0];
    float *gradients = poe_stage_shared_gradients(stage);
    head_copy copy = {.stage = stage, .gradient = malloc(model.vocab_padded * C * sizeof(float))};
    poe_stage_on_head_gradient(stage, copy_head, &copy);
    for (int step = 0; step < 2; step++) {
        double loss = 0;
        chain_run(&whole, B, T, idx, targets, 1, &loss);
        chain_run(&parts, B, T, idx, targets, 1, &loss);
        CHECK_INT(copy.calls, step + 1);
        CHECK_INT(copy.floats, model.vocab_padded * C);
        size_t head = poe_stage_shared_extent(poe_stage_shared_table(stage), POE_SHARED_HEAD).offset;
        CHECK(same_floats(copy.gradient, gradients + head, copy.floats));
        chain_update_shared(&whole, &some_rates, poe_stage_shared_gradients(whole.stages[0]));
        update_in_parts(stage, gradients);
        CHECK(same_floats(poe_stage_shared_values(stage), poe_stage_shared_values(whole.stages[0]),
                          poe_stage_shared_table(stage)->floats));
        CHECK_INT(*poe_stage_shared_updates(stage), step + 1);
        poe_stage_clear_shared_gradients(whole.stages[0]);
        for (poe_shared_part p = 0; p < POE_SHARED_PARTS; p++)
            poe_stage_clear_shared_part(stage, p);
    }
    for (poe_shared_part p = 0; p < POE_SHARED_PARTS; p++) {
        poe_shared_extent part = poe_stage_shared_extent(poe_stage_shared_table(stage), p);
        gradients[part.offset + part.floats - 1] = NAN;
        for (poe_shared_part q = 0; q < POE_SHARED_PARTS; q++)
            CHECK_INT(poe_stage_shared_part_finite(stage, q), q > p);
    }
    free(copy.gradient);
    chain_close(&whole);
    chain_close(&parts);
}

static void check_not_finite(const chain_backend *kind)
{
    poe_model_config config = small_config(1, (int[]){1});
    poe_model model = small_model(&config);
    stage_chain chain;
    double loss = 0;
    open_random(&chain, &model, true, kind);
    poe_stage *stage = chain.stages[0];
    chain_run(&chain, B, T, idx, targets, 1, &loss);
    CHECK(poe_stage_gradients_finite(stage));
    poe_stage_own_gradients(stage)[5] = INFINITY;
    CHECK(!poe_stage_gradients_finite(stage));
    poe_stage_clear_gradients(stage);
    CHECK(poe_stage_gradients_finite(stage));
    poe_stage_own_values(stage)[7] = NAN;
    poe_stage_forward(stage, 0, B, T, idx, NULL, NULL);
    CHECK_INT(poe_stage_backward(stage, 0, targets, 1, NULL, NULL, &loss), POE_NUMERIC);
    chain_close(&chain);
}

static void check_states(const chain_backend *kind)
{
    poe_model_config config = small_config(1, (int[]){2});
    poe_model model = small_model(&config);
    stage_chain chain;
    open_random(&chain, &model, true, kind);
    poe_stage *stage = chain.stages[0];
    double loss = 0;
    chain_run(&chain, B, T, idx, targets, 1, &loss);
    poe_stage_update_own(stage, &some_rates);
    CHECK_INT(*poe_stage_own_updates(stage), 1);
    CHECK_INT(*poe_stage_shared_updates(stage), 0);
    const poe_tensor_table *own = poe_stage_own_table(stage);
    for (size_t row = 0; row < own->count; row++) {
        const char *name = NULL;
        float *values = NULL;
        size_t floats = 0;
        const poe_tensor *tensor = &own->rows[row];
        int parts = poe_stage_state(stage, false, row, 1, &name, &values, &floats);
        CHECK_INT(parts, strcmp(tensor->name, "backout_lambda") == 0 ? 0 : 2);
        if (parts == 0)
            continue;
        bool matrix = tensor->group == POE_GROUP_MATRIX;
        CHECK_STRING(name, matrix ? "second" : "v");
        CHECK_INT(floats,
                  matrix ? (tensor->rows > tensor->cols ? tensor->rows : tensor->cols) : tensor->rows * tensor->cols);
        double sum = 0;
        for (size_t i = 0; i < floats; i++)
            sum += values[i];
        CHECK(sum > 0); /* it has seen a gradient */
    }
    chain_close(&chain);
}

/* --- memory ----------------------------------------------------------------------------------------------------- */

static poe_ops counting_ops;
static poe_backend *counted_backend;
static size_t allocated, live;
static int allowed; /* allocations until one fails */

static void *counting_allocate(poe_backend *be, const char *what, size_t bytes)
{
    (void)be;
    if (allowed-- == 0)
        return NULL;
    allocated += bytes;
    live += bytes;
    return counted_backend->ops->memory_allocate(counted_backend, what, bytes);
}

static void counting_free(poe_backend *be, void *memory, size_t bytes)
{
    (void)be;
    live -= bytes;
    counted_backend->ops->memory_free(counted_backend, memory, bytes);
}

static void check_memory_of(const poe_model *model, const poe_stage_settings *settings)
{
    poe_stage_memory size;
    poe_stage *stage;
    poe_backend counting = {&counting_ops};
    CHECK_INT(poe_stage_size(model, settings, &size), POE_OK);
    CHECK_INT(size.optimizer > 0, settings->training);
    allocated = 0;
    allowed = 100;
    CHECK_INT(poe_stage_create(model, settings, &counting, &stage), POE_OK);
    CHECK_INT(allocated, size.parameters + size.gradients + size.optimizer + size.activations);
    poe_stage_destroy(stage);
    CHECK_INT(live, 0);
    for (int n = 0; n < (settings->training ? 4 : 2); n++) {
        allowed = n;
        poe_log_hold();
        CHECK_INT(poe_stage_create(model, settings, &counting, &stage), POE_FAILED);
        poe_log_settle(false);
        CHECK_INT(live, 0);
    }
}

/* What is announced is what is allocated; without memory there is a status and nothing is left behind. */
static void check_memory(void)
{
    poe_model_config config = small_config(2, (int[]){1, 2});
    config.head = POE_HEAD_PER_STAGE;
    poe_model model = small_model(&config);
    poe_backend_limits limits;
    poe_stage_settings settings = {.stage = 1, .rows = B, .slots = 1, .training = true};
    poe_stage_limits(&model, &settings, &limits);
    chain_require(poe_plain_create(&limits, &counted_backend) == POE_OK, "a backend");
    counting_ops = *counted_backend->ops;
    counting_ops.memory_allocate = counting_allocate;
    counting_ops.memory_free = counting_free;
    check_memory_of(&model, &settings);
    settings.slots = 3;
    settings.split = true;
    check_memory_of(&model, &settings);
    for (int r = POE_RECOMPUTE_NORMS; r < POE_RECOMPUTE_COUNT; r++) {
        poe_stage_memory size;
        settings.recompute = (poe_recompute)r;
        poe_log_hold();
        CHECK_INT(poe_stage_size(&model, &settings, &size), POE_BAD_INPUT);
        poe_log_settle(false);
        settings.split = false;
        check_memory_of(&model, &settings);
        settings.split = true;
    }
    settings = (poe_stage_settings){.stage = 1, .rows = B, .slots = 1};
    check_memory_of(&model, &settings);
    model.config.objective = POE_OBJECTIVE_HIERARCHICAL;
    settings.training = true;
    check_memory_of(&model, &settings);
    poe_plain_destroy(counted_backend);
}

int main(int argc, char **argv)
{
    (void)argc;
    poe_blas_ensure(poe_kernels_best(), argv);
    poe_log *log = poe_log_create(0, 1);
    poe_log_attach(log);
    fill_tokens();
    check_finite_differences();
    check_backends();
    for (int i = 0; i < 2; i++) {
        const chain_backend *kind = i ? &cpu : &plain;
        check_prefix(kind);
        check_single_stage_is_bp(kind);
        check_own_head(kind);
        check_micro_batches(kind);
        check_evaluation(kind, false);
        check_evaluation(kind, true);
        check_recompute(kind);
        check_not_finite(kind);
        check_parts(kind);
        check_states(kind);
    }
    check_memory();
    poe_log_attach(NULL);
    poe_log_destroy(log);
    return check_result();
}
