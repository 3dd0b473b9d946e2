"""Compress TensorFlow's gradients before they are sent: `hvd.Compression`."""

from typing import Any

import tensorflow as tf

from hvdtrain.gradients.schemes import Compressor, NoneCompressor


class _CastCompressor(Compressor):
    """Sends float tensors in a narrower dtype; a subclass chooses it in `compress`."""

    @staticmethod
    def decompress(tensor: Any, ctx: Any) -> Any:
        """Cast back to the dtype that it had."""
        return tf.cast(tensor, ctx)


class FP16Compressor(_CastCompressor):
    """Sends float32 as float16, half the bytes: 11 bits of precision, no numbers beyond 65504."""

    @staticmethod
    def compress(tensor: Any) -> tuple[Any, Any]:
        """Cast a float tensor to float16; return others unchanged."""
        return _cast_down(tensor, tf.float16)

    @staticmethod
    def decompress(tensor: Any, ctx: Any) -> Any:
        """Cast back to the original dtype."""
        return tf.cast(tensor, ctx)


class BF16Compressor(_CastCompressor):
    """Sends float32 as bfloat16, half the bytes and the same range: 8 bits of precision, no overflow."""

    @staticmethod
    def compress(tensor: Any) -> tuple[Any, Any]:
        """Cast a float tensor to bfloat16; return others unchanged."""
        return _cast_down(tensor, tf.bfloat16)

    @staticmethod
    def decompress(tensor: Any, ctx: Any) -> Any:
        """Cast back to the original dtype."""
        return tf.cast(tensor, ctx)


def _cast_down(tensor: Any, dtype: Any) -> tuple[Any, Any]:
    tensor = tf.convert_to_tensor(tensor)
    wider = tensor.dtype.is_floating and tensor.dtype.size > dtype.size
    return (tf.cast(tensor, dtype) if wider else tensor), tensor.dtype


class Compression:
    """The choices for `compression=`: `none`, `fp16` and `bf16`."""

    none = NoneCompressor
    fp16 = FP16Compressor
    bf16 = BF16Compressor
