"""What scripts import from `horovod.common` and hvdtrain has no use for itself."""
