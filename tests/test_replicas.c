/* SPDX-License-Identifier: MIT
 * The ring that sums replicas' gradients: the sum, the same bits on every rank and every time, and rank 0's word. */
#include <pthread.h>

#include "comm/inproc/inproc.h"
#include "pipeline/replicas.h"
#include "src/log.h"
#include "src/rng.h"
#include "tests/check.h"

enum { RANKS = 5, FLOATS = 1000, STEPS = 3 };

typedef struct player {
    poe_transport *transport;
    size_t floats;
    uint32_t flags[STEPS];
    float values[STEPS][FLOATS];
    poe_status status;
} player;

static void fill(float *values, int rank, int step)
{
    poe_rng rng;
    poe_rng_init(&rng, (uint64_t)(rank + RANKS * step), "replicas");
    for (size_t i = 0; i < FLOATS; i++)
        values[i] = (float)poe_rng_normal(&rng);
}

static poe_status sum_steps(player *p, poe_comm *comm)
{
    poe_replicas replicas;
    poe_status status = poe_replicas_open(&replicas, comm, p->floats, 2, 7);
    for (int step = 0; status == POE_OK && step < STEPS; step++) {
        fill(p->values[step], poe_comm_rank(comm), step);
        p->flags[step] = poe_comm_rank(comm) == 0 ? (uint32_t)step : 99;
        status = poe_replicas_sum(&replicas, step, p->values[step], &p->flags[step]);
    }
    poe_replicas_close(&replicas);
    return status;
}

static void *play(void *arg)
{
    player *p = arg;
    poe_comm_settings settings = {.deadline = 30};
    poe_comm *comm;
    poe_log *log = poe_log_create(0, 1);
    poe_log_attach(log);
    p->status = poe_comm_create(p->transport, &settings, &comm);
    if (p->status == POE_OK) {
        p->status = sum_steps(p, comm);
        poe_comm_destroy(comm, true);
    }
    poe_log_destroy(log);
    return NULL;
}

static void play_all(player *players, int size, size_t floats)
{
    poe_transport *transports[RANKS];
    pthread_t threads[RANKS];
    CHECK_INT(poe_inproc_create(size, transports), POE_OK);
    for (int r = 0; r < size; r++) {
        players[r] = (player){.transport = transports[r], .floats = floats};
        pthread_create(&threads[r], NULL, play, &players[r]);
    }
    for (int r = 0; r < size; r++)
        pthread_join(threads[r], NULL);
}

static void check_sums(const player *players, int size, size_t floats)
{
    float own[FLOATS];
    for (int step = 0; step < STEPS; step++) {
        double sum[FLOATS] = {0}, magnitude[FLOATS] = {0};
        for (int r = 0; r < size; r++) {
            fill(own, r, step);
            for (size_t i = 0; i < floats; i++) {
                sum[i] += (double)own[i];
                magnitude[i] += fabs((double)own[i]);
            }
        }
        for (size_t i = 0; i < floats; i++) /* a rounding of 6e-8 per addition */
            CHECK_NEAR(players[0].values[step][i], sum[i], 0, size * 6e-8 * magnitude[i]);
    }
}

static void test_sum(int size, size_t floats)
{
    static player players[RANKS], again[RANKS];
    play_all(players, size, floats);
    play_all(again, size, floats);
    check_sums(players, size, floats);
    for (int r = 0; r < size; r++) {
        CHECK_INT(players[r].status, POE_OK);
        for (int step = 0; step < STEPS; step++) {
            CHECK_INT(players[r].flags[step], step);
            CHECK_INT(memcmp(players[r].values[step], players[0].values[step], floats * sizeof(float)), 0);
            CHECK_INT(memcmp(players[r].values[step], again[r].values[step], floats * sizeof(float)), 0);
        }
    }
}

int main(void)
{
    for (int size = 1; size <= RANKS; size++) {
        test_sum(size, FLOATS);
        test_sum(size, 7);
        test_sum(size, 2); /* fewer than ranks */
    }
    return check_result();
}
