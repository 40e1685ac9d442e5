/* SPDX-License-Identifier: MIT
 * The emulated network: its rules, its model of a link, and the decorator over inproc. Times are only held against
 * bounds that no load of the machine can break: nothing is ever early. */
#include <malloc.h>
#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

#include "comm/inproc/inproc.h"
#include "faults/net_model.h"
#include "src/clock.h"
#include "src/log.h"
#include "tests/check.h"
#include "tests/comm_scenarios.h"

/* --- rules -------------------------------------------------------------------------------------------------------- */
static void check_delay(const poe_net *net, int from, int to, double delay)
{
    CHECK_NEAR(poe_net_link_of(net, from, to)->delay, delay, 1e-12, 0);
}

static void check_links(void)
{
    poe_net net;
    CHECK_INT(poe_net_read("0-1:rtt=80ms , jitter=5ms,bw=1Gbit,loss=0.1%; 1>0:delay=1.5s;2>*:delay=200us;seed=7;", 4,
                           &net), POE_OK);
    const poe_net_link *link = poe_net_link_of(&net, 0, 1);
    CHECK_NEAR(link->delay, 0.04, 1e-12, 0);
    CHECK_NEAR(link->jitter, 0.005, 1e-12, 0);
    CHECK_NEAR(link->bandwidth, 1e9, 1e-12, 0);
    CHECK_NEAR(link->loss, 0.001, 1e-12, 0);
    check_delay(&net, 1, 0, 1.5);
    CHECK_NEAR(poe_net_link_of(&net, 1, 0)->bandwidth, 1e9, 1e-12, 0);
    check_delay(&net, 2, 3, 200e-6);
    check_delay(&net, 3, 2, 0);
    CHECK(poe_net_is_real(poe_net_link_of(&net, 3, 2)));
    CHECK_INT(net.seed, 7);
    poe_net_free(&net);

    CHECK_INT(poe_net_read("0,1-2,3:delay=3ms", 4, &net), POE_OK);
    for (int from = 0; from < 4; from++)
        for (int to = 0; to < 4; to++)
            if (from != to)
                check_delay(&net, from, to, (from < 2) != (to < 2) ? 3e-3 : 0);
    poe_net_free(&net);

    CHECK_INT(poe_net_read("none", 4, &net), POE_OK);
    CHECK(poe_net_is_real(poe_net_link_of(&net, 0, 1)));
    poe_net_free(&net);
}

static void check_presets(void)
{
    poe_net net;
    CHECK_INT(poe_net_read("*:preset=checkfree;0-1:preset=cross-az-25g,delay=2ms", 14, &net), POE_OK);
    check_delay(&net, 0, 1, 2e-3);
    CHECK_NEAR(poe_net_link_of(&net, 0, 1)->bandwidth, 25e9, 1e-12, 0);
    check_delay(&net, 1, 8, 3e-3); /* Belgium, Netherlands: the shortest */
    CHECK_NEAR(poe_net_link_of(&net, 8, 1)->bandwidth, 0.2425 * 8 * 0x1p30, 1e-12, 0);
    check_delay(&net, 7, 0, 0.132); /* London, Australia: the longest */
    check_delay(&net, 0, 12, 1e-3); /* both in Australia */
    check_delay(&net, 13, 8, 3e-3);
    poe_net_free(&net);
}

static void check_outages(void)
{
    poe_net net;
    CHECK_INT(poe_net_read("*:down,from=5s,to=6s;0-1:down,from=1s,to=2s;1>0:down,from=8s;0-1:cut=3s,corrupt=4", 2, &net),
              POE_OK);
    const poe_net_link *there = poe_net_link_of(&net, 0, 1), *back = poe_net_link_of(&net, 1, 0);
    CHECK_INT(there->n_outages, 2);
    CHECK_INT(back->n_outages, 3);
    CHECK(there->outages[0].from == 1 && there->outages[0].to == 2 && there->outages[1].from == 5);
    CHECK(back->outages[2].from == 8 && isinf(back->outages[2].to));
    CHECK(there->cut == 3 && back->cut == 0);
    CHECK(there->corrupt_message == 4 && back->corrupt_message == 4);
    poe_net_free(&net);
}

static void check_file(void)
{
    char path[] = "/tmp/test-net-XXXXXX";
    const char *text = "# the office\n0-1:rtt=4ms   # a tunnel\n\n*:bw=1Gbit;seed=3\n1-7:rtt=4ms\n";
    poe_net net;
    int file = mkstemp(path);
    CHECK(write(file, text, strlen(text)) == (ssize_t)strlen(text));
    close(file);
    CHECK_INT(poe_net_read(path, 8, &net), POE_OK);
    check_delay(&net, 1, 7, 2e-3);
    CHECK_INT(net.seed, 3);
    poe_net_free(&net);
    poe_capture_begin();
    CHECK_INT(poe_net_read(path, 2, &net), POE_BAD_INPUT);
    char *said = poe_capture_end();
    CHECK(strstr(said, path) && strstr(said, ", line 5, '1-7:rtt=4ms': there is no rank 7; ranks are 0 to 1\n"));
    free(said);
    poe_net_free(&net);
    unlink(path);
}

static void check_wrong(void)
{
    static const struct {
        const char *text, *says;
    } cases[] = {
        {"0-9:rtt=5ms", "--net '0-9:rtt=5ms': there is no rank 9; ranks are 0 to 3\n"},
        {"0-1:rtt=5ms;0>18446744073709551616:rtt=5ms", "'0>18446744073709551616:rtt=5ms': found \"18446744073709551616\" for a rank"},
        {"nothing", "--net: there is no file nothing"},
        {"0-1:rtt=1ms;0-1", "'0-1': found no colon"},
        {"0-1:", "says nothing about these links"},
        {":rtt=5ms", "found \"\" for links"},
        {"1:rtt=5ms", "found \"1\" for links"},
        {"0-:rtt=5ms", "found \"\" for a rank"},
        {"-1>0:rtt=5ms", "found \"\" for a rank"},
        {"0-1-2:rtt=5ms", "found \"1-2\" for a rank"},
        {"2-2:rtt=5ms", "names no link"},
        {"0-1:speed=5ms", "there is no key \"speed\"; keys are rtt, delay,"},
        {"0-1:rtt", "found \"\" for rtt, allowed is a time"},
        {"0-1:rtt=5", "found \"5\" for rtt, allowed is a time"},
        {"0-1:rtt=-5ms", "found \"-5ms\" for rtt"},
        {"0-1:rtt=5 ms", "found \"5\" for rtt"},
        {"0-1:delay=nans", "found \"nans\" for delay"},
        {"0-1:delay=2e9s", "found \"2e9s\" for delay, allowed is a time from 0 to 3600 s"},
        {"0-1:bw=10", "found \"10\" for bw, allowed is a rate"},
        {"0-1:bw=0Mbit", "found \"0Mbit\" for bw"},
        {"0-1:bw=10MB", "found \"10MB\" for bw"},
        {"0-1:loss=0.1", "found \"0.1\" for loss, allowed is a share from 0% to 50%"},
        {"0-1:loss=51%", "found \"51%\" for loss"},
        {"0-1:corrupt=0", "found \"0\" for corrupt"},
        {"0-1:corrupt=x", "found \"x\" for corrupt"},
        {"0-1:preset=moon", "found \"moon\" for preset, allowed is same-rack, same-zone,"},
        {"0-1:from=3s", "from and to say when a link is down"},
        {"0-1:down,from=3s,to=3s", "down from 3 s to 3 s, but the end must be later"},
        {"0-1:down,to=soon", "found \"soon\" for to"},
        {"0-1:rtt=1ms;seed=-1", "found \"-1\" for seed"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        poe_net net;
        poe_capture_begin();
        int status = poe_net_read(cases[i].text, 4, &net);
        char *said = poe_capture_end();
        CHECK_INT(status, POE_BAD_INPUT);
        bool one = strchr(said, '\n') == strrchr(said, '\n');
        if (!one || !strstr(said, cases[i].says)) {
            fprintf(stderr, "%s: not said: %s\nbut: %s\n", cases[i].text, cases[i].says, said);
            check_failures++;
        }
        free(said);
        poe_net_free(&net);
    }
}

/* Ranks 0 and 2 share a processor, and 1 and 3. */
static void check_shared_processors(void)
{
    poe_net net;
    CHECK_INT(poe_net_read("*:delay=3ms", 4, &net), POE_OK);
    CHECK_INT(poe_net_share(&net, 2), POE_OK);
    for (int from = 0; from < 4; from++)
        for (int to = 0; to < 4; to++)
            CHECK_INT(poe_net_is_real(poe_net_link_of(&net, from, to)), from % 2 == to % 2);
    poe_net_free(&net);
    CHECK_INT(poe_net_read("0-2:bw=1Gbit;1>2:bw=2Gbit", 4, &net), POE_OK);
    CHECK_INT(poe_net_share(&net, 1), POE_OK);
    poe_capture_begin();
    CHECK_INT(poe_net_share(&net, 2), POE_BAD_INPUT);
    char *said = poe_capture_end();
    CHECK(strstr(said, "link 1>2 has a bandwidth"));
    free(said);
    poe_net_free(&net);
}

static void check_description(void)
{
    poe_net net;
    CHECK_INT(poe_net_read("*:rtt=20ms,bw=100Mbit", 3, &net), POE_OK);
    char *text = poe_net_describe(&net);
    CHECK_STRING(text, "real messages, held back by rule; seed 0\nevery link  delay 10 ms, 100 Mbit/s\n");
    free(text);
    poe_net_free(&net);
    CHECK_INT(poe_net_read("0>1:delay=1.5s,loss=1%;1-2:down,from=3s", 3, &net), POE_OK);
    text = poe_net_describe(&net);
    CHECK_STRING(text, "real messages, held back by rule; seed 0\n0>1  delay 1.5 s, loss 1 %; 1>0  real\n"
                       "1-2  delay 0 us, down from 3 s on\n");
    free(text);
    poe_net_free(&net);
}

/* --- the model ---------------------------------------------------------------------------------------------------- */
static void check_bandwidth(void)
{
    const poe_net_link link = {.delay = 0.5, .bandwidth = 8e6}; /* 1 MB/s */
    poe_net_state state = {0};
    poe_rng rng = {0};
    for (int i = 1; i <= 12; i++) { /* all at 10 s: one after the other, the first 4 MiB in the buffer at once */
        poe_net_times t = poe_net_next(&link, 1, &state, &rng, 10, 1000000);
        CHECK_NEAR(t.due, 10.5 + i, 1e-12, 0);
        CHECK_NEAR(t.accepted, fmax(10, 10 + i - 4.194304), 1e-12, 0);
    }
    poe_net_times t = poe_net_next(&link, 1, &state, &rng, 30, 0); /* the link is idle again */
    CHECK_NEAR(t.due, 30.5, 1e-12, 0);
    CHECK_NEAR(t.accepted, 30, 1e-12, 0);
}

static void check_jitter(void)
{
    const poe_net_link link = {.delay = 1, .jitter = 0.5};
    poe_net_state state = {0};
    poe_rng rng;
    poe_rng_init(&rng, 1, "jitter");
    double before = 0, least = 2, most = 0, sum = 0;
    for (int i = 0; i < 2000; i++) { /* far apart: none holds the next one back */
        double travel = poe_net_next(&link, 2, &state, &rng, 10.0 * i, 1).due - 10.0 * i;
        least = fmin(least, travel);
        most = fmax(most, travel);
        sum += travel;
    }
    CHECK(least >= 0.5 && least < 0.51 && most <= 1.5 && most > 1.49);
    CHECK_NEAR(sum / 2000, 1, 0, 5 * 0.5 / sqrt(3.0 * 2000)); /* five standard errors */
    for (int i = 0; i < 2000; i++) { /* close together: never out of order */
        double due = poe_net_next(&link, 2, &state, &rng, 30000 + 0.001 * i, 1).due;
        CHECK(due >= before && due >= 30000 + 0.001 * i + 0.5);
        before = due;
    }
}

/* Messages of one packet: the share that is late is the loss; each is late by a timeout or more. */
static void check_loss(void)
{
    const poe_net_link link = {.delay = 1, .loss = 0.25};
    poe_rng rng;
    poe_rng_init(&rng, 1, "loss");
    int late = 0, twice = 0, fast = 0, n = 20000;
    for (int i = 0; i < n; i++) {
        poe_net_state state = {0};
        double extra = poe_net_next(&link, 2, &state, &rng, 0, 100).due - 1;
        CHECK(extra == 0 || extra >= 2.2);
        late += extra > 0;
        twice += extra > 2.2 + 1e-9;
    }
    CHECK_NEAR((double)late / n, 0.25, 0, 5 * sqrt(0.25 * 0.75 / n));
    CHECK_NEAR((double)twice / n, 0.0625, 0, 5 * sqrt(0.0625 * 0.9375 / n));
    const poe_net_link rare = {.delay = 1, .loss = 1e-4};
    for (int i = 0; i < 2000; i++) { /* a thousand packets: almost all losses are noticed after one round trip */
        poe_net_state state = {0};
        double extra = poe_net_next(&rare, 2, &state, &rng, 0, 1000 * POE_NET_PACKET).due - 1;
        CHECK(extra == 0 || extra >= 2 - 1e-9);
        fast += extra > 0 && extra < 2.1;
    }
    double expected = 1 - pow(1 - 1e-4, 1000);
    CHECK_NEAR(fast / 2000.0, expected, 0, 5 * sqrt(expected * (1 - expected) / 2000) + 0.002);
}

static void check_down(void)
{
    const poe_net_link link = {.delay = 1, .bandwidth = 8e6, .n_outages = 2,
                               .outages = {{.from = 10, .to = 20}, {.from = 30, .to = INFINITY}}};
    poe_net_state state = {0};
    poe_rng rng = {0};
    CHECK_NEAR(poe_net_next(&link, 2, &state, &rng, 1, 1000000).due, 3, 1e-12, 0);
    CHECK_NEAR(poe_net_next(&link, 2, &state, &rng, 8.5, 1000000).due, 22, 1e-12, 0); /* caught on its way */
    poe_net_times t = poe_net_next(&link, 2, &state, &rng, 12, 1000000);
    CHECK_NEAR(t.due, 23, 1e-12, 0);
    CHECK_NEAR(t.accepted, 12, 1e-12, 0);
    CHECK(isinf(poe_net_next(&link, 2, &state, &rng, 40, 1).due));
    CHECK_NEAR(poe_net_next(&link, 2, &state, &rng, 41, 1).accepted, 41, 1e-12, 0);
}

/* --- the decorator ------------------------------------------------------------------------------------------------ */
static void make_pair(const char *rules, poe_transport **transports)
{
    poe_net net;
    CHECK_INT(poe_inproc_create(2, transports), POE_OK);
    CHECK_INT(poe_net_read(rules, 2, &net), POE_OK);
    for (int r = 0; r < 2; r++)
        CHECK_INT(poe_net_wrap(&net, &transports[r]), POE_OK);
    poe_net_free(&net);
}

static void await(poe_transport *transport, const poe_operation *op)
{
    double until = poe_now() + 60;
    while (!op->done && poe_now() < until)
        transport->ops->progress(transport, 0.05);
    CHECK(op->done);
    CHECK_INT(op->status, POE_OK);
}

static void *destroy(void *transport)
{
    ((poe_transport *)transport)->ops->destroy(transport);
    return NULL;
}

enum { MESSAGES = 60, CHANNELS = 3, LARGEST = 40000 };

typedef struct stream {
    poe_transport *transport;
    atomic_bool *over;
    double times[MESSAGES]; /* when message i was sent, or received */
} stream;

static size_t length_of(int i)
{
    return (size_t)(i * 7919 % LARGEST);
}

static unsigned char byte_of(int i, size_t j)
{
    return (unsigned char)((size_t)i * 13 + j * 31);
}

/* Overwrites the memory as soon as an operation is done. */
static void *send_stream(void *arg)
{
    stream *s = arg;
    static unsigned char data[LARGEST];
    for (int i = 0; i < MESSAGES; i++) {
        poe_operation op = {0};
        for (size_t j = 0; j < length_of(i); j++)
            data[j] = byte_of(i, j);
        s->times[i] = poe_now();
        s->transport->ops->send(s->transport, 1, i % CHANNELS, data, length_of(i), &op);
        await(s->transport, &op);
        if (i % 20 == 10)
            usleep(5000);
    }
    while (!atomic_load(s->over))
        s->transport->ops->progress(s->transport, 0.01);
    return NULL;
}

static void *receive_stream(void *arg)
{
    stream *s = arg;
    static unsigned char data[LARGEST];
    for (int i = 0; i < MESSAGES; i++) {
        poe_operation op = {0};
        bool same = true;
        memset(data, 0, sizeof(data));
        s->transport->ops->receive(s->transport, 0, i % CHANNELS, data, length_of(i), &op);
        await(s->transport, &op);
        s->times[i] = poe_now();
        for (size_t j = 0; j < length_of(i); j++)
            same &= data[j] == byte_of(i, j);
        CHECK(same);
    }
    atomic_store(s->over, true);
    return NULL;
}

/* Bytes and order are right, nothing is early, and together the messages are no faster than the link. */
static void check_stream(void)
{
    poe_transport *transports[2];
    pthread_t sender, receiver;
    make_pair("0>1:delay=15ms,jitter=5ms,bw=80Mbit;1>0:delay=1ms", transports);
    atomic_bool over = false;
    stream sent = {.transport = transports[0], .over = &over}, got = {.transport = transports[1], .over = &over};
    pthread_create(&sender, NULL, send_stream, &sent);
    pthread_create(&receiver, NULL, receive_stream, &got);
    pthread_join(sender, NULL);
    pthread_join(receiver, NULL);
    for (int r = 0; r < 2; r++)
        transports[r]->ops->destroy(transports[r]);
    double bytes = 0;
    for (int i = 0; i < MESSAGES; i++) {
        bytes += (double)length_of(i);
        CHECK(got.times[i] - sent.times[i] >= 0.01 + (double)length_of(i) / 10e6);
        CHECK(got.times[i] - sent.times[0] >= 0.01 + bytes / 10e6);
    }
}

/* What was sent while the link was down arrives afterwards; who sends and leaves is heard all the same. */
static void check_partition(void)
{
    poe_transport *transports[2];
    pthread_t leaving;
    double start = poe_now();
    unsigned char in = 0, out = 42;
    poe_operation sending = {0}, receiving = {0};
    make_pair("0-1:delay=20ms,down,from=0s,to=0.2s", transports);
    transports[0]->ops->send(transports[0], 1, POE_CHANNEL_COLLECTIVE, &out, 1, &sending);
    CHECK(sending.done);
    out = 0;
    pthread_create(&leaving, NULL, destroy, transports[0]);
    transports[1]->ops->receive(transports[1], 0, POE_CHANNEL_COLLECTIVE, &in, 1, &receiving);
    await(transports[1], &receiving);
    CHECK(poe_now() - start >= 0.22);
    CHECK_INT(in, 42);
    pthread_join(leaving, NULL);
    transports[1]->ops->destroy(transports[1]);
}

/* A message that does not fit the send buffer is done when it does, and can be given up before. */
static void check_large(void)
{
    enum { LARGE = 3 << 20 };
    poe_transport *transports[2];
    poe_operation op[3] = {{0}};
    unsigned char *data = calloc(1, LARGE);
    make_pair("0-1:bw=400Mbit", transports);
    double start = poe_now();
    for (int i = 0; i < 3; i++)
        transports[0]->ops->send(transports[0], 1, i, data, LARGE, &op[i]);
    CHECK(op[0].done);
    CHECK(!op[2].done);
    transports[0]->ops->cancel(transports[0], &op[2]);
    CHECK(op[2].done && op[2].status == POE_PEER_LOST);
    await(transports[0], &op[1]);
    CHECK(poe_now() - start >= 8.0 * (2 * LARGE - POE_NET_SEND_BUFFER) / 400e6);
    free(data);
    for (int r = 1; r >= 0; r--)
        transports[r]->ops->destroy(transports[r]);
}

static size_t in_use(void)
{
    return mallinfo2().uordblks;
}

/* Once as many messages as ever have been on their way, more of them take no more memory. */
static void check_memory(void)
{
    poe_transport *transports[2];
    unsigned char in[3000], out[3000] = {0};
    size_t before = 0;
    make_pair("0-1:delay=1ms", transports);
    for (int i = 0; i < 60; i++) {
        poe_operation receives[8] = {{0}}, send = {0};
        for (int k = 0; k < 8; k++) {
            send = (poe_operation){0};
            transports[0]->ops->send(transports[0], 1, k, out, sizeof(out), &send);
            transports[1]->ops->receive(transports[1], 0, k, in, sizeof(in), &receives[k]);
            CHECK(send.done);
        }
        for (int k = 0; k < 8; k++)
            while (!receives[k].done)
                for (int r = 0; r < 2; r++)
                    transports[r]->ops->progress(transports[r], 0);
        transports[0]->ops->progress(transports[0], 0);
        if (i == 10)
            before = in_use();
    }
    CHECK_INT(in_use(), before);
    for (int r = 0; r < 2; r++)
        transports[r]->ops->destroy(transports[r]);
}

/* A send that fails below, after its sender was told that it is done, fails what is sent later. */
static void failing_send(poe_transport *t, int peer, int channel, const void *data, size_t bytes, poe_operation *op)
{
    (void)t, (void)peer, (void)channel, (void)data, (void)bytes;
    op->done = true;
    op->status = POE_PEER_LOST;
}

static int cuts;
static void count_cut(poe_transport *transport, int peer)
{
    (void)transport;
    cuts += peer == 1;
}

static void check_below(void)
{
    poe_transport *transports[2];
    poe_net net;
    CHECK_INT(poe_inproc_create(2, transports), POE_OK);
    CHECK_INT(poe_net_read("0-1:cut=10ms,delay=5ms", 2, &net), POE_OK);
    poe_capture_begin();
    CHECK_INT(poe_net_wrap(&net, &transports[0]), POE_BAD_INPUT);
    char *said = poe_capture_end();
    CHECK(strstr(said, "link 0>1 is to be cut, but the transport inproc has no connections of its own to cut\n"));
    free(said);
    poe_transport_ops ops = *transports[0]->ops;
    ops.send = failing_send;
    ops.cut = count_cut;
    transports[0]->ops = &ops;
    CHECK_INT(poe_net_wrap(&net, &transports[0]), POE_OK);
    CHECK_INT(poe_net_wrap(&net, &transports[1]), POE_OK);
    poe_net_free(&net);
    poe_operation first = {0}, second = {0};
    transports[0]->ops->send(transports[0], 1, 0, "x", 1, &first);
    CHECK(first.done && first.status == POE_OK);
    for (double until = poe_now() + 0.02; poe_now() < until;)
        transports[0]->ops->progress(transports[0], 0.001);
    CHECK_INT(cuts, 1);
    transports[0]->ops->send(transports[0], 1, 0, "x", 1, &second);
    CHECK(second.done && second.status == POE_PEER_LOST);
    for (int r = 0; r < 2; r++)
        transports[r]->ops->destroy(transports[r]);
}

/* --- comm over it ------------------------------------------------------------------------------------------------- */
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

static void check_scenario(const poe_scenario *scenario, const char *rules, const char *says)
{
    poe_transport *transports[2];
    pthread_t threads[2];
    player players[2];
    int before = check_failures + poe_scenarios_failures();
    make_pair(rules, transports);
    double start = poe_now();
    poe_capture_begin();
    for (int r = 0; r < 2; r++) {
        players[r] = (player){scenario, transports[r]};
        pthread_create(&threads[r], NULL, play, &players[r]);
    }
    for (int r = 0; r < 2; r++)
        pthread_join(threads[r], NULL);
    char *said = poe_capture_end();
    printf("%s over %s: %.2f s\n", scenario->name, rules, poe_now() - start);
    if (says && !strstr(said, says)) {
        fprintf(stderr, "not said: %s\n", says);
        check_failures++;
    }
    if (check_failures + poe_scenarios_failures() != before)
        fputs(said, stderr);
    free(said);
}

static void check_scenarios(void)
{
    for (int i = 0; i < poe_n_scenarios; i++)
        if (poe_scenarios[i].ranks <= 2)
            check_scenario(&poe_scenarios[i], "0>1:delay=2ms,jitter=2ms,loss=0.01%;1>0:delay=500us,bw=900Mbit",
                           poe_scenarios[i].ranks == 2 ? poe_scenarios[i].says : NULL);
}

/* Message 2 on the way from rank 0 is the first one's payload. */
static bool stream_damaged(poe_comm *comm)
{
    int rank = poe_comm_rank(comm);
    unsigned char *payload;
    poe_message m = {.kind = 1, .bytes = 100};
    poe_link_settings settings = {.name = "activations 0->1", .peer = 1 - rank, .channel = 3, .outgoing = rank == 0,
                                  .max_bytes = 100, .window = 1};
    poe_link *link;
    CHECK_INT(poe_link_open(comm, &settings, &link), POE_OK);
    if (rank == 0) {
        CHECK_INT(poe_link_acquire(link, &m, (void **)&payload), POE_OK);
        memset(payload, 1, 100);
        CHECK_INT(poe_link_send(link, &m), POE_OK);
        usleep(100000);
    } else {
        CHECK_INT(poe_link_receive(link, &m, NULL, (void **)&payload), POE_PEER_LOST);
    }
    poe_link_close(link);
    return false;
}

static bool wait_behind_partition(poe_comm *comm)
{
    CHECK_INT(poe_comm_barrier(comm, "a barrier that is cut off"), POE_PEER_LOST);
    return false;
}

int main(void)
{
    poe_log *log = poe_log_create(0, 1);
    poe_log_attach(log);
    check_links();
    check_presets();
    check_outages();
    check_file();
    check_wrong();
    check_shared_processors();
    check_description();
    check_bandwidth();
    check_jitter();
    check_loss();
    check_down();
    check_stream();
    check_partition();
    check_large();
    check_memory();
    check_below();
    poe_log_attach(NULL);
    check_scenarios();
    check_scenario(&(poe_scenario){"damaged", 2, {.deadline = 30}, stream_damaged, 1, NULL}, "0>1:corrupt=2",
                   "link activations 0->1: rank 1 refuses a message from rank 0: its payload's CRC-32C is ");
    check_scenario(&(poe_scenario){"partition", 2, {.deadline = 0.4}, wait_behind_partition, 0, NULL},
                   "0-1:rtt=1ms,down", "rank 1 has given no sign of life for ");
    poe_log_destroy(log);
    check_failures += poe_scenarios_failures();
    return check_result();
}
