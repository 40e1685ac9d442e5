/* SPDX-License-Identifier: MIT
 * Arithmetic of the vector kernels, in plain C that compilers turn into vector instructions. Included by vector.c
 * only, so once per instruction set. Every function gives the same bits whether it is vectorised or not: products
 * and sums are fused exactly where madd() says so, and reductions have POE_LANES partial sums in fixed places. */
#ifndef POE_STAGES_CPU_VECTOR_MATH_H
#define POE_STAGES_CPU_VECTOR_MATH_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Of the next loop: iterations do not depend on each other, although arguments may be the same array. */
#if defined(__clang__)
#define EACH _Pragma("clang loop vectorize(assume_safety)")
#else
#define EACH _Pragma("GCC ivdep")
#endif

enum { LANES = 32 }; /* partial sums: enough to hide the latency of an addition with 8-float vectors */

static inline float madd(float a, float b, float c)
{
#ifdef __FP_FAST_FMAF
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

static inline float from_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

static inline uint32_t to_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
}

/* --- functions --------------------------------------------------------------------------------------------------- */

/* x = n ln 2 + r with whole n and |r| <= ln 2 / 2. Adding 1.5 * 2^23 rounds to whole numbers and leaves n in the
 * low bits of `shifted`: shifted left by 23 they are n in the place of a float's exponent. */
typedef struct split {
    float r;
    uint32_t exponent;
} split;

static inline split split_ln2(float x)
{
    float shifted = madd(x, 0x1.715476p0f, 0x1.8p23f);
    float n = shifted - 0x1.8p23f;
    float r = madd(n, -0x1.62e4p-1f, x); /* ln 2 in two parts; n times the first is exact */
    return (split){madd(n, -1.42860682030941723e-6f, r), to_bits(shifted) << 23};
}

/* (exp(r) - 1) / r for |r| <= ln 2 / 2, relative error 1.1e-8: 1 + r q(r), q by Chebyshev approximation. */
static inline float exp_slope(float r)
{
    float q = madd(0.00139263759958f, r, 0.00836333308218f);
    q = madd(q, r, 0.0416665534587f);
    q = madd(q, r, 0.166665760623f);
    q = madd(q, r, 0.5f);
    return madd(q, r, 1.0f);
}

/* For x <= 88, within 2 ulp. Below exp(-87.3) it is 0, so that no denormal number ever comes out. */
static inline float exponential(float x)
{
    split s = split_ln2(x);
    float y = madd(exp_slope(s.r), s.r, 1.0f) * from_bits(s.exponent + (127u << 23));
    return x < -87.3f ? 0.0f : y; /* there the exponent is none: whatever y is */
}

/* Within 4 ulp, also near 0: t / (t + 2) with t = exp(2|x|) - 1 formed without cancellation. */
static inline float hyperbolic_tangent(float x)
{
    float twice = 2.0f * fabsf(x);
    twice = twice > 18.1f ? 18.1f : twice; /* the result is 1 from there on */
    split s = split_ln2(twice);
    float scale = from_bits(s.exponent + (127u << 23));
    float t = madd(exp_slope(s.r) * s.r, scale, scale - 1.0f);
    return copysignf(t / (t + 2.0f), x);
}

static inline float sigmoid(float x)
{
    return 1.0f / (1.0f + exponential(x < -87.0f ? 87.0f : -x));
}

/* --- reductions: x (n) ------------------------------------------------------------------------------------------- */

static inline float lanes_sum(float lane[LANES])
{
    for (size_t width = LANES / 2; width; width /= 2)
        for (size_t l = 0; l < width; l++)
            lane[l] += lane[l + width];
    return lane[0];
}

static inline float row_dot(const float *a, const float *b, size_t n)
{
    float lane[LANES] = {0};
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (size_t l = 0; l < LANES; l++)
            lane[l] = madd(a[i + l], b[i + l], lane[l]);
    for (size_t l = 0; i + l < n; l++)
        lane[l] = madd(a[i + l], b[i + l], lane[l]);
    return lanes_sum(lane);
}

static inline float row_sum(const float *x, size_t n)
{
    float lane[LANES] = {0};
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (size_t l = 0; l < LANES; l++)
            lane[l] += x[i + l];
    for (size_t l = 0; i + l < n; l++)
        lane[l] += x[i + l];
    return lanes_sum(lane);
}

/* The largest of x (n), n >= 1. */
static inline float row_max(const float *x, size_t n)
{
    float lane[LANES];
    for (size_t l = 0; l < LANES; l++)
        lane[l] = x[0];
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (size_t l = 0; l < LANES; l++)
            lane[l] = x[i + l] > lane[l] ? x[i + l] : lane[l];
    for (size_t l = 0; i + l < n; l++)
        lane[l] = x[i + l] > lane[l] ? x[i + l] : lane[l];
    for (size_t l = 1; l < LANES; l++)
        lane[0] = lane[l] > lane[0] ? lane[l] : lane[0];
    return lane[0];
}

#endif
