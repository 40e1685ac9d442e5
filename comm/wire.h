/* SPDX-License-Identifier: MIT
 * Wire formats: how a tensor of floats travels. A tensor is (rows, width); for activations a row is one position's C
 * channels. The bits are the same on every machine and for every choice of kernels: all arithmetic is that of IEEE
 * single precision, rounded to nearest, ties to even.
 *
 *   fp32  the floats themselves.
 *   bf16  each float rounded to its upper half.
 *   fp8   s = max(amax / 448, 2^-126) per row, amax its largest magnitude; code = x / s rounded to e4m3 (sign, 4 bits
 *         of exponent with bias 7, 3 of mantissa; largest 448, subnormal below 2^-6, no infinity); value = e4m3(code) * s.
 *   int8  s = max(amax / 127, 2^-126) per row; code = x / s rounded to a whole number; value = code * s.
 *
 * Zeros stay zeros (fp8 and bf16 keep their signs). A row with a NaN or an infinity gets the scale NaN and codes 0
 * under fp8 and int8, so that all its values come out as NaN and the receiver's loss says so; fp32 and bf16 carry them
 * as they are. Encoded: under fp8 and int8 all rows' scales (rows floats), then the codes; little-endian machines only,
 * as the floats of fp32 are. Nothing here knows of messages. */
#ifndef POE_COMM_WIRE_H
#define POE_COMM_WIRE_H

#include <stddef.h>

typedef enum poe_wire { POE_WIRE_FP32, POE_WIRE_BF16, POE_WIRE_FP8, POE_WIRE_INT8, POE_WIRE_COUNT } poe_wire;

const char *poe_wire_name(poe_wire wire);
/* Of a name that is one of these. */
poe_wire poe_wire_parse(const char *name);

/* Of an encoded tensor. */
size_t poe_wire_bytes(poe_wire wire, size_t rows, size_t width);

/* `wire` bytes are 4-byte aligned and do not overlap the floats. */
void poe_wire_encode(poe_wire wire, void *encoded, const float *values, size_t rows, size_t width);
void poe_wire_decode(poe_wire wire, float *values, const void *encoded, size_t rows, size_t width);

#endif
