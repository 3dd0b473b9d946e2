"""`DistributedOptimizer`: a subclass of the user's optimizer that averages gradients over ranks."""
