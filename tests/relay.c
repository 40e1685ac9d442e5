/* SPDX-License-Identifier: MIT */
#include "tests/relay.h"

#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MAX_PAIRS = 64, BUFFER = 64 << 10, SPACING = 37 };

/* Two sockets; end i's bytes go to end 1 - i. */
typedef struct pair {
    int ends[2];
    size_t passed;
} pair;

struct poe_relay {
    poe_relay_settings settings;
    struct sockaddr_in target, address;
    int door, headers, n;
    pair pairs[MAX_PAIRS];
    int cuts, flips;
    atomic_bool stop;
    pthread_t thread;
    unsigned char buffer[BUFFER];
};

static void reset(pair *p)
{
    const struct linger hard = {.l_onoff = 1};
    for (int i = 0; i < 2; i++) {
        setsockopt(p->ends[i], SOL_SOCKET, SO_LINGER, &hard, sizeof(hard));
        close(p->ends[i]);
    }
}

static void forget(poe_relay *r, int i)
{
    reset(&r->pairs[i]);
    r->pairs[i] = r->pairs[--r->n];
}

static void take(poe_relay *r)
{
    int in = accept(r->door, NULL, NULL), out = socket(AF_INET, SOCK_STREAM, 0);
    if (in < 0 || r->n == MAX_PAIRS || connect(out, (struct sockaddr *)&r->target, sizeof(r->target)) != 0) {
        close(in);
        close(out);
        return;
    }
    const int yes = 1;
    setsockopt(in, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof(yes));
    setsockopt(out, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof(yes));
    r->pairs[r->n++] = (pair){.ends = {in, out}};
}

/* Headers are known by their first four bytes. */
static void damage(poe_relay *r, size_t bytes)
{
    for (size_t i = 0; i + 64 <= bytes && r->flips < r->settings.flips; i++)
        if (memcmp(r->buffer + i, "poeF", 4) == 0 && ++r->headers % SPACING == 0) {
            r->buffer[i + 24 + (size_t)r->flips % 20] ^= 16;
            r->flips++;
        }
}

static bool pass(poe_relay *r, pair *p, int from)
{
    ssize_t got = recv(p->ends[from], r->buffer, BUFFER, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return true;
    if (got <= 0)
        return false;
    damage(r, (size_t)got);
    p->passed += (size_t)got;
    if (r->settings.every && p->passed > r->settings.every && r->cuts < r->settings.cuts) {
        r->cuts++;
        return false;
    }
    for (ssize_t at = 0; at < got;) {
        ssize_t sent = send(p->ends[1 - from], r->buffer + at, (size_t)(got - at), MSG_NOSIGNAL);
        if (sent <= 0)
            return false;
        at += sent;
    }
    return true;
}

static void *serve(void *arg)
{
    poe_relay *r = arg;
    while (!atomic_load(&r->stop)) {
        struct pollfd fds[1 + 2 * MAX_PAIRS] = {{.fd = r->door, .events = POLLIN}};
        int n = r->n;
        for (int i = 0; i < 2 * n; i++)
            fds[1 + i] = (struct pollfd){.fd = r->pairs[i / 2].ends[i % 2], .events = POLLIN};
        if (poll(fds, (nfds_t)(1 + 2 * n), 20) <= 0)
            continue;
        for (int i = n - 1; i >= 0; i--)
            if ((fds[1 + 2 * i].revents && !pass(r, &r->pairs[i], 0)) ||
                (fds[2 + 2 * i].revents && !pass(r, &r->pairs[i], 1)))
                forget(r, i);
        if (fds[0].revents)
            take(r);
    }
    return NULL;
}

poe_relay *poe_relay_start(const struct sockaddr_in *target, const poe_relay_settings *settings)
{
    poe_relay *r = calloc(1, sizeof(*r));
    socklen_t bytes = sizeof(r->address);
    r->settings = *settings;
    r->target = *target;
    r->door = socket(AF_INET, SOCK_STREAM, 0);
    r->address = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (bind(r->door, (struct sockaddr *)&r->address, sizeof(r->address)) != 0 || listen(r->door, 64) != 0)
        abort();
    getsockname(r->door, (struct sockaddr *)&r->address, &bytes);
    pthread_create(&r->thread, NULL, serve, r);
    return r;
}

struct sockaddr_in poe_relay_address(const poe_relay *relay)
{
    return relay->address;
}

void poe_relay_stop(poe_relay *relay, int *cuts, int *flips)
{
    atomic_store(&relay->stop, true);
    pthread_join(relay->thread, NULL);
    *cuts = relay->cuts;
    *flips = relay->flips;
    while (relay->n)
        forget(relay, 0);
    close(relay->door);
    free(relay);
}
