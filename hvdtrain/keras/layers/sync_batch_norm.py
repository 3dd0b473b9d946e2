"""Normalise by the batch statistics of all ranks."""

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
    """Normalises by the statistics of all ranks' samples, instead of this rank's only.

    In training the result is that of `keras.layers.BatchNormalization` on one process with the whole batch,
    including gradients and moving statistics, also if the ranks hold different numbers of samples. In inference
    both layers are the same. It costs one small allreduce forward and one backward.

    Args:
        fused: Accepted for compatibility with Horovod; must be False.
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
        total = differentiable.allreduce(engine, mine, Reduction(Op.SUM))
        mean_of_all, square = tf.split(total[:-1] / total[-1], 2)
        of_all = tf.stack([mean_of_all, tf.maximum(square - mean_of_all**2, 0)])
        return tuple(tf.unstack(tf.cast(of_all, mean.dtype)))


def _samples(inputs: Any, mask: Any, axes: list[int]) -> Any:
    """Return the number of this rank's values in each mean, as a float64 scalar."""
    if mask is not None:
        samples = tf.reduce_sum(tf.cast(mask, tf.float64))
    else:
        samples = tf.reduce_prod(tf.cast(tf.gather(tf.shape(inputs), axes), tf.float64))
    step = global_batch.current()
    if step is None or not step.partial:
        return samples
    # A rank without samples holds one row of weight 0.
    return samples * tf.cast(tf.minimum(step.own, 1), samples.dtype)


def _sums(mean: Any, variance: Any, samples: Any) -> Any:
    """Convert moments to values that can be summed over ranks: sums, sums of squares, and their number.

    The mean of squares minus the square of the mean loses digits, so float64 is used.
    """
    mean, variance = tf.cast(mean, tf.float64), tf.cast(variance, tf.float64)
    # The mean of a rank without samples is NaN.
    sums = tf.math.multiply_no_nan(tf.concat([mean, variance + mean**2], axis=0), samples)
    return tf.concat([sums, samples[None]], axis=0)
