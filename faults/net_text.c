/* SPDX-License-Identifier: MIT
 * The rules in words. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "faults/net.h"

enum { SHOWN = 8 }; /* links that get a line */

bool poe_net_is_real(const poe_net_link *link)
{
    return !(link->delay > 0 || link->jitter > 0 || link->bandwidth > 0 || link->loss > 0 || link->corrupt > 0 ||
             link->corrupt_message > 0 || link->cut > 0 || link->n_outages > 0);
}

static bool same(const poe_net_link *a, const poe_net_link *b)
{
    bool outages = a->n_outages == b->n_outages;
    for (int i = 0; outages && i < a->n_outages; i++)
        outages = a->outages[i].from == b->outages[i].from && a->outages[i].to == b->outages[i].to;
    return outages && a->delay == b->delay && a->jitter == b->jitter && a->bandwidth == b->bandwidth &&
           a->loss == b->loss && a->corrupt == b->corrupt && a->corrupt_message == b->corrupt_message &&
           a->cut == b->cut;
}

static void print_time(FILE *to, const char *before, double seconds)
{
    if (seconds < 1e-3)
        fprintf(to, "%s%.4g us", before, seconds * 1e6);
    else if (seconds < 1)
        fprintf(to, "%s%.4g ms", before, seconds * 1e3);
    else
        fprintf(to, "%s%.4g s", before, seconds);
}

static void print_rate(FILE *to, double bits)
{
    static const char *const units[] = {"bit", "kbit", "Mbit", "Gbit"};
    int unit = bits >= 1e9 ? 3 : bits >= 1e6 ? 2 : bits >= 1e3 ? 1 : 0;
    fprintf(to, ", %.4g %s/s", bits / pow(1e3, unit), units[unit]);
}

static void print_link(FILE *to, const poe_net_link *link)
{
    if (poe_net_is_real(link)) {
        fprintf(to, "real");
        return;
    }
    print_time(to, "delay ", link->delay);
    if (link->jitter > 0)
        print_time(to, " +- ", link->jitter);
    if (link->bandwidth > 0)
        print_rate(to, link->bandwidth);
    if (link->loss > 0)
        fprintf(to, ", loss %.4g %%", 100 * link->loss);
    if (link->corrupt > 0)
        fprintf(to, ", corrupts %.4g %% of messages", 100 * link->corrupt);
    if (link->corrupt_message)
        fprintf(to, ", corrupts message %" PRIu64, link->corrupt_message);
    if (link->cut > 0)
        print_time(to, ", cut at ", link->cut);
    for (int i = 0; i < link->n_outages; i++) {
        print_time(to, ", down from ", link->outages[i].from);
        if (isfinite(link->outages[i].to))
            print_time(to, " to ", link->outages[i].to);
        else
            fprintf(to, " on");
    }
}

static bool all_same(const poe_net *net)
{
    for (int from = 0; from < net->size; from++)
        for (int to = 0; to < net->size; to++)
            if (from != to && !same(poe_net_link_of(net, from, to), poe_net_link_of(net, 0, 1)))
                return false;
    return true;
}

/* Neighbours in the chain first: most of what is sent goes between them. */
static int print_links(FILE *to, const poe_net *net)
{
    int lines = 0;
    for (int distance = 1; distance < net->size; distance++)
        for (int a = 0; a + distance < net->size; a++) {
            int b = a + distance;
            const poe_net_link *there = poe_net_link_of(net, a, b), *back = poe_net_link_of(net, b, a);
            bool both = same(there, back);
            if (poe_net_is_real(there) && poe_net_is_real(back))
                continue;
            if (++lines > SHOWN)
                continue;
            fprintf(to, both ? "%d-%d  " : "%d>%d  ", a, b);
            print_link(to, there);
            if (!both) {
                fprintf(to, "; %d>%d  ", b, a);
                print_link(to, back);
            }
            fputc('\n', to);
        }
    return lines;
}

char *poe_net_describe(const poe_net *net)
{
    char *text = NULL;
    size_t size;
    FILE *to = open_memstream(&text, &size);
    if (!to)
        return NULL;
    fprintf(to, "real messages, held back by rule; seed %" PRIu64 "\n", net->seed);
    if (all_same(net)) {
        fprintf(to, "every link  ");
        print_link(to, poe_net_link_of(net, 0, 1));
        fputc('\n', to);
    } else {
        int lines = print_links(to, net);
        if (lines > SHOWN)
            fprintf(to, "... and %d pairs of ranks more\n", lines - SHOWN);
    }
    if (fclose(to) == 0)
        return text;
    free(text);
    return NULL;
}
