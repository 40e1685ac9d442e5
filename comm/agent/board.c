/* SPDX-License-Identifier: MIT
 * The mapping: the board itself, then its areas. A ring's counters move only after what they count is in place, or has
 * been used: so its other side, and a next process, find it whole whenever this one dies. */
#include "comm/agent/board.h"

#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "src/clock.h"
#include "src/log.h"

enum { OUTBOXES = 0, LOG = 2, SNAPSHOTS = 3, JOURNAL = 5, AREAS = 6 };
enum { HEAD_UNIT = 1 << 16 }; /* a multiple of every page size in use */

static size_t head_bytes(void)
{
    return (sizeof(poe_board) + HEAD_UNIT - 1) / HEAD_UNIT * HEAD_UNIT;
}

static size_t whole_bytes(void)
{
    return head_bytes() + AREAS * POE_BOARD_AREA;
}

static unsigned char *area(poe_board *board, int index)
{
    return (unsigned char *)board + head_bytes() + (size_t)index * POE_BOARD_AREA;
}

poe_status poe_board_create(poe_board **board)
{
    poe_board *b = mmap(NULL, whole_bytes(), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (b == MAP_FAILED) {
        poe_error(
            "the memory that a rank's processes share cannot be mapped (%zu GiB of address space, of which little "
            "is used): %s; --agents off does without",
            whole_bytes() >> 30, strerror(errno));
        return POE_FAILED;
    }
    madvise(b, whole_bytes(), MADV_DONTDUMP); /* a core file would have all of it, as zeros */
    b->valid = -1;
    b->stop_step = -1;
    b->to_agent.fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    b->to_stage.fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (b->to_agent.fd < 0 || b->to_stage.fd < 0) {
        poe_error("what a rank's processes wake each other with cannot be opened: %s", strerror(errno));
        poe_board_destroy(b);
        return POE_FAILED;
    }
    *board = b;
    return POE_OK;
}

void poe_board_destroy(poe_board *board)
{
    if (!board)
        return;
    if (board->to_agent.fd >= 0)
        close(board->to_agent.fd);
    if (board->to_stage.fd >= 0)
        close(board->to_stage.fd);
    munmap(board, whole_bytes());
}

/* --- moving ------------------------------------------------------------------------------------------------------- */
/* Nobody else uses the board meanwhile, so what is atomic is passed as the memory that it is. */
#define PASS(parcel, field) poe_parcel_pass(parcel, (void *)&(field), sizeof(field))

static void pass_snapshot(poe_board *board, poe_parcel *parcel)
{
    PASS(parcel, board->valid);
    int valid = atomic_load(&board->valid);
    if (valid != 0 && valid != 1) {
        parcel->failed = true;
        return;
    }
    PASS(parcel, board->snapshots[valid]);
    if (board->snapshots[valid].bytes > POE_BOARD_AREA)
        parcel->failed = true;
    else
        poe_parcel_pass(parcel, poe_board_snapshot_area(board, valid), board->snapshots[valid].bytes);
}

static void pass_journal(poe_board *board, poe_parcel *parcel)
{
    PASS(parcel, board->journal_bytes);
    if (atomic_load(&board->journal_bytes) > POE_BOARD_AREA)
        parcel->failed = true;
    else
        poe_parcel_pass(parcel, poe_board_journal(board), atomic_load(&board->journal_bytes));
}

/* Hosts have clocks of their own: the age is passed. */
static void pass_fault_start(poe_board *board, poe_parcel *parcel)
{
    int64_t now = (int64_t)(poe_now() * 1e9), start = atomic_load(&board->fault_start), age = start ? now - start : 0;
    poe_parcel_pass(parcel, &age, sizeof(age));
    atomic_store(&board->fault_start, age ? now - age : 0);
}

void poe_board_pass(poe_board *board, poe_parcel *parcel)
{
    bool stop = atomic_load(&board->stop);
    poe_parcel_pass(parcel, &stop, sizeof(stop));
    if (stop)
        atomic_store(&board->stop, true); /* who takes over may have been asked already */
    PASS(parcel, board->incarnation);
    PASS(parcel, board->sent);
    PASS(parcel, board->recoverable);
    PASS(parcel, board->decided);
    PASS(parcel, board->stop_step);
    PASS(parcel, board->shown);
    PASS(parcel, board->calls);
    PASS(parcel, board->outage);
    PASS(parcel, board->left);
    PASS(parcel, board->attended);
    PASS(parcel, board->absent);
    PASS(parcel, board->absent_until);
    PASS(parcel, board->n_left_out);
    PASS(parcel, board->left_out);
    PASS(parcel, board->fired);
    pass_fault_start(board, parcel);
    pass_snapshot(board, parcel);
    pass_journal(board, parcel);
}

unsigned char *poe_board_outbox(poe_board *board, unsigned incarnation)
{
    return area(board, OUTBOXES + (int)(incarnation % 2));
}

unsigned char *poe_board_log(poe_board *board)
{
    return area(board, LOG);
}

unsigned char *poe_board_snapshot_area(poe_board *board, int index)
{
    return area(board, SNAPSHOTS + index);
}

unsigned char *poe_board_journal(poe_board *board)
{
    return area(board, JOURNAL);
}

void poe_board_forget(void *from, size_t bytes)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t first = ((uintptr_t)from + page - 1) / page * page, end = ((uintptr_t)from + bytes) / page * page;
    if (first < end)
        madvise((unsigned char *)from + (first - (uintptr_t)from), end - first, MADV_REMOVE);
}

/* --- rings -------------------------------------------------------------------------------------------------------- */
/* The head moves before the look at `asleep`; the reader says `asleep` before its look at the head: one of them sees
 * the other. */
void poe_ring_publish(poe_ring *ring)
{
    if (ring->put == atomic_load_explicit(&ring->head, memory_order_relaxed))
        return;
    atomic_store(&ring->head, ring->put);
    if (atomic_load(&ring->asleep) && atomic_exchange(&ring->asleep, false))
        poe_ring_wake(ring);
}

bool poe_ring_put(poe_ring *ring, const poe_board_command *command)
{
    if (ring->put - atomic_load_explicit(&ring->tail, memory_order_acquire) >= POE_BOARD_COMMANDS)
        return false;
    ring->commands[ring->put++ % POE_BOARD_COMMANDS] = *command;
    return true;
}

bool poe_ring_write(poe_ring *ring, const poe_board_command *command)
{
    bool put = poe_ring_put(ring, command);
    poe_ring_publish(ring);
    return put;
}

const poe_board_command *poe_ring_peek(const poe_ring *ring)
{
    uint64_t tail = atomic_load_explicit(&ring->tail, memory_order_relaxed);
    if (tail == atomic_load_explicit(&ring->head, memory_order_acquire))
        return NULL;
    return &ring->commands[tail % POE_BOARD_COMMANDS];
}

void poe_ring_pop(poe_ring *ring)
{
    uint64_t tail = atomic_load_explicit(&ring->tail, memory_order_relaxed);
    atomic_store_explicit(&ring->tail, tail + 1, memory_order_release);
}

bool poe_ring_may_sleep(poe_ring *ring)
{
    atomic_store(&ring->asleep, true);
    if (atomic_load(&ring->head) == atomic_load(&ring->tail))
        return true;
    atomic_store(&ring->asleep, false);
    return false;
}

void poe_ring_awake(poe_ring *ring)
{
    uint64_t rings;
    atomic_store(&ring->asleep, false);
    if (read(ring->fd, &rings, sizeof(rings)) < 0)
        return; /* nobody rang: the time was over */
}

void poe_ring_wake(poe_ring *ring)
{
    const uint64_t ring_once = 1;
    if (write(ring->fd, &ring_once, sizeof(ring_once)) < 0)
        return; /* it rings so often already that the counter is full */
}

void poe_ring_reset(poe_ring *ring)
{
    poe_ring_awake(ring);
    ring->put = 0;
    atomic_store(&ring->head, 0);
    atomic_store(&ring->tail, 0);
}
