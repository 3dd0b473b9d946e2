"""Try settings of MPI, Horovod and the C library, and store those that are faster on this machine."""
