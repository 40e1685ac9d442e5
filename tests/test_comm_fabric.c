/* SPDX-License-Identifier: MIT
 * comm over libfabric, ranks as threads: all scenarios at 1, 2 and 4 ranks. */
#include <pthread.h>

#include "comm/fabric/fabric.h"
#include "comm/inproc/inproc.h"
#include "src/clock.h"
#include "src/log.h"
#include "tests/check.h"
#include "tests/comm_scenarios.h"

typedef struct player {
    const poe_scenario *scenario;
    const poe_fabric_settings *settings;
    poe_transport *over; /* inproc: the ranks meet over it */
    poe_transport *transport;
} player;

/* The ranks meet over threads, and then use the fabric alone. */
static poe_status meet(player *p)
{
    poe_comm *over = NULL;
    poe_log *log = poe_log_create(p->over->rank, p->over->size);
    poe_log_attach(log);
    CHECK_INT(poe_comm_create(p->over, NULL, &over), POE_OK);
    poe_log_hold();
    poe_status status = poe_fabric_create(over, p->settings, &p->transport);
    poe_log_settle(true);
    poe_comm_destroy(over, true);
    poe_log_attach(NULL);
    poe_log_destroy(log);
    return status;
}

static void *play(void *arg)
{
    player *p = arg;
    if (meet(p) == POE_OK)
        poe_scenario_play(p->scenario, p->transport);
    return NULL;
}

/* Everything that the ranks said; the caller frees it. */
static char *play_all(const poe_scenario *scenario, const poe_fabric_settings *settings, int size)
{
    poe_transport *transports[8];
    pthread_t threads[8];
    player players[8];
    double start = poe_now();
    CHECK_INT(poe_inproc_create(size, transports), POE_OK);
    poe_capture_begin();
    for (int r = 0; r < size; r++) {
        players[r] = (player){.scenario = scenario, .settings = settings, .over = transports[r]};
        pthread_create(&threads[r], NULL, play, &players[r]);
    }
    for (int r = 0; r < size; r++)
        pthread_join(threads[r], NULL);
    char *said = poe_capture_end();
    printf("%s, %d ranks: %.2f s\n", scenario->name, size, poe_now() - start);
    return said;
}

static void check_said(const char *said, const char *what)
{
    if (!what || strstr(said, what))
        return;
    fprintf(stderr, "not said: %s\nbut: %s\n", what, said);
    check_failures++;
}

static void check_scenario(const poe_scenario *scenario, const poe_fabric_settings *settings, int size)
{
    int before = poe_scenarios_failures() + check_failures;
    char *said = play_all(scenario, settings, size);
    check_said(said, scenario->says);
    if (poe_scenarios_failures() + check_failures != before)
        fputs(said, stderr);
    free(said);
}

int main(int argc, char **argv)
{
    static const int sizes[] = {1, 2, 4};
    const poe_fabric_settings plain = {0};
    for (int s = 0; s < 3; s++)
        for (int i = 0; i < poe_n_scenarios; i++)
            if (poe_scenarios[i].ranks <= sizes[s] && (argc < 2 || !strcmp(argv[1], poe_scenarios[i].name)))
                check_scenario(&poe_scenarios[i], &plain, sizes[s]);
    check_failures += poe_scenarios_failures();
    return check_result();
}
