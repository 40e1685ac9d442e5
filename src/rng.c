/* SPDX-License-Identifier: MIT */
#include "src/rng.h"

#include <math.h>

static uint64_t splitmix64(uint64_t *x)
{
    uint64_t z = (*x += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

void poe_rng_init(poe_rng *rng, uint64_t seed, const char *stream)
{
    uint64_t x = 0xCBF29CE484222325u; /* FNV-1a of the stream's name */
    for (const char *c = stream; *c; c++)
        x = (x ^ (unsigned char)*c) * 0x100000001B3u;
    x ^= splitmix64(&seed);
    for (int i = 0; i < 4; i++)
        rng->state[i] = splitmix64(&x);
    rng->has_spare = 0;
}

static uint64_t rotate_left(uint64_t x, int k)
{
    return (x << k) | (x >> (64 - k));
}

uint64_t poe_rng_next(poe_rng *rng)
{
    uint64_t *s = rng->state;
    uint64_t result = rotate_left(s[1] * 5, 7) * 9;
    uint64_t t = s[1] << 17;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = rotate_left(s[3], 45);
    return result;
}

double poe_rng_uniform(poe_rng *rng)
{
    return (double)(poe_rng_next(rng) >> 11) * 0x1.0p-53;
}

double poe_rng_normal(poe_rng *rng)
{
    if (rng->has_spare) {
        rng->has_spare = 0;
        return rng->spare;
    }
    double radius = sqrt(-2.0 * log(1.0 - poe_rng_uniform(rng)));
    double angle = 6.283185307179586 * poe_rng_uniform(rng);
    rng->spare = radius * sin(angle);
    rng->has_spare = 1;
    return radius * cos(angle);
}
