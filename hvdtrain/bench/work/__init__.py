"""Define the work of each contender: `prepare(settings)` returns a function that answers requests."""
