"""One bridge per framework: where a tensor becomes a buffer, and nowhere else."""
