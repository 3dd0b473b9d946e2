"""Slurm jobs as a user submits them: put together, checked, submitted, followed."""
