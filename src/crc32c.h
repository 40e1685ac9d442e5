/* SPDX-License-Identifier: MIT
 * CRC-32C (Castagnoli, polynomial 0x1EDC6F41 reflected, as in iSCSI and ext4), by the processor's instruction where
 * it has one. crc32c("123456789") = 0xE3069283. Thread-safe. */
#ifndef POE_SRC_CRC32C_H
#define POE_SRC_CRC32C_H

#include <stddef.h>
#include <stdint.h>

/* CRC of `bytes` bytes at `data`, continuing from `crc` (0 to start): crc(ab) = crc(b, continuing from crc(a)). */
uint32_t poe_crc32c(uint32_t crc, const void *data, size_t bytes);

/* The table form, without special instructions: the reference for the fast one. */
uint32_t poe_crc32c_plain(uint32_t crc, const void *data, size_t bytes);

#endif
