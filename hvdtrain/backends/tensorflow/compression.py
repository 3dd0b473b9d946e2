"""Compress TensorFlow's gradients while they travel: `hvd.Compression`."""

from typing import Any

import tensorflow as tf

from hvdtrain.gradients.compression import Compressor, NoneCompressor


class FP16Compressor(Compressor):
    """Halves what travels of float32: 11 bits of precision, nothing beyond 65504."""

    @staticmethod
    def compress(tensor: Any) -> tuple[Any, Any]:
        """Cast a float tensor to float16; others stay as they are."""
        return _narrowed(tensor, tf.float16)

    @staticmethod
    def decompress(tensor: Any, ctx: Any) -> Any:
        """Cast back to the dtype that it had."""
        return tf.cast(tensor, ctx)


class BF16Compressor(Compressor):
    """Halves what travels of float32 and keeps its range: 8 bits of precision, no overflow."""

    @staticmethod
    def compress(tensor: Any) -> tuple[Any, Any]:
        """Cast a float tensor to bfloat16; others stay as they are."""
        return _narrowed(tensor, tf.bfloat16)

    @staticmethod
    def decompress(tensor: Any, ctx: Any) -> Any:
        """Cast back to the dtype that it had."""
        return tf.cast(tensor, ctx)


def _narrowed(tensor: Any, dtype: Any) -> tuple[Any, Any]:
    tensor = tf.convert_to_tensor(tensor)
    wider = tensor.dtype.is_floating and tensor.dtype.size > dtype.size
    return (tf.cast(tensor, dtype) if wider else tensor), tensor.dtype


class Compression:
    """The choices for `compression=`: `none`, `fp16` and `bf16`."""

    none = NoneCompressor
    fp16 = FP16Compressor
    bf16 = BF16Compressor
