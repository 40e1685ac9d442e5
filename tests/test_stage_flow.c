/* SPDX-License-Identifier: MIT
 * Gradients that cross stages, micro-batches under way at once, backward in two parts: whatever the partition, the
 * order of tasks, the number of slots and of threads, gradients, weights and losses are the same bit for bit, and a
 * step allocates nothing. */
#include "src/log.h"
#include "tests/stage_small.h"

enum { MICRO = 5, STEPS = 3, LAYERS_MAX = 5 };

static int32_t tokens[MICRO][B * T], wanted[MICRO][B * T];

static void fill_micro_batches(void)
{
    poe_rng rng;
    poe_rng_init(&rng, 17, "micro-batches");
    for (int m = 0; m < MICRO; m++)
        for (int i = 0; i < B * T; i++) {
            tokens[m][i] = (int32_t)(poe_rng_next(&rng) % V);
            wanted[m][i] = i % 7 == m ? -1 : (int32_t)(poe_rng_next(&rng) % V);
        }
}

/* --- allocations (the linker sends the program's here) ----------------------------------------------------------- */

static long allocations;

void *__real_malloc(size_t bytes);
void *__real_calloc(size_t n, size_t bytes);
void *__real_realloc(void *memory, size_t bytes);
void *__wrap_malloc(size_t bytes);
void *__wrap_calloc(size_t n, size_t bytes);
void *__wrap_realloc(void *memory, size_t bytes);

void *__wrap_malloc(size_t bytes)
{
    allocations++;
    return __real_malloc(bytes);
}

void *__wrap_calloc(size_t n, size_t bytes)
{
    allocations++;
    return __real_calloc(n, bytes);
}

void *__wrap_realloc(void *memory, size_t bytes)
{
    allocations++;
    return __real_realloc(memory, bytes);
}

/* --- orders of tasks --------------------------------------------------------------------------------------------- */

typedef enum task_kind { FORWARD, BACKWARD, INPUT, WEIGHT } task_kind;

typedef struct task {
    task_kind kind;
    int micro;
} task;

/* What one stage does in a step. */
typedef struct order {
    task tasks[3 * MICRO];
    int count, done;
} order;

static void add_task(order *o, task_kind kind, int micro)
{
    o->tasks[o->count++] = (task){kind, micro};
}

/* `ahead`: how many forwards are done beyond the micro-batch of the next backward; `owed`: how many micro-batches the
 * weights' part comes late, -1 for a backward pass in one piece. */
static order make_order(int ahead, int owed)
{
    order o = {.count = 0};
    int forwards = 0;
    for (int m = 0; m < MICRO; m++) {
        for (; forwards < MICRO && forwards <= m + ahead; forwards++)
            add_task(&o, FORWARD, forwards);
        add_task(&o, owed < 0 ? BACKWARD : INPUT, m);
        if (owed >= 0 && m >= owed)
            add_task(&o, WEIGHT, m - owed);
    }
    for (int m = MICRO - owed; owed >= 0 && m < MICRO; m++)
        add_task(&o, WEIGHT, m);
    return o;
}

/* Whether what a stage's next task needs has been done by its neighbours. */
static bool is_ready(const stage_chain *chain, int k, task next, bool forwarded[][MICRO], bool backwarded[][MICRO])
{
    if (next.kind == FORWARD)
        return k == 0 || forwarded[k - 1][next.micro];
    bool waits = chain_flows_back(chain) && k < chain->n_stages - 1 && next.kind != WEIGHT;
    return !waits || backwarded[k + 1][next.micro];
}

static void run_task(stage_chain *chain, int k, task next, double *losses)
{
    if (next.kind == FORWARD)
        chain_forward(chain, k, next.micro, B, T, tokens[next.micro]);
    else if (next.kind == WEIGHT)
        poe_stage_backward_weight(chain->stages[k], next.micro % chain->slots);
    else
        chain_backward(chain, next.kind == INPUT ? poe_stage_backward_input : poe_stage_backward, k, next.micro,
                       wanted[next.micro], MICRO, losses);
}

/* The stages take turns, each with its next task when that can be done. */
static void run_orders(stage_chain *chain, order *orders, double *losses)
{
    bool forwarded[POE_MAX_STAGES][MICRO] = {{0}}, backwarded[POE_MAX_STAGES][MICRO] = {{0}};
    for (bool moved = true; moved;) {
        moved = false;
        for (int k = 0; k < chain->n_stages; k++) {
            order *o = &orders[k];
            if (o->done == o->count || !is_ready(chain, k, o->tasks[o->done], forwarded, backwarded))
                continue;
            task next = o->tasks[o->done++];
            run_task(chain, k, next, losses);
            if (next.kind != WEIGHT)
                (next.kind == FORWARD ? forwarded : backwarded)[k][next.micro] = true;
            moved = true;
        }
    }
    for (int k = 0; k < chain->n_stages; k++)
        CHECK_INT(orders[k].done, orders[k].count);
}

/* One micro-batch after the other. */
static void run_in_turn(stage_chain *chain, double *losses)
{
    for (int m = 0; m < MICRO; m++)
        chain_run(chain, B, T, tokens[m], wanted[m], MICRO, losses);
}

static void update(stage_chain *chain, float *sum)
{
    chain_sum_shared(chain, sum);
    chain_update_own(chain, &some_rates);
    chain_update_shared(chain, &some_rates, sum);
    chain_clear(chain);
}

/* --- partitions -------------------------------------------------------------------------------------------------- */

static void open_partition(stage_chain *chain, const poe_model_config *config, int n_stages, const int *layers,
                           poe_model *model, bool training, const chain_backend *kind)
{
    poe_model_config parts = *config;
    parts.n_stages = n_stages;
    memcpy(parts.stage_layers, layers, (size_t)n_stages * sizeof(*layers));
    *model = small_model(&parts);
    open_random(chain, model, training, kind);
}

/* The last stage's logits after a forward through all, against the single stage's. */
static void check_same_logits(stage_chain *one, stage_chain *parts)
{
    static float z[2][B * T * V];
    int last = parts->n_stages - 1;
    chain_run(one, B, T, tokens[0], NULL, 1, NULL);
    chain_run(parts, B, T, tokens[0], NULL, 1, NULL);
    for (int k = 0; k <= last; k++)
        CHECK_INT(poe_stage_has_head(parts->stages[k]), k == last);
    poe_stage_logits(one->stages[0], 0, B * T, z[0]);
    poe_stage_logits(parts->stages[last], 0, B * T, z[1]);
    CHECK(same_floats(z[0], z[1], B * T * V));
}

/* Several steps of bp over a partition are those of bp in one stage; so is evaluation. */
static void check_partition(const poe_model_config *config, int n_stages, const int *layers, const chain_backend *kind)
{
    int n_layers = 0;
    for (int k = 0; k < n_stages; k++)
        n_layers += layers[k];
    poe_model whole, split;
    stage_chain one, parts, eval;
    open_partition(&one, config, 1, &n_layers, &whole, true, kind);
    open_partition(&parts, config, n_stages, layers, &split, true, kind);
    open_partition(&eval, config, n_stages, layers, &split, false, kind);
    check_same_logits(&one, &eval);
    for (int step = 0; step < STEPS; step++) {
        double loss = 0, losses[LAYERS_MAX] = {0};
        float nothing[1];
        run_in_turn(&one, &loss);
        run_in_turn(&parts, losses);
        CHECK(losses[n_stages - 1] == loss);
        for (int k = 0; k < n_stages - 1; k++)
            CHECK(losses[k] == 0);
        check_same_tensors(&one, &parts);
        update(&one, nothing);
        update(&parts, nothing);
    }
    check_same_tensors(&one, &parts);
    chain_close(&one);
    chain_close(&parts);
    chain_close(&eval);
}

/* With L = 5 backout's layer 2 is on each side of a boundary, alone between two, and on a stage in the middle; with 2
 * and 4 it is the last stage's first. */
static void check_partitions(const chain_backend *kind)
{
    static const int partitions[][LAYERS_MAX + 1] = {{2, 1, 1},    {2, 2, 2},    {2, 2, 3},    {2, 3, 2},
                                                     {3, 2, 1, 2}, {3, 1, 2, 2}, {3, 1, 1, 2}, {5, 1, 1, 1, 1, 1}};
    for (size_t i = 0; i < sizeof(partitions) / sizeof(*partitions); i++) {
        poe_model_config config = small_config(1, (int[]){1});
        config.objective = POE_OBJECTIVE_BP;
        config.alpha = 0; /* without effect on one loss */
        config.backout = true;
        check_partition(&config, partitions[i][0], partitions[i] + 1, kind);
        config.backout = false;
        config.head = POE_HEAD_PER_STAGE;
        config.n_kv_head = config.n_head;
        check_partition(&config, partitions[i][0], partitions[i] + 1, kind);
    }
}

/* --- orders, slots, two parts ------------------------------------------------------------------------------------ */

typedef struct arrangement {
    const char *name;
    bool fills, may_split, splits; /* fills: all forwards come first */
    poe_recompute recompute;
} arrangement;

static const arrangement arrangements[] = {{"gpipe", true, false, false, POE_RECOMPUTE_NONE},
                                           {"gpipe, recompute norms", true, false, false, POE_RECOMPUTE_NORMS},
                                           {"gpipe, recompute block", true, false, false, POE_RECOMPUTE_BLOCK},
                                           {"1f1b", false, false, false, POE_RECOMPUTE_NONE},
                                           {"1f1b, recompute block", false, false, false, POE_RECOMPUTE_BLOCK},
                                           {"1f1b that could split", false, true, false, POE_RECOMPUTE_NONE},
                                           {"zero bubble", false, true, true, POE_RECOMPUTE_NONE},
                                           {"gpipe in two parts", true, true, true, POE_RECOMPUTE_NONE}};

/* Stage k of K runs K-1-k micro-batches ahead, and owes weights for k: so K slots are always enough. */
static int slots_of(const arrangement *a, int n_stages)
{
    return a->fills ? MICRO : n_stages;
}

static void open_arrangement(stage_chain *chain, const poe_model *model, const arrangement *a,
                             const chain_backend *kind)
{
    poe_stage_settings like = {.rows = B,
                               .slots = slots_of(a, model->config.n_stages),
                               .training = true,
                               .split = a->may_split,
                               .recompute = a->recompute};
    chain_open_like(chain, model, &like, MICRO, kind);
    for (int k = 0; k < chain->n_stages; k++)
        randomise_stage(chain->stages[k], 11);
}

static void run_arrangement(stage_chain *chain, const arrangement *a, double *losses)
{
    order orders[LAYERS_MAX];
    for (int k = 0; k < chain->n_stages; k++)
        orders[k] = make_order(a->fills ? MICRO : chain->n_stages - 1 - k, a->splits ? k : -1);
    run_orders(chain, orders, losses);
}

static void check_same_step(stage_chain *expected, stage_chain *actual, const char *name)
{
    bool same = true;
    for (int k = 0; k < expected->n_stages; k++)
        same = same && same_gradients(expected->stages[k], actual->stages[k]) &&
               same_values(expected->stages[k], actual->stages[k]);
    if (!same) {
        fprintf(stderr, "%s on %s: not the bits of one micro-batch at a time\n", name, actual->kind->name);
        check_failures++;
    }
}

/* `one` has run STEPS steps in turn, from the same weights; its gradients are the last step's. */
static void check_arrangement(stage_chain *one, const double *losses, const arrangement *a, const chain_backend *kind)
{
    stage_chain chain;
    double got[LAYERS_MAX] = {0};
    float *sum = calloc(one->shared_floats + 1, sizeof(*sum));
    chain_require(sum != NULL, "memory");
    open_arrangement(&chain, one->model, a, kind);
    long before = allocations;
    for (int step = 0; step < STEPS; step++) {
        if (step > 0)
            update(&chain, sum);
        run_arrangement(&chain, a, got);
    }
    CHECK_INT(allocations - before, 0);
    check_same_step(one, &chain, a->name);
    for (int k = 0; k < chain.n_stages; k++)
        CHECK(got[k] == losses[k]);
    chain_close(&chain);
    free(sum);
}

static void check_model(const poe_model *model, const chain_backend *const *kinds, int n_kinds)
{
    stage_chain one;
    double losses[LAYERS_MAX] = {0};
    open_random(&one, model, true, kinds[0]);
    float *sum = calloc(one.shared_floats + 1, sizeof(*sum));
    chain_require(sum != NULL, "memory");
    for (int step = 0; step < STEPS; step++) {
        if (step > 0)
            update(&one, sum);
        run_in_turn(&one, losses);
    }
    for (size_t i = 0; i < sizeof(arrangements) / sizeof(*arrangements); i++)
        for (int j = 0; j < n_kinds; j++)
            check_arrangement(&one, losses, &arrangements[i], kinds[j]);
    chain_close(&one);
    free(sum);
}

/* On the reference, and on cpu with any number of threads. */
static void check_orders_of(const poe_model *model)
{
    static const chain_backend *const reference[] = {&plain}, *const fast[] = {&cpu, &cpu_pair, &cpu_threads};
    check_model(model, reference, 1);
    check_model(model, fast, 3);
}

static void check_orders(void)
{
    poe_model_config config = small_config(3, (int[]){1, 2, 2});
    config.objective = POE_OBJECTIVE_BP;
    config.backout = true;
    poe_model model = small_model(&config);
    check_orders_of(&model);
    config.objective = POE_OBJECTIVE_HIERARCHICAL;
    config.alpha = 0.5;
    config.head = POE_HEAD_PER_STAGE;
    model = small_model(&config);
    check_orders_of(&model);
    config.objective = POE_OBJECTIVE_POE;
    model = small_model(&config);
    check_orders_of(&model);
}

int main(int argc, char **argv)
{
    (void)argc;
    poe_blas_ensure(poe_kernels_best(), argv);
    poe_log *log = poe_log_create(0, 1);
    poe_log_attach(log);
    fill_micro_batches();
    check_partitions(&plain);
    check_partitions(&cpu);
    check_orders();
    poe_log_attach(NULL);
    poe_log_destroy(log);
    return check_result();
}
