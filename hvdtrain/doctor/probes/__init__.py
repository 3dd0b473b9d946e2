"""Programs that doctor starts in processes of their own and that answer with one line of JSON.

The line begins afresh, because whoever spoke before may have ended without a newline.
TensorFlow is noisy and slow, MPI may abort the process that loads it: neither belongs in doctor's own.
"""
