/* SPDX-License-Identifier: MIT
 * Every operation of the CPU backend against a plain double-precision statement of it, on seeded random shapes, with
 * every kernel set that this processor runs; and its results on 1, 2 and 3 threads, which must be the same bits. */
#include <stdbool.h>
#include <stdint.h>

#include "src/crc32c.h"
#include "src/rng.h"
#include "stages/cpu/cpu.h"
#include "tests/check.h"

/* --- harness: a case draws inputs, runs an operation, records its results and checks them ------------------------- */

enum { MAX_THREADS = 3, MAX_PIECES = 256 };

static const float eps = 1.1920929e-7f;

typedef struct run {
    poe_backend *be;
    const poe_ops *ops;
    bool check;   /* compare with the reference */
    uint32_t crc; /* of everything recorded */
    poe_rng rng;
    const char *what; /* kernel set and case, for messages */
    void *pieces[MAX_PIECES];
    int n_pieces;
} run;

static void *take(run *r, size_t bytes)
{
    void *piece = calloc(bytes ? bytes : 1, 1);
    if (!piece || r->n_pieces == MAX_PIECES)
        abort();
    return r->pieces[r->n_pieces++] = piece;
}

/* Normal floats of the given standard deviation. */
static float *draw(run *r, size_t n, double deviation)
{
    float *x = take(r, n * sizeof(*x));
    for (size_t i = 0; i < n; i++)
        x[i] = (float)(deviation * poe_rng_normal(&r->rng));
    return x;
}

static size_t pick(run *r, size_t low, size_t high)
{
    return low + poe_rng_next(&r->rng) % (high - low + 1);
}

static int32_t *draw_tokens(run *r, size_t n, int32_t low, size_t v)
{
    int32_t *x = take(r, n * sizeof(*x));
    for (size_t i = 0; i < n; i++)
        x[i] = low + (int32_t)(poe_rng_next(&r->rng) % (v - (size_t)(int64_t)low));
    return x;
}

static float *copied(run *r, const float *x, size_t n)
{
    float *y = take(r, n * sizeof(*y));
    memcpy(y, x, n * sizeof(*y));
    return y;
}

static double *doubles(run *r, const float *x, size_t n) // x may be NULL: zeros
{
    double *y = take(r, n * sizeof(*y));
    for (size_t i = 0; x && i < n; i++)
        y[i] = (double)x[i];
    return y;
}

/* Records x (n) and compares it with `want`: |x - want| <= tolerance * (size + |want|), size being the root mean square
 * of `want`, or `terms`, the size of the terms that it is a sum of, where that is more: fp32 sums err by some units in
 * the last place of their terms. */
static void expect_sum(run *r, const char *name, const float *x, const double *want, size_t n, double tolerance,
                       double terms)
{
    r->crc = poe_crc32c(r->crc, x, n * sizeof(*x));
    if (!r->check)
        return;
    double square = 0, worst = 0;
    size_t at = 0;
    for (size_t i = 0; i < n; i++)
        square += want[i] * want[i];
    double size = fmax(sqrt(square / (double)n), terms);
    for (size_t i = 0; i < n; i++) {
        double error = fabs((double)x[i] - want[i]) / (size + fabs(want[i]) + 1e-30);
        if (!(error <= worst)) {
            worst = error;
            at = i;
        }
    }
    if (!(worst <= tolerance)) {
        fprintf(stderr, "%s: %s[%zu] of %zu is %.9g, expected %.9g (error %.3g, allowed %.3g)\n", r->what, name, at, n,
                (double)x[at], want[at], worst, tolerance);
        check_failures++;
    }
}

static void expect(run *r, const char *name, const float *x, const double *want, size_t n, double tolerance)
{
    expect_sum(r, name, x, want, n, tolerance, 0);
}

static const double exact = 2e-6; /* a handful of roundings and one short sum */

/* --- floats ------------------------------------------------------------------------------------------------------ */

static void case_floats(run *r)
{
    size_t n = pick(r, 1, 40000);
    float *a = draw(r, n, 1), *b = draw(r, n, 1), *y = draw(r, n, 1), *z = take(r, n * sizeof(*z));
    double *want = doubles(r, y, n);
    r->ops->add(r->be, y, a, n);
    for (size_t i = 0; i < n; i++)
        want[i] += (double)a[i];
    expect(r, "add", y, want, n, exact);
    r->ops->sum(r->be, z, a, b, n);
    for (size_t i = 0; i < n; i++)
        want[i] = (double)a[i] + (double)b[i];
    expect(r, "sum", z, want, n, exact);
    r->ops->copy(r->be, z, a, n);
    CHECK(!memcmp(z, a, n * sizeof(*z)));
    r->ops->fill(r->be, z, 1.5f, n);
    CHECK(z[0] == 1.5f && z[n / 2] == 1.5f && z[n - 1] == 1.5f);
}

static void case_finite(run *r)
{
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    size_t n = pick(r, 1, 60000);
    float *x = draw(r, n, 1e30);
    CHECK(r->ops->finite(r->be, x, n));
    x[pick(r, 0, n - 1)] = bad[pick(r, 0, 2)];
    CHECK(!r->ops->finite(r->be, x, n));
}

static void case_memory(run *r)
{
    float *x = r->ops->memory_allocate(r->be, "a test", 1000 * sizeof(*x));
    CHECK(x && (uintptr_t)x % 64 == 0 && x[0] == 0.0f && x[999] == 0.0f);
    r->ops->memory_free(r->be, x, 1000 * sizeof(*x));
}

static void case_relu2(run *r)
{
    size_t n = pick(r, 1, 40000);
    float *f = draw(r, n, 1), *a = take(r, n * sizeof(*a)), *d = draw(r, n, 1);
    double *want = doubles(r, NULL, n), *dwant = doubles(r, d, n);
    for (size_t i = 0; i < n; i++) {
        double x = fmax((double)f[i], 0);
        want[i] = x * x;
        dwant[i] *= 2 * x;
    }
    r->ops->relu2_forward(r->be, a, f, n);
    expect(r, "relu2", a, want, n, exact);
    r->ops->relu2_backward(r->be, d, d, f, n);
    expect(r, "relu2 df", d, dwant, n, exact);
}

/* --- products ---------------------------------------------------------------------------------------------------- */

/* c (m,n) += alpha a b, with steps between rows and columns of a (m,k) and b (k,n). */
static void plain_product(double *c, size_t ldc, const float *a, size_t a_row, size_t a_column, const float *b,
                          size_t b_row, size_t b_column, size_t m, size_t n, size_t k)
{
    for (size_t i = 0; i < m; i++)
        for (size_t l = 0; l < k; l++)
            for (size_t j = 0; j < n; j++)
                c[i * ldc + j] += (double)a[i * a_row + l * a_column] * (double)b[l * b_row + j * b_column];
}

static void case_products(run *r)
{
    size_t n = pick(r, 0, 3) ? pick(r, 1, 300) : 1, in = pick(r, 1, 130), out = pick(r, 1, 300);
    size_t ldx = in + pick(r, 0, 5), ldy = out + pick(r, 0, 5);
    float *x = draw(r, n * ldx, 1), *w = draw(r, out * in, 1), *y = draw(r, n * ldy, 1);
    float *dw = draw(r, out * in, 1), *dx = draw(r, n * ldx, 1), *dy = copied(r, y, n * ldy);
    bool accumulate = pick(r, 0, 1);
    double *want = doubles(r, y, n * ldy), *want_dx = doubles(r, dx, n * ldx), *want_dw = doubles(r, dw, out * in);
    for (size_t i = 0; i < n && !accumulate; i++) {
        memset(want + i * ldy, 0, out * sizeof(*want)); /* what lies between the rows must stay */
        memset(want_dx + i * ldx, 0, in * sizeof(*want));
    }
    if (r->check) {
        plain_product(want, ldy, x, ldx, 1, w, 1, in, n, out, in);
        plain_product(want_dx, ldx, dy, ldy, 1, w, in, 1, n, in, out);
        plain_product(want_dw, in, dy, 1, ldy, x, ldx, 1, out, in, n);
    }
    r->ops->matmul(r->be, y, ldy, x, ldx, w, n, in, out, accumulate);
    r->ops->matmul_dx(r->be, dx, ldx, dy, ldy, w, n, in, out, accumulate);
    r->ops->matmul_dw(r->be, dw, dy, ldy, x, ldx, n, in, out);
    expect(r, "matmul", y, want, n * ldy, exact);
    expect(r, "matmul dx", dx, want_dx, n * ldx, exact);
    expect(r, "matmul dw", dw, want_dw, out * in, exact);
}

/* --- norm and embedding ------------------------------------------------------------------------------------------ */

/* u = norm(x), returning rinv. */
static double plain_norm(double *u, const float *x, size_t c)
{
    double square = 0;
    for (size_t i = 0; i < c; i++)
        square += (double)x[i] * (double)x[i];
    double rinv = 1 / sqrt(square / (double)c + (double)eps);
    for (size_t i = 0; i < c; i++)
        u[i] = (double)x[i] * rinv;
    return rinv;
}

/* dx += backward of du through the norm. */
static void plain_norm_backward(double *dx, const float *du, const double *u, double rinv, size_t c)
{
    double mean = 0;
    for (size_t i = 0; i < c; i++)
        mean += (double)du[i] * u[i] / (double)c;
    for (size_t i = 0; i < c; i++)
        dx[i] += rinv * ((double)du[i] - u[i] * mean);
}

static void case_norm(run *r)
{
    size_t n = pick(r, 1, 80), c = pick(r, 24, 200);
    float *x = draw(r, n * c, 2), *u = take(r, n * c * sizeof(*u)), *rinv = take(r, n * sizeof(*rinv));
    float *dx = draw(r, n * c, 1), *du = draw(r, n * c, 1);
    memset(x, 0, c * sizeof(*x)); /* a row of zeros: eps alone */
    memset(du, 0, c * sizeof(*du));
    double *want = doubles(r, NULL, n * c), *want_rinv = doubles(r, NULL, n), *want_dx = doubles(r, dx, n * c);
    for (size_t i = 0; i < n; i++) {
        want_rinv[i] = plain_norm(want + i * c, x + i * c, c);
        plain_norm_backward(want_dx + i * c, du + i * c, want + i * c, want_rinv[i], c);
    }
    r->ops->norm_forward(r->be, u, rinv, x, n, c, eps);
    r->ops->norm_backward(r->be, dx, du, u, rinv, n, c);
    expect(r, "norm u", u, want, n * c, exact);
    expect(r, "norm rinv", rinv, want_rinv, n, exact);
    expect(r, "norm dx", dx, want_dx, n * c, exact);
}

static void case_embed(run *r)
{
    size_t n = pick(r, 1, 150), c = pick(r, 24, 200), v = pick(r, 1, 40);
    int32_t *idx = draw_tokens(r, n, 0, v);
    float *wte = draw(r, v * c, 1), *e = take(r, n * c * sizeof(*e)), *rinv = take(r, n * sizeof(*rinv));
    float *dwte = draw(r, v * c, 1), *de = draw(r, n * c, 1);
    double *want = doubles(r, NULL, n * c), *want_dwte = doubles(r, dwte, v * c);
    for (size_t i = 0; i < n; i++) {
        double s = plain_norm(want + i * c, wte + (size_t)idx[i] * c, c);
        plain_norm_backward(want_dwte + (size_t)idx[i] * c, de + i * c, want + i * c, s, c);
    }
    r->ops->embed_forward(r->be, e, rinv, idx, wte, n, c, eps);
    r->ops->embed_backward(r->be, dwte, de, e, rinv, idx, n, c);
    expect(r, "embed e", e, want, n * c, exact);
    expect(r, "embed dwte", dwte, want_dwte, v * c, exact);
}

static double logistic(double x)
{
    return 1 / (1 + exp(-x));
}

static double plain_dot(const float *a, const float *b, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += (double)a[i] * (double)b[i];
    return sum;
}

static void case_smear(run *r)
{
    size_t b = pick(r, 1, 3), t = pick(r, 1, 50), c = pick(r, 24, 100), n = b * t;
    float *e = draw(r, n * c, 1), *gate = draw(r, 24, 0.3), *lambda = draw(r, 1, 1), *dx0 = draw(r, n * c, 1);
    float *x0 = take(r, n * c * sizeof(*x0)), *sig = take(r, n * sizeof(*sig)), *de = draw(r, n * c, 1);
    float *dgate = draw(r, 24, 1), *dlambda = draw(r, 1, 1);
    double *want = doubles(r, e, n * c), *want_de = doubles(r, dx0, n * c), l = (double)*lambda;
    double *want_dgate = doubles(r, dgate, 24), *want_dlambda = doubles(r, dlambda, 1);
    for (size_t i = 0; i < n; i++) {
        if (i % t == 0)
            continue;
        double s = logistic(plain_dot(gate, e + i * c, 24)), through = plain_dot(dx0 + i * c, e + (i - 1) * c, c);
        double dlogit = l * through * s * (1 - s);
        *want_dlambda += s * through;
        for (size_t j = 0; j < c; j++) {
            want[i * c + j] += l * s * (double)e[(i - 1) * c + j];
            want_de[(i - 1) * c + j] += l * s * (double)dx0[i * c + j];
        }
        for (size_t j = 0; j < 24; j++) {
            want_de[i * c + j] += dlogit * (double)gate[j];
            want_dgate[j] += dlogit * (double)e[i * c + j];
        }
    }
    r->ops->smear_forward(r->be, x0, sig, e, gate, lambda, b, t, c);
    r->ops->smear_backward(r->be, de, dgate, dlambda, dx0, e, sig, gate, lambda, b, t, c);
    expect(r, "smear x0", x0, want, n * c, exact);
    expect(r, "smear de", de, want_de, n * c, 4 * exact);
    expect(r, "smear dgate", dgate, want_dgate, 24, 4 * exact);
    CHECK_NEAR((double)*dlambda, *want_dlambda, 1e-5, 1e-4);
}

/* --- residual stream --------------------------------------------------------------------------------------------- */

static void case_mix(run *r)
{
    size_t n = pick(r, 1, 100), c = pick(r, 24, 300);
    bool wanted = pick(r, 0, 1); /* dx */
    float *x = draw(r, n * c, 1), *x0 = draw(r, n * c, 1), *a = draw(r, 1, 1), *b = draw(r, 1, 1);
    float *y = copied(r, x, n * c), *dy = draw(r, n * c, 1), *dx0 = draw(r, n * c, 1), *ab = draw(r, 2, 1);
    double *want = doubles(r, NULL, n * c), *want_dx = doubles(r, dy, n * c), *want_dx0 = doubles(r, dx0, n * c);
    double da = (double)ab[0] + plain_dot(dy, x, n * c), db = (double)ab[1] + plain_dot(dy, x0, n * c);
    for (size_t i = 0; i < n * c; i++) {
        want[i] = (double)*a * (double)x[i] + (double)*b * (double)x0[i];
        want_dx[i] *= wanted ? (double)*a : 1;
        want_dx0[i] += (double)*b * (double)dy[i];
    }
    r->ops->mix_forward(r->be, y, y, x0, a, b, n, c);
    r->ops->mix_backward(r->be, wanted ? dy : NULL, dx0, ab, ab + 1, dy, x, x0, a, b, n, c);
    expect(r, "mix y", y, want, n * c, exact);
    expect(r, "mix dx", dy, want_dx, n * c, exact);
    expect(r, "mix dx0", dx0, want_dx0, n * c, exact);
    CHECK_NEAR((double)ab[0], da, 1e-5, 1e-3);
    CHECK_NEAR((double)ab[1], db, 1e-5, 1e-3);
    r->crc = poe_crc32c(r->crc, ab, 2 * sizeof(*ab));
}

static void case_backout(run *r)
{
    size_t n = pick(r, 1, 100), c = pick(r, 24, 300);
    float *x = draw(r, n * c, 1), *mid = draw(r, n * c, 1), *lambda = draw(r, 1, 1), *h = take(r, n * c * sizeof(*h));
    float *dmid = draw(r, n * c, 1), *dlambda = draw(r, 1, 1), *dh = draw(r, n * c, 1);
    double *want = doubles(r, x, n * c), *want_dmid = doubles(r, dmid, n * c);
    double want_dlambda = (double)*dlambda - plain_dot(dh, mid, n * c);
    for (size_t i = 0; i < n * c; i++) {
        want[i] -= (double)*lambda * (double)mid[i];
        want_dmid[i] -= (double)*lambda * (double)dh[i];
    }
    r->ops->backout_forward(r->be, h, x, mid, lambda, n, c);
    r->ops->backout_backward(r->be, dmid, dlambda, dh, mid, lambda, n, c);
    expect(r, "backout h", h, want, n * c, exact);
    expect(r, "backout dmid", dmid, want_dmid, n * c, exact);
    CHECK_NEAR((double)*dlambda, want_dlambda, 1e-5, 1e-3);
    r->crc = poe_crc32c(r->crc, dlambda, sizeof(*dlambda));
}

/* --- attention --------------------------------------------------------------------------------------------------- */

static size_t pick_head_size(run *r)
{
    static const size_t sizes[] = {2, 6, 16, 24, 64, 128};
    return sizes[pick(r, 0, 5)];
}

static void case_value_embed(run *r)
{
    size_t n = pick(r, 1, 90), c = pick(r, 24, 60), heads = pick(r, 1, 4), hs = pick_head_size(r), kv = heads * hs;
    size_t v = pick(r, 1, 30);
    int32_t *idx = draw_tokens(r, n, 0, v);
    float *u = draw(r, n * c, 1), *w = draw(r, heads * 12, 0.4), *ve = draw(r, v * kv, 1), *values = draw(r, n * kv, 1);
    float *gate = take(r, n * heads * sizeof(*gate)), *du = draw(r, n * c, 1), *dw = draw(r, heads * 12, 1);
    float *dve = draw(r, v * kv, 1), *dv = draw(r, n * kv, 1);
    double *want = doubles(r, values, n * kv), *want_du = doubles(r, du, n * c), *want_dw = doubles(r, dw, heads * 12);
    double *want_dve = doubles(r, dve, v * kv);
    for (size_t i = 0; i < n * heads; i++) {
        size_t row = i / heads, h = i % heads, token = (size_t)idx[row] * kv + h * hs;
        double s = logistic(plain_dot(u + row * c, w + h * 12, 12));
        double dlogit = plain_dot(dv + i * hs, ve + token, hs) * 3 * s * (1 - s);
        for (size_t j = 0; j < hs; j++) {
            want[i * hs + j] += 3 * s * (double)ve[token + j];
            want_dve[token + j] += 3 * s * (double)dv[i * hs + j];
        }
        for (size_t j = 0; j < 12; j++) {
            want_du[row * c + j] += dlogit * (double)w[h * 12 + j];
            want_dw[h * 12 + j] += dlogit * (double)u[row * c + j];
        }
    }
    r->ops->value_embed_forward(r->be, values, gate, u, idx, w, ve, n, c, heads, hs);
    r->ops->value_embed_backward(r->be, du, dw, dve, dv, gate, u, idx, w, ve, n, c, heads, hs);
    expect(r, "value embed v", values, want, n * kv, exact);
    expect(r, "value embed du", du, want_du, n * c, 4 * exact);
    expect(r, "value embed dw", dw, want_dw, heads * 12, 4 * exact);
    expect(r, "value embed dve", dve, want_dve, v * kv, exact);
}

/* One head: y = 1.2 norm(rotate(x)), and dx by the transposed Jacobian of each step. */
static void plain_rotary(double *y, double *dx, const float *x, const float *dy, const float *cosine, const float *sine,
                         size_t hs)
{
    float turned[256] = {0};
    double n[256], dn[256] = {0};
    float dscaled[256] = {0};
    for (size_t i = 0; i < hs / 2; i++) {
        turned[i] = x[i] * cosine[i] + x[i + hs / 2] * sine[i];
        turned[i + hs / 2] = x[i + hs / 2] * cosine[i] - x[i] * sine[i];
    }
    for (size_t i = 0; i < hs; i++)
        dscaled[i] = 1.2f * dy[i];
    double rinv = plain_norm(n, turned, hs);
    plain_norm_backward(dn, dscaled, n, rinv, hs);
    for (size_t i = 0; i < hs; i++)
        y[i] = 1.2 * n[i];
    for (size_t i = 0; i < hs / 2; i++) {
        double c = (double)cosine[i], s = (double)sine[i];
        dx[i] = dn[i] * c - dn[i + hs / 2] * s;
        dx[i + hs / 2] = dn[i] * s + dn[i + hs / 2] * c;
    }
}

static void case_rotary(run *r)
{
    size_t b = pick(r, 1, 3), t = pick(r, 1, 40), heads = pick(r, 1, 4), hs = pick_head_size(r), n = b * t * heads * hs;
    float *x = draw(r, n, 1), *dy = draw(r, n, 1), *rinv = take(r, b * t * heads * sizeof(*rinv));
    float *cosine = take(r, t * hs * sizeof(*cosine)), *sine = take(r, t * hs * sizeof(*sine));
    for (size_t i = 0; i < t * hs / 2; i++) {
        double angle = 10 * poe_rng_uniform(&r->rng);
        cosine[i] = (float)cos(angle);
        sine[i] = (float)sin(angle);
    }
    double *want = doubles(r, NULL, n), *want_dx = doubles(r, NULL, n);
    for (size_t i = 0; i < b * t * heads; i++) {
        size_t angle = i / heads % t * (hs / 2);
        plain_rotary(want + i * hs, want_dx + i * hs, x + i * hs, dy + i * hs, cosine + angle, sine + angle, hs);
    }
    r->ops->rotary_forward(r->be, x, rinv, x, cosine, sine, b, t, heads, hs, eps);
    expect(r, "rotary y", x, want, n, exact);
    float *over_y = draw(r, n, 1);
    memcpy(over_y, x, n * sizeof(*x));
    r->ops->rotary_backward(r->be, over_y, dy, over_y, rinv, cosine, sine, b, t, heads, hs);
    r->ops->rotary_backward(r->be, dy, dy, x, rinv, cosine, sine, b, t, heads, hs);
    CHECK(memcmp(over_y, dy, n * sizeof(*dy)) == 0);
    /* A head whose values happen to be small has a large rinv, and cancels: the tolerance is that of rinv^2. */
    expect(r, "rotary dx", dy, want_dx, n, 1e-4);
}

/* One query position t of one head: y, lse, and its part of dq, dk, dv. p has room for t+1 probabilities. Rows of q
 * and y are ld apart, those of k and v kv_ld; pointers are to position 0 of the head. */
typedef struct plain_head {
    const float *q, *k, *v, *dy;
    double *y, *dq, *dk, *dv, *p;
    size_t ld, kv_ld, hs, window;
} plain_head;

static double plain_attention_row(const plain_head *h, size_t t)
{
    size_t from = t > h->window ? t - h->window : 0;
    double total = 0, delta = 0, scale = 1 / sqrt((double)h->hs), dp;
    for (size_t s = from; s <= t; s++)
        total += h->p[s] = exp(scale * plain_dot(h->q + t * h->ld, h->k + s * h->kv_ld, h->hs));
    for (size_t s = from; s <= t; s++) {
        h->p[s] /= total;
        delta += h->p[s] * plain_dot(h->dy + t * h->ld, h->v + s * h->kv_ld, h->hs);
    }
    for (size_t s = from; s <= t; s++) {
        dp = plain_dot(h->dy + t * h->ld, h->v + s * h->kv_ld, h->hs);
        double ds = scale * h->p[s] * (dp - delta);
        for (size_t i = 0; i < h->hs; i++) {
            size_t query = t * h->ld + i, key = s * h->kv_ld + i;
            h->y[query] += h->p[s] * (double)h->v[key];
            h->dq[query] += ds * (double)h->k[key];
            h->dk[key] += ds * (double)h->q[query];
            h->dv[key] += h->p[s] * (double)h->dy[query];
        }
    }
    return log(total);
}

static void check_attention(run *r, const poe_attention_shape *s)
{
    size_t ld = s->n_head * s->head_size, kv_ld = s->n_kv_head * s->head_size, n = s->b * s->t;
    float *q = draw(r, n * ld, 1.2), *k = draw(r, n * kv_ld, 1.2), *v = draw(r, n * kv_ld, 1), *dy = draw(r, n * ld, 1);
    float *y = draw(r, n * ld, 1), *lse = take(r, n * s->n_head * sizeof(*lse));
    float *dq = draw(r, n * ld, 1), *dk = draw(r, n * kv_ld, 1), *dv = draw(r, n * kv_ld, 1); /* overwritten */
    double *want = doubles(r, NULL, n * ld), *want_lse = doubles(r, NULL, n * s->n_head);
    double *want_dq = doubles(r, NULL, n * ld), *p = doubles(r, NULL, s->t);
    double *want_dk = doubles(r, NULL, n * kv_ld), *want_dv = doubles(r, NULL, n * kv_ld);
    for (size_t i = 0; r->check && i < s->b * s->n_head; i++) {
        size_t b = i / s->n_head, h = i % s->n_head;
        size_t at = b * s->t * ld + h * s->head_size;
        size_t kv = b * s->t * kv_ld + h / (s->n_head / s->n_kv_head) * s->head_size;
        plain_head head = {q + at,       k + kv, v + kv, dy + at, want + at,    want_dq + at, want_dk + kv,
                           want_dv + kv, p,      ld,     kv_ld,   s->head_size, s->window};
        for (size_t t = 0; t < s->t; t++)
            want_lse[i * s->t + t] = plain_attention_row(&head, t);
    }
    r->ops->attention_forward(r->be, y, lse, q, k, v, s);
    r->ops->attention_backward(r->be, dq, dk, dv, dy, y, lse, q, k, v, s);
    expect(r, "attention y", y, want, n * ld, 2 * exact);
    expect(r, "attention lse", lse, want_lse, n * s->n_head, 2 * exact);
    /* p is formed from scores of up to some tens, whose last place is 2e-6: gradients inherit that. Those of q and k
     * are exactly 0 where a row sees one key: a difference of terms of size 1. */
    expect_sum(r, "attention dq", dq, want_dq, n * ld, 10 * exact, 1);
    expect_sum(r, "attention dk", dk, want_dk, n * kv_ld, 10 * exact, 1);
    expect(r, "attention dv", dv, want_dv, n * kv_ld, 10 * exact);
}

static void case_attention(run *r)
{
    size_t group = pick(r, 1, 3), n_kv_head = pick(r, 1, 3), t = pick(r, 0, 4) ? pick(r, 1, 200) : 1;
    static const size_t windows[] = {0, 1, 63, 64, 65, 127, 128, 1000};
    size_t window = windows[pick(r, 0, 7)];
    if (pick(r, 0, 2) == 0)
        window = t - pick(r, 0, 1);
    check_attention(r,
                    &(poe_attention_shape){pick(r, 1, 2), t, group * n_kv_head, n_kv_head, pick_head_size(r), window});
}

/* --- head -------------------------------------------------------------------------------------------------------- */

/* Loss and gradients of one row; logits has room for v. Returns the row's loss. */
static double plain_head_row(double *du, double *dw, double *logits, const float *u, const float *w, int32_t target,
                             double weight, size_t c, size_t v)
{
    double total = 0;
    for (size_t j = 0; j < v; j++) {
        logits[j] = 15 * tanh(plain_dot(u, w + j * c, c) / 15);
        total += exp(logits[j]);
    }
    if (target < 0)
        return 0;
    for (size_t j = 0; j < v; j++) {
        double tanh_j = logits[j] / 15;
        double d = weight * (exp(logits[j]) / total - (j == (size_t)target)) * (1 - tanh_j * tanh_j);
        for (size_t i = 0; i < c; i++) {
            du[i] += d * (double)w[j * c + i];
            dw[j * c + i] += d * (double)u[i];
        }
    }
    return log(total) - logits[target];
}

static void case_head(run *r)
{
    size_t n = pick(r, 0, 3) ? pick(r, 1, 300) : 1, c = pick(r, 24, 70), v = pick(r, 2, 700), vp = (v + 63) / 64 * 64;
    float *u = draw(r, n * c, 1), *w = draw(r, vp * c, pick(r, 0, 1) ? 0.2 : 2), *dw = draw(r, vp * c, 0.001);
    float *du = draw(r, n * c, 1), scale = 0.25f, *z = take(r, n * v * sizeof(*z));
    int32_t *targets = draw_tokens(r, n, -1, v);
    double *want_du = doubles(r, NULL, n * c), *want_dw = doubles(r, dw, vp * c), *logits = doubles(r, NULL, n * v);
    double count = 0, want = 0, loss = -1, alone = -1;
    for (size_t i = 0; i < n; i++)
        count += targets[i] >= 0;
    count = fmax(count, 1);
    for (size_t i = 0; r->check && i < n; i++)
        want += plain_head_row(want_du + i * c, want_dw, logits + i * v, u + i * c, w, targets[i],
                               (double)scale / count, c, v) /
                count;
    for (size_t i = v * c; i < vp * c; i++)
        w[i] = NAN; /* the rows beyond v must take no part */
    r->ops->head_loss(r->be, &alone, NULL, NULL, u, w, targets, scale, n, c, v, vp);
    r->ops->head_loss(r->be, &loss, du, dw, u, w, targets, scale, n, c, v, vp);
    r->ops->head_logits(r->be, z, u, w, n, c, v);
    CHECK(loss == alone);
    if (r->check)
        CHECK_NEAR(loss, want, 2e-6, 2e-6);
    r->crc = poe_crc32c(r->crc, &loss, sizeof(loss));
    expect(r, "head du", du, want_du, n * c, 4 * exact);
    expect(r, "head dw", dw, want_dw, vp * c, 4 * exact);
    expect(r, "head logits", z, logits, n * v, exact);
}

/* --- optimiser --------------------------------------------------------------------------------------------------- */

static void case_adamw(run *r)
{
    size_t n = pick(r, 1, 40000);
    float *w = draw(r, n, 1), *m = draw(r, n, 0.1), *v = draw(r, n, 0.1), *g = draw(r, n, 0.1);
    poe_adamw_step step = {0.01f, 0.8f, 0.96f, 1e-10f, 0.1f, (int64_t)pick(r, 1, 500)};
    double *want = doubles(r, w, n), *want_m = doubles(r, m, n), *want_v = doubles(r, v, n);
    double b1 = (double)step.beta1, b2 = (double)step.beta2, lr = (double)step.lr;
    for (size_t i = 0; i < n; i++) {
        v[i] = fabsf(v[i]);
        if (i % 7 == 0)
            g[i] = m[i] = v[i] = 0.0f; /* a token that does not occur */
        want_m[i] = b1 * (double)m[i] + (1 - b1) * (double)g[i];
        want_v[i] = b2 * (double)v[i] + (1 - b2) * (double)g[i] * (double)g[i];
        want[i] *= 1 - lr * (double)step.weight_decay;
        want[i] -= lr / (1 - pow(b1, (double)step.t)) * want_m[i] /
                   (sqrt(want_v[i] / (1 - pow(b2, (double)step.t))) + (double)step.eps);
    }
    r->ops->adamw(r->be, w, m, v, g, n, &step);
    expect(r, "adamw w", w, want, n, exact);
    expect(r, "adamw m", m, want_m, n, exact);
    expect(r, "adamw v", v, want_v, n, exact);
}

static const double polar[5][3] = {
    {8.156554524902461, -22.48329292557795, 15.878769915207462},
    {4.042929935166739, -2.808917465908714, 0.5000178451051316},
    {3.8916678022926607, -2.772484153217685, 0.5060648178503393},
    {3.285753657755655, -2.3681294933425376, 0.46449024233003106},
    {2.3465413258596377, -1.7097828382687081, 0.42323551169305323},
};

/* x <- a x + (b A + c A^2) x, A = x x^T: also what the tall form computes. */
static void plain_polar_step(run *r, double *x, size_t rows, size_t cols, const double *abc)
{
    double *a = doubles(r, NULL, rows * rows), *p = doubles(r, NULL, rows * rows), *y = doubles(r, NULL, rows * cols);
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < rows; j++)
            for (size_t l = 0; l < cols; l++)
                a[i * rows + j] += x[i * cols + l] * x[j * cols + l];
    for (size_t i = 0; i < rows; i++)
        for (size_t l = 0; l < rows; l++)
            for (size_t j = 0; j < rows; j++)
                p[i * rows + j] += abc[2] * a[i * rows + l] * a[l * rows + j];
    for (size_t i = 0; i < rows; i++)
        for (size_t l = 0; l < rows; l++)
            for (size_t j = 0; j < cols; j++)
                y[i * cols + j] += (p[i * rows + l] + abc[1] * a[i * rows + l]) * x[l * cols + j];
    for (size_t i = 0; i < rows * cols; i++)
        x[i] = abc[0] * x[i] + y[i];
}

/* Scales x in place and updates `second`, as poe_ref.py's muon() does. */
static void plain_normuon(run *r, double *x, double *second, size_t rows, size_t cols)
{
    bool by_row = rows >= cols;
    size_t kept = by_row ? rows : cols, reduced = by_row ? cols : rows;
    double *mean = doubles(r, NULL, kept), before = 0, after = 0;
    for (size_t i = 0; i < rows * cols; i++)
        mean[by_row ? i / cols : i % cols] += x[i] * x[i] / (double)reduced;
    for (size_t i = 0; i < kept; i++) {
        second[i] += 0.1 * (mean[i] - second[i]);
        before += mean[i] * (double)reduced;
        after += mean[i] * (double)reduced / fmax(second[i], 1e-10);
    }
    for (size_t i = 0; i < rows * cols; i++)
        x[i] *= sqrt(before) / fmax(sqrt(after), 1e-10) / sqrt(fmax(second[by_row ? i / cols : i % cols], 1e-10));
}

/* Gradients whose singular values fall over `decades`: what the small Gram matrix finds hardest. */
static void spread(run *r, float *g, size_t rows, size_t cols, double decades)
{
    size_t small = rows < cols ? rows : cols, n = rows * cols;
    double *mixed = doubles(r, NULL, n), *mix = doubles(r, NULL, small * small);
    for (size_t i = 0; i < small; i++)
        for (size_t j = 0; j < small; j++)
            mix[i * small + j] = poe_rng_normal(&r->rng) * pow(10, -decades * (double)j / (double)small);
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < cols; j++)
            for (size_t l = 0; l < small; l++)
                mixed[i * cols + j] += rows < cols ? mix[i * small + l] * (double)g[l * cols + j]
                                                   : (double)g[i * cols + l] * mix[j * small + l];
    for (size_t i = 0; i < n; i++)
        g[i] = (float)mixed[i];
}

/* The direction alone: no weights, no momentum, no variance to remember. */
static void case_muon_spread(run *r)
{
    static const size_t sides[][2] = {{24, 24}, {24, 96}, {96, 24}, {70, 280}, {280, 70}, {130, 512}};
    const size_t *side = sides[pick(r, 0, 5)];
    size_t rows = side[0], cols = side[1], n = rows * cols, kept = rows > cols ? rows : cols;
    float *w = draw(r, n, 0), *m = draw(r, n, 0), *second = draw(r, kept, 0), *g = draw(r, n, 1);
    spread(r, g, rows, cols, (double)pick(r, 0, 7));
    double *x = doubles(r, g, n), *want_second = doubles(r, NULL, kept), square = 0;
    for (size_t i = 0; i < n; i++)
        square += x[i] * x[i];
    for (size_t i = 0; i < n; i++)
        x[i] /= 1.01 * sqrt(square) + 1e-6;
    for (size_t i = 0; r->check && i < 5; i++)
        plain_polar_step(r, x, rows, cols, polar[i]);
    plain_normuon(r, x, want_second, rows, cols);
    double lr = sqrt(fmax(1, (double)rows / (double)cols));
    for (size_t i = 0; i < n; i++)
        x[i] *= -lr;
    r->ops->muon(r->be, w, m, second, g, rows, cols, &(poe_muon_step){1.0f, 0.0f, 0.0f});
    expect(r, "muon direction", w, x, n, 1e-3);
}

static void case_muon(run *r)
{
    static const size_t sides[][2] = {{2, 12}, {24, 24}, {24, 96}, {96, 24}, {40, 33}, {12, 48}, {280, 70}};
    const size_t *side = sides[pick(r, 0, 6)];
    size_t rows = side[0], cols = side[1], n = rows * cols, kept = rows > cols ? rows : cols;
    float *w = draw(r, n, 1), *m = draw(r, n, 0.1), *second = draw(r, kept, 0.1), *g = draw(r, n, 0.1);
    poe_muon_step step = {0.02f, 0.9f, 0.3f};
    for (size_t i = 0; i < kept; i++)
        second[i] = fabsf(second[i]);
    double *x = doubles(r, NULL, n), *want = doubles(r, w, n), *want_m = doubles(r, m, n), square = 0;
    double *want_second = doubles(r, second, kept), mu = (double)step.momentum;
    double lr = (double)step.lr * sqrt(fmax(1, (double)rows / (double)cols));
    for (size_t i = 0; i < n; i++) {
        want_m[i] = mu * (double)m[i] + (1 - mu) * (double)g[i];
        x[i] = (1 - mu) * (double)g[i] + mu * want_m[i];
        square += x[i] * x[i];
    }
    for (size_t i = 0; i < n; i++)
        x[i] /= 1.01 * sqrt(square) + 1e-6;
    for (size_t i = 0; r->check && i < 5; i++)
        plain_polar_step(r, x, rows, cols, polar[i]);
    plain_normuon(r, x, want_second, rows, cols);
    for (size_t i = 0; i < n; i++)
        want[i] -= lr * x[i] + (x[i] * want[i] >= 0 ? lr * (double)step.weight_decay * want[i] : 0);
    r->ops->muon(r->be, w, m, second, g, rows, cols, &step);
    expect(r, "muon m", m, want_m, n, exact);
    expect(r, "muon second", second, want_second, kept, 1e-4);
    /* lr is 0.02: this is 1e-3 of the step, to which five iterations amplify the roundings of the first; the decay of
     * an element whose direction is about zero may go either way, by lr * 0.3 * w. */
    expect(r, "muon w", w, want, n, 2e-5);
}

static void case_muon_zero(run *r)
{
    float *w = draw(r, 600, 1), *m = draw(r, 600, 0), *second = draw(r, 30, 0), *g = draw(r, 600, 0);
    r->ops->muon(r->be, w, m, second, g, 20, 30, &(poe_muon_step){0.02f, 0.9f, 0.0f});
    CHECK(r->ops->finite(r->be, w, 600));
}

/* --- all of it --------------------------------------------------------------------------------------------------- */

typedef struct test_case {
    const char *name;
    void (*run)(run *r);
    int repeats;
} test_case;

static const test_case cases[] = {
    {"floats", case_floats, 3},
    {"finite", case_finite, 5},
    {"memory", case_memory, 1},
    {"relu2", case_relu2, 2},
    {"products", case_products, 10},
    {"norm", case_norm, 5},
    {"embed", case_embed, 5},
    {"smear", case_smear, 6},
    {"mix", case_mix, 6},
    {"backout", case_backout, 3},
    {"rotary", case_rotary, 8},
    {"value embed", case_value_embed, 6},
    {"attention", case_attention, 24},
    {"head", case_head, 8},
    {"adamw", case_adamw, 3},
    {"muon", case_muon, 8},
    {"muon, spread spectrum", case_muon_spread, 12},
    {"muon of zeros", case_muon_zero, 1},
};

static uint32_t run_case(poe_backend *be, const test_case *test, uint64_t seed, bool check, const char *kernels)
{
    char what[128];
    snprintf(what, sizeof(what), "%s, %s %d", kernels, test->name, (int)seed);
    run r = {.be = be, .ops = be->ops, .check = check, .what = what};
    poe_rng_init(&r.rng, seed, test->name);
    test->run(&r);
    for (int i = 0; i < r.n_pieces; i++)
        free(r.pieces[i]);
    return r.crc;
}

static void test_kernels(poe_kernels kernels)
{
    const char *name = poe_kernels_name(kernels);
    poe_backend_limits limits = {.rows = 700,
                                 .t = 200,
                                 .c = 300,
                                 .head_size = 128,
                                 .n_head = 9,
                                 .n_kv_head = 4,
                                 .mlp_dim = 300,
                                 .vocab_padded = 704,
                                 .training = true};
    poe_backend *be[MAX_THREADS] = {NULL};
    for (int i = 0; i < MAX_THREADS; i++)
        CHECK_INT(poe_cpu_create(kernels, i + 1, &limits, &be[i]), POE_OK);
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++)
        for (int seed = 0; seed < cases[i].repeats; seed++) {
            uint32_t crc = run_case(be[0], &cases[i], (uint64_t)seed, true, name);
            for (int threads = 2; threads <= MAX_THREADS; threads++)
                if (run_case(be[threads - 1], &cases[i], (uint64_t)seed, false, name) != crc) {
                    fprintf(stderr, "%s, %s %d: %d threads give other bits\n", name, cases[i].name, seed, threads);
                    check_failures++;
                }
        }
    for (int i = 0; i < MAX_THREADS; i++)
        poe_cpu_destroy(be[i]);
}

int main(int argc, char **argv)
{
    (void)argc;
    poe_blas_ensure(poe_kernels_best(), argv); /* products by the best library under every set */
    for (poe_kernels kernels = 0; kernels <= poe_kernels_best(); kernels++)
        test_kernels(kernels);
    poe_cpu_destroy(NULL);
    return check_result();
}
