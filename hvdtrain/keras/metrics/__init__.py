"""Compute metrics over the samples of all ranks, by combining their states before each result is computed."""
