"""Record what each rank does, and merge and read the recordings."""
