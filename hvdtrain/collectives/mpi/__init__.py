"""Run collective operations with mpi4py over any MPI library."""
