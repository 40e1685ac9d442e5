/* SPDX-License-Identifier: MIT
 * Pictures: drawn from whole, short, damaged and resumed metrics; never a failure that says nothing. */
#include "src/plot.h"

#include <fcntl.h>
#include <stdbool.h>
#include <unistd.h>

#include "src/files.h"
#include "tests/check.h"

static char folder[] = "/tmp/poe plot's-XXXXXX"; /* a name that wants quoting */
static char metrics[4200], png[4200];

static void write_metrics(int stages, int steps, int eval_every, int nan_step)
{
    FILE *f = fopen(metrics, "w");
    for (int s = 0; f && s < steps; s++) {
        fprintf(f, "{\"step\": %d, \"loss\": 3, \"stage_loss\": [", s);
        for (int k = 0; k < stages; k++) {
            double loss = 3.2 - 0.05 * k + 4 * exp(-s / 20.0) + 0.15 * sin(12.9 * s + 3 * k) * cos(3.1 * s);
            fprintf(f, s == nan_step && k == 1 ? "%snull" : "%s%.4f", k ? ", " : "", loss);
        }
        fprintf(f, "], \"lrm\": 1, \"tokens\": %d, \"dt\": 0.1}\n", s * 4096);
        if (!eval_every || (s + 1) % eval_every)
            continue;
        fprintf(f, "{\"step\": %d, \"bpb\": {\"stage\": [2.2], \"prefix\": [", s + 1);
        for (int k = 0; k < stages; k++)
            fprintf(f, "%s%.4f", k ? ", " : "", 2.1 - 0.03 * k + 2 * exp(-s / 30.0));
        fprintf(f, "], \"aggregate\": 2}}\n");
    }
    if (f)
        fclose(f);
}

static bool is_png(void)
{
    unsigned char head[24] = {0};
    FILE *f = fopen(png, "rb");
    if (!f)
        return false;
    size_t got = fread(head, 1, sizeof(head), f);
    fclose(f);
    remove(png);
    int width = head[18] << 8 | head[19], height = head[22] << 8 | head[23];
    return got == sizeof(head) && memcmp(head, "\x89PNG", 4) == 0 && width == 1200 && height == 675;
}

int main(void)
{
    if (system("gnuplot --version >/dev/null 2>&1") != 0)
        poe_test_skip("gnuplot is not installed");
    CHECK(mkdtemp(folder) != NULL);
    snprintf(metrics, sizeof(metrics), "%s/metrics.jsonl", folder);
    snprintf(png, sizeof(png), "%s/loss's.png", folder);

    write_metrics(4, 150, 50, 70);
    CHECK_INT(poe_plot_run(metrics, png), POE_OK);
    CHECK(is_png());
    write_metrics(2, 40, 0, -1); /* no evaluations */
    CHECK_INT(poe_plot_run(metrics, png), POE_OK);
    CHECK(is_png());
    write_metrics(1, 1, 1, -1); /* one point */
    CHECK_INT(poe_plot_run(metrics, png), POE_OK);
    CHECK(is_png());
    write_metrics(128, 30, 10, -1);
    FILE *f = fopen(metrics, "a"); /* cut off in the middle of a line */
    CHECK(f && fputs("{\"step\": 30, \"stage_lo", f) >= 0);
    if (f)
        fclose(f);
    CHECK_INT(poe_plot_run(metrics, png), POE_OK);
    CHECK(is_png());

    int copy = dup(STDERR_FILENO);
    CHECK(freopen("/dev/null", "w", stderr) != NULL);
    poe_status empty, missing, unwritable;
    write_metrics(4, 0, 0, -1);
    empty = poe_plot_run(metrics, png);
    missing = poe_plot_run("/nowhere/metrics.jsonl", png);
    write_metrics(4, 10, 0, -1);
    unwritable = poe_plot_run(metrics, "/nowhere/loss.png");
    fflush(stderr);
    dup2(copy, STDERR_FILENO);
    CHECK_INT(empty, POE_FAILED);
    CHECK_INT(missing, POE_FAILED);
    CHECK_INT(unwritable, POE_FAILED);
    CHECK_INT(poe_remove_tree(folder), POE_OK);
    return check_result();
}
