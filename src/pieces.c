/* SPDX-License-Identifier: MIT */
#include "src/pieces.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "src/crc32c.h"
#include "src/log.h"

poe_status poe_pieces_add(poe_pieces *pieces, uint64_t begin, const void *data, size_t bytes)
{
    if (pieces->count == pieces->room) {
        size_t room = pieces->room ? 2 * pieces->room : 64;
        poe_piece *at = realloc(pieces->at, room * sizeof(*at));
        if (!at) {
            poe_error("not enough memory to note what was written");
            return POE_FAILED;
        }
        pieces->at = at;
        pieces->room = room;
    }
    pieces->at[pieces->count++] = (poe_piece){begin, begin + bytes, poe_crc32c(0, data, bytes)};
    return POE_OK;
}

static int by_place(const void *a, const void *b)
{
    const poe_piece *x = a, *y = b;
    return x->begin < y->begin ? -1 : x->begin > y->begin;
}

static poe_status check_piece(const poe_piece *piece, int fd, const char *path)
{
    unsigned char chunk[1 << 16];
    uint32_t crc = 0;
    for (uint64_t at = piece->begin; at < piece->end;) {
        size_t want = piece->end - at < sizeof(chunk) ? piece->end - at : sizeof(chunk);
        ssize_t n = pread(fd, chunk, want, (off_t)at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            poe_error("cannot read %s back: %s", path, strerror(errno));
            return POE_FAILED;
        }
        if (n == 0)
            break;
        crc = poe_crc32c(crc, chunk, (size_t)n);
        at += (uint64_t)n;
    }
    if (crc == piece->crc)
        return POE_OK;
    poe_error("%s does not read back as it was written", path);
    return POE_FAILED;
}

poe_status poe_pieces_check(poe_pieces *pieces, int fd, const char *path)
{
    if (fsync(fd)) {
        poe_error("cannot sync %s: %s", path, strerror(errno));
        return POE_FAILED;
    }
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED); /* so that the disk answers, not the page cache */
    if (pieces->count)
        qsort(pieces->at, pieces->count, sizeof(*pieces->at), by_place);
    poe_status status = POE_OK;
    for (size_t i = 0; i < pieces->count && !status; i++)
        status = check_piece(&pieces->at[i], fd, path);
    return status;
}
