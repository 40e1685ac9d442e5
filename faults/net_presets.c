/* SPDX-License-Identifier: MIT */
#include "faults/net_presets.h"

#include <stddef.h>
#include <string.h>

static const double ms = 1e-3, us = 1e-6, Mbit = 1e6, Gbit = 1e9;

const char poe_net_preset_names[] = "same-rack, same-zone, cross-az-10g, cross-az-25g, cross-az-400g, cross-region, "
                                    "home-uplink or checkfree";

/* --- CheckFree's table -------------------------------------------------------------------------------------------- */
enum { AUSTRALIA, BELGIUM, CANADA, GERMANY, IOWA, JAPAN, LOS_ANGELES, LONDON, NETHERLANDS, OREGON, SINGAPORE, TAIWAN,
       REGIONS };

/* One-way delay in milliseconds and GiB/s between two regions, the same both ways: communication/communication_costs.py
 * of github.com/gensyn-ai/CheckFree at 0e2711d. */
static const struct route {
    int a, b;
    double delay, rate;
} routes[] = {
    {AUSTRALIA, BELGIUM, 129, 0.00982666015625},
    {AUSTRALIA, CANADA, 98, 0.01318359375},
    {AUSTRALIA, GERMANY, 125.5, 0.01046142578125},
    {AUSTRALIA, IOWA, 84, 0.01123046875},
    {AUSTRALIA, JAPAN, 58, 0.0137939453125},
    {AUSTRALIA, LOS_ANGELES, 69, 0.0146484375},
    {AUSTRALIA, LONDON, 132, 0.0093994140625},
    {AUSTRALIA, NETHERLANDS, 128, 0.009521484375},
    {AUSTRALIA, OREGON, 68, 0.0146484375},
    {AUSTRALIA, SINGAPORE, 48, 0.02978515625},
    {AUSTRALIA, TAIWAN, 67, 0.02099609375},
    {BELGIUM, CANADA, 41, 0.0198974609375},
    {BELGIUM, GERMANY, 4, 0.2425},
    {BELGIUM, IOWA, 49, 0.0283203125},
    {BELGIUM, JAPAN, 112, 0.01171875},
    {BELGIUM, LOS_ANGELES, 70, 0.0194091796875},
    {BELGIUM, LONDON, 3.5, 0.2425},
    {BELGIUM, NETHERLANDS, 3, 0.2425},
    {BELGIUM, OREGON, 66, 0.0208740234375},
    {BELGIUM, SINGAPORE, 83, 0.01611328125},
    {BELGIUM, TAIWAN, 105, 0.012451171875},
    {CANADA, GERMANY, 44, 0.0318603515625},
    {CANADA, IOWA, 14, 0.07568359375},
    {CANADA, JAPAN, 74, 0.01806640625},
    {CANADA, LOS_ANGELES, 35, 0.030517578125},
    {CANADA, LONDON, 38.5, 0.036376953125},
    {CANADA, NETHERLANDS, 42, 0.0250244140625},
    {CANADA, OREGON, 30.5, 0.047119140625},
    {CANADA, SINGAPORE, 107, 0.01193847},
    {CANADA, TAIWAN, 89, 0.01470947265625},
    {GERMANY, IOWA, 53.5, 0.026611328125},
    {GERMANY, JAPAN, 112, 0.011083984375},
    {GERMANY, LOS_ANGELES, 73, 0.01824951171875},
    {GERMANY, LONDON, 6.6, 0.18875},
    {GERMANY, NETHERLANDS, 3.5, 0.2425},
    {GERMANY, OREGON, 68, 0.0149169921875},
    {GERMANY, SINGAPORE, 80, 0.0125},
    {GERMANY, TAIWAN, 102, 0.0125732421875},
    {IOWA, JAPAN, 72.5, 0.01397705078125},
    {IOWA, LOS_ANGELES, 23.4, 0.06146240234375},
    {IOWA, LONDON, 48.1, 0.0218505859375},
    {IOWA, NETHERLANDS, 51, 0.02740478515625},
    {IOWA, OREGON, 19.3, 0.09033203125},
    {IOWA, SINGAPORE, 101.5, 0.01263427734375},
    {IOWA, TAIWAN, 88, 0.0128},
    {JAPAN, LOS_ANGELES, 50, 0.02777099609375},
    {JAPAN, LONDON, 107, 0.00888671875},
    {JAPAN, NETHERLANDS, 108.5, 0.011376953125},
    {JAPAN, OREGON, 46.2, 0.03045654296875},
    {JAPAN, SINGAPORE, 35.6, 0.03900146484375},
    {JAPAN, TAIWAN, 19.2, 0.07672119140625},
    {LOS_ANGELES, LONDON, 68, 0.0149169921875},
    {LOS_ANGELES, NETHERLANDS, 71.5, 0.014251708984375},
    {LOS_ANGELES, OREGON, 12.4, 0.1185302734375},
    {LOS_ANGELES, SINGAPORE, 79.5, 0.016845703125},
    {LOS_ANGELES, TAIWAN, 64, 0.016192626953125},
    {LONDON, NETHERLANDS, 4.8, 0.023681640625},
    {LONDON, OREGON, 64, 0.021240234375},
    {LONDON, SINGAPORE, 85, 0.01568603515625},
    {LONDON, TAIWAN, 109.5, 0.0089599609375},
    {NETHERLANDS, OREGON, 67, 0.0203857421875},
    {NETHERLANDS, SINGAPORE, 81.5, 0.016357421875},
    {NETHERLANDS, TAIWAN, 105.5, 0.011962890625},
    {OREGON, SINGAPORE, 78.5, 0.01678466796875},
    {OREGON, TAIWAN, 59.5, 0.0233154296875},
    {SINGAPORE, TAIWAN, 23.2, 0.0618896484375},
};

_Static_assert(sizeof(routes) / sizeof(*routes) == REGIONS * (REGIONS - 1) / 2, "a route for every pair of regions");

/* Rank r is in region r % 12. */
static void checkfree(int from, int to, poe_net_link *link)
{
    int a = from % REGIONS, b = to % REGIONS;
    double delay = 1, rate = 2; /* within a region */
    for (size_t i = 0; i < sizeof(routes) / sizeof(*routes); i++)
        if ((routes[i].a == a && routes[i].b == b) || (routes[i].a == b && routes[i].b == a)) {
            delay = routes[i].delay;
            rate = routes[i].rate;
        }
    link->delay = delay * ms;
    link->jitter = link->loss = 0;
    link->bandwidth = 8 * 0x1p30 * rate;
}

/* --- the others --------------------------------------------------------------------------------------------------- */
static const char *const names[] = {"same-rack",     "same-zone",    "cross-az-10g", "cross-az-25g",
                                    "cross-az-400g", "cross-region", "home-uplink",  "checkfree"};
enum { PRESETS = sizeof(names) / sizeof(*names), CHECKFREE = PRESETS - 1 };

int poe_net_preset_find(const char *name)
{
    for (int i = 0; i < PRESETS; i++)
        if (strcmp(names[i], name) == 0)
            return i;
    return -1;
}

void poe_net_preset_apply(int preset, int from, int to, poe_net_link *link)
{
    const struct {
        double delay, jitter, bandwidth, loss;
    } presets[CHECKFREE] = {
        {25 * us, 5 * us, 25 * Gbit, 0},       {150 * us, 30 * us, 10 * Gbit, 0},
        {500 * us, 100 * us, 10 * Gbit, 0},    {500 * us, 100 * us, 25 * Gbit, 0},
        {500 * us, 50 * us, 400 * Gbit, 0},    {35 * ms, 1 * ms, 5 * Gbit, 1e-5},
        {20 * ms, 5 * ms, 20 * Mbit, 1e-3},
    };
    if (preset == CHECKFREE) {
        checkfree(from, to, link);
        return;
    }
    link->delay = presets[preset].delay;
    link->jitter = presets[preset].jitter;
    link->bandwidth = presets[preset].bandwidth;
    link->loss = presets[preset].loss;
}
