"""Build Horovod's native core for the TensorFlow and MPI of this environment."""
