# mpi.env as rows of C: the lines `export NAME=value` of Open MPI, PMIx and hwloc.
s/^export ([A-Z][A-Za-z0-9_]*)=(.*)$/{"\1", "\2"},/p
