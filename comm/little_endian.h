/* SPDX-License-Identifier: MIT
 * Numbers in wire formats: little-endian, at any address. */
#ifndef POE_COMM_LITTLE_ENDIAN_H
#define POE_COMM_LITTLE_ENDIAN_H

#include <endian.h>
#include <stdint.h>
#include <string.h>

static inline void put32(unsigned char *wire, int at, uint32_t value)
{
    value = htole32(value);
    memcpy(wire + at, &value, 4);
}

static inline void put64(unsigned char *wire, int at, uint64_t value)
{
    value = htole64(value);
    memcpy(wire + at, &value, 8);
}

static inline uint32_t get32(const unsigned char *wire, int at)
{
    uint32_t value;
    memcpy(&value, wire + at, 4);
    return le32toh(value);
}

static inline uint64_t get64(const unsigned char *wire, int at)
{
    uint64_t value;
    memcpy(&value, wire + at, 8);
    return le64toh(value);
}

#endif
