/* SPDX-License-Identifier: MIT
 * The wire format, private to comm/: every transport message is a frame of 128 bytes, little-endian, that carries its
 * own checksum, or belongs to one. Nothing in a frame is believed before that checksum holds. */
#ifndef POE_COMM_MESSAGE_H
#define POE_COMM_MESSAGE_H

#include <stdbool.h>
#include <stdint.h>

#include "comm/comm.h"

enum { POE_FRAME_BYTES = 128, POE_WHY_BYTES = 160 };

typedef enum poe_frame_type {
    POE_FRAME_DATA = 1,   /* of a link: the payload follows on its own channel */
    POE_FRAME_CREDIT,     /* of a link: data_hash counts the messages released so far */
    POE_FRAME_CHUNK,      /* of a reduce: micro is the chunk, data_hash the vector's length; see reduce.c */
    POE_FRAME_COLLECTIVE, /* kind is the call, step its number; the payload follows on its own channel */
    POE_FRAME_BEAT,       /* a sign of life: what the sender does is behind it */
} poe_frame_type;

typedef struct poe_frame {
    poe_frame_type type;
    uint64_t run;
    uint32_t payload_crc; /* CRC-32C */
    poe_message message;
} poe_frame;

void poe_frame_encode(const poe_frame *frame, unsigned char wire[POE_FRAME_BYTES]);

/* False when the bytes are no whole frame of this version; `why` says so. */
bool poe_frame_decode(const unsigned char wire[POE_FRAME_BYTES], poe_frame *frame, char why[POE_WHY_BYTES]);

/* False when `got` differs from `expected` in type, run, kind, step, micro, stage, shape or bytes; `why` names the
 * first such field, what came and what was expected. */
bool poe_frame_matches(const poe_frame *got, const poe_frame *expected, char why[POE_WHY_BYTES]);

/* False when the payload is not the one that was sent. */
bool poe_frame_payload_whole(const poe_frame *frame, const void *payload, char why[POE_WHY_BYTES]);

/* A heartbeat: a frame and a text behind it, of the same length whatever it says. The text is cut if need be. */
enum { POE_BEAT_TEXT = 224, POE_BEAT_BYTES = POE_FRAME_BYTES + POE_BEAT_TEXT };
void poe_beat_encode(const char *text, uint32_t flags, unsigned char wire[POE_BEAT_BYTES]);
/* False when it is no whole heartbeat; `why` says so. */
bool poe_beat_decode(const unsigned char wire[POE_BEAT_BYTES], uint32_t *flags, char text[POE_BEAT_TEXT],
                     char why[POE_WHY_BYTES]);

#endif
