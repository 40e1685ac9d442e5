/* SPDX-License-Identifier: MIT
 * All ranks send and receive piece by piece in the same order, a piece sent before the same one is taken in, so with two
 * credits nobody waits for ever. A rank that cannot read or write its file goes on with the messages all the same. */
#include "pipeline/copies.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pipeline/streams.h"
#include "src/files.h"
#include "src/log.h"

enum { PIECE = 1 << 20, WINDOW = 2 };

/* One file under way. */
struct poe_passage {
    poe_link *link;
    int sender;
    poe_manifest_file file;
    char path[POE_PATH_MAX];
    FILE *stream;      /* NULL: zeros are sent, what comes goes nowhere */
    poe_status status; /* of this rank's end of it */
};

/* --- links ------------------------------------------------------------------------------------------------------ */

/* Of the ranks with another folder, in the order in which they come after `rank`: the first one's for the first rank of
 * a folder, the second one's for its second, and around. */
static int holder_of(int rank, int size, const int *leaders)
{
    int others[POE_MAX_STAGES], n = 0, before = 0;
    for (int i = 1; i < size; i++)
        if (leaders[(rank + i) % size] != leaders[rank])
            others[n++] = (rank + i) % size;
    for (int r = 0; r < rank; r++)
        before += leaders[r] == leaders[rank];
    return n ? others[before % n] : -1;
}

static poe_status open_link(const poe_copies *c, int peer, bool outgoing, uint64_t run, poe_link **link)
{
    return poe_channel_open(c->comm, peer, POE_CHANNEL_COPY, outgoing, PIECE, WINDOW, run, link);
}

poe_status poe_copies_open(poe_copies *c, poe_comm *comm, const int *leaders, uint64_t run)
{
    *c = (poe_copies){.comm = comm, .rank = poe_comm_rank(comm), .size = poe_comm_size(comm)};
    for (int r = 0; r < c->size; r++)
        c->holders[r] = holder_of(r, c->size, leaders);
    c->passages = calloc((size_t)c->size + 1, sizeof(*c->passages));
    if (!c->passages) {
        poe_error("out of memory for the copies of checkpoints");
        return POE_FAILED;
    }
    poe_status status = POE_OK;
    if (c->holders[c->rank] >= 0)
        status = open_link(c, c->holders[c->rank], true, run, &c->out);
    for (int r = 0; r < c->size && status == POE_OK; r++)
        if (c->holders[r] == c->rank)
            status = open_link(c, r, false, run, &c->in[r]);
    return status;
}

void poe_copies_close(poe_copies *c)
{
    poe_link_close(c->out);
    for (int r = 0; r < c->size; r++)
        poe_link_close(c->in[r]);
    free(c->passages);
    *c = (poe_copies){0};
}

bool poe_copies_any(const poe_copies *c)
{
    return c->size > 0 && c->holders[0] >= 0;
}

/* --- one file under way ----------------------------------------------------------------------------------------- */

static void fail(poe_passage *p, const char *verb)
{
    poe_error("cannot %s %s: %s", verb, p->path, errno ? strerror(errno) : "it ends before its end");
    p->status = POE_FAILED;
}

static void open_passage(poe_passage *p, poe_link *link, int sender, const char *folder, const poe_manifest_file *file,
                         const char *mode)
{
    *p = (poe_passage){.link = link, .sender = sender, .file = *file};
    if (!file->name[0] || !mode)
        return;
    p->status = poe_path(p->path, "%s/%s", folder, file->name);
    if (p->status == POE_OK && !(p->stream = fopen(p->path, mode)))
        fail(p, "open");
}

static poe_message message_of(const poe_passage *p, int64_t step, uint64_t at)
{
    uint64_t left = p->file.size - at;
    return (poe_message){.kind = POE_KIND_COPY,
                         .step = step,
                         .micro = (int32_t)(at / PIECE),
                         .stage = p->sender,
                         .bytes = left < PIECE ? left : PIECE};
}

static poe_status send_piece(poe_passage *p, int64_t step, uint64_t at)
{
    poe_message message = message_of(p, step, at);
    void *payload;
    poe_status status = poe_link_acquire(p->link, &message, &payload);
    if (status != POE_OK)
        return status;
    errno = 0;
    size_t read = p->stream && p->status == POE_OK ? fread(payload, 1, message.bytes, p->stream) : 0;
    memset((char *)payload + read, 0, message.bytes - read);
    if (p->stream && p->status == POE_OK && read < message.bytes)
        fail(p, "read");
    return poe_link_send(p->link, &message);
}

static poe_status take_piece(poe_passage *p, int64_t step, uint64_t at)
{
    poe_message message = message_of(p, step, at);
    void *payload;
    poe_status status = poe_link_receive(p->link, &message, NULL, &payload);
    if (status != POE_OK)
        return status;
    errno = 0;
    if (p->stream && p->status == POE_OK && fwrite(payload, 1, message.bytes, p->stream) < message.bytes)
        fail(p, "write");
    poe_link_release(p->link);
    return POE_OK;
}

static poe_status check(const poe_passage *p)
{
    poe_manifest_file found = {0};
    poe_status status = poe_sync_path(p->path);
    if (status == POE_OK)
        status = poe_checksum_file(p->path, &found.size, &found.crc);
    if (status != POE_OK || (found.size == p->file.size && found.crc == p->file.crc))
        return status;
    poe_error("%s is not what rank %d has sent: CRC-32C 0x%08x of %llu bytes, expected 0x%08x of %llu", p->path, p->sender,
              found.crc, (unsigned long long)found.size, p->file.crc, (unsigned long long)p->file.size);
    return POE_FAILED;
}

static void close_passage(poe_passage *p, bool checks)
{
    errno = 0;
    if (p->stream && fclose(p->stream) && p->status == POE_OK)
        fail(p, "write");
    if (p->stream && checks && p->status == POE_OK)
        p->status = check(p);
}

/* --- all files -------------------------------------------------------------------------------------------------- */

static poe_status pass_pieces(poe_passage *own, poe_passage *others, int n_others, int64_t step, uint64_t at)
{
    poe_status status = own->link && at < own->file.size ? send_piece(own, step, at) : POE_OK;
    for (int i = 0; i < n_others && status == POE_OK; i++)
        if (at < others[i].file.size)
            status = take_piece(&others[i], step, at);
    return status;
}

/* How many files are to come. */
static int open_passages(poe_copies *c, const char *folder, const poe_manifest_file *files, bool done)
{
    int n = 0;
    open_passage(&c->passages[0], c->out, c->rank, folder, &files[c->rank], c->out && !done ? "rb" : NULL);
    for (int r = 0; r < c->size; r++)
        if (c->in[r])
            open_passage(&c->passages[++n], c->in[r], r, folder, &files[r], done ? NULL : "wb");
    return n;
}

poe_status poe_copies_exchange(poe_copies *c, int64_t step, const char *folder, const poe_manifest_file *files, bool done)
{
    int n = open_passages(c, folder, files, done);
    uint64_t longest = 0;
    for (int i = 0; i <= n; i++)
        longest = c->passages[i].file.size > longest ? c->passages[i].file.size : longest;
    poe_status lost = POE_OK, status = POE_OK;
    for (uint64_t at = 0; at < longest && lost == POE_OK; at += PIECE)
        lost = pass_pieces(&c->passages[0], &c->passages[1], n, step, at);
    for (int i = 0; i <= n; i++) {
        close_passage(&c->passages[i], i > 0 && lost == POE_OK);
        status = status == POE_OK ? c->passages[i].status : status;
    }
    return lost != POE_OK ? lost : status;
}
