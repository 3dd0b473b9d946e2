"""Watch the ranks of a job from the launcher, and report how they end."""
