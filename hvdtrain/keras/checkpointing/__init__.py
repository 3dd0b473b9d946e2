"""Stopping a training and going on with it: what `hvd.callbacks.Checkpoint` saves, and how it comes back."""
