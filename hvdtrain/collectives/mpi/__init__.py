"""The `mpi` engine: mpi4py over any MPI library."""
