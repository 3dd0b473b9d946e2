"""What measures: each contender at work while all others stand still, in alternating rounds of one run."""
