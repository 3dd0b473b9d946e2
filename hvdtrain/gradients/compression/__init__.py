"""Reduce gradients by sending less than all of them. Schemes compose: `ErrorFeedback(TopK(0.01))`."""

from hvdtrain.gradients.compression.composition import ErrorFeedback, Selective
from hvdtrain.gradients.compression.low_rank import PowerSGD
from hvdtrain.gradients.compression.quantization import Quantized
from hvdtrain.gradients.compression.sparsification import RandomK, TopK

__all__ = ["ErrorFeedback", "PowerSGD", "Quantized", "RandomK", "Selective", "TopK"]
