/* SPDX-License-Identifier: MIT
 * Private to comm/fabric/: one rank's end, its connections (line.c), what flows on them (stream.c), and how it finds
 * the others (open.c). Everything but waking happens in one thread. */
#ifndef POE_COMM_FABRIC_IMPL_H
#define POE_COMM_FABRIC_IMPL_H

#include <math.h>
#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>
#include <rdma/fi_errno.h>
#include <stdatomic.h>
#include <string.h>

#include "comm/fabric/fabric.h"
#include "comm/fabric/library.h"
#include "comm/fabric/wire.h"

enum {
    UNIT_BYTES = 1 << 20, /* longest body: what is sent again after a break, and what a heartbeat waits behind */
    SLOTS = 128,          /* units per peer that are not acknowledged yet */
    SLACK = 4 << 20,      /* bytes per channel that may come before their receives are posted */
    OVERHEAD = 64,        /* ... of which every message counts for so many more than its length */
    NAME_BYTES = 124,
    MAX_PARTS = 8, /* units in one message */
};

typedef struct fabric fabric;
typedef struct peer peer;

/* A message to be sent or a receive to be filled. */
typedef struct transfer {
    struct transfer *next;
    poe_operation *op; /* NULL: cancelled, `data` is a copy of ours */
    unsigned char *data;
    size_t bytes;
} transfer;

typedef struct queue {
    transfer *first, *last;
} queue;

/* A message that came before its receive. */
typedef struct message {
    struct message *next;
    size_t bytes, got;
    bool busy; /* a body is on its way into it */
    unsigned char data[];
} message;

typedef struct channel {
    queue sends;             /* not yet wholly made into units; the first one: */
    size_t sent;             /* ... up to here */
    uint64_t spent, allowed; /* window: bytes sent since the beginning, bytes that may be */

    queue receives;            /* posted, in order */
    message *kept, *kept_last; /* in order */
    bool begun;                /* a message is arriving: */
    bool dropped;              /* ... and nobody wants it */
    message *into;             /* ... into this one; NULL: into the first receive */
    size_t total, got;
    uint64_t taken, offered, told; /* the other side's window: used, allowed, and what it knows of that */
} channel;

/* A unit of data that is not acknowledged: number s is in slot s % SLOTS. */
typedef struct slot {
    transfer *owner; /* NULL: of a message that is short as a whole, and was copied */
    poe_unit unit;
    bool posted; /* the provider has the owner's memory */
} slot;

/* One endpoint; outlives its peer's use of it until the provider has returned all tokens. */
typedef struct line {
    struct line *next; /* in the list of closed ones */
    peer *peer;
    struct fid_ep *ep;
    int tokens;
    bool closed;
    unsigned char heard[POE_UNIT_SLOT];
} line;

typedef enum token_kind { SENT_BODY, GOT_HEADER, GOT_BODY } token_kind;

/* What the provider was asked to do, and gives word of. It does not for short sends: those have come to an end when the
 * other side acknowledges them. */
typedef struct token {
    struct token *next; /* in the list of free ones */
    token_kind kind;
    line *line;
    slot *slot;
    size_t bytes;
    struct fid_mr *registered;
} token;

typedef enum line_state { APART, DIALLING, ANSWERING, JOINED } line_state;

struct peer {
    fabric *fabric;
    int rank;
    line *line; /* NULL: APART */
    line_state state;
    uint32_t epoch;     /* connections so far */
    uint64_t greeted;   /* ANSWERING: what the other side has received */
    double due;         /* APART: dial; otherwise: give this connection up, in JOINED unless it is heard before */
    double patience;    /* seconds in JOINED until then, while something is not acknowledged */
    double joined_at;
    double backoff;
    double apart_since; /* 0: never joined, or joined now */
    double refused_since; /* 0: not refused */
    bool broken;        /* to be dropped once nobody is looking at it */
    bool ended;         /* it has said goodbye */
    bool failed;
    bool parked;        /* no connection is to be made until it is released */
    bool moved;         /* the next connection is not one that broke */
    int damaged;        /* connections lost to damage since a unit last came through */

    slot slots[SLOTS];
    unsigned char *wires; /* (SLOTS + 1, POE_UNIT_SLOT): the last one for headers without data */
    struct fid_mr *registered; /* the wires; may be NULL */
    uint64_t retired, acknowledged, cursor, next; /* slots free again, acknowledged, sent on this line, in use */
    slot *half;          /* its body is not posted yet */
    size_t under_way;    /* bytes of bodies with the provider */
    uint64_t pending;    /* channels with sends, a bit each */
    uint64_t windows;    /* channels whose window is to be told */
    bool news;           /* to be told: what has been received */
    bool bye, bye_answer; /* to be said */
    bool bye_said, released; /* ... and answered */
    int last_channel;

    uint64_t received;
    bool listening; /* for a header */
    bool held;      /* `unit` is here, its body not posted */
    bool body;      /* it is */
    poe_unit unit;
    channel channels[POE_CHANNELS];
};

typedef struct fabric_name {
    uint32_t bytes;
    unsigned char address[NAME_BYTES];
} fabric_name;

struct fabric {
    poe_transport base;
    char host[256];
    const poe_libfabric *library;
    struct fi_info *info; /* of this side: address without a port */
    struct fid_fabric *fid;
    struct fid_domain *domain;
    struct fid_eq *eq;
    struct fid_cq *cq;
    struct fid_pep *door;
    bool registers;
    uint64_t key; /* of the next registered memory */
    int parts; /* that the provider takes in one message, at most MAX_PARTS */
    int eq_fd, cq_fd, wake_fd;
    int watched; /* somebody else's; -1: none */
    atomic_bool rung;
    unsigned char secret[POE_SECRET_BYTES];
    fabric_name name, *names; /* own; of all */
    fabric_name *directory;   /* (n_directory) of those that met, by their ranks there; NULL: nobody will need it */
    int n_directory;
    peer **peers;             /* (size); NULL: never used */
    line *closed;
    token *tokens;       /* free ones */
    transfer *transfers; /* free ones */
    unsigned char *dump; /* (UNIT_BYTES) for what nobody wants */
    int completed;       /* operations since progress() last returned */
    int strangers;
    bool leaving;
    bool look;  /* for events of connections */
    bool quiet; /* the provider had nothing, and was asked for nothing since */
    unsigned steps;
    double due;
};

/* --- open.c ------------------------------------------------------------------------------------------------------- */
/* Listens; `alone`: all ranks are on this host. Its `name` is what the others dial. */
poe_status poe_fabric_listen(const poe_fabric_settings *settings, bool alone, int rank, fabric **f);
/* The others' names and the secret are copied; in place of what it had joined before, without peers. */
poe_status poe_fabric_join(fabric *f, int rank, int size, const fabric_name *names, const unsigned char *secret);
void poe_fabric_close(fabric *f); /* NULL is legal */
/* "192.0.2.1:4711", for people. */
void poe_fabric_address_text(const void *address, size_t bytes, char text[64]);

/* --- line.c ------------------------------------------------------------------------------------------------------- */
/* The peer, made on first use. NULL: out of memory, said. */
peer *poe_peer_of(fabric *f, int rank);
void poe_peer_free(peer *p);
/* There is something for this peer: dials if need be. */
void poe_line_want(peer *p);
/* Something came over the connection, or was sent: from now on `patience` counts. */
void poe_line_heard(peer *p);
void poe_line_sent(peer *p);
/* Closes the connection; one that is still needed is made anew. */
void poe_line_drop(peer *p);
/* Fails all that is under way and to come with this peer, after the sentence. */
void poe_line_fail(peer *p, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* From now on this thread speaks for `f` about calls that the provider itself refuses. NULL: for nobody. */
void poe_line_listen(fabric *f);
void poe_line_events(fabric *f);
void poe_line_timers(fabric *f, double now);
/* Each asks the provider for something. False: not now, or `broken` is set. */
bool poe_line_post(peer *p, token_kind kind, slot *of, void *data, size_t bytes);
bool poe_line_say(peer *p, const struct iovec *parts, int n); /* in one message, from the wires */
void poe_line_return(token *t);

/* --- stream.c ----------------------------------------------------------------------------------------------------- */
void poe_stream_send(peer *p, int channel, const void *data, size_t bytes, poe_operation *op);
void poe_stream_receive(peer *p, int channel, void *data, size_t bytes, poe_operation *op);
void poe_stream_cancel(peer *p, poe_operation *op);
void poe_stream_joined(peer *p, uint64_t received);
void poe_stream_apart(peer *p);
void poe_stream_fail(peer *p);
/* A token came back; `bytes`: how many were received. */
void poe_stream_completed(const token *t, size_t bytes);
/* Finds a place for a body that is held. */
void poe_stream_settle(peer *p);
void poe_stream_pump(peer *p);
/* Everything that was sent has been acknowledged. */
bool poe_stream_is_idle(const peer *p);
/* A message that begins before its receive is posted, the channel's last. False: out of memory. */
bool poe_stream_keep(channel *c, size_t bytes);

#endif
