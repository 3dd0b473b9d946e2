"""Batch statistics are those of the whole batch, not of a rank's rows."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from hvdtrain.backends.tensorflow import differentiable
from hvdtrain.collectives.engine import Op
from hvdtrain.collectives.scaling import Reduction
from hvdtrain.patching import replace
from hvdtrain.wrap import context
from hvdtrain.wrap.row_shard import Share


def install() -> None:
    """Changes `keras.layers.BatchNormalization`, for as long as a model computes a rank's rows."""
    replace(keras.layers.BatchNormalization, "_moments", _of_all_rows)


def _of_all_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    def moments(self: Any, inputs: Any, mask: Any) -> Any:
        share = context.share()
        if context.is_trying():
            # Each part would have statistics of its own; when it matters they are those of all rows.
            return self.moving_mean.value, self.moving_variance.value
        if share is None:
            return original(self, inputs, mask)
        mean, variance = original(self, inputs, mask)
        wide, spread = tf.cast(mean, tf.float64), tf.cast(variance, tf.float64)
        number = _values(inputs, mask, self._reduction_axes) * tf.cast(tf.minimum(share.real, 1), tf.float64)
        # In float64, since a mean of squares less the square of the mean loses digits.
        sums = tf.math.multiply_no_nan(tf.concat([wide, spread + wide**2], 0), number)
        return _combined(share, tf.concat([sums, number[None]], 0), mean.dtype)

    return moments


def _combined(share: Share, sums: Any, dtype: Any) -> tuple[Any, Any]:
    total = differentiable.allreduce(share.engine, sums, Reduction(Op.SUM))
    mean, square = tf.split(total[:-1] / total[-1], 2)
    return tf.cast(mean, dtype), tf.cast(tf.maximum(square - mean**2, 0), dtype)


def _values(inputs: Any, mask: Any, axes: Any) -> Any:
    """Returns over how many values of this rank each mean was taken, as a float64 scalar."""
    if mask is None:
        return tf.reduce_prod(tf.cast(tf.gather(tf.shape(inputs), axes), tf.float64))
    return tf.reduce_sum(tf.cast(tf.broadcast_to(mask, tf.shape(inputs)[:-1]), tf.float64))
