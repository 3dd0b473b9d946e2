"""Compress TensorFlow's gradients before they are sent: `hvd.Compression`."""

from typing import Any

import tensorflow as tf

from hvdtrain.gradients.compression import ErrorFeedback, PowerSGD, Quantized, RandomK, Selective, TopK
from hvdtrain.gradients.schemes import Compressor, NoneCompressor, Scheme, is_compressor


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
    """The choices for `compression=`.

    `none`, `fp16` and `bf16` are Horovod's. The others are functions that return a scheme. Each adds what a step
    leaves out to later gradients (error feedback), if `error_feedback` is not False; sends gradients of fewer
    than `min_size` elements as they are; and in the first `start_after` steps all of them.
    """

    none = NoneCompressor
    fp16 = FP16Compressor
    bf16 = BF16Compressor

    @staticmethod
    def int8(block: int = 1024, **options: Any) -> Scheme:
        """Send 8 bits per element; each `block` elements have a scale of their own. See `Quantized`."""
        return _scheme(Quantized(8, block), **options)

    @staticmethod
    def int4(block: int = 128, **options: Any) -> Scheme:
        """Send 4 bits per element; each `block` elements have a scale of their own. See `Quantized`."""
        return _scheme(Quantized(4, block), **options)

    @staticmethod
    def signsgd(block: int = 128, **options: Any) -> Scheme:
        """Send the sign of each element, and a mean magnitude for each `block` elements. See `Quantized`."""
        return _scheme(Quantized(1, block), **options)

    @staticmethod
    def topk(ratio: float = 0.01, **options: Any) -> Scheme:
        """Send the part `ratio` of the elements that is largest. See `TopK`."""
        return _scheme(TopK(ratio), **options)

    @staticmethod
    def randomk(ratio: float = 0.05, *, error_feedback: bool = True, **options: Any) -> Scheme:
        """Send a random part `ratio` of the elements. See `RandomK`."""
        return _scheme(RandomK(ratio, rescale=not error_feedback), error_feedback, **options)

    @staticmethod
    def powersgd(rank: int = 4, warm_start: bool = True, **options: Any) -> Scheme:
        """Send matrices as products of two thin ones with `rank` columns. See `PowerSGD`."""
        return _scheme(PowerSGD(rank, warm_start), **options)


def check_compressor(compression: Any) -> None:
    """Raise TypeError if `compression` has not the two methods that a collective on any tensor can use."""
    if not is_compressor(compression):
        raise TypeError(
            "Here compression is hvd.Compression.none, fp16 or bf16, or a class with the methods compress and "
            "decompress; schemes such as topk are for the gradients of optimizers and tapes. Received: "
            f"{compression!r}."
        )


def _scheme(
    scheme: Scheme, error_feedback: bool = True, min_size: int = 1024, start_after: int = 0
) -> Scheme:
    return Selective(ErrorFeedback(scheme) if error_feedback else scheme, min_size, start_after)
