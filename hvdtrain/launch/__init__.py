"""Start ranks on a workstation or a cluster; imports neither TensorFlow nor MPI."""
