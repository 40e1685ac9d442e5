/* SPDX-License-Identifier: MIT
 * AdamW and Muon of the reference backend (spec 3). */
#include <math.h>

#include "stages/plain/plain_impl.h"

void plain_adamw(poe_backend *be, float *w, float *m, float *v, const float *g, size_t n, const poe_adamw_step *step)
{
    (void)be;
    double b1 = step->beta1, b2 = step->beta2, lr = step->lr;
    double fix1 = 1 - pow(b1, (double)step->t), fix2 = 1 - pow(b2, (double)step->t);
    for (size_t i = 0; i < n; i++) {
        double gi = g[i], mi = b1 * m[i] + (1 - b1) * gi, vi = b2 * v[i] + (1 - b2) * gi * gi;
        m[i] = (float)mi;
        v[i] = (float)vi;
        w[i] = (float)(w[i] * (1 - lr * step->weight_decay) - lr * (mi / fix1) / (sqrt(vi / fix2) + step->eps));
    }
}

/* out (rows,cols) = A (rows,inner) B (inner,cols) */
static void multiply(double *out, const double *a, const double *b, size_t rows, size_t inner, size_t cols)
{
    for (size_t r = 0; r < rows; r++) {
        for (size_t c = 0; c < cols; c++)
            out[r * cols + c] = 0;
        for (size_t k = 0; k < inner; k++)
            for (size_t c = 0; c < cols; c++)
                out[r * cols + c] += a[r * inner + k] * b[k * cols + c];
    }
}

/* One Polar Express step on x (short,long): x = a x + (b A + c A^2) x with A = x x^T. */
static void polar_step(double *x, double *spare, double *squares, size_t n, size_t cols, const double abc[3])
{
    double *A = squares, *A2 = A + n * n, *mixed = A2 + n * n;
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < n; j++) {
            A[i * n + j] = 0;
            for (size_t k = 0; k < cols; k++)
                A[i * n + j] += x[i * cols + k] * x[j * cols + k];
        }
    multiply(A2, A, A, n, n, n);
    for (size_t i = 0; i < n * n; i++)
        mixed[i] = abc[1] * A[i] + abc[2] * A2[i];
    multiply(spare, mixed, x, n, n, cols);
    for (size_t i = 0; i < n * cols; i++)
        x[i] = abc[0] * x[i] + spare[i];
}

/* x (short,long) becomes nearly orthogonal. */
static void orthogonalise(double *x, double *spare, double *squares, size_t n, size_t cols)
{
    static const double coefficients[5][3] = {
        {8.156554524902461, -22.48329292557795, 15.878769915207462},
        {4.042929935166739, -2.808917465908714, 0.5000178451051316},
        {3.8916678022926607, -2.772484153217685, 0.5060648178503393},
        {3.285753657755655, -2.3681294933425376, 0.46449024233003106},
        {2.3465413258596377, -1.7097828382687081, 0.42323551169305323},
    };
    double squared = 0;
    for (size_t i = 0; i < n * cols; i++)
        squared += x[i] * x[i];
    for (size_t i = 0; i < n * cols; i++)
        x[i] /= 1.01 * sqrt(squared) + 1e-6;
    for (int step = 0; step < 5; step++)
        polar_step(x, spare, squares, n, cols, coefficients[step]);
}

/* NorMuon on x (lines,length): each line is scaled by its running mean square, the norm of the whole is kept. */
static void reduce_variance(double *x, float *second, size_t lines, size_t length)
{
    double before = 0, after = 0;
    for (size_t i = 0; i < lines; i++) {
        double v = 0;
        for (size_t j = 0; j < length; j++)
            v += x[i * length + j] * x[i * length + j] / (double)length;
        second[i] = (float)(0.9 * second[i] + 0.1 * v);
        before += v * (double)length;
        after += v * (double)length / fmax(second[i], 1e-10);
    }
    double keep = sqrt(before) / fmax(sqrt(after), 1e-10);
    for (size_t i = 0; i < lines * length; i++)
        x[i] *= keep / sqrt(fmax(second[i / length], 1e-10));
}

static void transpose(double *y, const double *x, size_t rows, size_t cols)
{
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++)
            y[c * rows + r] = x[r * cols + c];
}

void plain_muon(poe_backend *be, float *w, float *m, float *second, const float *g, size_t rows, size_t cols,
                const poe_muon_step *step)
{
    size_t n = rows * cols, narrow = rows < cols ? rows : cols, wide = rows < cols ? cols : rows;
    double *x = plain_scratch(be), *spare = x + n, *squares = spare + n, mu = step->momentum;
    double lr = step->lr * sqrt(fmax(1, (double)rows / (double)cols));
    for (size_t i = 0; i < n; i++) {
        double mi = mu * m[i] + (1 - mu) * g[i];
        m[i] = (float)mi;
        spare[i] = (1 - mu) * g[i] + mu * mi;
    }
    /* orthogonalise() wants the short side first; reduce_variance() one line per index of the long side. */
    if (rows > cols)
        transpose(x, spare, rows, cols);
    else
        for (size_t i = 0; i < n; i++)
            x[i] = spare[i];
    orthogonalise(x, spare, squares, narrow, wide);
    if (rows == cols)
        reduce_variance(x, second, rows, cols);
    else {
        transpose(spare, x, narrow, wide);
        reduce_variance(spare, second, wide, narrow);
        transpose(x, spare, wide, narrow);
    }
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++) {
            double xi = rows > cols ? x[c * rows + r] : x[r * cols + c], wi = w[r * cols + c];
            w[r * cols + c] = (float)(wi - lr * xi - (xi * wi >= 0 ? lr * step->weight_decay * wi : 0));
        }
}
