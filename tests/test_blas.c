/* SPDX-License-Identifier: MIT
 * Choosing kernels: their names, and that the library of products runs those that belong to a set after
 * poe_blas_ensure(), which this program tries by executing itself: `test_blas KERNELS` prints what it got. */
#include <sys/wait.h>
#include <unistd.h>

#include "stages/cpu/cpu.h"
#include "tests/check.h"

static void test_names(void)
{
    poe_kernels kernels = POE_KERNELS_COUNT;
    CHECK_INT(poe_kernels_parse("auto", &kernels), POE_OK);
    CHECK_INT(kernels, poe_kernels_best());
    CHECK_INT(poe_kernels_parse("", &kernels), POE_OK);
    CHECK_INT(kernels, poe_kernels_best());
    for (poe_kernels k = 0; k < POE_KERNELS_COUNT; k++) {
        poe_kernels found = POE_KERNELS_COUNT;
        CHECK_INT(poe_kernels_parse(poe_kernels_name(k), &found), k <= poe_kernels_best() ? POE_OK : POE_BAD_INPUT);
        CHECK_INT(found, k <= poe_kernels_best() ? k : POE_KERNELS_COUNT);
    }
    CHECK_INT(poe_kernels_parse("avx", &kernels), POE_BAD_INPUT);
    CHECK_INT(poe_kernels_parse("avx512 ", &kernels), POE_BAD_INPUT);
}

#if defined(__x86_64__)

/* What `test_blas KERNELS` prints, in an environment that asks OpenBLAS for something else. */
static void ask_child(const char *kernels, char *answer, size_t size)
{
    int ends[2];
    answer[0] = '\0';
    CHECK_INT(pipe(ends), 0);
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], STDOUT_FILENO);
        setenv("OPENBLAS_CORETYPE", "Nehalem", 1);
        setenv("OPENBLAS_NUM_THREADS", "2", 1);
        execl("/proc/self/exe", "test_blas", kernels, (char *)NULL);
        _exit(1);
    }
    close(ends[1]);
    ssize_t got = read(ends[0], answer, size - 1);
    answer[got > 0 ? got : 0] = '\0';
    close(ends[0]);
    int status = -1;
    waitpid(child, &status, 0);
    CHECK_INT(status, 0);
}

static void test_ensure(void)
{
#ifdef POE_HAVE_ONEDNN
    static const char *const expected[] = {"OpenBLAS Prescott 0", "oneDNN AVX2 0", "oneDNN AVX-512 0"};
#else
    static const char *const expected[] = {"OpenBLAS Prescott 0", "OpenBLAS Haswell 0", "OpenBLAS SkylakeX 0"};
#endif
    for (poe_kernels k = 0; k <= poe_kernels_best(); k++) {
        char answer[64];
        ask_child(poe_kernels_name(k), answer, sizeof(answer));
        CHECK_STRING(answer, expected[k]);
    }
}

#endif

int main(int argc, char **argv)
{
    if (argc == 2) {
        poe_kernels kernels = POE_KERNELS_GENERIC;
        if (poe_kernels_parse(argv[1], &kernels) != POE_OK)
            return 1;
        poe_blas_ensure(kernels, argv);
        printf("%s %s %d", poe_blas_library(), poe_blas_kernels(), poe_blas_check());
        return 0;
    }
    CHECK(poe_blas_kernels()[0]);
    CHECK_INT(poe_blas_check(), POE_OK);
    test_names();
#if defined(__x86_64__)
    test_ensure();
#endif
    return check_result();
}
