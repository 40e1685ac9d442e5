/* SPDX-License-Identifier: MIT
 * Wire formats against slow references that follow the words of comm/wire.h: over all codes, all midpoints between
 * them, and random rows. */
#include "comm/wire.h"

#include <stdbool.h>
#include <stdint.h>

#include "src/crc32c.h"
#include "src/rng.h"
#include "tests/check.h"

enum { WIDEST = 300, ROWS = 40 };

static float float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

static uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
}

/* --- references --------------------------------------------------------------------------------------------------- */
static double e4m3(unsigned code)
{
    int exponent = (int)(code >> 3 & 15), mantissa = (int)(code & 7);
    double magnitude = exponent ? ldexp(8 + mantissa, exponent - 10) : ldexp(mantissa, -9);
    return code & 0x80 ? -magnitude : magnitude;
}

/* The nearest of all codes but the NaNs; of two the even one. */
static unsigned e4m3_nearest(double x)
{
    unsigned best = 0;
    for (unsigned code = 1; code < 0x7f; code++) {
        double off = fabs(fabs(x) - e4m3(code)), least = fabs(fabs(x) - e4m3(best));
        if (off < least || (off == least && code % 2 == 0))
            best = code;
    }
    return best | (signbit(x) ? 0x80 : 0);
}

static double nearest_whole(double x)
{
    double low = floor(x), off = x - low;
    return off < 0.5 || (off == 0.5 && fmod(low, 2) == 0) ? low : low + 1;
}

/* Of the two upper halves around x the nearer, or the even one; beyond the largest comes infinity. */
static uint32_t bf16_nearest(float x)
{
    uint32_t bits = bits_of(x), below = bits >> 16;
    if (!isfinite(x))
        return below;
    double down = fabs((double)float_of(below << 16)), size = fabs((double)x);
    uint32_t above_bits = (below + 1) << 16;
    double up = isfinite(float_of(above_bits)) ? fabs((double)float_of(above_bits)) : 0x1p128;
    if (size - down == up - size)
        return below % 2 ? below + 1 : below;
    return size - down < up - size ? below : below + 1;
}

static float reference_scale(const float *x, size_t n, double top)
{
    double most = 0;
    for (size_t i = 0; i < n; i++)
        most = fmax(most, fabs((double)x[i]));
    return fmaxf((float)(most / top), 0x1p-126f);
}

/* --- whole tensors ------------------------------------------------------------------------------------------------ */
static void check_row(poe_wire wire, const float *x, const void *codes, float scale, const float *decoded, size_t width)
{
    float s = reference_scale(x, width, wire == POE_WIRE_FP8 ? 448 : 127);
    int wrong = bits_of(s) != bits_of(scale);
    for (size_t i = 0; i < width; i++) {
        float quotient = x[i] / s;
        if (wire == POE_WIRE_FP8) {
            unsigned code = e4m3_nearest(quotient);
            wrong += ((const uint8_t *)codes)[i] != code;
            wrong += bits_of(decoded[i]) != bits_of((float)e4m3(code) * s);
        } else {
            double code = nearest_whole(quotient);
            wrong += ((const int8_t *)codes)[i] != code;
            wrong += decoded[i] != (float)code * s;
        }
    }
    CHECK_INT(wrong, 0);
}

static void check_tensor(poe_wire wire, const float *x, size_t rows, size_t width)
{
    static uint32_t encoded[ROWS * (WIDEST + 1) + 1];
    static float decoded[ROWS * WIDEST];
    size_t bytes = poe_wire_bytes(wire, rows, width), n = rows * width;
    unsigned char *end = (unsigned char *)encoded + bytes;
    *end = 0xa5;
    poe_wire_encode(wire, encoded, x, rows, width);
    poe_wire_decode(wire, decoded, encoded, rows, width);
    CHECK_INT(*end, 0xa5);
    if (wire == POE_WIRE_FP32) {
        CHECK_INT(bytes, 4 * n);
        CHECK(memcmp(decoded, x, 4 * n) == 0);
    } else if (wire == POE_WIRE_BF16) {
        CHECK_INT(bytes, 2 * n);
        int wrong = 0;
        for (size_t i = 0; i < n; i++)
            wrong += bits_of(decoded[i]) != bf16_nearest(x[i]) << 16;
        CHECK_INT(wrong, 0);
    } else {
        CHECK_INT(bytes, n + 4 * rows);
        const uint8_t *codes = (const uint8_t *)(encoded + rows);
        for (size_t r = 0; r < rows; r++)
            check_row(wire, x + r * width, codes + r * width, float_of(encoded[r]), decoded + r * width, width);
    }
}

static void test_random_rows(void)
{
    static const size_t widths[] = {1, 2, 3, 7, 24, 31, 128, 300};
    float x[ROWS * WIDEST];
    poe_rng rng;
    poe_rng_init(&rng, 3, "rows");
    for (size_t w = 0; w < sizeof(widths) / sizeof(*widths); w++)
        for (poe_wire wire = 0; wire < POE_WIRE_COUNT; wire++) {
            for (size_t i = 0; i < ROWS * widths[w]; i++) {
                int row = (int)(i / widths[w]), exponent = row * 7 - 150; /* from below the smallest to 2^123 */
                x[i] = (float)ldexp(poe_rng_normal(&rng), exponent);
                if (poe_rng_uniform(&rng) < 0.1)
                    x[i] = poe_rng_uniform(&rng) < 0.5 ? 0.0f : -0.0f;
            }
            check_tensor(wire, x, ROWS, widths[w]);
        }
}

/* --- all codes ---------------------------------------------------------------------------------------------------- */
/* A row whose scale is 1: every code's value, the middles between neighbours, and the floats beside all of these. */
static void test_every_code(poe_wire wire, double top, int n_codes, double (*value)(unsigned code))
{
    float x[WIDEST];
    for (int side = -1; side <= 1; side++)
        for (int sign = -1; sign <= 1; sign += 2)
            for (int first = 0; first < n_codes; first += 100) {
                size_t n = 0;
                x[n++] = (float)(sign * top);
                for (int c = first; c < first + 100 && c < n_codes; c++) {
                    double here = value((unsigned)c), next = c + 1 < n_codes ? value((unsigned)c + 1) : here;
                    float at[2] = {(float)here, (float)((here + next) / 2)};
                    for (int i = 0; i < 2; i++) {
                        float beside = side ? nextafterf(at[i], side < 0 ? 0 : (float)top) : at[i];
                        x[n++] = (float)sign * beside;
                    }
                }
                check_tensor(wire, x, 1, n);
            }
}

static double whole(unsigned code)
{
    return code;
}

static void test_codes(void)
{
    test_every_code(POE_WIRE_FP8, 448, 0x7f, e4m3);
    test_every_code(POE_WIRE_INT8, 127, 128, whole);
    uint8_t codes[4 + 256];
    float decoded[256], one = 1;
    memcpy(codes, &one, sizeof(one));
    for (unsigned i = 0; i < 256; i++)
        codes[4 + i] = (uint8_t)i;
    uint32_t encoded[65];
    memcpy(encoded, codes, sizeof(codes));
    poe_wire_decode(POE_WIRE_FP8, decoded, encoded, 1, 256);
    for (unsigned i = 0; i < 256; i++)
        if ((i & 0x7f) != 0x7f) /* which no encoder writes */
            CHECK_INT(bits_of(decoded[i]), bits_of((float)e4m3(i)));
    poe_wire_decode(POE_WIRE_INT8, decoded, encoded, 1, 256);
    for (unsigned i = 0; i < 256; i++)
        CHECK(decoded[i] == (float)(int8_t)(uint8_t)i);
}

/* Every upper half with some lower ones. */
static void test_bf16(void)
{
    static const uint32_t lows[] = {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff};
    float x[6];
    for (uint32_t high = 0; high < 0x10000; high++) {
        for (int i = 0; i < 6; i++)
            x[i] = float_of(high << 16 | lows[i]);
        if (isfinite(float_of(high << 16)))
            check_tensor(POE_WIRE_BF16, x, 1, 6);
    }
}

/* --- what is not finite, and nothing ------------------------------------------------------------------------------ */
static void test_not_finite(void)
{
    static const uint32_t bad[] = {0x7f800000, 0xff800000, 0x7fc00000, 0xffc00001, 0x7f800001};
    for (size_t b = 0; b < sizeof(bad) / sizeof(*bad); b++)
        for (poe_wire wire = 0; wire < POE_WIRE_COUNT; wire++) {
            float x[3 * 9], back[3 * 9];
            uint32_t encoded[3 * 9];
            for (int i = 0; i < 27; i++)
                x[i] = (float)i - 13;
            x[9 + b] = float_of(bad[b]);
            poe_wire_encode(wire, encoded, x, 3, 9);
            poe_wire_decode(wire, back, encoded, 3, 9);
            for (size_t i = 0; i < 27; i++) {
                bool whole_row = wire == POE_WIRE_FP8 || wire == POE_WIRE_INT8;
                bool spoilt = whole_row ? i / 9 == 1 : i == 9 + b;
                CHECK(spoilt ? !isfinite(back[i]) : isfinite(back[i]));
                CHECK(!spoilt || !whole_row || isnan(back[i]));
            }
            CHECK(wire > POE_WIRE_BF16 || isnan(back[9 + b]) == isnan(x[9 + b]));
        }
}

static void test_zeros(void)
{
    for (poe_wire wire = 0; wire < POE_WIRE_COUNT; wire++) {
        float x[8] = {0, -0.0f, 0, 0, -0.0f, 0, 0, 0}, back[8];
        uint32_t encoded[9];
        poe_wire_encode(wire, encoded, x, 1, 8);
        poe_wire_decode(wire, back, encoded, 1, 8);
        for (int i = 0; i < 8; i++)
            CHECK_INT(bits_of(back[i]), wire == POE_WIRE_INT8 ? 0 : bits_of(x[i]));
    }
}

/* The same bits from every compiler, on every machine. */
static void test_known_bits(void)
{
    static const uint32_t known[POE_WIRE_COUNT] = {4189345237, 3591986383, 1269281159, 1453704291};
    float x[20 * 33];
    uint32_t encoded[20 * 34];
    uint64_t state = 1;
    for (int i = 0; i < 20 * 33; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        x[i] = (float)(int32_t)(state >> 32) * (state >> 20 & 3 ? 0x1p-31f : 0x1p-40f);
    }
    for (poe_wire wire = 0; wire < POE_WIRE_COUNT; wire++) {
        poe_wire_encode(wire, encoded, x, 20, 33);
        CHECK_INT(poe_crc32c(0, encoded, poe_wire_bytes(wire, 20, 33)), known[wire]);
    }
}

static void test_names(void)
{
    for (poe_wire wire = 0; wire < POE_WIRE_COUNT; wire++)
        CHECK_INT(poe_wire_parse(poe_wire_name(wire)), wire);
}

int main(void)
{
    test_names();
    test_random_rows();
    test_codes();
    test_bf16();
    test_not_finite();
    test_zeros();
    test_known_bits();
    return check_result();
}
