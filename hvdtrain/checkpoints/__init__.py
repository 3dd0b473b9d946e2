"""Checkpoints on disk: whole or absent, proven by checksums, of one training at a time."""
