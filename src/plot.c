/* SPDX-License-Identifier: MIT
 * gnuplot gets one script with the data inside, through a temporary file: no pipe can break, no name needs quoting but
 * that of the picture. */
#include "src/plot.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <libgen.h>
#include <math.h>
#include <spawn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "src/files.h"
#include "src/log.h"

enum { MAX_STAGES = 128, LEGEND_ROWS = 12 };

extern char **environ;

/* What the metrics hold. */
typedef struct series {
    json_t *lines;  /* all records, an array */
    json_t *layers; /* of config.json: a list of whole numbers, or NULL */
    int n_stages;   /* with losses */
    int n_prefixes; /* with BPB */
    int n_steps, n_evaluations;
    double *step;     /* (n_steps) */
    double *loss;     /* (n_steps, n_stages); NAN where there is none */
    double low, high; /* of the losses drawn, the first tenth left out: the fall from the start hides the rest */
} series;

static bool is_step(const json_t *line)
{
    return json_is_array(json_object_get(line, "stage_loss"));
}

/* BPB of every "stage" or "prefix"; NULL when the record is no evaluation. */
static json_t *bpb(const json_t *line, const char *of)
{
    return json_object_get(json_object_get(line, "bpb"), of);
}

/* A line that is cut off or damaged is left out: a picture is no place to fail. */
static poe_status read_lines(const char *path, json_t **lines)
{
    char *text = NULL;
    size_t room = 0;
    FILE *file = fopen(path, "r");
    if (!file) {
        poe_warn("no picture: cannot read %s: %s", path, strerror(errno));
        return POE_FAILED;
    }
    *lines = json_array();
    while (getline(&text, &room, file) >= 0) {
        json_t *line = json_loads(text, 0, NULL);
        json_object_del(line, "accounts"); /* most of a line, and not drawn */
        if (line)
            json_array_append_new(*lines, line);
    }
    free(text);
    fclose(file);
    return POE_OK;
}

/* The stages' layers stand in the run's config.json, beside the metrics. */
static json_t *read_layers(const char *metrics_path)
{
    char path[POE_PATH_MAX], copy[POE_PATH_MAX];
    if (strlen(metrics_path) >= sizeof(copy) - sizeof("/config.json"))
        return NULL;
    strcpy(copy, metrics_path);
    snprintf(path, sizeof(path), "%.*s/config.json", (int)(sizeof(path) - sizeof("/config.json")), dirname(copy));
    json_t *config = json_load_file(path, 0, NULL);
    json_t *layers = json_incref(json_object_get(config, "stages"));
    json_decref(config);
    return layers;
}

static int clamp_count(size_t n, int most)
{
    int count = n > MAX_STAGES ? MAX_STAGES : (int)n;
    return count > most ? count : most;
}

static double number_of(const json_t *value)
{
    return json_is_number(value) ? json_number_value(value) : NAN;
}

static void measure(series *data)
{
    size_t i;
    json_t *line;
    json_array_foreach(data->lines, i, line)
    {
        data->n_steps += is_step(line);
        data->n_evaluations += json_array_size(bpb(line, "prefix")) > 0;
        data->n_stages = clamp_count(json_array_size(json_object_get(line, "stage_loss")), data->n_stages);
        data->n_prefixes = clamp_count(json_array_size(bpb(line, "prefix")), data->n_prefixes);
    }
}

static poe_status fill(series *data)
{
    size_t i, n = 0;
    json_t *line;
    data->low = INFINITY;
    data->high = -INFINITY;
    data->step = calloc((size_t)data->n_steps + 1, sizeof(double));
    data->loss = calloc((size_t)data->n_steps * (size_t)data->n_stages + 1, sizeof(double));
    if (!data->step || !data->loss) {
        poe_warn("no picture: out of memory");
        return POE_FAILED;
    }
    json_array_foreach(data->lines, i, line)
    {
        if (!is_step(line))
            continue;
        data->step[n] = number_of(json_object_get(line, "step"));
        for (size_t k = 0; k < (size_t)data->n_stages; k++) {
            double loss = number_of(json_array_get(json_object_get(line, "stage_loss"), k));
            data->loss[n * (size_t)data->n_stages + k] = loss;
            if (n >= (size_t)data->n_steps / 10) {
                data->low = fmin(data->low, loss);
                data->high = fmax(data->high, loss);
            }
        }
        n++;
    }
    return POE_OK;
}

/* gnuplot takes NaN as a gap; JSON has none, so that a loss that is no number comes as null. */
static void put_number(FILE *script, double value)
{
    if (isfinite(value))
        fprintf(script, " %.6g", value);
    else
        fputs(" NaN", script);
}

/* The mean over the steps around step n, as far as there are numbers; a gap stays one. */
static double smoothed(const series *data, int n, int k)
{
    int reach = data->n_steps / 40, count = 0;
    double sum = 0;
    if (!isfinite(data->loss[n * data->n_stages + k]))
        return NAN;
    for (int i = n - reach; i <= n + reach; i++) {
        bool inside = i >= 0 && i < data->n_steps && 2 * n - i >= 0 && 2 * n - i < data->n_steps; /* both sides alike */
        double loss = inside ? data->loss[i * data->n_stages + k] : NAN;
        if (isfinite(loss)) {
            sum += loss;
            count++;
        }
    }
    return sum / count;
}

/* Per step: step, then raw and smoothed loss of every stage. */
static void put_losses(FILE *script, const series *data)
{
    fputs("$loss << EOD\n", script);
    for (int n = 0; n < data->n_steps; n++) {
        put_number(script, data->step[n]);
        for (int k = 0; k < data->n_stages; k++) {
            put_number(script, data->loss[n * data->n_stages + k]);
            put_number(script, smoothed(data, n, k));
        }
        fputc('\n', script);
    }
    fputs("EOD\n", script);
}

/* Per evaluation: updates done, then BPB of every prefix. Of the last one, per stage: BPB of it alone, and of the
 * prefix that ends with it. */
static void put_evaluations(FILE *script, const series *data)
{
    size_t i;
    json_t *line, *last = NULL;
    fputs("$bpb << EOD\n", script);
    json_array_foreach(data->lines, i, line)
    {
        if (!json_array_size(bpb(line, "prefix")))
            continue;
        put_number(script, number_of(json_object_get(line, "step")));
        for (int k = 0; k < data->n_prefixes; k++)
            put_number(script, number_of(json_array_get(bpb(line, "prefix"), (size_t)k)));
        fputc('\n', script);
        last = line;
    }
    fputs("EOD\n$last << EOD\n", script);
    for (int k = 0; last && k < data->n_prefixes; k++) {
        fprintf(script, "%d", k);
        put_number(script, number_of(json_array_get(bpb(last, "stage"), (size_t)k)));
        put_number(script, number_of(json_array_get(bpb(last, "prefix"), (size_t)k)));
        fputc('\n', script);
    }
    fputs("EOD\n", script);
}

static void put_style(FILE *script, const char *png_path)
{
    fputs("set terminal pngcairo size 1200,675 font 'sans,12' background rgb '#ffffff'\nset output '", script);
    for (const char *c = png_path; *c; c++)
        fputs(*c == '\'' ? "''" : (char[]){*c, '\0'}, script);
    fputs(
        "'\nset border 3 lc rgb '#808080'\nset tics nomirror textcolor rgb '#404040'\n"
        "set grid ytics lc rgb '#e4e4e4' lt 1\nset key right top opaque samplen 2 spacing 1.2 textcolor rgb '#404040'\n"
        "set title font ',14' textcolor rgb '#202020'\nset xlabel 'step' textcolor rgb '#404040'\n",
        script);
}

/* Colour of stage k of n: dark blue to orange. */
static unsigned colour(int k, int n)
{
    static const double stops[5][3] = {
        {0x26, 0x46, 0x8f}, {0x1f, 0x8a, 0xa8}, {0x3a, 0xa8, 0x72}, {0xe0, 0xa0, 0x2a}, {0xd2, 0x4e, 0x2c}};
    double place = n > 1 ? 4.0 * k / (n - 1) : 0;
    int i = place >= 4 ? 3 : (int)place;
    unsigned rgb = 0;
    for (int c = 0; c < 3; c++)
        rgb = rgb << 8 | (unsigned)(stops[i][c] + (place - i) * (stops[i + 1][c] - stops[i][c]));
    return rgb;
}

/* Only some of many curves are named. */
static bool is_named(int k, int n)
{
    int every = (n + LEGEND_ROWS - 1) / LEGEND_ROWS;
    return k % every == 0 || k == n - 1;
}

static void put_stage_title(FILE *script, const series *data, int k)
{
    json_t *layers = json_array_get(data->layers, (size_t)k);
    long long n = json_integer_value(layers);
    if (!is_named(k, data->n_stages))
        fputs(" notitle", script);
    else if (data->layers && json_array_size(data->layers) > (size_t)data->n_stages)
        fputs(" title 'the whole model'", script); /* one loss, at the end of all stages */
    else if (json_is_integer(layers))
        fprintf(script, " title 'stage %d (%lld layer%s)'", k, n, n == 1 ? "" : "s");
    else
        fprintf(script, " title 'stage %d'", k);
}

static void plot_losses(FILE *script, const series *data)
{
    double margin = 0.06 * (data->high - data->low) + 1e-3;
    fputs("set title 'Training loss of every stage'\nset ylabel 'nats per token' textcolor rgb '#404040'\n", script);
    if (data->low <= data->high)
        fprintf(script, "set yrange [%g:%g]\n", data->low - margin, data->high + margin);
    fprintf(script, "set xrange [%g:%g]\nplot", data->step[0], data->step[data->n_steps - 1] + 1e-3);
    for (int k = 0; k < data->n_stages; k++)
        fprintf(script, "%s $loss using 1:%d with lines lw 1 lc rgb '#c0%06x' notitle", k ? "," : "", 2 + 2 * k,
                colour(k, data->n_stages));
    for (int k = 0; k < data->n_stages; k++) {
        fprintf(script, ", $loss using 1:%d with lines lw 2.5 lc rgb '#%06x'", 3 + 2 * k, colour(k, data->n_stages));
        put_stage_title(script, data, k);
    }
    fputs("\nset yrange [*:*]\nset xrange [*:*]\n", script);
}

static void plot_evaluations(FILE *script, const series *data)
{
    fputs("set title 'Held-out text, stages together'\nplot", script);
    for (int k = 0; k < data->n_prefixes; k++) {
        fprintf(script, "%s $bpb using 1:%d with linespoints lw 2 pt 7 ps 0.9 lc rgb '#%06x'", k ? "," : "", k + 2,
                colour(k, data->n_prefixes));
        if (!is_named(k, data->n_prefixes))
            fputs(" notitle", script);
        else if (k == 0)
            fputs(" title 'stage 0'", script);
        else
            fprintf(script, " title 'stages 0 to %d'", k);
    }
    fputs("\n", script);
}

/* A single evaluation has no course: stages side by side say more. */
static void plot_last_evaluation(FILE *script, const series *data)
{
    fprintf(script, "set title 'Held-out text'\nset xlabel 'stage'\nset xtics %d\nset xrange [-0.5:%d.5]\n",
            data->n_prefixes / 16 + 1, data->n_prefixes - 1);
    fprintf(script, "plot $last using 1:2 with linespoints lw 2 pt 7 ps 1.1 lc rgb '#%06x' title 'each stage alone',",
            colour(4, 5));
    fprintf(script, " $last using 1:3 with linespoints lw 2 pt 7 ps 1.1 lc rgb '#%06x' title 'it and all before'\n",
            colour(0, 5));
}

static void write_script(FILE *script, const series *data, const char *png_path)
{
    put_losses(script, data);
    put_evaluations(script, data);
    put_style(script, png_path);
    if (data->n_stages && data->n_prefixes)
        fputs("set multiplot layout 1,2 margins 0.07,0.98,0.12,0.92 spacing 0.09,0\n", script);
    if (data->n_stages)
        plot_losses(script, data);
    if (!data->n_prefixes)
        return;
    fputs("set ylabel 'bits per byte' textcolor rgb '#404040'\nset offsets graph 0.05, graph 0.05, graph 0.2, graph "
          "0.05\n",
          script);
    if (data->n_evaluations > 1)
        plot_evaluations(script, data);
    else
        plot_last_evaluation(script, data);
}

/* The first line of what gnuplot said, on one line. */
static void warn_gnuplot(FILE *said, const char *png_path)
{
    char line[256] = "";
    rewind(said);
    while (fgets(line, sizeof(line), said) && strspn(line, " \t\n") == strlen(line))
        continue;
    line[strcspn(line, "\n")] = '\0';
    poe_warn("gnuplot could not draw %s: %s", png_path, *line ? line : "no reason given");
}

static poe_status run_gnuplot(FILE *script, FILE *said, const char *png_path)
{
    char *argv[] = {(char *)"gnuplot", NULL};
    posix_spawn_file_actions_t actions;
    pid_t child;
    int status = 0;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, fileno(script), STDIN_FILENO);
    posix_spawn_file_actions_adddup2(&actions, fileno(said), STDOUT_FILENO);
    posix_spawn_file_actions_adddup2(&actions, fileno(said), STDERR_FILENO);
    int reason = posix_spawnp(&child, argv[0], &actions, NULL, argv, environ);
    posix_spawn_file_actions_destroy(&actions);
    if (reason) {
        poe_warn("no picture: cannot start gnuplot (Debian package gnuplot-nox): %s", strerror(reason));
        return POE_FAILED;
    }
    while (waitpid(child, &status, 0) < 0 && errno == EINTR)
        continue;
    if (status == 0)
        return POE_OK;
    warn_gnuplot(said, png_path);
    return POE_FAILED;
}

static poe_status draw(const series *data, const char *png_path)
{
    poe_status status = POE_FAILED;
    FILE *script = tmpfile(), *said = tmpfile();
    if (script && said) {
        write_script(script, data, png_path);
        rewind(script);
        status = run_gnuplot(script, said, png_path);
    } else {
        poe_warn("no picture: cannot make a temporary file: %s", strerror(errno));
    }
    if (script)
        fclose(script);
    if (said)
        fclose(said);
    return status;
}

poe_status poe_plot_run(const char *metrics_path, const char *png_path)
{
    series data = {0};
    poe_status status = read_lines(metrics_path, &data.lines);
    if (status != POE_OK)
        return status;
    data.layers = read_layers(metrics_path);
    measure(&data);
    if (data.n_stages || data.n_prefixes) {
        status = fill(&data);
        if (status == POE_OK)
            status = draw(&data, png_path);
    } else {
        poe_warn("no picture: %s has neither losses nor evaluations", metrics_path);
        status = POE_FAILED;
    }
    json_decref(data.lines);
    json_decref(data.layers);
    free(data.step);
    free(data.loss);
    return status;
}
