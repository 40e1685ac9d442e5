/* SPDX-License-Identifier: MIT */
#include "comm/fabric/wire.h"

#include <inttypes.h>
#include <stdio.h>

#include "comm/little_endian.h"
#include "comm/transport.h"
#include "src/crc32c.h"

enum {
    UNIT_MAGIC = 0x46656f70,     /* "poeF" */
    GREETING_MAGIC = 0x47656f70, /* "poeG" */
    VERSION = 1,
    HALF = POE_SECRET_BYTES / 2,
    URGENT = 1,
    SEALED = POE_UNIT_HEADER - 4, /* bytes of a header under its checksum, which follows them */
    SECRET_AT = 24,
    GREETING_SEALED = SECRET_AT + HALF,
};

static uint32_t seal(const unsigned char *wire, size_t length)
{
    uint32_t crc = poe_crc32c(0, wire, SEALED);
    return length > POE_UNIT_HEADER ? poe_crc32c(crc, wire + POE_UNIT_HEADER, length - POE_UNIT_HEADER) : crc;
}

void poe_unit_encode(const poe_unit *unit, unsigned char wire[POE_UNIT_SLOT])
{
    memset(wire, 0, POE_UNIT_HEADER);
    put32(wire, 0, UNIT_MAGIC);
    wire[4] = VERSION;
    wire[5] = (unsigned char)unit->type;
    wire[6] = (unsigned char)unit->channel;
    wire[7] = unit->urgent ? URGENT : 0;
    put64(wire, 8, unit->sequence);
    put64(wire, 16, unit->received);
    put64(wire, 24, unit->total);
    put64(wire, 32, unit->offset);
    put32(wire, 40, unit->bytes);
    put32(wire, SEALED, seal(wire, poe_unit_length(unit)));
}

static void read_unit(const unsigned char *wire, poe_unit *unit)
{
    unit->type = (poe_unit_type)wire[5];
    unit->channel = wire[6];
    unit->urgent = wire[7] & URGENT;
    unit->sequence = get64(wire, 8);
    unit->received = get64(wire, 16);
    unit->total = get64(wire, 24);
    unit->offset = get64(wire, 32);
    unit->bytes = get32(wire, 40);
}

static bool is_sound(const poe_unit *unit)
{
    if (unit->type < POE_UNIT_DATA || unit->type > POE_UNIT_BYE_ANSWER || unit->channel >= POE_CHANNELS)
        return false;
    return unit->type != POE_UNIT_DATA || (unit->offset <= unit->total && unit->bytes <= unit->total - unit->offset);
}

bool poe_unit_decode(const unsigned char *wire, size_t bytes, poe_unit *unit, char why[POE_WIRE_WHY])
{
    if (bytes < POE_UNIT_HEADER) {
        snprintf(why, POE_WIRE_WHY, "it has %zu bytes, expected at least %d", bytes, POE_UNIT_HEADER);
        return false;
    }
    if (get32(wire, 0) != UNIT_MAGIC || wire[4] != VERSION) {
        snprintf(why, POE_WIRE_WHY, "its magic is 0x%08" PRIx32 ", version %d; expected 0x%08x, version %d",
                 get32(wire, 0), wire[4], UNIT_MAGIC, VERSION);
        return false;
    }
    read_unit(wire, unit);
    size_t length = poe_unit_length(unit);
    if (length > bytes) {
        snprintf(why, POE_WIRE_WHY, "it has %zu bytes, expected %zu", bytes, length);
        return false;
    }
    uint32_t crc = seal(wire, length);
    if (get32(wire, SEALED) != crc) {
        snprintf(why, POE_WIRE_WHY, "its CRC-32C is 0x%08" PRIx32 ", expected 0x%08" PRIx32, get32(wire, SEALED), crc);
        return false;
    }
    if (is_sound(unit) && (length == bytes || unit->type != POE_UNIT_DATA || poe_unit_is_short(unit)))
        return true;
    snprintf(why, POE_WIRE_WHY, "type %d, channel %d, %" PRIu32 " bytes at %" PRIu64 " of %" PRIu64 " do not fit",
             unit->type, unit->channel, unit->bytes, unit->offset, unit->total);
    return false;
}

void poe_greeting_encode(const poe_greeting *greeting, const unsigned char *secret, unsigned char *wire)
{
    memset(wire, 0, POE_GREETING_BYTES);
    put32(wire, 0, GREETING_MAGIC);
    wire[4] = VERSION;
    put32(wire, 8, (uint32_t)greeting->from | (uint32_t)greeting->to << 16);
    put32(wire, 12, greeting->epoch);
    put64(wire, 16, greeting->received);
    memcpy(wire + SECRET_AT, secret, HALF);
    put32(wire, GREETING_SEALED, poe_crc32c(0, wire, GREETING_SEALED));
}

/* In a time that tells nothing about where they differ. */
static bool same_secret(const unsigned char *a, const unsigned char *b)
{
    unsigned char difference = 0;
    for (int i = 0; i < HALF; i++)
        difference |= a[i] ^ b[i];
    return difference == 0;
}

bool poe_greeting_decode(const unsigned char *wire, size_t bytes, const unsigned char *secret, poe_greeting *greeting,
                         char why[POE_WIRE_WHY])
{
    /* Some providers pad what they carry. */
    if (bytes < POE_GREETING_BYTES || get32(wire, 0) != GREETING_MAGIC || wire[4] != VERSION ||
        get32(wire, GREETING_SEALED) != poe_crc32c(0, wire, GREETING_SEALED)) {
        snprintf(why, POE_WIRE_WHY, "its greeting is not one of poe-pipe, or of another version");
        return false;
    }
    if (!same_secret(wire + SECRET_AT, secret)) {
        snprintf(why, POE_WIRE_WHY, "it does not know this run's secret");
        return false;
    }
    greeting->from = (int)(get32(wire, 8) & 0xffff);
    greeting->to = (int)(get32(wire, 8) >> 16);
    greeting->epoch = get32(wire, 12);
    greeting->received = get64(wire, 16);
    return true;
}
