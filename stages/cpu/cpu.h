/* SPDX-License-Identifier: MIT
 * The CPU backend: fp32, matrix products by oneDNN or OpenBLAS on fixed tiles dealt to a team of threads, everything else in
 * vectorised C compiled once per instruction set and chosen at run time. */
#ifndef POE_STAGES_CPU_CPU_H
#define POE_STAGES_CPU_CPU_H

#include "stages/ops.h"

/* Kernel sets, each a superset of the one before it. On other processors than x86-64 only generic exists. */
typedef enum poe_kernels { POE_KERNELS_GENERIC, POE_KERNELS_AVX2, POE_KERNELS_AVX512, POE_KERNELS_COUNT } poe_kernels;

const char *poe_kernels_name(poe_kernels kernels); /* "generic", "avx2", "avx512" */
/* The best set that this processor and operating system can run. */
poe_kernels poe_kernels_best(void);
/* `text`: "auto", "" or a name. POE_BAD_INPUT (said): unknown, or this processor cannot run it. */
poe_status poe_kernels_parse(const char *text, poe_kernels *kernels);

/* To be called first thing in main(): chooses the library of matrix products for `kernels`, oneDNN where the build and
 * the processor (AVX2) allow it. Otherwise OpenBLAS, which reads OPENBLAS_CORETYPE before main() and does not know newer
 * processors in Debian's build: unless it runs the kernels that belong to `kernels` and starts no threads of its own, sets
 * the variables and executes this program again, once. Returns when nothing has to change. */
void poe_blas_ensure(poe_kernels kernels, char **argv);
/* "oneDNN" or "OpenBLAS", the name of the kernels that it runs ("AVX-512", "SkylakeX"), and a known-answer product:
 * POE_FAILED (said) when it is wrong. */
const char *poe_blas_library(void);
const char *poe_blas_kernels(void);
poe_status poe_blas_check(void);

/* How products of bf16 operands are computed, for the start-up table: on AMX tiles, or why not. */
const char *poe_bf16_engine(poe_kernels kernels);
/* A known-answer product of that kind: POE_FAILED (said) when it is wrong. */
poe_status poe_bf16_check(poe_kernels kernels);

/* Bytes of scratch that poe_cpu_create() will allocate. */
size_t poe_cpu_scratch_bytes(const poe_backend_limits *limits, int n_threads);

/* A backend with its own team of `n_threads`. POE_FAILED: said. */
poe_status poe_cpu_create(poe_kernels kernels, int n_threads, const poe_backend_limits *limits, poe_backend **backend);
void poe_cpu_destroy(poe_backend *backend); /* NULL is legal */

#endif
