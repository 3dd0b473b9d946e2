"""Record the collectives of each rank with their times, and merge and analyse the recordings."""
