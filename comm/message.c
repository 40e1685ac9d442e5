/* SPDX-License-Identifier: MIT */
#include "comm/message.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "comm/little_endian.h"
#include "src/crc32c.h"

enum { MAGIC = 0x4d656f70 /* "poeM" */, VERSION = 1, RESERVED_AT = 80, CRC_AT = 124 };

void poe_frame_encode(const poe_frame *frame, unsigned char wire[POE_FRAME_BYTES])
{
    const poe_message *m = &frame->message;
    memset(wire, 0, POE_FRAME_BYTES);
    put32(wire, 0, MAGIC);
    put32(wire, 4, VERSION);
    put32(wire, 8, (uint32_t)frame->type);
    put32(wire, 12, m->kind);
    put64(wire, 16, frame->run);
    put64(wire, 24, (uint64_t)m->step);
    put32(wire, 32, (uint32_t)m->micro);
    put32(wire, 36, (uint32_t)m->stage);
    for (int i = 0; i < 4; i++)
        put32(wire, 40 + 4 * i, m->shape[i]);
    put64(wire, 56, m->data_hash);
    put64(wire, 64, m->bytes);
    put32(wire, 72, m->flags);
    put32(wire, 76, frame->payload_crc);
    put32(wire, CRC_AT, poe_crc32c(0, wire, CRC_AT));
}

/* Magic and version come first: what is not ours, or newer, has no checksum where we look for it. */
static bool is_whole(const unsigned char *wire, char why[POE_WHY_BYTES])
{
    if (get32(wire, 0) != MAGIC) {
        snprintf(why, POE_WHY_BYTES, "its magic is 0x%08" PRIx32 ", expected 0x%08x", get32(wire, 0), MAGIC);
        return false;
    }
    if (get32(wire, 4) != VERSION) {
        snprintf(why, POE_WHY_BYTES, "its version is %" PRIu32 ", expected %d", get32(wire, 4), VERSION);
        return false;
    }
    uint32_t crc = poe_crc32c(0, wire, CRC_AT);
    if (get32(wire, CRC_AT) != crc) {
        snprintf(why, POE_WHY_BYTES, "its header's CRC-32C is 0x%08" PRIx32 ", expected 0x%08" PRIx32,
                 get32(wire, CRC_AT), crc);
        return false;
    }
    for (int i = RESERVED_AT; i < CRC_AT; i++)
        if (wire[i] != 0) {
            snprintf(why, POE_WHY_BYTES, "its reserved byte %d is %d, expected 0", i, wire[i]);
            return false;
        }
    return true;
}

bool poe_frame_decode(const unsigned char wire[POE_FRAME_BYTES], poe_frame *frame, char why[POE_WHY_BYTES])
{
    if (!is_whole(wire, why))
        return false;
    poe_message *m = &frame->message;
    frame->type = (poe_frame_type)get32(wire, 8);
    m->kind = get32(wire, 12);
    frame->run = get64(wire, 16);
    m->step = (int64_t)get64(wire, 24);
    m->micro = (int32_t)get32(wire, 32);
    m->stage = (int32_t)get32(wire, 36);
    for (int i = 0; i < 4; i++)
        m->shape[i] = get32(wire, 40 + 4 * i);
    m->data_hash = get64(wire, 56);
    m->bytes = get64(wire, 64);
    m->flags = get32(wire, 72);
    frame->payload_crc = get32(wire, 76);
    return true;
}

bool poe_frame_matches(const poe_frame *got, const poe_frame *expected, char why[POE_WHY_BYTES])
{
    const poe_message *g = &got->message, *e = &expected->message;
    if (got->run != expected->run) {
        snprintf(why, POE_WHY_BYTES, "its run is %016" PRIx64 ", expected %016" PRIx64, got->run, expected->run);
        return false;
    }
    const struct {
        const char *name;
        int64_t got, expected;
    } fields[] = {
        {"type", got->type, expected->type}, {"kind", g->kind, e->kind},
        {"step", g->step, e->step},          {"micro-batch", g->micro, e->micro},
        {"stage", g->stage, e->stage},       {"shape[0]", g->shape[0], e->shape[0]},
        {"shape[1]", g->shape[1], e->shape[1]}, {"shape[2]", g->shape[2], e->shape[2]},
        {"shape[3]", g->shape[3], e->shape[3]}, {"length", (int64_t)g->bytes, (int64_t)e->bytes},
    };
    for (size_t i = 0; i < sizeof(fields) / sizeof(*fields); i++)
        if (fields[i].got != fields[i].expected) {
            snprintf(why, POE_WHY_BYTES, "its %s is %" PRId64 ", expected %" PRId64, fields[i].name, fields[i].got,
                     fields[i].expected);
            return false;
        }
    return true;
}

bool poe_frame_payload_whole(const poe_frame *frame, const void *payload, char why[POE_WHY_BYTES])
{
    uint32_t crc = poe_crc32c(0, payload, (size_t)frame->message.bytes);
    if (crc == frame->payload_crc)
        return true;
    snprintf(why, POE_WHY_BYTES, "its payload's CRC-32C is 0x%08" PRIx32 ", expected 0x%08" PRIx32, crc,
             frame->payload_crc);
    return false;
}

void poe_beat_encode(const char *text, uint32_t flags, unsigned char wire[POE_BEAT_BYTES])
{
    unsigned char *copy = wire + POE_FRAME_BYTES;
    memset(copy, 0, POE_BEAT_TEXT);
    memcpy(copy, text, strnlen(text, POE_BEAT_TEXT - 1));
    poe_frame frame = {.type = POE_FRAME_BEAT,
                       .payload_crc = poe_crc32c(0, copy, POE_BEAT_TEXT),
                       .message = {.flags = flags, .bytes = POE_BEAT_TEXT}};
    poe_frame_encode(&frame, wire);
}

bool poe_beat_decode(const unsigned char wire[POE_BEAT_BYTES], uint32_t *flags, char text[POE_BEAT_TEXT],
                     char why[POE_WHY_BYTES])
{
    poe_frame got, expected = {.type = POE_FRAME_BEAT, .message.bytes = POE_BEAT_TEXT};
    if (!poe_frame_decode(wire, &got, why) || !poe_frame_matches(&got, &expected, why) ||
        !poe_frame_payload_whole(&got, wire + POE_FRAME_BYTES, why))
        return false;
    *flags = got.message.flags;
    memcpy(text, wire + POE_FRAME_BYTES, POE_BEAT_TEXT);
    text[POE_BEAT_TEXT - 1] = 0;
    return true;
}
