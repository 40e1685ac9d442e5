/* SPDX-License-Identifier: MIT
 * Random numbers that depend only on a seed and a stream name, never on the order in which streams are used: a
 * tensor's initial values are the same whichever rank makes it. SplitMix64 seeds xoshiro256** (Blackman, Vigna 2018). */
#ifndef POE_SRC_RNG_H
#define POE_SRC_RNG_H

#include <stdint.h>

typedef struct poe_rng {
    uint64_t state[4];
    double spare; /* second value of the last Box-Muller pair */
    int has_spare;
} poe_rng;

void poe_rng_init(poe_rng *rng, uint64_t seed, const char *stream);
uint64_t poe_rng_next(poe_rng *rng);
double poe_rng_uniform(poe_rng *rng); /* [0, 1), 53 bits */
double poe_rng_normal(poe_rng *rng);  /* mean 0, standard deviation 1 */

#endif
