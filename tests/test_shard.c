/* SPDX-License-Identifier: MIT
 * Token shards: written and read back, refused, and mutated at random. */
#include "src/shard.h"

#include <unistd.h>

#include "src/files.h"
#include "src/log.h"
#include "src/rng.h"
#include "tests/check.h"

enum { HEADER = 1024, COUNT = 1000 };

static char root[] = "/tmp/poe-test-shard-XXXXXX";
static char path[POE_PATH_MAX];

static void check_round_trip(void)
{
    int32_t tokens[COUNT];
    for (int i = 0; i < COUNT; i++)
        tokens[i] = (i * 7919) % 65536;
    tokens[3] = 65535;
    poe_shard_writer *writer;
    CHECK_INT(poe_shard_writer_create(path, &writer), POE_OK);
    CHECK_INT(poe_shard_writer_add(writer, tokens, 3), POE_OK);
    CHECK(access(path, F_OK) != 0); /* not there before it is whole */
    CHECK_INT(poe_shard_writer_add(writer, tokens + 3, COUNT - 3), POE_OK);
    CHECK_INT(poe_shard_writer_finish(writer), POE_OK);
    poe_shard shard;
    CHECK_INT(poe_shard_open(path, false, &shard), POE_OK);
    CHECK_INT(shard.count, COUNT);
    for (size_t i = 0; i < COUNT; i++)
        CHECK_INT(shard.tokens[i], tokens[i]);
    poe_shard_close(&shard);
    CHECK_INT(poe_shard_open(path, true, &shard), POE_OK);
    CHECK_INT(shard.count, COUNT + HEADER / 2);
    poe_shard_close(&shard);
}

static void check_writer_refusals(void)
{
    char other[POE_PATH_MAX], name[POE_PATH_MAX];
    CHECK_INT(poe_path(other, "%s/other.bin", root), POE_OK);
    CHECK_INT(poe_path(name, "%s/other.bin.tmp", root), POE_OK);
    poe_shard_writer *writer;
    CHECK_INT(poe_shard_writer_create(other, &writer), POE_OK);
    CHECK_INT(poe_shard_writer_add(writer, (int32_t[]){65536}, 1), POE_BAD_INPUT);
    CHECK_INT(poe_shard_writer_add(writer, (int32_t[]){-1}, 1), POE_BAD_INPUT);
    poe_shard_writer_discard(writer);
    CHECK(access(other, F_OK) != 0 && access(name, F_OK) != 0);
    CHECK_INT(poe_path(other, "%s/absent/other.bin", root), POE_OK);
    CHECK_INT(poe_shard_writer_create(other, &writer), POE_BAD_INPUT);
    CHECK_INT(poe_path(other, "%s/full.bin", root), POE_OK);
    CHECK_INT(poe_path(name, "%s/full.bin.tmp", root), POE_OK);
    if (access("/dev/full", W_OK) == 0 && symlink("/dev/full", name) == 0) {
        CHECK_INT(poe_shard_writer_create(other, &writer), POE_OK);
        CHECK_INT(poe_shard_writer_finish(writer), POE_FAILED);
        CHECK(access(other, F_OK) != 0 && unlink(name) != 0);
    }
}

/* The status of opening `size` bytes, every token of which is then read. */
static poe_status open_bytes(const char *data, size_t size, bool raw, size_t *count)
{
    FILE *f = fopen(path, "wb");
    CHECK(f && fwrite(data, 1, size, f) == size && fclose(f) == 0);
    poe_shard shard;
    poe_status status = poe_shard_open(path, raw, &shard);
    if (status != POE_OK)
        return status;
    unsigned sum = 0;
    for (size_t i = 0; i < shard.count; i++)
        sum += shard.tokens[i];
    *count = shard.count + (sum & 0);
    poe_shard_close(&shard);
    return POE_OK;
}

static void check_refusals(const char *good, size_t size)
{
    char bad[HEADER + 2 * COUNT];
    size_t count = 0;
    memcpy(bad, good, size);
    CHECK_INT(open_bytes(bad, size, false, &count), POE_OK);
    CHECK_INT(open_bytes(bad, size - 1, false, &count), POE_BAD_INPUT);
    CHECK_INT(open_bytes(bad, size - 1, true, &count), POE_BAD_INPUT);
    CHECK_INT(open_bytes(bad, HEADER, false, &count), POE_BAD_INPUT);
    CHECK_INT(open_bytes(bad, HEADER - 1, false, &count), POE_BAD_INPUT);
    CHECK_INT(open_bytes(bad, 3, false, &count), POE_BAD_INPUT);
    CHECK_INT(open_bytes(bad, 0, false, &count), POE_BAD_INPUT);
    CHECK_INT(open_bytes(bad, 0, true, &count), POE_BAD_INPUT);
    const struct {
        size_t word;
        int32_t value;
    } changes[] = {{0, 20240521}, {1, 2}, {2, COUNT + 1}, {2, 0}, {2, -COUNT}, {2, INT32_MIN}};
    for (size_t i = 0; i < sizeof(changes) / sizeof(changes[0]); i++) {
        memcpy(bad, good, size);
        memcpy(bad + 4 * changes[i].word, &changes[i].value, 4);
        CHECK_INT(open_bytes(bad, size, false, &count), POE_BAD_INPUT);
    }
}

/* Random bytes changed and random lengths: refused, or every token counted by a header that is right. */
static void check_mutations(const char *good, size_t size)
{
    poe_rng rng;
    poe_rng_init(&rng, 1, "shards");
    for (int round = 0; round < 2000; round++) {
        char bad[HEADER + 2 * COUNT];
        memcpy(bad, good, size);
        for (int change = 0; change < 3; change++)
            bad[poe_rng_next(&rng) % (round % 2 ? 12 : size)] = (char)poe_rng_next(&rng);
        size_t kept = round % 3 ? size : poe_rng_next(&rng) % (size + 1), count = 0;
        poe_status status = open_bytes(bad, kept, false, &count);
        CHECK(status == POE_BAD_INPUT || (status == POE_OK && HEADER + 2 * count == kept));
    }
}

int main(void)
{
    if (!mkdtemp(root) || poe_path(path, "%s/a.bin", root) != POE_OK)
        return 1;
    check_round_trip();
    char *good = NULL;
    size_t size = 0;
    CHECK_INT(poe_read_file(path, "test", &good, &size), POE_OK);
    poe_log *log = poe_log_create(0, 1); /* holds the sentences that the refusals say */
    poe_log_attach(log);
    poe_log_hold();
    check_writer_refusals();
    check_refusals(good, size);
    check_mutations(good, size);
    poe_log_settle(false);
    poe_log_destroy(log);
    free(good);
    CHECK_INT(poe_remove_tree(root), POE_OK);
    return check_result();
}
