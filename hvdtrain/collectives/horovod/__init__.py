"""The `horovod` engine: Horovod's native core."""
