/* SPDX-License-Identifier: MIT */
#include "src/crc32c.h"

#include <pthread.h>
#include <stdbool.h>
#include <string.h>

static uint32_t table[256];
static pthread_once_t table_once = PTHREAD_ONCE_INIT;

static void fill_table(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int bit = 0; bit < 8; bit++)
            c = c & 1 ? (c >> 1) ^ 0x82F63B78u : c >> 1;
        table[i] = c;
    }
}

uint32_t poe_crc32c_plain(uint32_t crc, const void *data, size_t bytes)
{
    pthread_once(&table_once, fill_table);
    const unsigned char *p = data;
    crc = ~crc;
    for (size_t i = 0; i < bytes; i++)
        crc = (crc >> 8) ^ table[(crc ^ p[i]) & 255];
    return ~crc;
}

#if defined(__x86_64__)
#include <immintrin.h>

__attribute__((target("sse4.2"))) static uint32_t crc32c_sse42(uint32_t crc, const void *data, size_t bytes)
{
    const unsigned char *p = data;
    uint64_t c = ~crc;
    for (; bytes >= 8; bytes -= 8, p += 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        c = _mm_crc32_u64(c, word);
    }
    uint32_t tail = (uint32_t)c;
    for (; bytes; bytes--, p++)
        tail = _mm_crc32_u8(tail, *p);
    return ~tail;
}

uint32_t poe_crc32c(uint32_t crc, const void *data, size_t bytes)
{
    return __builtin_cpu_supports("sse4.2") ? crc32c_sse42(crc, data, bytes) : poe_crc32c_plain(crc, data, bytes);
}
#else
uint32_t poe_crc32c(uint32_t crc, const void *data, size_t bytes)
{
    return poe_crc32c_plain(crc, data, bytes);
}
#endif
