"""Combine gradients over the ranks, between backprop and update."""
