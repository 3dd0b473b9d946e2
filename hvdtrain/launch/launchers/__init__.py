"""Start commands of each MPI, of srun and of other schedulers."""
