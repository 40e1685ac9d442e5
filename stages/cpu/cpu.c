/* SPDX-License-Identifier: MIT
 * The backend as an object: which kernels the processor can run, the table of operations, the team, the scratch. */
#include "stages/cpu/cpu.h"

#include <cblas.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "src/log.h"
#include "stages/cpu/internal.h"

static const char *const kernels_names[POE_KERNELS_COUNT] = {"generic", "avx2", "avx512"};

#if defined(__x86_64__)
static const poe_vector *const vectors[] = {&poe_vector_generic, &poe_vector_avx2, &poe_vector_avx512};
#else
static const poe_vector *const vectors[] = {&poe_vector_generic};
#endif

const char *poe_kernels_name(poe_kernels kernels)
{
    return kernels_names[kernels];
}

poe_kernels poe_kernels_best(void)
{
#if defined(__x86_64__)
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        return POE_KERNELS_GENERIC;
    bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 ? POE_KERNELS_AVX512 : POE_KERNELS_AVX2;
#else
    return POE_KERNELS_GENERIC;
#endif
}

poe_status poe_kernels_parse(const char *text, poe_kernels *kernels)
{
    poe_kernels best = poe_kernels_best();
    if (!*text || !strcmp(text, "auto")) {
        *kernels = best;
        return POE_OK;
    }
    for (poe_kernels k = 0; k < POE_KERNELS_COUNT; k++) {
        if (strcmp(text, kernels_names[k]))
            continue;
        if (k > best) {
            poe_error("--kernels %s: this processor's best kernels are %s", text, kernels_names[best]);
            return POE_BAD_INPUT;
        }
        *kernels = k;
        return POE_OK;
    }
    poe_error("--kernels is \"%s\": it must be auto, generic, avx2 or avx512", text);
    return POE_BAD_INPUT;
}

/* --- work for the team ------------------------------------------------------------------------------------------- */

typedef struct span_run {
    poe_span_kernel *kernel;
    const void *args;
    size_t n, span;
} span_run;

static void span_task(void *arg, size_t task, int thread)
{
    const span_run *run = arg;
    (void)thread;
    size_t first = task * run->span;
    run->kernel(run->args, task, first, poe_smaller(first + run->span, run->n));
}

void poe_cpu_spans(poe_cpu *cpu, poe_span_kernel *kernel, const void *args, size_t n, size_t span)
{
    poe_team_run(cpu->team, poe_parts(n, span), span_task, &(span_run){kernel, args, n, span});
}

/* --- memory ------------------------------------------------------------------------------------------------------ */

static void *memory_allocate(poe_backend *be, const char *what, size_t bytes)
{
    (void)be;
    poe_arena arena;
    return poe_arena_create(&arena, what, poe_larger(bytes, 1)) == POE_OK ? arena.base : NULL;
}

static void memory_free(poe_backend *be, void *memory, size_t bytes)
{
    (void)be;
    if (memory)
        munmap(memory, poe_larger(bytes, 1));
}

/* --- the object -------------------------------------------------------------------------------------------------- */

size_t poe_cpu_scratch_bytes(const poe_backend_limits *limits, int n_threads)
{
    size_t bytes = poe_cpu_rows_scratch(limits);
    bytes = poe_larger(bytes, poe_cpu_attention_scratch(limits, n_threads));
    bytes = poe_larger(bytes, poe_cpu_head_scratch(limits));
    if (limits->training)
        bytes = poe_larger(bytes, poe_cpu_optimizer_scratch(limits));
    return bytes + poe_cpu_products_scratch(limits, n_threads);
}

poe_status poe_cpu_create(poe_kernels kernels, int n_threads, const poe_backend_limits *limits, poe_backend **backend)
{
    poe_cpu *cpu = calloc(1, sizeof(*cpu));
    if (!cpu) {
        poe_error("cannot allocate the CPU backend: %s", strerror(errno));
        return POE_FAILED;
    }
    openblas_set_num_threads(1); /* the threads are ours */
    cpu->base.ops = &cpu->ops;
    cpu->vector = vectors[kernels];
    cpu->ops.name = "cpu";
    cpu->ops.memory_allocate = memory_allocate;
    cpu->ops.memory_free = memory_free;
    poe_cpu_rows_ops(&cpu->ops);
    poe_cpu_products_ops(&cpu->ops);
    poe_cpu_attention_ops(&cpu->ops);
    poe_cpu_head_ops(&cpu->ops);
    poe_cpu_optimizer_ops(&cpu->ops);
    cpu->block = limits->bf16 ? poe_block_choose(kernels) : NULL;
    cpu->block_bytes = poe_cpu_products_scratch(limits, n_threads);
    poe_status status = poe_arena_create(&cpu->scratch, "scratch", poe_cpu_scratch_bytes(limits, n_threads));
    if (status == POE_OK)
        status = poe_team_create(n_threads, &cpu->team);
    if (status != POE_OK) {
        poe_cpu_destroy(&cpu->base);
        return status;
    }
    cpu->block_scratch = poe_arena_take(&cpu->scratch, cpu->block_bytes);
    *backend = &cpu->base;
    return POE_OK;
}

void poe_cpu_destroy(poe_backend *backend)
{
    if (!backend)
        return;
    poe_cpu *cpu = poe_cpu_of(backend);
    poe_team_destroy(cpu->team);
    poe_arena_destroy(&cpu->scratch);
    free(cpu);
}
