"""Convert tensors to buffers, with one bridge per framework; no other folder does this."""
