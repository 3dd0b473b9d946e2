"""What a contender's ranks do: `prepare(settings)` gets ready and returns what answers requests."""
