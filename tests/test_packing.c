/* SPDX-License-Identifier: MIT
 * Best-fit choice against a plain search through all documents, and its pace with very many. */
#include "src/packing.h"

#include "src/clock.h"
#include "src/rng.h"
#include "tests/check.h"

enum { CAPACITY = 60 };

typedef struct plain_document {
    size_t slot, length;
} plain_document;

/* The rule as it is told, over documents in order of age: the index of the document to take. */
static size_t plain_choice(const plain_document *documents, size_t n, size_t room)
{
    size_t best = n, shortest = 0;
    for (size_t i = 0; i < n; i++) {
        if (documents[i].length <= room && (best == n || documents[i].length > documents[best].length))
            best = i;
        if (documents[i].length < documents[shortest].length)
            shortest = i;
    }
    return best < n ? best : shortest;
}

static void check_against_plain(uint64_t seed, size_t longest)
{
    poe_rng rng;
    poe_rng_init(&rng, seed, "packing");
    poe_packer *packer;
    CHECK_INT(poe_packer_create(CAPACITY, &packer), POE_OK);
    plain_document documents[CAPACITY];
    size_t n = 0;
    for (int step = 0; step < 5000; step++) {
        if (n < CAPACITY && poe_rng_next(&rng) % 100 < (step / 500 % 2 ? 30 : 70)) {
            size_t length = 1 + poe_rng_next(&rng) % longest;
            documents[n] = (plain_document){poe_packer_add(packer, length), length};
            CHECK(documents[n].slot < CAPACITY);
            n++;
        } else if (n == 0) {
            CHECK(poe_packer_take(packer, 1) == POE_NO_SLOT);
        } else {
            size_t room = 1 + poe_rng_next(&rng) % longest, chosen = plain_choice(documents, n, room);
            CHECK_INT(poe_packer_take(packer, room), documents[chosen].slot);
            memmove(documents + chosen, documents + chosen + 1, (--n - chosen) * sizeof(*documents));
        }
        CHECK_INT(poe_packer_count(packer), n);
        size_t slot = POE_NO_SLOT;
        for (size_t i = 0; i < n; i++)
            CHECK_INT(slot = poe_packer_next(packer, slot), documents[i].slot);
        CHECK(poe_packer_next(packer, slot) == POE_NO_SLOT);
    }
    poe_packer_clear(packer);
    CHECK_INT(poe_packer_count(packer), 0);
    CHECK_INT(poe_packer_add(packer, 3), 0);
    CHECK_INT(poe_packer_add(packer, 3), 1);
    poe_packer_destroy(packer);
}

/* Packs `n` documents of random lengths, all at once; gives the seconds it took. */
static double time_packing(size_t n, size_t longest, size_t row, size_t *tokens)
{
    poe_rng rng;
    poe_rng_init(&rng, 1, "pace");
    size_t *lengths = calloc(n, sizeof(*lengths)), slot;
    poe_packer *packer;
    CHECK_INT(poe_packer_create(n, &packer), POE_OK);
    double start = poe_now();
    for (size_t i = 0; i < n; i++) {
        size_t length = 1 + poe_rng_next(&rng) % longest;
        lengths[poe_packer_add(packer, length)] = length;
    }
    *tokens = 0;
    for (size_t room = row; (slot = poe_packer_take(packer, room)) != POE_NO_SLOT;) {
        size_t used = lengths[slot] < room ? lengths[slot] : room;
        *tokens += used;
        room = room > used ? room - used : row;
    }
    double seconds = poe_now() - start;
    poe_packer_destroy(packer);
    free(lengths);
    return seconds;
}

int main(void)
{
    check_against_plain(1, 10); /* many ties */
    check_against_plain(2, 100);
    check_against_plain(3, 100000);
    static const size_t longest[] = {500, 5000, 20000};
    for (size_t i = 0; i < 3; i++) {
        size_t tokens;
        double seconds = time_packing(100000, longest[i], 2049, &tokens);
        printf("100000 documents of up to %zu tokens: %zu tokens packed in %.3f s\n", longest[i], tokens, seconds);
        CHECK(seconds < 60); /* a quadratic search takes minutes */
    }
    return check_result();
}
