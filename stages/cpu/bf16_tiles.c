/* SPDX-License-Identifier: MIT
 * Blocks of bf16 products on AMX tiles: 16 rows of 64 bytes each. Compiled twice: with the processor's instructions,
 * and, for tests on processors without them, with plain C that does what they do. */
#include <stdint.h>
#include <string.h>

#include "src/bf16.h"
#include "stages/cpu/product.h"

enum {
    SIDE = 16,                /* rows of a tile, and sums in a row */
    DEEP = 32,                /* bf16 numbers in a row: pairs of neighbours along k */
    TILE_WORDS = SIDE * SIDE, /* 32-bit words of a tile: pairs, or sums */
};

/* --- the tiles: 0..3 hold sums, 4..7 operands ----------------------------------------------------------------------
 */

#ifdef POE_TILES_EMULATED

#define BLOCK_PRODUCT poe_block_by_emulation

typedef union tile {
    uint32_t words[SIDE][SIDE];
    float sums[SIDE][SIDE];
} tile;

static _Thread_local tile tiles[8];

static void tiles_begin(void)
{
    memset(tiles, 0xff, sizeof(tiles)); /* NaN, for whoever forgets tile_zero */
}

static void tiles_end(void) {}

#define tile_zero(t) memset(&tiles[t], 0, sizeof(tile))
#define tile_load(t, words) memcpy(&tiles[t], words, sizeof(tile))

static void tile_store(int t, float *sums, size_t ld)
{
    for (int i = 0; i < SIDE; i++)
        memcpy(sums + (size_t)i * ld, tiles[t].sums[i], sizeof(tiles[t].sums[i]));
}

/* tdpbf16ps: first the sums of the even and of the odd products, then both onto the tile. */
static void tile_dot(int c, int a, int b)
{
    for (int i = 0; i < SIDE; i++)
        for (int j = 0; j < SIDE; j++) {
            float even = 0, odd = 0;
            for (int pair = 0; pair < SIDE; pair++) {
                uint32_t x = tiles[a].words[i][pair], y = tiles[b].words[pair][j];
                even += poe_bf16_value(x & 0xffff) * poe_bf16_value(y & 0xffff);
                odd += poe_bf16_value(x >> 16) * poe_bf16_value(y >> 16);
            }
            tiles[c].sums[i][j] += even + odd;
        }
}

#else

#include <immintrin.h>

#define BLOCK_PRODUCT poe_block_on_tiles

static void tiles_begin(void)
{
    static const struct {
        uint8_t palette, first_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } configuration = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _Static_assert(sizeof(configuration) == 64, "what ldtilecfg reads");
    _tile_loadconfig(&configuration);
    __asm__ volatile("" ::: "memory"); /* GCC's _tile_loadd does not say that it reads memory: all is written by here */
}

static void tiles_end(void)
{
    _tile_release();
}

#define tile_zero(t) _tile_zero(t)
#define tile_load(t, words) _tile_loadd(t, words, 64)
#define tile_store(t, sums, ld) _tile_stored(t, sums, (ld) * sizeof(float))
#define tile_dot(c, a, b) _tile_dpbf16ps(c, a, b)

#endif

/* --- operands as tiles ---------------------------------------------------------------------------------------------
 */

/* Both operands as lines along k: the rows of op(A), the columns of op(B). */
typedef struct operand {
    const float *x;
    size_t ld, lines, k;
    bool line_by_line; /* in memory, or else all lines' numbers of one k together */
} operand;

/* Lines in panels of two tiles' height: what dot_tiles() takes. */
static size_t panels(size_t lines)
{
    return (lines + 2 * SIDE - 1) / (2 * SIDE);
}

static size_t steps(size_t k)
{
    return (k + DEEP - 1) / DEEP;
}

static uint32_t pair(float even, float odd)
{
    return poe_bf16_bits(even) | poe_bf16_bits(odd) << 16;
}

/* words (lines, pairs) */
static void read_line_by_line(uint32_t *words, const operand *o, size_t line, size_t lines, size_t k, size_t deep)
{
    for (size_t i = 0; i < lines; i++) {
        const float *x = o->x + (line + i) * o->ld + k;
        for (size_t p = 0; p < deep / 2; p++)
            words[i * SIDE + p] = pair(x[2 * p], x[2 * p + 1]);
        if (deep % 2)
            words[i * SIDE + deep / 2] = pair(x[deep - 1], 0);
    }
}

/* words (pairs, lines) */
static void read_across_lines(uint32_t *words, const operand *o, size_t line, size_t lines, size_t k, size_t deep)
{
    static const float zeros[SIDE];
    for (size_t p = 0; 2 * p < deep; p++) {
        const float *even = o->x + (k + 2 * p) * o->ld + line, *odd = 2 * p + 1 < deep ? even + o->ld : zeros;
        for (size_t i = 0; i < lines; i++)
            words[p * SIDE + i] = pair(even[i], odd[i]);
    }
}

static void transpose(uint32_t *y, const uint32_t *x)
{
    for (size_t i = 0; i < SIDE; i++)
        for (size_t j = 0; j < SIDE; j++)
            y[i * SIDE + j] = x[j * SIDE + i];
}

/* One tile, (lines, pairs) or else (pairs, lines); what the operand does not have is zero. */
static void pack_tile(uint32_t *words, const operand *o, size_t line, size_t k, bool lines_first)
{
    size_t lines = line < o->lines ? o->lines - line : 0, deep = o->k - k;
    lines = lines < SIDE ? lines : SIDE;
    deep = deep < DEEP ? deep : DEEP;
    uint32_t read[TILE_WORDS], *to = lines_first == o->line_by_line ? words : read;
    if (lines < SIDE || deep < DEEP)
        memset(to, 0, TILE_WORDS * sizeof(*to));
    if (o->line_by_line)
        read_line_by_line(to, o, line, lines, k, deep);
    else
        read_across_lines(to, o, line, lines, k, deep);
    if (to == read)
        transpose(words, read);
}

/* Tiles in the order (lines of 16, steps along k). */
static void pack(uint32_t *words, const operand *o, bool lines_first)
{
    for (size_t line = 0; line < panels(o->lines) * 2 * SIDE; line += SIDE)
        for (size_t k = 0; k < o->k; k += DEEP, words += TILE_WORDS)
            pack_tile(words, o, line, k, lines_first);
}

/* --- the product ---------------------------------------------------------------------------------------------------
 */

/* sums (32, 32) of a panel of each operand. */
static void dot_tiles(float *sums, const uint32_t *a, const uint32_t *b, size_t n_steps)
{
    const uint32_t *below = a + n_steps * TILE_WORDS, *right = b + n_steps * TILE_WORDS;
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
    for (size_t at = 0; at < n_steps * TILE_WORDS; at += TILE_WORDS) {
        tile_load(4, a + at);
        tile_load(5, below + at);
        tile_load(6, b + at);
        tile_load(7, right + at);
        tile_dot(0, 4, 6);
        tile_dot(1, 4, 7);
        tile_dot(2, 5, 6);
        tile_dot(3, 5, 7);
    }
    tile_store(0, sums, 2 * SIDE);
    tile_store(1, sums + SIDE, 2 * SIDE);
    tile_store(2, sums + 2 * SIDE * SIDE, 2 * SIDE);
    tile_store(3, sums + 2 * SIDE * SIDE + SIDE, 2 * SIDE);
}

/* The part of C that `sums` cover, from (row, column) on. */
static void put(const poe_product *p, size_t row, size_t column, const float *sums)
{
    float alpha = p->alpha, beta = p->beta;
    size_t rows = p->m - row < 2 * SIDE ? p->m - row : 2 * SIDE;
    size_t columns = p->n - column < 2 * SIDE ? p->n - column : 2 * SIDE;
    for (size_t i = 0; i < rows; i++) {
        float *c = p->c + (row + i) * p->ldc + column;
        for (size_t j = 0; j < columns; j++)
            c[j] = alpha * sums[i * 2 * SIDE + j] + (beta == 0.0f ? 0.0f : beta * c[j]);
    }
}

void BLOCK_PRODUCT(const poe_product *p, void *scratch)
{
    operand left = {p->a, p->lda, p->m, p->k, !p->transpose_a}, right = {p->b, p->ldb, p->n, p->k, p->transpose_b};
    size_t panel = 2 * steps(p->k) * TILE_WORDS;
    uint32_t *a = scratch, *b = a + panels(p->m) * panel;
    float sums[4 * TILE_WORDS];
    pack(a, &left, true);
    pack(b, &right, false);
    tiles_begin();
    for (size_t j = 0; j < panels(p->n); j++)
        for (size_t i = 0; i < panels(p->m); i++) {
            dot_tiles(sums, a + i * panel, b + j * panel, steps(p->k));
            put(p, i * 2 * SIDE, j * 2 * SIDE, sums);
        }
    tiles_end();
}
