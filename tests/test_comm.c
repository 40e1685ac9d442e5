/* SPDX-License-Identifier: MIT
 * comm over threads: all scenarios at 1, 2 and 4 ranks; networks that damage or swallow messages, by decorators on the
 * transport; and damaged headers. */
#include <pthread.h>
#include <unistd.h>

#include "comm/inproc/inproc.h"
#include "comm/message.h"
#include "src/clock.h"
#include "src/rng.h"
#include "tests/check.h"
#include "tests/comm_scenarios.h"

typedef struct player {
    const poe_scenario *scenario;
    poe_transport *transport;
} player;

static void *play(void *arg)
{
    player *p = arg;
    poe_scenario_play(p->scenario, p->transport);
    return NULL;
}

/* Everything that the ranks said; the caller frees it. */
static char *play_all(const poe_scenario *scenario, poe_transport **transports, int size)
{
    pthread_t threads[8];
    player players[8];
    double start = poe_now();
    poe_capture_begin();
    for (int r = 0; r < size; r++) {
        players[r] = (player){scenario, transports[r]};
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
    if (what && strstr(said, what))
        return;
    fprintf(stderr, "not said: %s\nbut: %s\n", what, said);
    check_failures++;
}

static int count_of(const char *text, const char *what)
{
    int n = 0;
    for (; (text = strstr(text, what)); text++)
        n++;
    return n;
}

static void check_scenario(const poe_scenario *scenario, int size)
{
    poe_transport *transports[8];
    CHECK_INT(poe_inproc_create(size, transports), POE_OK);
    int before = poe_scenarios_failures();
    char *said = play_all(scenario, transports, size);
    if (scenario->says)
        check_said(said, scenario->says);
    if (strcmp(scenario->name, "agree") == 0)
        CHECK_INT(count_of(said, "holds this"), 1);
    if (poe_scenarios_failures() != before)
        fputs(said, stderr);
    free(said);
}

/* --- decorators --------------------------------------------------------------------------------------------------- */
typedef struct decorator {
    poe_transport base;
    poe_transport *below;
    unsigned char *copy; /* of the damaged payload */
} decorator;

static poe_transport *below(poe_transport *transport)
{
    return ((decorator *)transport)->below;
}

static void pass_send(poe_transport *t, int peer, int channel, const void *data, size_t bytes, poe_operation *op)
{
    decorator *d = (decorator *)t;
    if (bytes == 96 && !d->copy) {
        d->copy = malloc(bytes);
        memcpy(d->copy, data, bytes);
        d->copy[50] ^= 4;
        data = d->copy;
    }
    below(t)->ops->send(below(t), peer, channel, data, bytes, op);
}

static void pass_receive(poe_transport *t, int peer, int channel, void *data, size_t bytes, poe_operation *op)
{
    below(t)->ops->receive(below(t), peer, channel, data, bytes, op);
}

static bool pass_progress(poe_transport *t, double wait)
{
    return below(t)->ops->progress(below(t), wait);
}

static void pass_wake(poe_transport *t)
{
    below(t)->ops->wake(below(t));
}

static void pass_cancel(poe_transport *t, poe_operation *op)
{
    below(t)->ops->cancel(below(t), op);
}

static void pass_destroy(poe_transport *t)
{
    below(t)->ops->destroy(below(t));
    free(((decorator *)t)->copy);
    free(t);
}

static void drop_send(poe_transport *t, int peer, int channel, const void *data, size_t bytes, poe_operation *op)
{
    (void)t, (void)peer, (void)channel, (void)data, (void)bytes;
    op->done = true;
}

static const poe_transport_ops damaging = {.name = "damaging", .send = pass_send, .receive = pass_receive,
                                           .progress = pass_progress, .wake = pass_wake, .cancel = pass_cancel,
                                           .destroy = pass_destroy};
static const poe_transport_ops silent = {.name = "silent", .send = drop_send, .receive = pass_receive,
                                         .progress = pass_progress, .wake = pass_wake, .cancel = pass_cancel,
                                         .destroy = pass_destroy};

static poe_transport *decorate(poe_transport *transport, const poe_transport_ops *ops)
{
    decorator *d = calloc(1, sizeof(*d));
    d->base = *transport;
    d->base.ops = ops;
    d->below = transport;
    return &d->base;
}

static bool send_damaged(poe_comm *comm)
{
    for (int i = 0; i < poe_n_scenarios; i++)
        if (strcmp(poe_scenarios[i].name, "wrong step") == 0)
            return poe_scenarios[i].run(comm);
    return false;
}

static bool wait_for_silence(poe_comm *comm)
{
    if (poe_comm_rank(comm) == 1) {
        usleep(1200000);
        return false;
    }
    double start = poe_now();
    CHECK_INT(poe_comm_barrier(comm, "a barrier that never ends"), POE_PEER_LOST);
    CHECK(poe_now() - start < 1.1);
    return false;
}

static void check_decorated(const poe_scenario *scenario, int rank, const poe_transport_ops *ops)
{
    poe_transport *transports[2];
    CHECK_INT(poe_inproc_create(2, transports), POE_OK);
    transports[rank] = decorate(transports[rank], ops);
    int before = check_failures + poe_scenarios_failures();
    char *said = play_all(scenario, transports, 2);
    check_said(said, scenario->says);
    if (check_failures + poe_scenarios_failures() != before)
        fputs(said, stderr);
    free(said);
}

/* --- damaged headers ---------------------------------------------------------------------------------------------- */
/* Every mutation is refused, with a reason, or has changed nothing. */
static void check_mutations(void)
{
    poe_frame frame = {.type = POE_FRAME_DATA, .run = 7, .payload_crc = 3,
                       .message = {.kind = 1, .flags = 2, .step = -3, .micro = 4, .stage = 5, .shape = {6, 7, 8, 9},
                                   .data_hash = 1ull << 60, .bytes = 1234}};
    unsigned char wire[POE_FRAME_BYTES], mutated[POE_FRAME_BYTES];
    poe_frame got;
    char why[POE_WHY_BYTES] = "";
    poe_rng rng;
    poe_rng_init(&rng, 1, "mutations");
    poe_frame_encode(&frame, wire);
    CHECK(poe_frame_decode(wire, &got, why) && poe_frame_matches(&got, &frame, why));
    CHECK(got.message.data_hash == frame.message.data_hash && got.payload_crc == 3 && got.message.flags == 2);
    for (int i = 0; i < 5000; i++) {
        memcpy(mutated, wire, sizeof(wire));
        int n = 1 + (int)(poe_rng_next(&rng) % 6);
        for (int k = 0; k < n; k++) {
            unsigned char *at = &mutated[poe_rng_next(&rng) % POE_FRAME_BYTES];
            *at = (unsigned char)(poe_rng_next(&rng) % 3 ? *at ^ (1u << poe_rng_next(&rng) % 8) : poe_rng_next(&rng));
        }
        why[0] = 0;
        bool whole = poe_frame_decode(mutated, &got, why);
        CHECK(whole ? memcmp(wire, mutated, sizeof(wire)) == 0 : why[0] != 0);
    }
}

int main(void)
{
    static const int sizes[] = {1, 2, 4};
    check_mutations();
    for (int s = 0; s < 3; s++)
        for (int i = 0; i < poe_n_scenarios; i++)
            if (poe_scenarios[i].ranks <= sizes[s])
                check_scenario(&poe_scenarios[i], sizes[s]);
    check_decorated(&(poe_scenario){"damaged", 2, {.deadline = 30}, send_damaged, 1,
                                    "refuses a message from rank 0: its payload's CRC-32C is "}, 0, &damaging);
    check_decorated(&(poe_scenario){"silent", 2, {.deadline = 0.5}, wait_for_silence, 0,
                                    "rank 1 has given no sign of life for "}, 1, &silent);
    check_failures += poe_scenarios_failures();
    return check_result();
}
