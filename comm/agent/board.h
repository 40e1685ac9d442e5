/* SPDX-License-Identifier: MIT
 * The memory that a rank's agent, its keeper and its stage processes share. It is mapped before the first fork, at the
 * same address in all of them, and outlives every stage process: so a stage process that dies loses nothing that is
 * here. The agent owns the rank's connections (relay.h); the stage process reaches them through the board (proxy.h).
 *
 * Every field says who writes it. Areas are address space that takes memory only where it is written. */
#ifndef POE_COMM_AGENT_BOARD_H
#define POE_COMM_AGENT_BOARD_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "comm/agent/parcel.h"
#include "comm/transport.h"
#include "src/status.h"

enum {
    POE_BOARD_RANKS = 128,
    POE_BOARD_COMMANDS = 4096, /* of a ring; operations that a stage process has under way, at most */
    POE_BOARD_FAULTS = 64,
    POE_BOARD_TEXT = 4096,
    POE_BOARD_LEFT_OUT = 64,
    POE_BOARD_STEPS = 1 << 20, /* back to the snapshot, at most: no log has room for the messages of so many */
    POE_BOARD_AGAIN = 75, /* exit status of a stage process that asks to be started again, and has said why */
};

/* One message of the two rings. From the stage: an operation to be started; from the agent: it is done. */
typedef struct poe_board_command {
    uint32_t tag; /* the stage's own, comes back */
    int32_t peer;
    int16_t channel;
    uint8_t sends;   /* or receives */
    int8_t status;   /* poe_status, in the answer */
    uint64_t offset; /* into the outbox (a send), into the log (the answer to a receive) */
    uint64_t bytes;
} poe_board_command;

/* One writer, one reader. */
typedef struct poe_ring {
    uint64_t put;                /* the writer's: written so far */
    _Atomic uint64_t head, tail; /* published so far, read so far */
    atomic_bool asleep;          /* the reader sleeps on its eventfd */
    int fd;                      /* that eventfd */
    poe_board_command commands[POE_BOARD_COMMANDS];
} poe_ring;

/* Messages on one channel with one peer, since the beginning of the run. */
typedef struct poe_traffic {
    uint64_t sent;     /* handed to the transport */
    uint64_t received; /* taken in for good: what came after them is wanted again by who goes on from here */
} poe_traffic;

typedef struct poe_board_snapshot {
    int64_t step; /* updates made */
    uint64_t bytes;
    uint32_t crc; /* CRC-32C of them */
    poe_traffic traffic[POE_BOARD_RANKS][POE_CHANNELS];
} poe_board_snapshot;

/* Where the stage process is; the last words of one that died. */
typedef struct poe_board_place {
    _Atomic int64_t step;
    atomic_int micro;
    _Atomic(const char *) doing; /* static text: the same in all processes */
    atomic_uint entered;         /* changes with every entry */
} poe_board_place;

typedef struct poe_board {
    /* the agent's, before the first stage process */
    int rank, size, host_ranks;
    char host[256];
    char emulated[POE_BOARD_TEXT]; /* "": the network is real */
    /* the agent's */
    atomic_uint incarnation; /* stage processes so far; the one that runs reads its own number here */
    uint64_t outbox_from;    /* of its outbox: what lies below is still being sent, for an earlier one */
    atomic_bool stop;        /* the user wishes to stop */
    atomic_bool report;      /* the user asks what the stage process is doing; the stage process lowers it */
    atomic_bool outage;      /* the stage cannot work: from the next step on, the run goes on without it */
    _Atomic uint64_t sent[POE_BOARD_RANKS][POE_CHANNELS]; /* messages passed on so far, by all stage processes */
    atomic_bool snapshot_wanted; /* the log is at its limit: take a snapshot after this step; lowered by the stage process */
    atomic_bool leave;           /* the stage is to move elsewhere: take a snapshot after this step, and end (POE_BOARD_AGAIN) */
    /* the stage process's */
    atomic_bool recoverable; /* a snapshot is there and training goes on: a death is survived */
    atomic_bool over;        /* training is, and no message will be wanted again */
    atomic_bool ended;       /* `outcome` is final: what follows is no death */
    atomic_int outcome;      /* poe_status */
    atomic_uint beats;       /* counts while its helper thread is alive */
    poe_board_place place;
    _Atomic uint64_t reached; /* the furthest micro-batch begun: step * 2^32 + micro-batch */
    _Atomic double restored; /* when the stage process that runs had its snapshot back (poe_now()) */
    atomic_int valid;        /* index of the snapshot that counts; -1: none yet */
    poe_board_snapshot snapshots[2];
    _Atomic int64_t decided;   /* rank 0: steps below this one have had their say on stopping ... */
    _Atomic int64_t stop_step; /* ... and after this one the run stops; -1: none */
    _Atomic int64_t shown;     /* last rank: steps below this one have had their line on the screen */
    _Atomic uint64_t journal_bytes;
    _Atomic int64_t calls;     /* collective calls completed */
    _Atomic int64_t left;      /* the shared gradients of steps below this one may have left */
    _Atomic int64_t attended;  /* steps below this one have had their say on whether the stage is there ... */
    _Atomic uint64_t absent[POE_BOARD_STEPS / 64]; /* ... and in which of them it is not: a bit each, in a ring */
    _Atomic int64_t absent_until;    /* a fault plan's: the stage cannot work in steps below this one, ... */
    _Atomic double absent_until_time; /* ... nor before this time (poe_now()) */
    atomic_int n_left_out;
    _Atomic uint64_t left_out[POE_BOARD_LEFT_OUT]; /* micro-batches whose gradients do not count (--on-nan skip) */
    atomic_uint fired[POE_BOARD_FAULTS]; /* how often each fault of a plan has happened */
    _Atomic uint64_t fault_request;      /* for the agent: a fault on a link (faults/), 0: none; lowered by the agent */
    _Atomic int64_t fault_start; /* the monotonic clock at the first moment that a fault plan saw, in ns; 0: none yet */

    poe_ring to_agent, to_stage;
} poe_board;

/* Before any fork, and before threads start. POE_FAILED: said. */
poe_status poe_board_create(poe_board **board);
void poe_board_destroy(poe_board *board); /* NULL is legal; unmaps it in this process */
/* What a stage process elsewhere, with another board, needs to go on as the next one here would. While there is none,
 * and with a valid snapshot. Rank, size and what an agent says of its host stay as they are. */
void poe_board_pass(poe_board *board, poe_parcel *parcel);

/* The areas, each POE_BOARD_AREA bytes of address space. Outboxes: a stage process uses that of its number's parity. */
#define POE_BOARD_AREA ((size_t)1 << 36)
unsigned char *poe_board_outbox(poe_board *board, unsigned incarnation);
unsigned char *poe_board_log(poe_board *board);
unsigned char *poe_board_snapshot_area(poe_board *board, int index);
unsigned char *poe_board_journal(poe_board *board);
/* Gives back the memory of a range of an area, of its whole pages: they are zero from then on. */
void poe_board_forget(void *from, size_t bytes);

/* Writer: false when the ring is full. What was put is there for the reader, all of it at once, when it is published;
 * that wakes the reader if it sleeps. Writing is both. */
bool poe_ring_put(poe_ring *ring, const poe_board_command *command);
void poe_ring_publish(poe_ring *ring);
bool poe_ring_write(poe_ring *ring, const poe_board_command *command);
/* Reader: the oldest command, NULL when there is none; and done with it, and with what it points to. */
const poe_board_command *poe_ring_peek(const poe_ring *ring);
void poe_ring_pop(poe_ring *ring);
/* Reader: before it sleeps on ring->fd; false when there is something to read, and it must not. Undone by the next
 * poe_ring_awake(), which also drains the eventfd. */
bool poe_ring_may_sleep(poe_ring *ring);
void poe_ring_awake(poe_ring *ring);
void poe_ring_wake(poe_ring *ring);  /* any process: ends the reader's sleep, or its next one */
void poe_ring_reset(poe_ring *ring); /* while one side is not there: empties it */

#endif
