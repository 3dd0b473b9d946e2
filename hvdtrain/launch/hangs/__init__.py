"""Detect ranks that wait for one another, and report who waits for whom."""
