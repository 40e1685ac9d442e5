/* SPDX-License-Identifier: MIT
 * Loops without branches over floats and their bits, for the compiler to turn into vector code. */
#include "comm/wire.h"

#include <assert.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "src/bf16.h"

/* The same C for wider vectors, chosen when the program starts: the results do not depend on it. */
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define WIDE __attribute__((target_clones("default", "avx2")))
#else
#define WIDE
#endif

static const char *const names[POE_WIRE_COUNT] = {"fp32", "bf16", "fp8", "int8"};

const char *poe_wire_name(poe_wire wire)
{
    return names[wire];
}

poe_wire poe_wire_parse(const char *name)
{
    poe_wire wire = POE_WIRE_FP32;
    while (strcmp(name, names[wire]) != 0) {
        wire++;
        assert(wire < POE_WIRE_COUNT);
    }
    return wire;
}

size_t poe_wire_bytes(poe_wire wire, size_t rows, size_t width)
{
    static const size_t per_value[POE_WIRE_COUNT] = {4, 2, 1, 1}, per_row[POE_WIRE_COUNT] = {0, 0, 4, 4};
    return rows * (width * per_value[wire] + per_row[wire]);
}

static inline uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

static inline float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

/* All ones, or none: what compilers make vector code of everywhere. */
static inline uint32_t mask(bool yes)
{
    return 0u - (uint32_t)yes;
}

/* --- scales ------------------------------------------------------------------------------------------------------- */
/* Magnitudes compare as their bits do, NaN above infinity above all numbers. */
WIDE static uint32_t largest(const float *x, size_t n)
{
    int32_t most = 0;
    for (size_t i = 0; i < n; i++) {
        int32_t magnitude = (int32_t)(bits_of(x[i]) & 0x7fffffff);
        most = magnitude > most ? magnitude : most;
    }
    return (uint32_t)most;
}

/* NaN for a row that is not finite. */
static float scale_of(const float *x, size_t n, float top)
{
    uint32_t most = largest(x, n);
    if (most >= 0x7f800000)
        return float_of(0x7fc00000);
    float scale = float_of(most) / top;
    return scale > 0x1p-126f ? scale : 0x1p-126f;
}

/* --- fp8: e4m3 ---------------------------------------------------------------------------------------------------- */
/* |x| at most 448 and a little. Below 2^-6 codes are multiples of 2^-9, which is what 2^14 leaves of a sum with it. */
static inline uint32_t e4m3_of(float x)
{
    uint32_t bits = bits_of(x), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
    uint32_t normal = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
    uint32_t tiny = bits_of(float_of(magnitude) + 0x1p14f) - 0x46800000;
    uint32_t is_tiny = mask((int32_t)magnitude < 0x3c800000);
    return sign | (tiny & is_tiny) | (normal & ~is_tiny);
}

static inline float e4m3_value(uint32_t code)
{
    uint32_t sign = (code & 0x80) << 24, low = code & 0x7f;
    uint32_t normal = (low << 20) + (120u << 23), tiny = bits_of((float)(int32_t)low * 0x1p-9f);
    uint32_t is_tiny = mask((int32_t)low < 8);
    return float_of(sign | (tiny & is_tiny) | (normal & ~is_tiny));
}

WIDE static void encode_fp8(uint8_t *restrict code, const float *restrict x, size_t n, float scale)
{
    for (size_t i = 0; i < n; i++)
        code[i] = (uint8_t)e4m3_of(x[i] / scale);
}

WIDE static void decode_fp8(float *restrict x, const uint8_t *restrict code, size_t n, float scale)
{
    for (size_t i = 0; i < n; i++)
        x[i] = e4m3_value(code[i]) * scale;
}

/* --- int8 --------------------------------------------------------------------------------------------------------- */
/* |x| at most 127 and a little: a sum with 1.5 * 2^23 is whole, and its lowest bits are the two's complement. */
WIDE static void encode_int8(int8_t *restrict code, const float *restrict x, size_t n, float scale)
{
    for (size_t i = 0; i < n; i++)
        code[i] = (int8_t)(uint8_t)bits_of(x[i] / scale + 0x1.8p23f);
}

WIDE static void decode_int8(float *restrict x, const int8_t *restrict code, size_t n, float scale)
{
    for (size_t i = 0; i < n; i++)
        x[i] = (float)code[i] * scale;
}

/* --- bf16 --------------------------------------------------------------------------------------------------------- */
WIDE static void encode_bf16(uint16_t *restrict code, const float *restrict x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        code[i] = (uint16_t)poe_bf16_bits(x[i]);
}

WIDE static void decode_bf16(float *restrict x, const uint16_t *restrict code, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] = poe_bf16_value(code[i]);
}

/* --- tensors ------------------------------------------------------------------------------------------------------ */
static void encode_scaled(poe_wire wire, void *encoded, const float *values, size_t rows, size_t width)
{
    float *scales = encoded;
    uint8_t *codes = (uint8_t *)(scales + rows);
    for (size_t r = 0; r < rows; r++) {
        const float *x = values + r * width;
        scales[r] = scale_of(x, width, wire == POE_WIRE_FP8 ? 448 : 127);
        if (scales[r] != scales[r])
            memset(codes + r * width, 0, width);
        else if (wire == POE_WIRE_FP8)
            encode_fp8(codes + r * width, x, width, scales[r]);
        else
            encode_int8((int8_t *)codes + r * width, x, width, scales[r]);
    }
}

static void decode_scaled(poe_wire wire, float *values, const void *encoded, size_t rows, size_t width)
{
    const float *scales = encoded;
    const uint8_t *codes = (const uint8_t *)(scales + rows);
    for (size_t r = 0; r < rows; r++)
        if (wire == POE_WIRE_FP8)
            decode_fp8(values + r * width, codes + r * width, width, scales[r]);
        else
            decode_int8(values + r * width, (const int8_t *)codes + r * width, width, scales[r]);
}

void poe_wire_encode(poe_wire wire, void *encoded, const float *values, size_t rows, size_t width)
{
    if (wire == POE_WIRE_FP32)
        memcpy(encoded, values, rows * width * sizeof(float));
    else if (wire == POE_WIRE_BF16)
        encode_bf16(encoded, values, rows * width);
    else
        encode_scaled(wire, encoded, values, rows, width);
}

void poe_wire_decode(poe_wire wire, float *values, const void *encoded, size_t rows, size_t width)
{
    if (wire == POE_WIRE_FP32)
        memcpy(values, encoded, rows * width * sizeof(float));
    else if (wire == POE_WIRE_BF16)
        decode_bf16(values, encoded, rows * width);
    else
        decode_scaled(wire, values, encoded, rows, width);
}
