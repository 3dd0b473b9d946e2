"""What tells the truth when something is wrong: before a run, at its first step, and while it hangs."""
