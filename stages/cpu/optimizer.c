/* SPDX-License-Identifier: MIT
 * The updates of MuonAdamW (spec 3; nanochat's optim.py). Polar Express: Amsel, Persson, Musco, Gower 2025. */
#include <math.h>

#include "stages/cpu/internal.h"

enum { GRAM_BLOCK = 128 };

/* x^t for whole t >= 0, the same on every machine, as pow() is not. */
static double power(double x, int64_t t)
{
    double result = 1;
    for (; t; t /= 2, x *= x)
        if (t % 2)
            result *= x;
    return result;
}

static void adamw(poe_backend *be, float *w, float *m, float *v, const float *g, size_t n, const poe_adamw_step *step)
{
    poe_cpu *cpu = poe_cpu_of(be);
    double beta1 = (double)step->beta1, beta2 = (double)step->beta2;
    poe_adamw_args args = {.w = w,
                           .m = m,
                           .v = v,
                           .g = g,
                           .keep = (float)(1 - (double)step->lr * (double)step->weight_decay),
                           .toward_g = (float)(1 - beta1),
                           .toward_g2 = (float)(1 - beta2),
                           .rate = (float)((double)step->lr / (1 - power(beta1, step->t))),
                           .v_correction = (float)(1 / (1 - power(beta2, step->t))),
                           .eps = step->eps};
    poe_cpu_spans(cpu, cpu->vector->adamw, &args, n, POE_SPAN_FLOATS);
}

/* --- Muon -------------------------------------------------------------------------------------------------------- */

typedef struct muon_work {
    poe_cpu *cpu;
    size_t rows, cols;
    size_t small;        /* the smaller of the two */
    float *x, *next;     /* (rows, cols) */
    float *gram, *polynomial, *factor, *spare; /* (small, small) */
    float *mean, *scale; /* (larger of rows and cols) */
    double *parts;       /* one per span of x */
} muon_work;

size_t poe_cpu_optimizer_scratch(const poe_backend_limits *limits)
{
    size_t c = limits->c, wide = poe_larger(c, limits->mlp_dim), matrix = c * wide;
    return 2 * poe_arena_round(matrix * sizeof(float)) + 4 * poe_arena_round(c * c * sizeof(float)) +
           2 * poe_arena_round(wide * sizeof(float)) +
           poe_arena_round(poe_parts(matrix, POE_SPAN_FLOATS) * sizeof(double));
}

static muon_work muon_work_init(poe_cpu *cpu, size_t rows, size_t cols)
{
    muon_work work = {.cpu = cpu, .rows = rows, .cols = cols, .small = poe_smaller(rows, cols)};
    poe_cpu_scratch_reset(cpu);
    work.x = poe_cpu_scratch_floats(cpu, rows * cols);
    work.next = poe_cpu_scratch_floats(cpu, rows * cols);
    float **squares[] = {&work.gram, &work.polynomial, &work.factor, &work.spare};
    for (size_t i = 0; i < sizeof(squares) / sizeof(*squares); i++)
        *squares[i] = poe_cpu_scratch_floats(cpu, work.small * work.small);
    work.mean = poe_cpu_scratch_floats(cpu, poe_larger(rows, cols));
    work.scale = poe_cpu_scratch_floats(cpu, poe_larger(rows, cols));
    work.parts = poe_arena_take(&cpu->scratch, poe_parts(rows * cols, POE_SPAN_FLOATS) * sizeof(double));
    return work;
}

/* m <- lerp(m, g, 1 - momentum), x = lerp(g, m, momentum) / (1.01 norm + 1e-6). */
static void nesterov(muon_work *work, float *m, const float *g, float mu)
{
    poe_cpu *cpu = work->cpu;
    size_t n = work->rows * work->cols;
    poe_cpu_spans(cpu, cpu->vector->momentum, &(poe_momentum_args){m, work->x, work->parts, g, mu}, n, POE_SPAN_FLOATS);
    double sum = 0;
    for (size_t span = 0; span < poe_parts(n, POE_SPAN_FLOATS); span++)
        sum += work->parts[span];
    poe_flat_args args = {.y = work->x, .value = (float)(1 / (1.01 * sqrt(sum) + 1e-6))};
    poe_cpu_spans(cpu, cpu->vector->scale, &args, n, POE_SPAN_FLOATS);
}

/* A symmetric product C (n,n), of which only the blocks on and below the diagonal are computed; afterwards
 * C += beta * add + diagonal * 1. */
typedef struct symmetric {
    poe_cpu *cpu;
    poe_product product;
    size_t side;      /* of a block */
    const float *add; // may be NULL
    float beta, diagonal;
} symmetric;

static void symmetric_task(void *arg, size_t task, int thread)
{
    const symmetric *s = arg;
    size_t block_row = 0, n = s->product.n;
    while (task > block_row)
        task -= ++block_row;
    size_t row = block_row * s->side, column = task * s->side;
    size_t rows = poe_smaller(s->side, n - row), columns = poe_smaller(s->side, n - column);
    float *c = s->product.c;
    poe_product_tile(s->cpu, thread, &s->product, row, rows, column, columns);
    for (size_t i = row; i < row + rows; i++) {
        for (size_t j = column; s->add && j < column + columns; j++)
            c[i * n + j] += s->beta * s->add[i * n + j];
        if (row == column)
            c[i * n + i] += s->diagonal;
        for (size_t j = column; row != column && j < column + columns; j++)
            c[j * n + i] = c[i * n + j];
    }
}

static void symmetric_product(poe_cpu *cpu, symmetric *s)
{
    s->cpu = cpu;
    s->side = poe_tile_side(s->product.n, GRAM_BLOCK);
    size_t blocks = poe_parts(s->product.n, s->side);
    poe_team_run(cpu->team, blocks * (blocks + 1) / 2, symmetric_task, s);
}

static void swap(float **a, float **b)
{
    float *old = *a;
    *a = *b;
    *b = old;
}

/* out = left right + beta add + diagonal 1 for (small, small) matrices whose product is symmetric. */
static void square_product(muon_work *work, float *out, float alpha, const float *left, const float *right,
                           const float *add, float beta, float diagonal)
{
    size_t n = work->small;
    symmetric s = {.product = {false, false, n, n, n, alpha, left, n, right, n, 0.0f, out, n},
                   .add = add,
                   .beta = beta,
                   .diagonal = diagonal};
    symmetric_product(work->cpu, &s);
}

/* `count` steps x <- x P, P = a 1 + b A + c A^2, A = x^T x (from the left, with A = x x^T, unless x is tall), on the small
 * matrix: the next A is P A P, for all of them are polynomials of the first and so commute, and x meets the product of
 * all P in the end. */
static void polar_steps(muon_work *work, const double (*coefficients)[3], int count)
{
    bool tall = work->rows > work->cols;
    size_t n = work->small, cols = work->cols, deep = tall ? work->rows : cols;
    symmetric gram = {.product = {tall, !tall, n, n, deep, 1.0f, work->x, cols, work->x, cols, 0.0f, work->gram, n}};
    symmetric_product(work->cpu, &gram);
    for (int i = 0; i < count; i++) {
        float a = (float)coefficients[i][0], b = (float)coefficients[i][1], c = (float)coefficients[i][2];
        float *p = i ? work->polynomial : work->factor;
        square_product(work, p, c, work->gram, work->gram, work->gram, b, a);
        if (i + 1 < count) {
            square_product(work, work->spare, 1.0f, work->gram, p, NULL, 0.0f, 0.0f);
            square_product(work, work->gram, 1.0f, work->spare, p, NULL, 0.0f, 0.0f);
        }
        if (i) {
            square_product(work, work->spare, 1.0f, work->factor, p, NULL, 0.0f, 0.0f);
            swap(&work->factor, &work->spare);
        }
    }
    const float *left = tall ? work->x : work->factor, *right = tall ? work->factor : work->x;
    poe_product p = {false, false, work->rows, cols, n, 1.0f, left, n, right, cols, 0.0f, work->next, cols};
    poe_cpu_product(work->cpu, &p);
    swap(&work->x, &work->next);
}

/* Steps on the small matrix cost 3 r + 7 against 7.5 r + 2.5 products of it, r = larger / smaller side, but what rounding
 * has done to the small eigenvalues of A grows by a^2 with each. Formed anew after three steps, A does no worse than five
 * steps of x itself: at most 4e-4 of the result's mean square, in fp32, with singular values of seven decades. Products
 * of bf16 operands would not do for that. */
static void polar_express(muon_work *work)
{
    static const double coefficients[][3] = {
        {8.156554524902461, -22.48329292557795, 15.878769915207462},
        {4.042929935166739, -2.808917465908714, 0.5000178451051316},
        {3.8916678022926607, -2.772484153217685, 0.5060648178503393},
        {3.285753657755655, -2.3681294933425376, 0.46449024233003106},
        {2.3465413258596377, -1.7097828382687081, 0.42323551169305323},
    };
    if (work->rows == work->cols || work->cpu->block) {
        for (int i = 0; i < 5; i++)
            polar_steps(work, coefficients + i, 1);
    } else {
        polar_steps(work, coefficients, 3);
        polar_steps(work, coefficients + 3, 2);
    }
}

/* NorMuon's variance reduction: updates `second` and leaves the factor of each row (or column) in work->scale. */
static void reduce_variance(muon_work *work, float *second)
{
    poe_cpu *cpu = work->cpu;
    bool by_row = work->rows >= work->cols;
    size_t kept = by_row ? work->rows : work->cols, reduced = by_row ? work->cols : work->rows;
    poe_cpu_spans(cpu, by_row ? cpu->vector->square_rows : cpu->vector->square_columns,
                  &(poe_square_args){work->mean, work->x, work->rows, work->cols}, kept,
                  by_row ? POE_SPAN_ROWS : POE_SPAN_COLUMNS);
    double before = 0, after = 0;
    for (size_t i = 0; i < kept; i++) {
        second[i] += 0.1f * (work->mean[i] - second[i]);
        work->scale[i] = 1.0f / sqrtf(fmaxf(second[i], 1e-10f));
        double square = (double)work->mean[i] * (double)reduced, step = (double)work->scale[i];
        before += square;
        after += square * step * step;
    }
    float ratio = (float)(sqrt(before) / fmax(sqrt(after), 1e-10));
    for (size_t i = 0; i < kept; i++)
        work->scale[i] *= ratio;
}

static void muon(poe_backend *be, float *w, float *m, float *second, const float *g, size_t rows, size_t cols,
                 const poe_muon_step *step)
{
    poe_cpu *cpu = poe_cpu_of(be);
    muon_work work = muon_work_init(cpu, rows, cols);
    nesterov(&work, m, g, step->momentum);
    polar_express(&work);
    reduce_variance(&work, second);
    double lr = (double)step->lr * sqrt(rows > cols ? (double)rows / (double)cols : 1.0);
    poe_muon_update_args args = {.w = w,
                                 .x = work.x,
                                 .scale = work.scale,
                                 .by_row = rows >= cols,
                                 .lr = (float)lr,
                                 .decay = (float)(lr * (double)step->weight_decay),
                                 .cols = cols};
    poe_cpu_spans(cpu, cpu->vector->muon_update, &args, rows, POE_SPAN_ROWS);
}

void poe_cpu_optimizer_ops(poe_ops *ops)
{
    ops->adamw = adamw;
    ops->muon = muon;
}
