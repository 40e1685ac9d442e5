/* SPDX-License-Identifier: MIT
 * Stand-ins for parts that are not built yet; the real ones take precedence. */
#include <stdlib.h>

#include "comm/mpi/mpi.h"
#include "src/log.h"
#include "tools/programs.h"
#include "tools/train.h"

#define WEAK __attribute__((weak))

static poe_status absent(const char *what)
{
    poe_error("%s is not part of this build", what);
    return POE_FAILED;
}

WEAK int poe_train_main(int argc, char **argv, poe_options *options, poe_status parse_status)
{
    (void)argc, (void)argv, (void)options;
    poe_log_settle(true);
    return poe_exit_status(parse_status == POE_OK ? absent("training") : parse_status);
}

WEAK poe_status poe_generate(const poe_options *options)
{
    (void)options;
    return absent("generate");
}

WEAK poe_status poe_inspect(const poe_options *options)
{
    (void)options;
    return absent("inspect");
}

WEAK poe_status poe_export(const poe_options *options)
{
    (void)options;
    return absent("export");
}

WEAK bool poe_mpi_launched(void)
{
    return getenv("OMPI_COMM_WORLD_SIZE") != NULL;
}

WEAK void poe_mpi_environment(int *rank, int *size)
{
    const char *r = getenv("OMPI_COMM_WORLD_RANK"), *s = getenv("OMPI_COMM_WORLD_SIZE");
    *rank = r ? atoi(r) : 0;
    *size = s ? atoi(s) : 1;
}
