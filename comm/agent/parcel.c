/* SPDX-License-Identifier: MIT */
#include "comm/agent/parcel.h"

#include <stdlib.h>
#include <string.h>

enum { SMALLEST = 1 << 16 };

static bool make_room(poe_parcel *parcel, size_t bytes)
{
    size_t wanted = parcel->bytes + bytes, room = parcel->room ? parcel->room : SMALLEST;
    if (parcel->failed || wanted <= parcel->room)
        return !parcel->failed;
    while (room < wanted)
        room *= 2;
    unsigned char *data = realloc(parcel->data, room);
    if (!data)
        return false;
    parcel->data = data;
    parcel->room = room;
    return true;
}

static void pack(poe_parcel *parcel, const void *memory, size_t bytes)
{
    if (!make_room(parcel, bytes)) {
        parcel->failed = true;
        return;
    }
    memcpy(parcel->data + parcel->bytes, memory, bytes);
    parcel->bytes += bytes;
}

static void unpack(poe_parcel *parcel, void *memory, size_t bytes)
{
    if (parcel->failed || parcel->bytes - parcel->read < bytes) {
        parcel->failed = true;
        memset(memory, 0, bytes);
        return;
    }
    memcpy(memory, parcel->data + parcel->read, bytes);
    parcel->read += bytes;
}

void poe_parcel_pass(poe_parcel *parcel, void *memory, size_t bytes)
{
    if (!bytes)
        return;
    if (parcel->unpacks)
        unpack(parcel, memory, bytes);
    else
        pack(parcel, memory, bytes);
}

void poe_parcel_free(poe_parcel *parcel)
{
    free(parcel->data);
    *parcel = (poe_parcel){0};
}
