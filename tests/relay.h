/* SPDX-License-Identifier: MIT
 * A stretch of bad network for tests: a port that passes every connection on to another one, and on the way breaks
 * connections and damages headers. */
#ifndef POE_TESTS_RELAY_H
#define POE_TESTS_RELAY_H

#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>

typedef struct poe_relay poe_relay;

typedef struct poe_relay_settings {
    size_t every; /* bytes after which a connection is reset, with what is on its way lost; 0: never */
    int cuts;     /* ... at most so many times */
    int flips;    /* headers of which a bit is turned round, one every 37 */
} poe_relay_settings;

poe_relay *poe_relay_start(const struct sockaddr_in *target, const poe_relay_settings *settings);
struct sockaddr_in poe_relay_address(const poe_relay *relay);
/* Ends it, says how many connections it broke and headers it damaged. */
void poe_relay_stop(poe_relay *relay, int *cuts, int *flips);

#endif
