"""Compose, check, submit and follow Slurm jobs."""
