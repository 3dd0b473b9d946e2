"""Store the checkpoints of one training on disk, complete or absent, with checksums."""
