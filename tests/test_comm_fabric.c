/* SPDX-License-Identifier: MIT
 * comm over libfabric: all scenarios with ranks as threads; connections that break, are damaged or are strangers';
 * ranks that are killed or stopped; and what cannot be opened. */
#include <arpa/inet.h>
#include <pthread.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "comm/fabric/impl.h"
#include "comm/inproc/inproc.h"
#include "src/clock.h"
#include "src/log.h"
#include "src/rng.h"
#include "tests/check.h"
#include "tests/comm_scenarios.h"
#include "tests/relay.h"

enum { MOST = 8 };

/* What lies between the ranks of one play. */
typedef struct network {
    poe_fabric_settings settings;
    poe_relay_settings relay; /* zeros: none */
    int cut_every;            /* calls of progress() after which a rank cuts a connection; 0: never */
    void (*meanwhile)(const fabric_name *names);
} network;

static const unsigned char secret[POE_SECRET_BYTES] = "a secret of thirty-two bytes....";

typedef struct player {
    const poe_scenario *scenario;
    const network *net;
    poe_transport *over; /* inproc: the ranks meet over it */
    poe_relay *relay;
    int cuts, flips;
} player;

static fabric_name met[MOST]; /* where the ranks of this play listen */
static pthread_barrier_t all_met;

/* --- cutting ------------------------------------------------------------------------------------------------------ */
typedef struct cutter {
    poe_transport base;
    poe_transport *below;
    poe_transport_ops ops;
    int every, calls;
    poe_rng rng;
} cutter;

static void cutter_send(poe_transport *t, int rank, int number, const void *data, size_t bytes, poe_operation *op)
{
    poe_transport *below = ((cutter *)t)->below;
    below->ops->send(below, rank, number, data, bytes, op);
}

static void cutter_receive(poe_transport *t, int rank, int number, void *data, size_t bytes, poe_operation *op)
{
    poe_transport *below = ((cutter *)t)->below;
    below->ops->receive(below, rank, number, data, bytes, op);
}

static bool cutter_progress(poe_transport *t, double wait)
{
    cutter *c = (cutter *)t;
    if (++c->calls % c->every == 0)
        c->below->ops->cut(c->below, (int)(poe_rng_next(&c->rng) % (uint64_t)t->size));
    return c->below->ops->progress(c->below, wait);
}

static void cutter_wake(poe_transport *t)
{
    ((cutter *)t)->below->ops->wake(((cutter *)t)->below);
}

static void cutter_cancel(poe_transport *t, poe_operation *op)
{
    ((cutter *)t)->below->ops->cancel(((cutter *)t)->below, op);
}

static void cutter_destroy(poe_transport *t)
{
    ((cutter *)t)->below->ops->destroy(((cutter *)t)->below);
    free(t);
}

static poe_transport *add_cutter(poe_transport *below, int every)
{
    cutter *c = calloc(1, sizeof(*c));
    c->base = *below;
    c->ops = (poe_transport_ops){.name = "fabric", .send = cutter_send, .receive = cutter_receive,
                                 .progress = cutter_progress, .wake = cutter_wake, .cancel = cutter_cancel,
                                 .destroy = cutter_destroy};
    c->base.ops = &c->ops;
    c->below = below;
    c->every = every;
    poe_rng_init(&c->rng, (uint64_t)below->rank, "cuts");
    return &c->base;
}

/* --- playing ------------------------------------------------------------------------------------------------------ */
static bool has_relay(const network *net)
{
    return net->relay.every || net->relay.flips;
}

/* As poe_fabric_create() does it, but each rank is reached through a relay. */
static poe_status meet_through_relays(player *p, poe_comm *over, poe_transport **transport)
{
    fabric *f = NULL;
    fabric_name names[MOST], mine;
    struct sockaddr_in address;
    CHECK_INT(poe_fabric_listen(&p->net->settings, true, p->over->rank, &f), POE_OK);
    mine = f->name;
    memcpy(&address, mine.address, sizeof(address));
    p->relay = poe_relay_start(&address, &p->net->relay);
    address = poe_relay_address(p->relay);
    memcpy(mine.address, &address, sizeof(address));
    CHECK_INT(poe_comm_gather(over, &mine, names, sizeof(mine)), POE_OK);
    *transport = &f->base;
    return poe_fabric_join(f, p->over->rank, p->over->size, names, secret);
}

static poe_transport *meet(player *p)
{
    poe_comm *over = NULL;
    poe_transport *transport = NULL;
    poe_log *log = poe_log_create(p->over->rank, p->over->size);
    poe_log_attach(log);
    CHECK_INT(poe_comm_create(p->over, NULL, &over), POE_OK);
    poe_log_hold();
    poe_status status = has_relay(p->net) ? meet_through_relays(p, over, &transport)
                                          : poe_fabric_create(over, &p->net->settings, &transport);
    CHECK_INT(status, POE_OK);
    poe_log_settle(true);
    poe_comm_destroy(over, true);
    poe_log_attach(NULL);
    poe_log_destroy(log);
    if (transport && transport->rank == 0)
        memcpy(met, ((fabric *)transport)->names, (size_t)transport->size * sizeof(*met));
    return transport && p->net->cut_every ? add_cutter(transport, p->net->cut_every) : transport;
}

static void *play(void *arg)
{
    player *p = arg;
    poe_transport *transport = meet(p);
    pthread_barrier_wait(&all_met);
    if (transport)
        poe_scenario_play(p->scenario, transport);
    return NULL;
}

/* Everything that the ranks said; the caller frees it. */
static char *play_all(const poe_scenario *scenario, const network *net, int size, int *cuts, int *flips)
{
    poe_transport *transports[MOST];
    pthread_t threads[MOST];
    player players[MOST];
    double start = poe_now();
    *cuts = *flips = 0;
    CHECK_INT(poe_inproc_create(size, transports), POE_OK);
    pthread_barrier_init(&all_met, NULL, (unsigned)size + 1);
    poe_capture_begin();
    for (int r = 0; r < size; r++) {
        players[r] = (player){.scenario = scenario, .net = net, .over = transports[r]};
        pthread_create(&threads[r], NULL, play, &players[r]);
    }
    pthread_barrier_wait(&all_met);
    if (net->meanwhile)
        net->meanwhile(met);
    for (int r = 0; r < size; r++)
        pthread_join(threads[r], NULL);
    char *said = poe_capture_end();
    for (int r = 0; r < size && has_relay(net); r++) {
        int c, f;
        poe_relay_stop(players[r].relay, &c, &f);
        *cuts += c;
        *flips += f;
    }
    pthread_barrier_destroy(&all_met);
    printf("%s, %d ranks: %.2f s\n", scenario->name, size, poe_now() - start);
    return said;
}

static int times_said(const char *text, const char *what)
{
    int n = 0;
    for (; (text = strstr(text, what)); text++)
        n++;
    return n;
}

static void check_said(const char *said, const char *what)
{
    if (!what || strstr(said, what))
        return;
    fprintf(stderr, "not said: %s\nbut: %s\n", what, said);
    check_failures++;
}

static const poe_scenario *scenario_named(const char *name)
{
    for (int i = 0; i < poe_n_scenarios; i++)
        if (strcmp(poe_scenarios[i].name, name) == 0)
            return &poe_scenarios[i];
    return NULL;
}

/* Plays it, shows what was said if a check failed in it. The caller frees the text. */
static char *check_play(const poe_scenario *scenario, const network *net, int size, int *cuts, int *flips)
{
    int before = poe_scenarios_failures() + check_failures;
    char *said = play_all(scenario, net, size, cuts, flips);
    check_said(said, scenario->says);
    if (poe_scenarios_failures() + check_failures != before)
        fputs(said, stderr);
    return said;
}

static void check_scenarios(void)
{
    static const int sizes[] = {1, 2, 4};
    const network plain = {0};
    int cuts, flips;
    for (int s = 0; s < 3; s++)
        for (int i = 0; i < poe_n_scenarios; i++)
            if (poe_scenarios[i].ranks <= sizes[s])
                free(check_play(&poe_scenarios[i], &plain, sizes[s], &cuts, &flips));
}

/* --- bad networks ------------------------------------------------------------------------------------------------- */
/* More bytes than a unit, than the window, than what sockets hold; in both directions, received late. */
enum { LONG = 9 << 20, LONGS = 6 };

static void *fill_long(unsigned char *p, int i)
{
    for (size_t j = 0; j < LONG; j += 8) {
        uint64_t value = j * 2654435761u + (uint64_t)i;
        memcpy(p + j, &value, 8);
    }
    return p;
}

static bool exchange(poe_comm *comm)
{
    int rank = poe_comm_rank(comm);
    unsigned char *expected = malloc(LONG);
    if (rank > 1)
        return true;
    poe_link *links[2];
    for (int from = 0; from < 2; from++) {
        poe_link_settings settings = {.name = "long", .peer = 1 - rank, .channel = from, .outgoing = rank == from,
                                      .max_bytes = LONG, .window = 2};
        CHECK_INT(poe_link_open(comm, &settings, &links[from]), POE_OK);
    }
    for (int i = 0; i < LONGS; i++) {
        poe_message m = {.step = i, .bytes = LONG};
        void *payload;
        CHECK_INT(poe_link_acquire(links[rank], &m, &payload), POE_OK);
        CHECK(fill_long(payload, i) && poe_link_send(links[rank], &m) == POE_OK);
        CHECK_INT(poe_link_receive(links[1 - rank], &m, NULL, &payload), POE_OK);
        CHECK(memcmp(payload, fill_long(expected, i), LONG) == 0);
        if (i % 3 == 0)
            usleep(5000);
        poe_link_release(links[1 - rank]);
    }
    for (int from = 0; from < 2; from++)
        poe_link_close(links[from]);
    free(expected);
    return true;
}

/* Sums begun by one rank long before the other: their chunks wait at the receiver, and hold up nothing else. */
static bool early_sum(poe_comm *comm)
{
    static const int ranks[] = {0, 1};
    enum { COUNT = 6 << 20 };
    int rank = poe_comm_rank(comm);
    poe_reduce_settings settings = {.name = "early", .ranks = ranks, .n_ranks = 2, .count = COUNT, .slots = 1};
    poe_reduce *reduce;
    float *values = aligned_alloc(64, COUNT * sizeof(float));
    for (int i = 0; i < COUNT; i++)
        values[i] = (float)(i % 1000 + rank);
    if (rank == 0) {
        CHECK_INT(poe_reduce_open(comm, &settings, &reduce), POE_OK);
        CHECK_INT(poe_reduce_begin(reduce, 0, values, values), POE_OK);
    }
    for (int i = 0; i < 5; i++)
        CHECK_INT(poe_comm_barrier(comm, "before the other rank sums"), POE_OK);
    if (rank == 1) {
        CHECK_INT(poe_reduce_open(comm, &settings, &reduce), POE_OK);
        CHECK_INT(poe_reduce_begin(reduce, 0, values, values), POE_OK);
    }
    CHECK_INT(poe_reduce_end(reduce, 0), POE_OK);
    int wrong = 0;
    for (int i = 0; i < COUNT; i++)
        wrong += values[i] != (float)(2 * (i % 1000) + 1);
    CHECK_INT(wrong, 0);
    poe_reduce_close(reduce);
    free(values);
    return true;
}

/* A sum given up half way: what has begun still arrives, and the connection serves the farewell. */
static bool give_up(poe_comm *comm)
{
    static const int ranks[] = {0, 1};
    enum { COUNT = 16 << 20 };
    int rank = poe_comm_rank(comm);
    poe_reduce_settings settings = {.name = "given up", .ranks = ranks, .n_ranks = 2, .count = COUNT, .slots = 1};
    poe_reduce *reduce;
    if (rank == 0) {
        float *values = aligned_alloc(64, COUNT * sizeof(float));
        memset(values, 0, COUNT * sizeof(float));
        CHECK_INT(poe_reduce_open(comm, &settings, &reduce), POE_OK);
        CHECK_INT(poe_reduce_begin(reduce, 0, values, values), POE_OK);
        usleep(50000); /* it is stuck: the other side posts nothing */
        poe_reduce_close(reduce);
        free(values);
    } else {
        CHECK_INT(poe_comm_barrier(comm, "a barrier after it"), POE_PEER_LOST);
    }
    return false;
}

#define PATIENT {.deadline = 60, .patience = 60}
static const poe_scenario exchange_scenario = {"exchange", 2, PATIENT, exchange, 0, NULL};
static const poe_scenario early_sum_scenario = {"early sum", 2, PATIENT, early_sum, 0, NULL};

static void check_cuts(void)
{
    static const char *const names[] = {"stream", "reduce", "collectives", "credits"};
    const network cut = {.cut_every = 23}, reset = {.relay = {.every = 300000, .cuts = 12}};
    int cuts, flips;
    for (int i = 0; i < 4; i++)
        for (int size = 2; size <= 4; size += 2) {
            char *said = check_play(scenario_named(names[i]), &cut, size, &cuts, &flips);
            if (i < 2)
                check_said(said, "broke and was made anew after ");
            free(said);
        }
    char *said = check_play(&exchange_scenario, &reset, 2, &cuts, &flips);
    CHECK_INT(cuts, 12); /* of one relay: only one rank's calls come through */
    check_said(said, "broke and was made anew after ");
    free(said);
    free(check_play(scenario_named("stream"), &reset, 2, &cuts, &flips));
    CHECK(cuts > 0);
}

static void check_damage(void)
{
    const network damaging = {.relay = {.flips = 5}};
    int cuts, flips;
    char *said = check_play(scenario_named("stream"), &damaging, 2, &cuts, &flips);
    CHECK(flips > 0);
    CHECK_INT(times_said(said, "is damaged (its CRC-32C is 0x"), flips);
    check_said(said, "the connection is made anew");
    free(said);
}

/* --- strangers ---------------------------------------------------------------------------------------------------- */
static int say_nonsense(const fabric_name *name, const void *data, size_t bytes)
{
    struct sockaddr_in address;
    memcpy(&address, name->address, sizeof(address));
    int s = socket(AF_INET, SOCK_STREAM, 0);
    CHECK_INT(connect(s, (struct sockaddr *)&address, sizeof(address)), 0);
    CHECK_INT(send(s, data, bytes, MSG_NOSIGNAL), bytes);
    return s;
}

/* One that speaks no libfabric, one that falls silent after a byte, and one that knows all but the secret. */
static void be_strange(const fabric_name *names)
{
    usleep(150000); /* the ranks have reached each other: while one calls, a failed call may be its own */
    static const char nonsense[] = "GET /index.html HTTP/1.1\r\nHost: somebody\r\nAccept: everything\r\n\r\n";
    int talker = say_nonsense(&names[0], nonsense, sizeof(nonsense)), silent = say_nonsense(&names[0], "\1", 1);
    fabric *f = NULL;
    unsigned char wrong[POE_SECRET_BYTES] = "some other secret, as long......";
    poe_operation op = {0};
    CHECK_INT(poe_fabric_listen(&(poe_fabric_settings){0}, true, 1, &f), POE_OK);
    CHECK_INT(poe_fabric_join(f, 1, 2, names, wrong), POE_OK);
    f->base.ops->send(&f->base, 0, 3, "anything", 8, &op);
    for (double until = poe_now() + 0.3; poe_now() < until;)
        f->base.ops->progress(&f->base, 0.05);
    f->base.ops->destroy(&f->base);
    close(talker);
    close(silent);
}

static void check_strangers(void)
{
    const network strange = {.meanwhile = be_strange};
    int cuts, flips;
    char *said = check_play(scenario_named("slow"), &strange, 2, &cuts, &flips);
    check_said(said, "rank 0: warning: refused a connection from a stranger that is not one of this run's: ");
    check_said(said, "rank 0: warning: refused a connection from 127.0.0.1:");
    check_said(said, " that is not one of this run's: it does not know this run's secret\n");
    free(said);
}

/* --- processes ---------------------------------------------------------------------------------------------------- */
/* Rank 1 in a process of its own; they tell each other their names through a socket. Returns its process. */
static pid_t fork_pair(const poe_scenario *scenario, fabric **mine)
{
    int ends[2];
    fabric_name names[2];
    fabric *f = NULL;
    CHECK_INT(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
    fflush(NULL);
    pid_t child = fork();
    int rank = child == 0;
    CHECK_INT(poe_fabric_listen(&(poe_fabric_settings){0}, true, rank, &f), POE_OK);
    names[rank] = f->name;
    CHECK_INT(write(ends[rank], &f->name, sizeof(f->name)), sizeof(f->name));
    CHECK_INT(read(ends[rank], &names[1 - rank], sizeof(f->name)), sizeof(f->name));
    CHECK_INT(poe_fabric_join(f, rank, 2, names, secret), POE_OK);
    close(ends[0]);
    close(ends[1]);
    if (child == 0) {
        poe_scenario_play(scenario, &f->base);
        _exit(check_failures + poe_scenarios_failures() ? 1 : 0);
    }
    *mine = f;
    return child;
}

static pid_t victim;

static bool send_to_victim(poe_comm *comm)
{
    int rank = poe_comm_rank(comm);
    poe_status status = POE_OK;
    poe_link_settings settings = {.name = "to the victim", .peer = 1 - rank, .outgoing = rank == 0,
                                  .max_bytes = 1 << 20, .window = 2};
    poe_link *link;
    CHECK_INT(poe_link_open(comm, &settings, &link), POE_OK);
    double killed = 0;
    for (int i = 0; status == POE_OK; i++) {
        poe_message m = {.step = i, .bytes = 1 << 20};
        void *payload;
        if (rank == 1) {
            status = poe_link_receive(link, &m, NULL, &payload);
            if (status == POE_OK)
                poe_link_release(link);
            continue;
        }
        if (i == 20) {
            kill(victim, SIGKILL);
            killed = poe_now();
        }
        status = poe_link_acquire(link, &m, &payload);
        if (status == POE_OK)
            status = poe_link_send(link, &m);
    }
    CHECK_INT(status, POE_PEER_LOST);
    CHECK(rank == 1 || poe_now() - killed < 20); /* long before the deadline of 60 s */
    poe_link_close(link);
    return false;
}

static void check_killed(void)
{
    static const poe_scenario scenario = {"killed", 2, PATIENT, send_to_victim, 0, NULL};
    fabric *f;
    double start = poe_now();
    victim = fork_pair(&scenario, &f);
    poe_capture_begin();
    poe_scenario_play(&scenario, &f->base);
    char *said = poe_capture_end();
    printf("killed: %.2f s\n", poe_now() - start);
    check_said(said, "rank 1 is gone: nothing answers at 127.0.0.1:");
    waitpid(victim, NULL, 0);
    free(said);
}

static void *stop_and_continue(void *unused)
{
    usleep(20000);
    kill(victim, SIGSTOP);
    usleep(1200000);
    kill(victim, SIGCONT);
    return unused;
}

/* A pause shorter than the deadline costs nothing but its time, though longer than a heartbeat. */
static void check_stopped(void)
{
    static const poe_scenario scenario = {
        "stopped", 2, {.deadline = 30, .patience = 30, .heartbeat = 0.2}, exchange, 0, NULL};
    fabric *f;
    pthread_t thread;
    int status;
    double start = poe_now();
    victim = fork_pair(&scenario, &f);
    poe_capture_begin();
    pthread_create(&thread, NULL, stop_and_continue, NULL);
    poe_scenario_play(&scenario, &f->base);
    pthread_join(thread, NULL);
    char *said = poe_capture_end();
    printf("stopped: %.2f s\n", poe_now() - start);
    CHECK_STRING(said, "");
    CHECK(waitpid(victim, &status, 0) == victim && status == 0);
    free(said);
}

/* --- opening ------------------------------------------------------------------------------------------------------ */
static void check_refused(const poe_fabric_settings *settings, const char *const *words)
{
    fabric *f = NULL;
    poe_capture_begin();
    CHECK_INT(poe_fabric_listen(settings, true, 0, &f), POE_BAD_INPUT);
    char *said = poe_capture_end();
    for (; *words; words++)
        check_said(said, *words);
    CHECK_INT(times_said(said, "\n"), 1);
    free(said);
}

static void check_opening(void)
{
    fabric *first = NULL;
    struct sockaddr_in address;
    CHECK_INT(poe_fabric_listen(&(poe_fabric_settings){0}, true, 0, &first), POE_OK);
    memcpy(&address, first->name.address, sizeof(address));
    CHECK_INT(address.sin_addr.s_addr, htonl(INADDR_LOOPBACK));
    int port = ntohs(address.sin_port);
    check_refused(&(poe_fabric_settings){.port_low = port, .port_high = port},
                  (const char *const[]){"--port-range ", "finds no free port there", NULL});
    fabric *second = NULL;
    const poe_fabric_settings range = {.port_low = port, .port_high = port + 20};
    CHECK_INT(poe_fabric_listen(&range, true, 0, &second), POE_OK);
    memcpy(&address, second->name.address, sizeof(address));
    CHECK(ntohs(address.sin_port) > port && ntohs(address.sin_port) <= port + 20);
    check_refused(&(poe_fabric_settings){.provider = "nonsense"},
                  (const char *const[]){"--fabric-provider: found \"nonsense\"", "tcp", NULL});
    check_refused(&(poe_fabric_settings){.interface = "nonsense0"},
                  (const char *const[]){"--interface: found \"nonsense0\"", "lo", NULL});
    poe_fabric_close(first);
    poe_fabric_close(second);
}

/* --- damaged bytes ------------------------------------------------------------------------------------------------ */
/* Every mutation is refused, with a reason, or has changed nothing. */
static void check_mutations(void)
{
    poe_unit unit = {.type = POE_UNIT_DATA, .channel = 5, .urgent = true, .sequence = 1ull << 40, .received = 77,
                     .total = 5000, .offset = 4900, .bytes = 100};
    unsigned char wire[POE_UNIT_SLOT], mutated[POE_UNIT_SLOT];
    char why[POE_WIRE_WHY] = "";
    poe_unit got;
    poe_rng rng;
    poe_rng_init(&rng, 1, "mutations");
    memset(wire + POE_UNIT_HEADER, 7, 100);
    poe_unit_encode(&unit, wire);
    size_t length = poe_unit_length(&unit);
    CHECK(poe_unit_decode(wire, length, &got, why) && got.sequence == unit.sequence && got.offset == 4900);
    for (int i = 0; i < 5000; i++) {
        memcpy(mutated, wire, length);
        for (int k = 1 + (int)(poe_rng_next(&rng) % 6); k > 0; k--)
            mutated[poe_rng_next(&rng) % length] ^= (unsigned char)(1u << poe_rng_next(&rng) % 8);
        why[0] = 0;
        bool whole = poe_unit_decode(mutated, length, &got, why);
        CHECK(whole ? memcmp(wire, mutated, length) == 0 : why[0] != 0);
    }
    for (size_t n = 0; n < length; n++)
        CHECK(!poe_unit_decode(wire, n, &got, why));
}

static void check_greetings(void)
{
    poe_greeting greeting = {.from = 3, .to = 100, .epoch = 7, .received = 12345678901ull}, got;
    unsigned char wire[POE_GREETING_BYTES];
    char why[POE_WIRE_WHY];
    poe_greeting_encode(&greeting, secret, wire);
    CHECK(poe_greeting_decode(wire, sizeof(wire), secret, &got, why) && got.from == 3 && got.to == 100 &&
          got.epoch == 7 && got.received == greeting.received);
    CHECK(!poe_greeting_decode(wire, sizeof(wire), secret + POE_SECRET_BYTES / 2, &got, why));
    CHECK(!poe_greeting_decode(wire, sizeof(wire) - 1, secret, &got, why));
    for (int i = 0; i < POE_GREETING_BYTES - 4; i++) {
        wire[i] ^= 1;
        CHECK(!poe_greeting_decode(wire, sizeof(wire), secret, &got, why));
        wire[i] ^= 1;
    }
}

int main(void)
{
    const network plain = {0}, registering = {.settings.registers = true};
    static const poe_scenario given_up = {"give up", 2, PATIENT, give_up, 1, "rank 0 has ended early"};
    int cuts, flips;
    check_mutations();
    check_greetings();
    check_opening();
    check_scenarios();
    free(check_play(&exchange_scenario, &plain, 2, &cuts, &flips));
    free(check_play(&exchange_scenario, &registering, 2, &cuts, &flips));
    free(check_play(&early_sum_scenario, &plain, 2, &cuts, &flips));
    free(check_play(&given_up, &plain, 2, &cuts, &flips));
    check_cuts();
    check_damage();
    check_strangers();
    check_killed();
    check_stopped();
    check_failures += poe_scenarios_failures();
    return check_result();
}
