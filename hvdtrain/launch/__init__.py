"""How ranks come to life, on a workstation and on a cluster; imports neither TensorFlow nor MPI."""
