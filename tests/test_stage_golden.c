/* SPDX-License-Identifier: MIT
 * Whole training runs against those of the PyTorch reference, every stage in this process. Tolerances are the golden
 * README's, what single precision meets: losses 1e-5, gradients 2e-5, final weights 5e-4 (relative norm per tensor). */
#include "stages/cpu/cpu.h"
#include "stages/plain/plain.h"
#include "tests/golden.h"
#include "tests/stage_chain.h"

enum { DELAY_MAX = 8 };

static poe_status create_cpu(const poe_backend_limits *limits, poe_backend **backend)
{
    return poe_cpu_create(poe_kernels_best(), 2, limits, backend);
}

static const chain_backend plain = {"plain", poe_plain_create, poe_plain_destroy};
static const chain_backend cpu = {"cpu", create_cpu, poe_cpu_destroy};

/* The sync rule, and what it holds back. */
typedef struct sync_state {
    bool every;
    int n;         /* every: period, else delay */
    int n_pending; /* every: sums added to sums[0] */
    float *sums[DELAY_MAX];
    poe_rates rates[DELAY_MAX];
} sync_state;

static void sync_open(sync_state *sync, const golden *run, size_t floats)
{
    const char *rule = json_string_value(json_object_get(run->config, "sync")), *number = strchr(rule, ':');
    *sync = (sync_state){.every = strncmp(rule, "every", 5) == 0};
    sync->n = number ? atoi(number + 1) : strcmp(rule, "exact") != 0;
    golden_require(sync->n + 1 < DELAY_MAX, "sync");
    for (int i = 0; i < DELAY_MAX; i++)
        sync->sums[i] = calloc(floats, sizeof(float));
}

static void sync_close(sync_state *sync)
{
    for (int i = 0; i < DELAY_MAX; i++)
        free(sync->sums[i]);
}

static void sync_mean(stage_chain *chain, sync_state *sync, const poe_rates *rates, bool last)
{
    float *held = sync->sums[0], *sum = sync->sums[1];
    chain_sum_shared(chain, sum);
    for (size_t i = 0; i < chain->shared_floats; i++)
        held[i] += sum[i];
    if (++sync->n_pending < sync->n && !last)
        return;
    for (size_t i = 0; i < chain->shared_floats; i++)
        held[i] /= (float)sync->n_pending;
    chain_update_shared(chain, rates, held);
    memset(held, 0, chain->shared_floats * sizeof(*held));
    sync->n_pending = 0;
}

static void sync_delayed(stage_chain *chain, sync_state *sync, const poe_rates *rates, bool last)
{
    chain_sum_shared(chain, sync->sums[sync->n_pending]);
    sync->rates[sync->n_pending++] = *rates;
    while (sync->n_pending > (last ? 0 : sync->n)) {
        float *first = sync->sums[0];
        chain_update_shared(chain, &sync->rates[0], first);
        memmove(&sync->sums[0], &sync->sums[1], (DELAY_MAX - 1) * sizeof(first));
        memmove(&sync->rates[0], &sync->rates[1], (DELAY_MAX - 1) * sizeof(sync->rates[0]));
        sync->sums[DELAY_MAX - 1] = first;
        sync->n_pending--;
    }
}

/* --- tensors ---------------------------------------------------------------------------------------------------- */

/* A stage's part of each tensor. */
static void load_table(const poe_safetensors *file, const poe_tensor_table *table, float *values)
{
    for (size_t i = 0; i < table->count; i++) {
        const poe_tensor *tensor = &table->rows[i];
        const poe_safetensor *found = poe_safetensors_find(file, tensor->name);
        golden_require(found != NULL, tensor->name);
        poe_safetensors_read(file, found, tensor->first, tensor->rows * tensor->cols, values + tensor->offset);
    }
}

static void load(stage_chain *chain, const golden *run)
{
    poe_safetensors *file = golden_tensors(run, "init.safetensors");
    for (int k = 0; k < chain->n_stages; k++) {
        poe_stage *stage = chain->stages[k];
        load_table(file, poe_stage_own_table(stage), poe_stage_own_values(stage));
        load_table(file, poe_stage_shared_table(stage), poe_stage_shared_values(stage));
        poe_stage_parameters_changed(stage);
    }
    poe_safetensors_close(file);
}

static double distance(const float *a, const float *b, size_t n) /* b NULL: from zero */
{
    double squares = 0;
    for (size_t i = 0; i < n; i++)
        squares += ((double)a[i] - (b ? b[i] : 0)) * ((double)a[i] - (b ? b[i] : 0));
    return sqrt(squares);
}

/* Returns ||a - e|| / ||e||, and says so where it is above `tolerance`; 1e-12: a zero gradient must be zero. A stage's
 * slice of a vector is measured by the norm of the whole. */
static double compare(const golden *run, const poe_safetensors *file, const poe_tensor *tensor, const float *actual,
                      double tolerance)
{
    const poe_safetensor *found = poe_safetensors_find(file, tensor->name);
    golden_require(found != NULL, tensor->name);
    size_t n = tensor->rows * tensor->cols, whole = found->shape[0] * found->shape[1];
    float *expected = malloc(whole * sizeof(*expected));
    golden_require(expected != NULL, "out of memory");
    poe_safetensors_read(file, found, 0, whole, expected);
    double off = distance(actual, expected + tensor->first, n), norm = distance(expected, NULL, whole);
    free(expected);
    if (!(off <= tolerance * norm + 1e-12)) {
        fprintf(stderr, "%s: %s is off by %.3g of norm %.3g\n", run->name, tensor->name, off, norm);
        check_failures++;
    }
    return norm > 0 ? off / norm : 0;
}

static double compare_table(const golden *run, const poe_safetensors *file, const poe_tensor_table *table,
                            const float *values, double tolerance)
{
    double worst = 0;
    for (size_t i = 0; i < table->count; i++)
        worst = fmax(worst, compare(run, file, &table->rows[i], values + table->rows[i].offset, tolerance));
    return worst;
}

static double compare_gradients(stage_chain *chain, const golden *run, const float *sum)
{
    poe_safetensors *file = golden_tensors(run, "grads.safetensors");
    double worst = compare_table(run, file, poe_stage_shared_table(chain->stages[0]), sum, 2e-5);
    for (int k = 0; k < chain->n_stages; k++) {
        const poe_tensor_table *own = poe_stage_own_table(chain->stages[k]);
        for (size_t i = 0; i < own->count; i++)
            worst = fmax(worst, compare(run, file, &own->rows[i], chain_own_gradient(chain->stages[k], i), 2e-5));
    }
    poe_safetensors_close(file);
    return worst;
}

static double compare_weights(stage_chain *chain, const golden *run)
{
    poe_safetensors *file = golden_tensors(run, "final.safetensors");
    double worst = 0;
    for (int k = 0; k < chain->n_stages; k++) {
        poe_stage *stage = chain->stages[k];
        worst = fmax(worst, compare_table(run, file, poe_stage_own_table(stage), poe_stage_own_values(stage), 5e-4));
        worst =
            fmax(worst, compare_table(run, file, poe_stage_shared_table(stage), poe_stage_shared_values(stage), 5e-4));
    }
    poe_safetensors_close(file);
    return worst;
}

/* --- runs ------------------------------------------------------------------------------------------------------- */

/* Gradients of one step; returns the largest relative error of a loss. */
static double step_gradients(stage_chain *chain, const golden *run, int step)
{
    size_t b = (size_t)run->device_batch_size, t = (size_t)run->model.config.sequence_len;
    double losses[POE_MAX_STAGES] = {0}, worst = 0;
    chain_clear(chain);
    for (int m = 0; m < run->n_micro; m++) {
        const int32_t *idx = run->tokens + (size_t)(step * run->n_micro + m) * b * t;
        chain_run(chain, b, t, idx, idx + 1, run->n_micro, losses);
    }
    const json_t *expected = json_object_get(json_array_get(run->expected, (size_t)step), "stage_loss");
    size_t n = 0;
    for (int k = 0; k < chain->n_stages; k++) {
        if (!poe_stage_has_head(chain->stages[k]))
            continue;
        double e = json_number_value(json_array_get(expected, n++));
        CHECK_NEAR(losses[k], e, 1e-5, 0);
        worst = fmax(worst, fabs(losses[k] / e - 1));
    }
    CHECK_INT(n, json_array_size(expected));
    return worst;
}

static void check_run(const char *name, const chain_backend *kind, poe_recompute recompute)
{
    golden run;
    stage_chain chain;
    sync_state sync;
    golden_open(&run, name);
    chain_open_recomputing(&chain, &run.model, (size_t)run.device_batch_size, true, kind, recompute);
    sync_open(&sync, &run, chain.shared_floats);
    load(&chain, &run);
    double loss = 0, gradients = 0;
    for (int step = 0; step < run.optimizer.num_iterations; step++) {
        poe_rates rates;
        poe_rates_at(&run.model, &run.optimizer, step, &rates);
        loss = fmax(loss, step_gradients(&chain, &run, step));
        if (step == 0) {
            chain_sum_shared(&chain, sync.sums[0]);
            gradients = compare_gradients(&chain, &run, sync.sums[0]);
            memset(sync.sums[0], 0, chain.shared_floats * sizeof(float));
        }
        chain_update_own(&chain, &rates);
        bool last = step + 1 == run.optimizer.num_iterations;
        (sync.every ? sync_mean : sync_delayed)(&chain, &sync, &rates, last);
    }
    printf("%-13s on %s, --recompute %s: worst relative error of a loss %.1e, a gradient %.1e, a final weight %.1e\n",
           name, kind->name, poe_recompute_name(recompute), loss, gradients, compare_weights(&chain, &run));
    sync_close(&sync);
    chain_close(&chain);
    golden_close(&run);
}

int main(int argc, char **argv)
{
    (void)argc;
    poe_blas_ensure(poe_kernels_best(), argv);
    if (!poe_test_shared())
        poe_test_skip("no golden runs: set POE_SHARED to the folder that holds golden/");
    for (int i = 0; i < GOLDEN_COUNT; i++)
        for (int r = 0; r < POE_RECOMPUTE_COUNT; r++)
            check_run(golden_names[i], &cpu, (poe_recompute)r);
    check_run(golden_names[0], &plain, POE_RECOMPUTE_NONE); /* one is enough of the slow one: every path is in it */
    return check_result();
}
