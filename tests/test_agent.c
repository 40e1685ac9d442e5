/* SPDX-License-Identifier: MIT
 * The agent's half and the stage process's half of a rank's communication. First both in one process, step by step:
 * what is logged, replayed, dropped, kept and given back. Then stage processes that are killed at any moment and go on
 * from where they last said they were, over threads and over libfabric: every message is seen once and whole by all. */
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "comm/agent/proxy.h"
#include "comm/agent/relay.h"
#include "comm/agent/space.h"
#include "comm/fabric/impl.h"
#include "comm/inproc/inproc.h"
#include "comm/message.h"
#include "src/clock.h"
#include "src/log.h"
#include "src/rng.h"
#include "tests/check.h"
#include "tests/comm_scenarios.h"

static const double patience = 20; /* seconds that anything in here may take */

static void check_said(const char *said, const char *what)
{
    if (strstr(said, what))
        return;
    fprintf(stderr, "not said: %s\nbut: %s\n", what, said);
    check_failures++;
}

/* What message `number` is, of a stream of bytes that `which` names. */
static void fill(unsigned char *data, size_t bytes, unsigned which, uint64_t number)
{
    uint64_t x = which * 0x9e3779b97f4a7c15u + number * 0xbf58476d1ce4e5b9u + 1;
    for (size_t i = 0; i < bytes; i++) {
        if (i % 8 == 0)
            x = x * 6364136223846793005u + 1442695040888963407u;
        data[i] = (unsigned char)(x >> (8 * (i % 8)));
    }
}

static bool is_filled(const unsigned char *data, size_t bytes, unsigned which, uint64_t number)
{
    unsigned char *expected = malloc(bytes + 1);
    fill(expected, bytes, which, number);
    bool same = memcmp(data, expected, bytes) == 0;
    free(expected);
    return same;
}

static size_t resident(void *from, size_t bytes)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), pages = (bytes + page - 1) / page, n = 0;
    unsigned char *in = malloc(pages);
    CHECK_INT(mincore(from, bytes, in), 0);
    for (size_t i = 0; i < pages; i++)
        n += in[i] & 1;
    free(in);
    return n * page;
}

static poe_board *new_board(int rank, int size)
{
    poe_board *board = NULL;
    CHECK_INT(poe_board_create(&board), POE_OK);
    board->rank = rank;
    board->size = board->host_ranks = size;
    strcpy(board->host, "here");
    return board;
}

/* --- board and space ---------------------------------------------------------------------------------------------- */
static void check_rings(void)
{
    poe_board *board = new_board(0, 1);
    poe_ring *ring = &board->to_agent;
    CHECK(atomic_load(&board->valid) == -1 && atomic_load(&board->stop_step) == -1);
    for (unsigned lap = 0; lap < 3; lap++) {
        CHECK(poe_ring_peek(ring) == NULL);
        for (uint32_t i = 0; i < POE_BOARD_COMMANDS; i++)
            CHECK(poe_ring_write(ring, &(poe_board_command){.tag = i + lap}));
        CHECK(!poe_ring_write(ring, &(poe_board_command){0}));
        for (uint32_t i = 0; i < POE_BOARD_COMMANDS - lap; i++, poe_ring_pop(ring))
            CHECK_INT(poe_ring_peek(ring)->tag, i + lap);
        CHECK(lap == 0 || !poe_ring_may_sleep(ring));
        while (poe_ring_peek(ring))
            poe_ring_pop(ring);
    }
    CHECK(poe_ring_may_sleep(ring));
    uint64_t rings = 0;
    CHECK(read(ring->fd, &rings, sizeof(rings)) < 0);
    CHECK(poe_ring_write(ring, &(poe_board_command){0}) && poe_ring_write(ring, &(poe_board_command){0}));
    CHECK(read(ring->fd, &rings, sizeof(rings)) == sizeof(rings) && rings == 1);
    poe_ring_wake(ring);
    poe_ring_reset(ring);
    CHECK(read(ring->fd, &rings, sizeof(rings)) < 0 && !poe_ring_peek(ring) && poe_ring_may_sleep(ring));
    poe_board_destroy(board);
    poe_board_destroy(NULL);
}

static void check_areas(void)
{
    poe_board *board = new_board(0, 1);
    unsigned char *areas[] = {
        poe_board_outbox(board, 6),        poe_board_outbox(board, 7),        poe_board_log(board),
        poe_board_snapshot_area(board, 0), poe_board_snapshot_area(board, 1), poe_board_journal(board)};
    for (int i = 0; i < 6; i++)
        areas[i][0] = areas[i][POE_BOARD_AREA - 1] = (unsigned char)(i + 1);
    for (int i = 0; i < 6; i++)
        CHECK(areas[i][0] == i + 1 && areas[i][POE_BOARD_AREA - 1] == i + 1);
    memset(areas[2], 7, 1 << 20);
    CHECK_INT(resident(areas[2], 1 << 20), 1 << 20);
    poe_board_forget(areas[2] + 1, (1 << 20) - 1);
    CHECK_INT(resident(areas[2], 1 << 20), sysconf(_SC_PAGESIZE));
    CHECK(areas[2][0] == 7 && areas[2][(1 << 20) - 1] == 0);
    poe_board_forget(areas[2] + 1, 10);
    CHECK(areas[2][0] == 7);
    poe_board_destroy(board);
}

enum { BLOCKS = 200 };

/* Blocks come and go at random: none overlaps another, or is touched by what is given back. */
static void check_space(uint64_t keep)
{
    poe_board *board = new_board(0, 1);
    poe_space space;
    poe_rng rng;
    uint64_t offsets[BLOCKS], sizes[BLOCKS], highest = 0;
    bool used[BLOCKS] = {false};
    CHECK_INT(poe_space_init(&space, poe_board_log(board), 0, keep), POE_OK);
    poe_rng_init(&rng, keep, "space");
    for (int i = 0; i < 6000; i++) {
        int b = (int)(poe_rng_next(&rng) % BLOCKS);
        if (used[b]) {
            CHECK(is_filled(space.area + offsets[b], sizes[b], 1, (uint64_t)b));
            poe_space_give(&space, offsets[b], sizes[b]);
        } else {
            sizes[b] = poe_rng_next(&rng) % (b % 20 ? 300 : 20000);
            CHECK(poe_space_take(&space, sizes[b], &offsets[b]) && offsets[b] % 64 == 0);
            fill(space.area + offsets[b], sizes[b], 1, (uint64_t)b);
            highest = offsets[b] > highest ? offsets[b] : highest;
        }
        used[b] = !used[b];
        CHECK(space.stale <= keep);
    }
    for (int b = 0; b < BLOCKS; b++)
        if (used[b])
            poe_space_give(&space, offsets[b], sizes[b]);
    CHECK(highest < 1 << 20);
    CHECK(resident(space.area, 2 << 20) <= keep + (size_t)sysconf(_SC_PAGESIZE));
    CHECK(poe_space_take(&space, POE_BOARD_AREA, &offsets[0]) && offsets[0] == 0);
    CHECK(!poe_space_take(&space, 0, &offsets[1]));
    poe_space_give(&space, 0, POE_BOARD_AREA);
    CHECK(!poe_space_take(&space, POE_BOARD_AREA + 1, &offsets[1]));
    poe_space_finish(&space);
    poe_board_destroy(board);
}

/* --- both halves in one process ----------------------------------------------------------------------------------- */
/* Rank 0 has an agent, rank 1 (`other`) none. */
typedef struct scene {
    poe_board *board;
    poe_relay *relay;
    poe_transport *other, *stage;
} scene;

static void start_stage(scene *s)
{
    CHECK_INT(poe_relay_begin(s->relay), POE_OK);
    CHECK_INT(poe_proxy_create(s->board, &s->stage), POE_OK);
}

static void end_stage(scene *s)
{
    s->stage->ops->destroy(s->stage);
    poe_relay_end(s->relay);
}

static void restart_stage(scene *s)
{
    end_stage(s);
    start_stage(s);
}

static scene open_scene(uint64_t log_limit)
{
    poe_transport *transports[2];
    scene s = {.board = new_board(0, 2)};
    CHECK_INT(poe_inproc_create(2, transports), POE_OK);
    CHECK_INT(poe_relay_create(s.board, transports[0], &(poe_relay_settings){.log_limit = log_limit}, &s.relay),
              POE_OK);
    s.other = transports[1];
    start_stage(&s);
    return s;
}

static void close_scene(scene *s)
{
    end_stage(s);
    poe_relay_destroy(s->relay);
    s->other->ops->destroy(s->other);
    poe_board_destroy(s->board);
}

static void turn(scene *s)
{
    poe_relay_progress(s->relay, 0);
    s->stage->ops->progress(s->stage, 0);
    s->other->ops->progress(s->other, 0);
}

static void settle(scene *s)
{
    for (int i = 0; i < 20; i++)
        turn(s);
}

static void wait_for(scene *s, const poe_operation *op)
{
    for (double until = poe_now() + patience; !op->done && poe_now() < until;)
        turn(s);
    CHECK(op->done && op->status == POE_OK);
    if (!op->done)
        exit(check_result()); /* its memory must not go */
}

static void post_send(poe_transport *t, int on, const void *data, size_t bytes, poe_operation *op)
{
    *op = (poe_operation){0};
    t->ops->send(t, 1 - t->rank, on, data, bytes, op);
}

static void post_receive(poe_transport *t, int on, void *data, size_t bytes, poe_operation *op)
{
    *op = (poe_operation){0};
    t->ops->receive(t, 1 - t->rank, on, data, bytes, op);
}

/* A message of rank 1 that the stage process is to receive, and the other way round. Numbers say what is in them. */
static void pass(scene *s, bool to_stage, int on, uint64_t number, size_t bytes)
{
    poe_transport *from = to_stage ? s->other : s->stage, *to = to_stage ? s->stage : s->other;
    poe_operation sent, got;
    unsigned char *out = calloc(1, bytes + 1), *in = calloc(1, bytes + 1);
    fill(out, bytes, (unsigned)on, number);
    post_send(from, on, out, bytes, &sent);
    post_receive(to, on, in, bytes, &got);
    wait_for(s, &got);
    wait_for(s, &sent);
    CHECK(is_filled(in, bytes, (unsigned)on, number));
    free(in);
    free(out);
}

/* The stage process gets a message that is there already. */
static void receive_again(scene *s, int on, uint64_t number, size_t bytes)
{
    poe_operation got;
    unsigned char *in = calloc(1, bytes + 1);
    post_receive(s->stage, on, in, bytes, &got);
    wait_for(s, &got);
    CHECK(is_filled(in, bytes, (unsigned)on, number));
    free(in);
}

/* It sends one that is not to arrive. */
static void send_again(scene *s, int on, uint64_t number, size_t bytes)
{
    poe_operation sent;
    unsigned char *out = calloc(1, bytes + 1);
    fill(out, bytes, (unsigned)on, number);
    post_send(s->stage, on, out, bytes, &sent);
    wait_for(s, &sent);
    free(out);
}

static void publish(scene *s, int64_t step, int on, uint64_t sent, uint64_t received)
{
    int next = atomic_load(&s->board->valid) == 0;
    poe_board_snapshot *snapshot = &s->board->snapshots[next];
    snapshot->step = step;
    snapshot->traffic[1][on] = (poe_traffic){.sent = sent, .received = received};
    atomic_store(&s->board->valid, next);
}

static void check_transport(void)
{
    scene s = open_scene(0);
    CHECK_STRING(s.stage->ops->name, "agent");
    CHECK(s.stage->board == s.board && s.stage->rank == 0 && s.stage->size == 2 && s.stage->emulated == NULL);
    CHECK_STRING(s.stage->host, "here");
    CHECK_INT(atomic_load(&s.board->incarnation), 1);
    strcpy(s.board->emulated, "as slow as you like");
    restart_stage(&s);
    CHECK_STRING(s.stage->emulated, "as slow as you like");
    for (uint64_t i = 0; i < 10; i++) {
        pass(&s, true, 3, i, 1000 * i);
        pass(&s, false, 3, i, 1000 * i);
    }
    pass(&s, true, 3, 10, 5 << 20);
    pass(&s, false, 3, 10, 5 << 20);
    CHECK_INT(poe_relay_logged(s.relay), 45000 + (5 << 20));
    CHECK(poe_relay_idle(s.relay) && !poe_relay_cut(s.relay, 1));
    close_scene(&s);
}

/* From the beginning, then from a snapshot, of which the second one is not whole. */
static void check_replay(void)
{
    scene s = open_scene(0);
    for (uint64_t i = 0; i < 5; i++) {
        pass(&s, true, 7, i, 100 + i);
        pass(&s, false, 7, i, 200 + i);
    }
    restart_stage(&s);
    for (uint64_t i = 0; i < 5; i++) {
        send_again(&s, 7, i, 200 + i);
        receive_again(&s, 7, i, 100 + i);
    }
    publish(&s, 1, 7, 5, 5);
    for (uint64_t i = 5; i < 9; i++) {
        pass(&s, false, 7, i, 200 + i);
        pass(&s, true, 7, i, 100 + i);
    }
    s.board->snapshots[1].traffic[1][7] = (poe_traffic){100, 100};
    for (uint64_t again = 0; again < 3; again++) {
        restart_stage(&s);
        receive_again(&s, 7, 5, 105);
        for (uint64_t i = 5; i < 9 + again; i++)
            send_again(&s, 7, i, 200 + i);
        for (uint64_t i = 6; i < 9; i++)
            receive_again(&s, 7, i, 100 + i);
        pass(&s, false, 7, 9 + again, 10);
        publish(&s, 2 + (int64_t)again, 7, 5, 5);
    }
    close_scene(&s);
}

/* Receives that a stage process leaves behind are its successor's, whether they are filled before or after. */
static void check_left_behind(void)
{
    scene s = open_scene(0);
    unsigned char never[50], out[3][50];
    poe_operation got[3], sent[3];
    for (int i = 0; i < 3; i++) {
        post_receive(s.stage, 16, never, 50, &got[i]);
        fill(out[i], 50, 16, (uint64_t)i);
    }
    settle(&s);
    post_send(s.other, 16, out[0], 50, &sent[0]);
    restart_stage(&s);
    for (int i = 1; i < 3; i++)
        post_send(s.other, 16, out[i], 50, &sent[i]);
    for (int i = 0; i < 3; i++)
        receive_again(&s, 16, (uint64_t)i, 50);
    pass(&s, true, 16, 3, 50);
    close_scene(&s);
}

static void check_other_length(void)
{
    scene s = open_scene(0);
    poe_operation got;
    unsigned char in[100];
    pass(&s, true, 2, 0, 64);
    restart_stage(&s);
    poe_capture_begin();
    post_receive(s.stage, 2, in, 65, &got);
    settle(&s);
    CHECK_INT(poe_relay_progress(s.relay, 0), POE_PEER_LOST);
    char *said = poe_capture_end();
    check_said(said, "asks for a message of 65 bytes from rank 1 on channel 2, where the one before had asked for 64");
    CHECK(got.done && got.status == POE_PEER_LOST);
    free(said);
    close_scene(&s);
}

/* What the transport below cannot do is passed on, and stays so. */
static void check_failure(void)
{
    scene s = open_scene(0);
    poe_operation got, sent;
    unsigned char in[8], out[9] = {0};
    poe_capture_begin();
    post_receive(s.stage, 2, in, 8, &got);
    post_send(s.other, 2, out, 9, &sent);
    settle(&s);
    char *said = poe_capture_end();
    check_said(said, "rank 0 expects a message of 8 bytes from rank 1 on channel 2, but got one of 9 bytes");
    CHECK(got.done && got.status == POE_PEER_LOST);
    CHECK_INT(poe_relay_progress(s.relay, 0), POE_PEER_LOST);
    free(said);
    close_scene(&s);
}

/* --- messages that stand for themselves --------------------------------------------------------------------------- */
enum { CREDIT = POE_CHANNEL_CREDIT + 5 };

static void check_live(void)
{
    scene s = open_scene(0);
    for (uint64_t i = 0; i < 200; i++)
        pass(&s, true, CREDIT, i, 4096);
    CHECK_INT(poe_relay_logged(s.relay), 0);
    CHECK(resident(poe_board_log(s.board), 8 << 20) < 64 << 10);
    for (uint64_t again = 0; again < 2; again++) {
        restart_stage(&s);
        receive_again(&s, CREDIT, 199, 4096);
    }
    pass(&s, true, CREDIT, 200, 4096);
    pass(&s, false, CREDIT, 0, 10);
    restart_stage(&s);
    pass(&s, false, CREDIT, 0, 10); /* it arrives again */
    receive_again(&s, CREDIT, 200, 4096);
    close_scene(&s);
}

/* What comes for receives that were left behind is not lost: the latest of it is seen. */
static void check_live_left_behind(void)
{
    scene s = open_scene(0);
    unsigned char never[8], out[3][8];
    poe_operation got, sent;
    pass(&s, true, CREDIT, 0, 8);
    for (int i = 0; i < 3; i++) {
        post_receive(s.stage, CREDIT, never, 8, &got);
        fill(out[i], 8, CREDIT, 10 + (uint64_t)i);
    }
    settle(&s);
    restart_stage(&s);
    receive_again(&s, CREDIT, 0, 8);
    for (int i = 0; i < 2; i++) {
        post_send(s.other, CREDIT, out[i], 8, &sent);
        wait_for(&s, &sent);
    }
    receive_again(&s, CREDIT, 11, 8);
    post_send(s.other, CREDIT, out[2], 8, &sent);
    receive_again(&s, CREDIT, 12, 8);
    pass(&s, true, CREDIT, 13, 8);
    close_scene(&s);
}

static void check_beat(void)
{
    scene s = open_scene(0);
    unsigned char wire[POE_BEAT_BYTES];
    char text[POE_BEAT_TEXT], why[POE_WHY_BYTES] = "";
    uint32_t flags = 9;
    poe_operation got;
    poe_relay_beat(s.relay, "to nobody");
    settle(&s);
    pass(&s, true, POE_CHANNEL_BEAT, 0, POE_BEAT_BYTES);
    end_stage(&s);
    poe_relay_beat(s.relay, "its stage process is started again");
    poe_relay_beat(s.relay, "not yet: the first one is on its way");
    post_receive(s.other, POE_CHANNEL_BEAT, wire, sizeof(wire), &got);
    start_stage(&s);
    wait_for(&s, &got);
    CHECK(poe_beat_decode(wire, &flags, text, why));
    CHECK_STRING(text, "its stage process is started again");
    CHECK_INT(flags, 0);
    wire[200] ^= 1;
    CHECK(!poe_beat_decode(wire, &flags, text, why));
    settle(&s);
    CHECK(poe_relay_idle(s.relay));
    close_scene(&s);
}

/* --- memory ------------------------------------------------------------------------------------------------------- */
static void check_trimming(void)
{
    enum { BYTES = 1 << 20, MANY = 24, LIMIT = 20, WANTED = 2, HELD = LIMIT / 4 };
    scene s = open_scene(LIMIT * (uint64_t)BYTES);
    for (uint64_t i = 0; i < MANY; i++) {
        CHECK_INT(atomic_load(&s.board->snapshot_wanted), i > LIMIT);
        pass(&s, true, 16, i, BYTES);
        pass(&s, false, 16, i, BYTES);
        turn(&s);
    }
    CHECK_INT(poe_relay_logged(s.relay), MANY * BYTES);
    CHECK(resident(poe_board_log(s.board), 64 << 20) >= MANY * BYTES);
    atomic_store(&s.board->snapshot_wanted, false);
    turn(&s);
    CHECK(!atomic_load(&s.board->snapshot_wanted)); /* asked for once */
    publish(&s, 1, 16, MANY, MANY - WANTED);
    turn(&s);
    CHECK_INT(poe_relay_logged(s.relay), WANTED * BYTES);
    CHECK(resident(poe_board_log(s.board), 64 << 20) <= (WANTED + HELD + 1) * BYTES);
    restart_stage(&s);
    for (uint64_t i = MANY - WANTED; i < MANY; i++)
        receive_again(&s, 16, i, BYTES);
    CHECK(resident(poe_board_outbox(s.board, 0), 64 << 20) + resident(poe_board_outbox(s.board, 1), 64 << 20) <=
          2 * BYTES);
    close_scene(&s);
}

/* When nobody will go on from a snapshot, nothing that was read is kept; what is still to be read is. */
static void check_over(void)
{
    enum { BYTES = 1 << 20, MANY = 6 };
    poe_operation sent, got;
    unsigned char *out = calloc(1, BYTES), *in = calloc(1, BYTES);
    scene s = open_scene(2 * (uint64_t)BYTES);
    publish(&s, 1, 16, 0, 0);
    pass(&s, true, 16, 0, BYTES);
    CHECK_INT(poe_relay_logged(s.relay), BYTES);
    atomic_store(&s.board->over, true);
    for (uint64_t i = 1; i < MANY; i++) {
        pass(&s, true, 16, i, BYTES);
        settle(&s);
        CHECK_INT(poe_relay_logged(s.relay), 0);
    }
    fill(out, BYTES, 16, MANY);
    post_send(s.other, 16, out, BYTES, &sent);
    post_receive(s.stage, 16, in, BYTES, &got);
    s.stage->ops->progress(s.stage, 0);
    for (int i = 0; i < 20; i++) { /* it is there, and the stage process does not look */
        poe_relay_progress(s.relay, 0);
        s.other->ops->progress(s.other, 0);
    }
    CHECK_INT(poe_relay_logged(s.relay), BYTES);
    wait_for(&s, &got);
    wait_for(&s, &sent);
    CHECK(is_filled(in, BYTES, 16, MANY) && !atomic_load(&s.board->snapshot_wanted));
    free(in);
    free(out);
    close_scene(&s);
}

/* More requests than there are tags, made while the agent sleeps. */
static void check_full(void)
{
    enum { MANY = POE_BOARD_COMMANDS + 1000 };
    scene s = open_scene(0);
    poe_operation *sent = calloc(MANY, sizeof(*sent)), *got = calloc(MANY, sizeof(*got));
    unsigned char(*in)[8] = calloc(MANY, sizeof(*in)), out[8];
    for (uint64_t i = 0; i < MANY; i++) {
        s.stage->ops->progress(s.stage, 0);
        CHECK_INT(s.stage->ops->settled(s.stage), i < POE_BOARD_COMMANDS);
        fill(out, 8, 1, i);
        uint64_t *copy = malloc(8); /* freed where it is taken */
        memcpy(copy, out, 8);
        post_send(s.stage, 1, copy, 8, &sent[i]);
        sent[i].backend[3] = copy;
    }
    CHECK(!poe_relay_idle(s.relay));
    for (int i = 0; i < MANY; i++) {
        post_receive(s.other, 1, in[i], 8, &got[i]);
        if (i % 16 == 0)
            turn(&s);
    }
    for (uint64_t i = 0; i < MANY; i++) {
        wait_for(&s, &got[i]);
        wait_for(&s, &sent[i]);
        CHECK(is_filled(in[i], 8, 1, i));
        free(sent[i].backend[3]);
    }
    CHECK(s.stage->ops->settled(s.stage) && poe_relay_idle(s.relay));
    free(in);
    free(got);
    free(sent);
    close_scene(&s);
}

/* With one tag left, a header waits for its message to have one too. */
static void check_together(void)
{
    enum { MANY = POE_BOARD_COMMANDS - 1 };
    static unsigned char in[MANY][8], header[8], body[8];
    static poe_operation got[MANY];
    poe_operation sent[2];
    scene s = open_scene(0);
    for (int i = 0; i < MANY; i++)
        post_receive(s.stage, 16, in[i], 8, &got[i]);
    post_send(s.stage, 0, header, 8, &sent[0]);
    post_send(s.stage, 16, body, 8, &sent[1]);
    settle(&s);
    CHECK(atomic_load(&s.board->sent[1][0]) == 0 && atomic_load(&s.board->sent[1][16]) == 0);
    poe_operation more;
    fill(header, 8, 16, 0);
    post_send(s.other, 16, header, 8, &more);
    settle(&s);
    CHECK(atomic_load(&s.board->sent[1][0]) == 1 && atomic_load(&s.board->sent[1][16]) == 1);
    CHECK(got[0].done && is_filled(in[0], 8, 16, 0));
    close_scene(&s);
}

static void check_cancel(void)
{
    scene s = open_scene(0);
    poe_operation given_up, got, *many = calloc(POE_BOARD_COMMANDS + 2, sizeof(*many)), sent;
    unsigned char in[8] = "before", out[8] = "after";
    post_receive(s.stage, 4, in, 8, &given_up);
    settle(&s);
    s.stage->ops->cancel(s.stage, &given_up);
    CHECK(given_up.done && given_up.status == POE_PEER_LOST);
    post_send(s.other, 4, out, 8, &sent);
    wait_for(&s, &sent);
    CHECK_STRING((char *)in, "before");
    pass(&s, true, 4, 1, 8);
    for (int i = 0; i < POE_BOARD_COMMANDS + 2; i++)
        post_send(s.stage, 21, out, 8, &many[i]);
    CHECK(!s.stage->ops->settled(s.stage));
    for (int i = POE_BOARD_COMMANDS + 1; i >= 0; i--)
        s.stage->ops->cancel(s.stage, &many[i]);
    CHECK(!s.stage->ops->settled(s.stage)); /* nothing is handed over between two looks */
    s.stage->ops->progress(s.stage, 0);
    CHECK(s.stage->ops->settled(s.stage)); /* those without a tag are gone, the others are the agent's */
    for (int i = 0; i < POE_BOARD_COMMANDS; i++) {
        post_receive(s.other, 21, in, 8, &got);
        wait_for(&s, &got);
    }
    settle(&s);
    pass(&s, false, 21, 2, 8);
    free(many);
    close_scene(&s);
}

/* What stage processes had handed over when they died arrives: no later one writes over it. */
static void check_outboxes(void)
{
    enum { LIVES = 6, BYTES = 100000 };
    scene s = open_scene(0);
    poe_operation sent, got;
    unsigned char *data = malloc(BYTES);
    for (uint64_t i = 0; i < LIVES; i++) {
        fill(data, BYTES, 9, i);
        post_send(s.stage, 9, data, BYTES, &sent);
        s.stage->ops->progress(s.stage, 0);
        CHECK(s.stage->ops->settled(s.stage));
        memset(data, 0, BYTES);
        publish(&s, (int64_t)i, 9, i + 1, 0);
        CHECK_INT(s.board->outbox_from, i / 2 * (2 << 16));
        restart_stage(&s);
    }
    CHECK(!poe_relay_idle(s.relay));
    for (uint64_t i = 0; i < LIVES; i++) {
        post_receive(s.other, 9, data, BYTES, &got);
        wait_for(&s, &got);
        CHECK(is_filled(data, BYTES, 9, i));
    }
    settle(&s);
    CHECK(poe_relay_idle(s.relay));
    restart_stage(&s);
    CHECK_INT(s.board->outbox_from, 0);
    pass(&s, false, 9, LIVES, 100);
    free(data);
    close_scene(&s);
}

/* What lies in the outbox is sent from where it is, and is nobody else's until it has gone. */
static void check_in_place(void)
{
    enum { BYTES = 100000 };
    scene s = open_scene(0);
    poe_operation sent, got;
    unsigned char *in = malloc(BYTES), *out = s.stage->ops->allocate(s.stage, BYTES);
    CHECK((uintptr_t)out % 64 == 0);
    fill(out, BYTES, 8, 0);
    post_send(s.stage, 8, out, BYTES, &sent);
    s.stage->ops->progress(s.stage, 0);
    fill(out, BYTES, 8, 1); /* against the rules: it shows that there is no copy */
    post_receive(s.other, 8, in, BYTES, &got);
    wait_for(&s, &got);
    wait_for(&s, &sent);
    CHECK(is_filled(in, BYTES, 8, 1));

    post_send(s.stage, 8, out, BYTES, &sent);
    s.stage->ops->progress(s.stage, 0);
    s.stage->ops->cancel(s.stage, &sent);
    CHECK(!sent.done);
    post_receive(s.other, 8, in, BYTES, &got);
    wait_for(&s, &got);
    wait_for(&s, &sent);
    s.stage->ops->release(s.stage, out, BYTES);
    CHECK(s.stage->ops->allocate(s.stage, BYTES) == out);

    fill(out, BYTES, 8, 2);
    post_send(s.stage, 8, out, BYTES, &sent);
    s.stage->ops->progress(s.stage, 0);
    publish(&s, 1, 8, 3, 0);
    for (int i = 0; i < 2; i++) {
        restart_stage(&s);
        fill(s.stage->ops->allocate(s.stage, BYTES), BYTES, 8, 3);
    }
    post_receive(s.other, 8, in, BYTES, &got);
    wait_for(&s, &got);
    CHECK(is_filled(in, BYTES, 8, 2));
    CHECK(s.stage->ops->allocate(s.stage, POE_BOARD_AREA) == NULL);
    free(in);
    close_scene(&s);
}

/* --- sleeping ----------------------------------------------------------------------------------------------------- */
static void *wake_soon(void *arg)
{
    poe_transport *stage = arg;
    usleep(20000);
    stage->ops->wake(stage);
    return NULL;
}

static void check_sleep(void)
{
    scene s = open_scene(0);
    pthread_t thread;
    int ends[2];
    double start = poe_now();
    CHECK(!s.stage->ops->progress(s.stage, 0.02) && poe_now() - start >= 0.02);
    s.stage->ops->wake(s.stage);
    CHECK(!s.stage->ops->progress(s.stage, patience));
    pthread_create(&thread, NULL, wake_soon, s.stage);
    CHECK(!s.stage->ops->progress(s.stage, patience));
    pthread_join(thread, NULL);
    s.stage->ops->progress(s.stage, 0); /* what rang late is not heard again for ever */
    CHECK_INT(pipe(ends), 0);
    poe_relay_watch(s.relay, ends[0]);
    CHECK_INT(write(ends[1], "x", 1), 1);
    CHECK_INT(poe_relay_progress(s.relay, patience), POE_OK);
    poe_relay_watch(s.relay, -1);
    double before = poe_now();
    CHECK_INT(poe_relay_progress(s.relay, 0.02), POE_OK);
    CHECK(poe_now() - before >= 0.02 && before - start < patience);
    close(ends[0]);
    close(ends[1]);
    close_scene(&s);
}

static void check_refused(void)
{
    poe_transport *transports[1];
    poe_board *board = new_board(0, 1);
    poe_relay *relay = NULL;
    CHECK_INT(poe_inproc_create(1, transports), POE_OK);
    poe_transport_ops deaf = *transports[0]->ops;
    deaf.watch = NULL;
    transports[0]->ops = &deaf;
    poe_capture_begin();
    CHECK_INT(poe_relay_create(board, transports[0], NULL, &relay), POE_BAD_INPUT);
    char *said = poe_capture_end();
    check_said(said, "the transport inproc cannot serve stage processes that are started again");
    free(said);
    poe_relay_destroy(relay);
    poe_board_destroy(board);
}

/* --- processes that die ------------------------------------------------------------------------------------------- */
enum { WORLDS = 3, MESSAGES = 300, STREAMS = 4, POSTED = 4, WINDOW = 6, KILLS = 12, LONGEST = 5 << 19 };

/* The first stream is held back by credits. */
static const int numbers[STREAMS] = {0, 16, 3, POE_CHANNEL_COLLECTIVE};

static poe_board *boards[2 * WORLDS];

typedef struct place {
    uint64_t begun, done; /* messages: posted, and done in order */
    poe_operation operations[WINDOW];
    unsigned char *data[WINDOW];
} place;

typedef struct stage {
    poe_board *board;
    poe_transport *transport;
    int rank;
    poe_rng rng;
    place in[STREAMS], out[STREAMS];
    uint64_t credit, told; /* of the first stream: got, given */
    uint64_t credit_in, credit_out;
    poe_operation credit_operations[2];
    int64_t step;
    int since; /* messages taken since the last snapshot */
} stage;

static unsigned which(int from, int stream)
{
    return (unsigned)(10 * from + stream);
}

static size_t size_of(int from, int stream, uint64_t number)
{
    poe_rng rng;
    poe_rng_init(&rng, number, from ? "one" : "zero");
    for (int i = 0; i < stream; i++)
        poe_rng_next(&rng);
    uint64_t dice = poe_rng_next(&rng), most = dice % 64 == 0 ? LONGEST : dice % 8 == 0 ? 64 << 10 : 2000;
    return (size_t)(poe_rng_next(&rng) % (most + 1));
}

static void send_next(stage *s, int stream)
{
    place *p = &s->out[stream];
    int at = (int)(p->begun % WINDOW);
    size_t bytes = size_of(s->rank, stream, p->begun);
    fill(p->data[at], bytes, which(s->rank, stream), p->begun++);
    post_send(s->transport, numbers[stream], p->data[at], bytes, &p->operations[at]);
}

static void receive_next(stage *s, int stream)
{
    place *p = &s->in[stream];
    int at = (int)(p->begun % WINDOW);
    size_t bytes = size_of(1 - s->rank, stream, p->begun++);
    memset(p->data[at], 0xee, bytes);
    post_receive(s->transport, numbers[stream], p->data[at], bytes, &p->operations[at]);
}

/* The oldest one of the stream, if it is done. */
static bool take(stage *s, place *p)
{
    const poe_operation *op = &p->operations[p->done % WINDOW];
    if (p->done == p->begun || !op->done)
        return false;
    CHECK_INT(op->status, POE_OK);
    s->since++;
    p->done++;
    return true;
}

/* How many messages of a stream may have been sent: each life adds its part, so that kills, and moves, come while
 * messages flow, however fast the machine is, and only who was killed often enough comes to the end. */
static uint64_t quota(const stage *s)
{
    unsigned lives = atomic_load(&s->board->incarnation);
    return MESSAGES * (lives < KILLS + 1 ? lives : KILLS + 1) / (KILLS + 1);
}

static bool advance_stream(stage *s, int stream)
{
    place *in = &s->in[stream], *out = &s->out[stream];
    bool moved = false;
    while (in->begun < MESSAGES && in->begun < in->done + POSTED)
        receive_next(s, stream);
    while (out->begun < quota(s) && out->begun < out->done + WINDOW && (stream || out->begun < s->credit + WINDOW)) {
        send_next(s, stream);
        moved = true;
    }
    while (take(s, out))
        moved = true;
    while (take(s, in)) {
        uint64_t number = in->done - 1;
        CHECK(is_filled(in->data[number % WINDOW], size_of(1 - s->rank, stream, number), which(1 - s->rank, stream),
                        number));
        moved = true;
    }
    return moved;
}

/* Credits count from the beginning. Those of a process that was set back are lower for a while. */
static bool advance_credits(stage *s)
{
    bool moved = false;
    if (s->credit_operations[0].done) {
        s->credit = s->credit_in > s->credit ? s->credit_in : s->credit;
        CHECK(s->credit <= MESSAGES);
        post_receive(s->transport, POE_CHANNEL_CREDIT, &s->credit_in, 8, &s->credit_operations[0]);
        moved = true;
    }
    if (s->credit_operations[1].done && s->told != s->in[0].done) {
        s->credit_out = s->told = s->in[0].done;
        post_send(s->transport, POE_CHANNEL_CREDIT, &s->credit_out, 8, &s->credit_operations[1]);
        moved = true;
    }
    return moved;
}

/* Into the place that does not count; another process that dies in here changes nothing. */
static void save(stage *s)
{
    int next = atomic_load(&s->board->valid) == 0;
    poe_board_snapshot *snapshot = &s->board->snapshots[next];
    memset(snapshot, 0xff, sizeof(*snapshot));
    snapshot->step = ++s->step;
    for (int i = 0; i < STREAMS; i++)
        snapshot->traffic[1 - s->rank][numbers[i]] = (poe_traffic){.sent = s->out[i].begun, .received = s->in[i].done};
    atomic_store(&s->board->valid, next);
    s->since = 0;
}

static void restore(stage *s)
{
    int valid = atomic_load(&s->board->valid);
    const poe_board_snapshot *snapshot = &s->board->snapshots[valid < 0 ? 0 : valid];
    s->credit_operations[0].done = s->credit_operations[1].done = true;
    for (int i = 0; i < STREAMS; i++) {
        poe_traffic t = valid < 0 ? (poe_traffic){0} : snapshot->traffic[1 - s->rank][numbers[i]];
        s->in[i].begun = s->in[i].done = t.received;
        s->out[i].begun = s->out[i].done = t.sent;
        for (int at = 0; at < WINDOW; at++) {
            s->in[i].data[at] = malloc(LONGEST);
            s->out[i].data[at] = malloc(LONGEST);
        }
    }
    s->credit = s->credit_in = 0;
    s->step = valid < 0 ? 0 : snapshot->step;
}

static bool is_over(const stage *s)
{
    const poe_board *other = boards[s->board == boards[s->rank] ? 1 - s->rank : 3 - s->rank];
    bool over = s->told >= MESSAGES - WINDOW || atomic_load(&other->ended);
    for (int i = 0; i < STREAMS; i++)
        over &= s->in[i].done == MESSAGES && s->out[i].done == MESSAGES;
    return over;
}

static _Noreturn void run_stage(poe_board *board)
{
    static stage s; /* nothing of it outlives the process */
    s.board = board;
    s.rank = board->rank;
    CHECK_INT(poe_proxy_create(board, &s.transport), POE_OK);
    restore(&s);
    poe_rng_init(&s.rng, atomic_load(&board->incarnation), s.rank ? "one" : "zero");
    while (!is_over(&s) && check_failures == 0) {
        bool moved = advance_credits(&s);
        for (int i = 0; i < STREAMS; i++)
            moved |= advance_stream(&s, i);
        if (s.since > 60 && s.transport->ops->settled(s.transport))
            save(&s);
        if (moved)
            usleep((unsigned)(poe_rng_next(&s.rng) % 200));
        s.transport->ops->progress(s.transport, moved ? 0 : 1);
    }
    atomic_store(&board->outcome, check_failures ? POE_FAILED : POE_OK);
    atomic_store(&board->ended, true);
    _exit(0);
}

/* --- the keeper: a process of one thread, which forks ------------------------------------------------------------- */
enum { START = 1, KILL = 2 };

typedef struct order {
    int what, board;
} order;

static int to_keeper;

static _Noreturn void keep(int orders)
{
    order o;
    pid_t children[2 * WORLDS] = {0};
    while (read(orders, &o, sizeof(o)) == sizeof(o)) {
        if (o.what == KILL) {
            if (children[o.board] > 0 && kill(children[o.board], SIGKILL) == 0)
                waitpid(children[o.board], NULL, 0);
            children[o.board] = 0;
        } else if ((children[o.board] = fork()) == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            run_stage(boards[o.board]);
        }
        if (write(orders, &o, sizeof(o)) != sizeof(o))
            break;
    }
    _exit(0);
}

static void start_keeper(void)
{
    int ends[2];
    for (int i = 0; i < 2 * WORLDS; i++)
        boards[i] = new_board(i % 2, 2);
    CHECK_INT(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
    fflush(NULL);
    if (fork() == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        close(ends[0]);
        keep(ends[1]);
    }
    close(ends[1]);
    to_keeper = ends[0];
}

static void ask_keeper(int what, int board)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    order o = {what, board};
    pthread_mutex_lock(&lock);
    CHECK(write(to_keeper, &o, sizeof(o)) == sizeof(o) && read(to_keeper, &o, sizeof(o)) == sizeof(o));
    pthread_mutex_unlock(&lock);
}

/* --- agents ------------------------------------------------------------------------------------------------------- */
typedef struct agent {
    int board;
    poe_transport *below;
    int kills, survived; /* survived: with a snapshot */
    bool moves, follows; /* the rank goes elsewhere from time to time; the other one does */
    int moved;
    bool status_wrong;
} agent;

/* Where rank 0 of the last world goes: the first two are where both begin. The other agent is asked to let go, has, and is
 * asked to take hold of who is at the place. */
enum { MOVES = KILLS / 3 };
enum { NOTHING, LET_GO, HAS_LET_GO, TAKE_HOLD };
static fabric *places[2 + MOVES];
static int place_of_rank_0;
static atomic_int asked;

static void ask_other(const agent *a, int what)
{
    atomic_store(&asked, what);
    poe_ring_wake(&boards[a->board ^ 1]->to_agent);
}

static void follow(const agent *a)
{
    int what = atomic_load(&asked);
    if (what == LET_GO) {
        CHECK_INT(poe_fabric_hold(a->below, 0), POE_OK);
        atomic_store(&asked, HAS_LET_GO);
    } else if (what == TAKE_HOLD) {
        poe_fabric_release(a->below, 0, place_of_rank_0);
        atomic_store(&asked, NOTHING);
    }
}

static void let_go(const agent *a, poe_relay *relay)
{
    double until = poe_now() + patience;
    while (!poe_relay_is_quiet(relay) && poe_now() < until)
        CHECK_INT(poe_relay_progress(relay, 0.01), POE_OK);
    CHECK(poe_relay_is_quiet(relay));
    while (atomic_load(&asked) != NOTHING && poe_now() < until)
        usleep(100);
    ask_other(a, LET_GO);
    while (atomic_load(&asked) != HAS_LET_GO && poe_now() < until)
        usleep(100);
    CHECK_INT(poe_fabric_hold(a->below, 1), POE_OK);
}

/* The board stays, as in another process with a copy of it. */
static poe_relay *move(agent *a, poe_relay *relay)
{
    poe_parcel parcel = {0};
    poe_relay *next = NULL;
    let_go(a, relay);
    poe_fabric_pass(a->below, &parcel);
    poe_relay_pass(relay, &parcel);
    CHECK(!parcel.failed);
    poe_relay_destroy(relay);
    parcel.unpacks = true;
    place_of_rank_0 = 2 + a->moved++;
    a->below = &places[place_of_rank_0]->base;
    CHECK_INT(poe_fabric_take_rank(a->below, 0, 2, (int[]){place_of_rank_0, 1}), POE_OK);
    poe_fabric_pass(a->below, &parcel);
    CHECK_INT(poe_relay_create(boards[a->board], a->below, &(poe_relay_settings){.log_limit = 1 << 20}, &next), POE_OK);
    poe_relay_pass(next, &parcel);
    CHECK(!parcel.failed && parcel.read == parcel.bytes);
    poe_parcel_free(&parcel);
    ask_other(a, TAKE_HOLD);
    return next;
}

static bool all_ended(int board)
{
    return atomic_load(&boards[board]->ended) && atomic_load(&boards[board ^ 1]->ended);
}

/* The later ones leave a snapshot, however slow the machine is. */
static bool may_be_killed(const agent *a, const poe_board *board, double due)
{
    bool early = a->kills < KILLS / 2, saved = atomic_load(&board->valid) >= 0;
    return a->kills < KILLS && poe_now() >= due && (early || saved) && !atomic_load(&board->ended);
}

/* Kills a stage process after a while, at times the next one at once. */
static void *run_agent(void *arg)
{
    agent *a = arg;
    poe_board *board = boards[a->board];
    poe_relay *relay = NULL;
    poe_rng rng;
    bool running = false;
    double due = 0;
    poe_rng_init(&rng, (uint64_t)a->board, "kills");
    a->status_wrong = poe_relay_create(board, a->below, &(poe_relay_settings){.log_limit = 1 << 20}, &relay) != POE_OK;
    double last = poe_now() + 2 * patience;
    while (!a->status_wrong && !all_ended(a->board) && poe_now() < last) {
        if (running && may_be_killed(a, board, due)) {
            ask_keeper(KILL, a->board);
            poe_relay_end(relay);
            running = atomic_load(&board->ended);
            a->kills += !running;
            a->survived += !running && atomic_load(&board->valid) >= 0;
            if (a->moves && !running && a->kills % 3 == 0)
                relay = move(a, relay);
        }
        if (a->follows)
            follow(a);
        if (!running) {
            a->status_wrong = poe_relay_begin(relay) != POE_OK;
            ask_keeper(START, a->board);
            running = true;
            due = poe_now() + (poe_rng_next(&rng) % 4 ? 0.01 + 0.1 * poe_rng_uniform(&rng) : 0);
        }
        /* Long enough that it would show if the agent were not woken. */
        bool kills = a->kills < KILLS && !atomic_load(&board->ended);
        a->status_wrong |= poe_relay_progress(relay, kills ? fmin(0.2, fmax(due - poe_now(), 1e-3)) : 0.2) != POE_OK;
    }
    ask_keeper(KILL, a->board); /* it is at its end */
    if (relay)
        poe_relay_end(relay);
    poe_relay_destroy(relay);
    return NULL;
}

static void meet_over_fabric(poe_transport *transports[2])
{
    static const unsigned char secret[POE_SECRET_BYTES] = "a secret of thirty-two bytes....";
    fabric *f[2];
    fabric_name names[2];
    for (int r = 0; r < 2; r++) {
        CHECK_INT(poe_fabric_listen(&(poe_fabric_settings){0}, true, r, &f[r]), POE_OK);
        names[r] = f[r]->name;
    }
    for (int r = 0; r < 2; r++) {
        CHECK_INT(poe_fabric_join(f[r], r, 2, names, secret), POE_OK);
        transports[r] = &f[r]->base;
    }
}

static void meet_with_places(poe_transport *transports[2])
{
    static const unsigned char secret[POE_SECRET_BYTES] = "a secret of thirty-two bytes....";
    fabric_name names[2 + MOVES];
    for (int i = 0; i < 2 + MOVES; i++) {
        CHECK_INT(poe_fabric_listen(&(poe_fabric_settings){0}, true, i, &places[i]), POE_OK);
        names[i] = places[i]->name;
    }
    for (int i = 0; i < 2 + MOVES; i++) {
        CHECK_INT(poe_fabric_join(places[i], i < 2 ? i : 0, i < 2 ? 2 : 0, names, secret), POE_OK);
        places[i]->directory = calloc(2 + MOVES, sizeof(*names));
        memcpy(places[i]->directory, names, sizeof(names));
        places[i]->n_directory = 2 + MOVES;
    }
    transports[0] = &places[0]->base;
    transports[1] = &places[1]->base;
}

static void check_kills(int world)
{
    static const char *const worlds[] = {"inproc", "fabric", "fabric, moving"};
    poe_transport *transports[2];
    agent agents[2];
    pthread_t threads[2];
    double start = poe_now();
    if (world == 0)
        CHECK_INT(poe_inproc_create(2, transports), POE_OK);
    else if (world == 1)
        meet_over_fabric(transports);
    else
        meet_with_places(transports);
    for (int r = 0; r < 2; r++) {
        agents[r] = (agent){.board = 2 * world + r, .below = transports[r], .moves = world == 2 && r == 0, .follows = world == 2 && r == 1};
        pthread_create(&threads[r], NULL, run_agent, &agents[r]);
    }
    for (int r = 0; r < 2; r++) {
        pthread_join(threads[r], NULL);
        poe_board *board = boards[2 * world + r];
        printf("%s, rank %d: %d stage processes, %d killed, %d of them after a snapshot\n", worlds[world], r,
               (int)atomic_load(&board->incarnation), agents[r].kills, agents[r].survived);
        CHECK(!agents[r].status_wrong);
        CHECK_INT(atomic_load(&board->outcome), POE_OK);
        CHECK(agents[r].survived > 0);
        CHECK_INT(atomic_load(&board->incarnation), agents[r].kills + 1);
    }
    CHECK_INT(agents[0].moved, world == 2 ? MOVES : 0);
    printf("%s: %.2f s\n", worlds[world], poe_now() - start);
}

int main(void)
{
    alarm(120);
    start_keeper();
    check_rings();
    check_areas();
    check_space(0);
    check_space(100000);
    check_transport();
    check_replay();
    check_left_behind();
    check_other_length();
    check_failure();
    check_live();
    check_live_left_behind();
    check_beat();
    check_trimming();
    check_over();
    check_full();
    check_together();
    check_cancel();
    check_outboxes();
    check_in_place();
    check_sleep();
    check_refused();
    for (int world = 0; world < WORLDS; world++)
        check_kills(world);
    for (int i = 0; i < 2 * WORLDS; i++)
        poe_board_destroy(boards[i]);
    return check_result();
}
