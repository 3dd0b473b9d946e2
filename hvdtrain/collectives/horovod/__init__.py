"""Run collective operations in Horovod's native core."""
