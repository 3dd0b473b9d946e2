"""Examine the environment of a training: installation, MPI, network, GPUs, and real allreduces."""
