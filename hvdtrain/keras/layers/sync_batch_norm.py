"""Layers that communicate."""

from typing import Any

import keras
import tensorflow as tf

from hvdtrain import runtime
from hvdtrain.backends.tensorflow import differentiable
from hvdtrain.collectives.engine import Op
from hvdtrain.collectives.scaling import Reduction
from hvdtrain.data import global_batch


@keras.saving.register_keras_serializable("hvdtrain")
class SyncBatchNormalization(keras.layers.BatchNormalization):
    """Normalises by the statistics of all ranks' samples together, instead of this rank's few.

    In training it gives what `keras.layers.BatchNormalization` gives on one process with the whole batch,
    gradients and moving statistics included, also where the ranks hold different numbers of samples. In
    inference the two are the same. It costs one small allreduce forward and one backward.

    Args:
        fused: Accepted for Horovod's sake; only False is possible.
        **kwargs: As for `keras.layers.BatchNormalization`.

    Raises:
        ValueError: If `fused` is True or None.
    """

    combines_ranks = True  # its moving statistics are those of all ranks' samples

    def __init__(self, fused: bool = False, **kwargs: Any) -> None:
        if fused in (True, None):
            raise ValueError(
                "SyncBatchNormalization communicates between its two halves, so it cannot be fused. Received: "
                f"{fused=}. Leave the argument out."
            )
        super().__init__(**kwargs)

    def _moments(self, inputs: Any, mask: Any) -> tuple[Any, Any]:
        mean, variance = super()._moments(inputs, mask)
        engine = runtime.engine()
        if engine.size == 1:
            return mean, variance
        mine = _sums(mean, variance, _samples(inputs, mask, self._reduction_axes))
        every = differentiable.allreduce(engine, mine, Reduction(Op.SUM))
        mean_of_all, square = tf.split(every[:-1] / every[-1], 2)
        of_all = tf.stack([mean_of_all, tf.maximum(square - mean_of_all**2, 0)])
        return tuple(tf.unstack(tf.cast(of_all, mean.dtype)))


def _samples(inputs: Any, mask: Any, axes: list[int]) -> Any:
    """Return over how many values of this rank each mean was taken, as a float64 scalar."""
    if mask is not None:
        samples = tf.reduce_sum(tf.cast(mask, tf.float64))
    else:
        samples = tf.reduce_prod(tf.cast(tf.gather(tf.shape(inputs), axes), tf.float64))
    step = global_batch.current()
    if step is None or not step.partial:
        return samples
    # A rank without samples holds a row all the same, which counts nothing.
    return samples * tf.cast(tf.minimum(step.own, 1), samples.dtype)


def _sums(mean: Any, variance: Any, samples: Any) -> Any:
    """Turn moments into what can be added up over ranks: sums, then sums of squares, then their number.

    A mean of squares less the square of the mean loses digits; float64 has them to spare.
    """
    mean, variance = tf.cast(mean, tf.float64), tf.cast(variance, tf.float64)
    # A rank without samples has no mean.
    sums = tf.math.multiply_no_nan(tf.concat([mean, variance + mean**2], axis=0), samples)
    return tf.concat([sums, samples[None]], axis=0)
