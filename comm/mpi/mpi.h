/* SPDX-License-Identifier: MIT
 * Ranks as processes under mpiexec or srun. Blocking calls of MPI spin, so none is used after the start: the helper
 * thread tests, and sleeps between tests. */
#ifndef POE_COMM_MPI_MPI_H
#define POE_COMM_MPI_MPI_H

#include "comm/transport.h"

/* True when a launcher of MPI jobs started this process (its environment says so). */
bool poe_mpi_launched(void);
/* Rank and size as the launcher's environment has them, before MPI_Init: 0 and 1 when unknown. */
void poe_mpi_environment(int *rank, int *size);

/* MPI_Init_thread. POE_BAD_INPUT (said): a launcher started N processes but MPI joined them into worlds of one (srun
 * without PMIx, or another MPI's mpiexec). */
poe_status poe_mpi_start(int *rank, int *size);
/* The transport over MPI_COMM_WORLD (duplicated; errors return). After poe_mpi_start(). */
poe_status poe_mpi_create(poe_transport **transport);
/* MPI_Finalize; the transport must be destroyed before. */
void poe_mpi_finish(void);

#endif
