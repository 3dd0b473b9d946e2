"""From backprop to update."""
