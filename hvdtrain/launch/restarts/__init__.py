"""Decide whether a job that failed is started again, and on which hosts."""
