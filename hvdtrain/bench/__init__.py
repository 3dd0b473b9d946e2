"""Measure contenders in alternating rounds of one run; only one of them runs at a time."""
