"""Names that scripts import from `horovod.tensorflow.compression`."""

from hvdtrain.backends.tensorflow.compression import Compression
from hvdtrain.gradients.schemes import Compressor

NoneCompressor = Compression.none
FP16Compressor = Compression.fp16

__all__ = ["Compression", "Compressor", "FP16Compressor", "NoneCompressor"]
