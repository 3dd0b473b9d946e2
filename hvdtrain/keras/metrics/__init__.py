"""Metrics over all samples of all ranks: their states are combined, and each result is computed from the whole."""
