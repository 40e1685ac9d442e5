/* SPDX-License-Identifier: MIT
 * bf16: the upper half of a float. Rounded to the nearest, ties to even; a NaN stays one. */
#ifndef POE_SRC_BF16_H
#define POE_SRC_BF16_H

#include <stdint.h>
#include <string.h>

static inline uint32_t poe_bf16_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1), quiet = bits | 0x400000;
    return ((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded) >> 16;
}

static inline float poe_bf16_value(uint32_t bits)
{
    float value;
    bits <<= 16;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

#endif
