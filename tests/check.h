/* SPDX-License-Identifier: MIT
 * Checks for the test programs: always on, printing both values. A test program exits 0 when all checks held, 1 when
 * one failed, 77 (skipped, with a line that says why) through poe_test_skip(). */
#ifndef POE_TESTS_CHECK_H
#define POE_TESTS_CHECK_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int check_failures;

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);                                    \
            check_failures++;                                                                                          \
        }                                                                                                              \
    } while (0)

#define CHECK_INT(actual, expected)                                                                                    \
    do {                                                                                                               \
        long long check_a = (long long)(actual), check_e = (long long)(expected);                                      \
        if (check_a != check_e) {                                                                                      \
            fprintf(stderr, "%s:%d: %s is %lld, expected %lld\n", __FILE__, __LINE__, #actual, check_a, check_e);      \
            check_failures++;                                                                                          \
        }                                                                                                              \
    } while (0)

#define CHECK_STRING(actual, expected)                                                                                 \
    do {                                                                                                               \
        const char *check_a = (actual), *check_e = (expected);                                                         \
        if (!check_a || strcmp(check_a, check_e) != 0) {                                                               \
            fprintf(stderr, "%s:%d: %s is \"%s\", expected \"%s\"\n", __FILE__, __LINE__, #actual,                     \
                    check_a ? check_a : "(null)", check_e);                                                            \
            check_failures++;                                                                                          \
        }                                                                                                              \
    } while (0)

/* |actual - expected| <= absolute + relative * |expected| */
#define CHECK_NEAR(actual, expected, relative, absolute)                                                               \
    do {                                                                                                               \
        double check_a = (actual), check_e = (expected);                                                               \
        if (!(fabs(check_a - check_e) <= (absolute) + (relative)*fabs(check_e))) {                                     \
            fprintf(stderr, "%s:%d: %s is %.9g, expected %.9g (off by %.3g)\n", __FILE__, __LINE__, #actual, check_a,  \
                    check_e, check_a - check_e);                                                                       \
            check_failures++;                                                                                          \
        }                                                                                                              \
    } while (0)

static inline int check_result(void)
{
    if (check_failures)
        fprintf(stderr, "%d checks failed\n", check_failures);
    return check_failures ? 1 : 0;
}

static inline _Noreturn void poe_test_skip(const char *why)
{
    printf("skipped: %s\n", why);
    exit(77);
}

/* Where golden runs and data are: POE_SHARED, set by meson. NULL when the folder is not there. */
static inline const char *poe_test_shared(void)
{
    const char *path = getenv("POE_SHARED");
    char probe[4200];
    if (!path)
        return NULL;
    snprintf(probe, sizeof(probe), "%s/golden/README.md", path);
    FILE *f = fopen(probe, "r");
    if (!f)
        return NULL;
    fclose(f);
    return path;
}

#endif
