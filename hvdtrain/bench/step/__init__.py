"""Time a training step on several ranks, and the same step of independent processes."""
