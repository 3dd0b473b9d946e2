"""Write the start commands of each MPI and of srun, and read the hosts of other schedulers."""
