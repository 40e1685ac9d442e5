/* SPDX-License-Identifier: MIT
 * poe-pipe: reads the flags and hands over to what they ask for. */
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>

#include "comm/mpi/mpi.h"
#include "src/log.h"
#include "src/options.h"
#include "tools/launch.h"
#include "tools/programs.h"
#include "tools/train.h"

static int launch(int argc, char **argv, const poe_options *options)
{
    int exit_status = 0;
    poe_status status = poe_launch(options->ranks, argc, argv, &exit_status);
    return status == POE_OK ? exit_status : poe_exit_status(status);
}

static int run_command(poe_command command, char **argv, const poe_options *options)
{
    switch (command) {
    case POE_COMMAND_GENERATE:
        return poe_program_generate(argv, options);
    case POE_COMMAND_INSPECT:
        return poe_program_inspect(options);
    case POE_COMMAND_EXPORT:
        return poe_program_export(argv, options);
    case POE_COMMAND_PLAN:
        return poe_program_plan(argv, options);
    default:
        return poe_program_data(options);
    }
}

static int answer(poe_command command, const poe_options *options)
{
    if (options->help)
        poe_options_help(command);
    else
        puts("poe-pipe " POE_VERSION);
    return fflush(stdout) == 0 ? 0 : 1;
}

static int run(int argc, char **argv, poe_command command, poe_options *options, poe_status parsed, bool is_rank)
{
    bool train = command == POE_COMMAND_TRAIN;
    if (train && is_rank)
        return poe_train_main(argc, argv, options, parsed);
    poe_log_settle(true);
    if (parsed != POE_OK)
        return poe_exit_status(parsed);
    if (!train)
        return run_command(command, argv, options);
    bool threads = strcmp(options->transport, "inproc") == 0;
    if (options->ranks > 0 && !options->dry_run && !threads)
        return launch(argc, argv, options);
    return poe_train_main(argc, argv, options, parsed);
}

int main(int argc, char **argv)
{
    poe_options options;
    poe_command command;
    int rank = 0, size = 1;
    bool is_rank = poe_mpi_launched();
    if (is_rank)
        poe_mpi_environment(&rank, &size);
    poe_log *log = poe_log_create(rank, size);
    poe_log_attach(log);
    /* Ranks do not outlive mpiexec, whatever ends it. */
    if (is_rank)
        prctl(PR_SET_PDEATHSIG, SIGKILL);
    poe_log_hold();
    poe_status parsed = poe_options_parse(argc, argv, &command, &options);
    int status = 0;
    if (parsed == POE_OK && (options.help || options.version))
        status = rank == 0 ? answer(command, &options) : 0;
    else
        status = run(argc, argv, command, &options, parsed, is_rank);
    poe_options_free(&options);
    poe_log_destroy(log);
    return status;
}
