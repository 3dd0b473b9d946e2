"""Names that scripts import from `horovod.tensorflow.compression`."""

from hvdtrain.gradients.compression import Compression, Compressor

NoneCompressor = Compression.none
FP16Compressor = Compression.fp16

__all__ = ["Compression", "Compressor", "FP16Compressor", "NoneCompressor"]
