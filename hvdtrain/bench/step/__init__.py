"""`hvdtrain bench step`: what a training step costs on several ranks, beside the same step without any others."""
