/* SPDX-License-Identifier: MIT
 * comm over MPI: all scenarios, under mpiexec with any number of ranks; with --fabric over the fabric, whose ranks meet
 * over MPI. Called with --alone, and PMI_SIZE in the environment but no launcher: the start must be refused. */
#include <signal.h>
#include <unistd.h>

#include "comm/fabric/fabric.h"
#include "comm/mpi/mpi.h"
#include "src/clock.h"
#include "src/log.h"
#include "tests/check.h"
#include "tests/comm_scenarios.h"

static bool over_fabric;

static poe_transport *create_transport(void)
{
    const poe_fabric_settings settings = {0};
    poe_transport *transport, *direct = NULL;
    poe_comm *over;
    CHECK_INT(poe_mpi_create(&transport), POE_OK);
    if (!over_fabric)
        return transport;
    CHECK_INT(poe_comm_create(transport, NULL, &over), POE_OK);
    CHECK_INT(poe_fabric_create(over, &settings, &direct), POE_OK);
    poe_comm_destroy(over, true);
    return direct;
}

static void check_scenario(const poe_scenario *scenario, int rank)
{
    poe_transport *transport = create_transport();
    int before = poe_scenarios_failures() + check_failures;
    double start = poe_now();
    poe_capture_begin();
    poe_scenario_play(scenario, transport);
    char *said = poe_capture_end();
    bool said_it = !scenario->says || rank != scenario->sayer || strstr(said, scenario->says);
    CHECK(said_it);
    if (!said_it || poe_scenarios_failures() + check_failures != before)
        fprintf(stderr, "rank %d, %s: %s\n", rank, scenario->name, said);
    if (rank == 0)
        printf("%s: %.2f s\n", scenario->name, poe_now() - start);
    free(said);
}

/* A rank that is stopped says nothing: rank 0 gives up, in words, and lets it go on. */
static bool wait_for_stopped(poe_comm *comm)
{
    int rank = poe_comm_rank(comm);
    int32_t own = getpid(), pids[64];
    CHECK_INT(poe_comm_gather(comm, &own, pids, sizeof(own)), POE_OK);
    if (rank > 1)
        return false;
    if (rank == 1)
        raise(SIGSTOP);
    double start = poe_now();
    poe_status status = poe_comm_barrier(comm, "a barrier"); /* rank 1 may find its own part of it done */
    if (rank == 1)
        return false;
    double took = poe_now() - start;
    kill(pids[1], SIGCONT);
    CHECK_INT(status, POE_PEER_LOST);
    CHECK(took > 1.5 && took < 20); /* a loaded machine may be late, never early */
    return false;
}

static void check_alone(void)
{
    int rank, size;
    setenv("PMI_SIZE", "4", 1);
    setenv("PMI_RANK", "0", 1);
    CHECK(poe_mpi_launched());
    poe_capture_begin();
    CHECK_INT(poe_mpi_start(&rank, &size), POE_BAD_INPUT);
    char *said = poe_capture_end();
    CHECK(strstr(said, "the launcher started 4 ranks (PMI_SIZE=4), but MPI joined them into worlds of one"));
    free(said);
    poe_mpi_finish();
}

int main(int argc, char **argv)
{
    int rank, size, expected_rank, expected_size;
    if (argc > 1 && strcmp(argv[1], "--alone") == 0) {
        check_alone();
        return check_result();
    }
    over_fabric = argc > 1 && strcmp(argv[1], "--fabric") == 0;
    poe_mpi_environment(&expected_rank, &expected_size);
    CHECK(poe_mpi_launched());
    CHECK_INT(poe_mpi_start(&rank, &size), POE_OK);
    CHECK_INT(rank, expected_rank);
    CHECK_INT(size, expected_size);
    for (int i = 0; i < poe_n_scenarios; i++)
        if (poe_scenarios[i].ranks <= size)
            check_scenario(&poe_scenarios[i], rank);
    if (size > 1)
        check_scenario(&(poe_scenario){"stopped", 2, {.deadline = 2}, wait_for_stopped, 0,
                                       " s (--deadline 2): rank 0 waits for a barrier (collective call 2) since "}, rank);
    poe_mpi_finish();
    check_failures += poe_scenarios_failures();
    return check_result();
}
