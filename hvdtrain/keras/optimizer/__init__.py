"""Average gradients over ranks in a subclass of the user's optimizer: `DistributedOptimizer`."""
