/* SPDX-License-Identifier: MIT
 * Checksums, random streams and arenas. */
#include "src/arena.h"
#include "src/crc32c.h"
#include "src/rng.h"
#include "tests/check.h"

static void check_crc(void)
{
    CHECK_INT(poe_crc32c(0, "123456789", 9), 0xE3069283u);
    CHECK_INT(poe_crc32c_plain(0, "123456789", 9), 0xE3069283u);
    unsigned char bytes[301];
    poe_rng rng;
    poe_rng_init(&rng, 1, "crc");
    for (size_t i = 0; i < sizeof(bytes); i++)
        bytes[i] = (unsigned char)poe_rng_next(&rng);
    for (size_t n = 0; n <= sizeof(bytes); n++) {
        uint32_t whole = poe_crc32c_plain(0, bytes, n);
        CHECK_INT(poe_crc32c(0, bytes, n), whole);
        CHECK_INT(poe_crc32c(poe_crc32c(0, bytes, n / 3), bytes + n / 3, n - n / 3), whole);
    }
}

static void check_rng(void)
{
    poe_rng a, b;
    poe_rng_init(&a, 7, "wte");
    poe_rng_init(&b, 7, "lm_head");
    CHECK(poe_rng_next(&a) != poe_rng_next(&b));
    double sum = 0, squares = 0;
    int n = 100000;
    for (int i = 0; i < n; i++) {
        double x = poe_rng_normal(&a);
        sum += x;
        squares += x * x;
    }
    CHECK_NEAR(sum / n, 0, 0, 5 / sqrt(n));
    CHECK_NEAR(squares / n, 1, 0, 5 * sqrt(2.0 / n));
}

static void check_arena(void)
{
    poe_arena arena;
    CHECK_INT(poe_arena_create(&arena, "test", poe_arena_round(10) + poe_arena_round(100)), POE_OK);
    char *first = poe_arena_take(&arena, 10), *second = poe_arena_take(&arena, 100);
    CHECK_INT(second - first, POE_ALIGN);
    CHECK_INT((uintptr_t)first % POE_ALIGN, 0);
    CHECK_INT(second[99], 0);
    poe_arena_destroy(&arena);
}

int main(void)
{
    check_crc();
    check_rng();
    check_arena();
    return check_result();
}
