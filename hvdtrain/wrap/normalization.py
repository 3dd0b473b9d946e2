"""Compute the statistics of `BatchNormalization` over the whole batch, not over the rows of one rank."""

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
    """Change `keras.layers.BatchNormalization`, for the time in which a model computes the rows of a rank."""
    replace(keras.layers.BatchNormalization, "_moments", _of_all_rows)


def _of_all_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    def moments(self: Any, inputs: Any, mask: Any) -> Any:
        share = context.share()
        if context.is_testing():
            # The statistics of each part would differ. In training they are computed over all rows.
            return self.moving_mean.value, self.moving_variance.value
        if share is None:
            return original(self, inputs, mask)
        mean, variance = original(self, inputs, mask)
        wide, spread = tf.cast(mean, tf.float64), tf.cast(variance, tf.float64)
        count = _value_count(inputs, mask, self._reduction_axes) * tf.cast(
            tf.minimum(share.real, 1), tf.float64
        )
        # In float64, because the mean of squares minus the square of the mean loses digits.
        sums = tf.math.multiply_no_nan(tf.concat([wide, spread + wide**2], 0), count)
        return _combined(share, tf.concat([sums, count[None]], 0), mean.dtype)

    return moments


def _combined(share: Share, sums: Any, dtype: Any) -> tuple[Any, Any]:
    total = differentiable.allreduce(share.engine, sums, Reduction(Op.SUM))
    mean, square = tf.split(total[:-1] / total[-1], 2)
    return tf.cast(mean, dtype), tf.cast(tf.maximum(square - mean**2, 0), dtype)


def _value_count(inputs: Any, mask: Any, axes: Any) -> Any:
    """Return the number of values on this rank in each mean, as a float64 scalar."""
    if mask is None:
        return tf.reduce_prod(tf.cast(tf.gather(tf.shape(inputs), axes), tf.float64))
    return tf.reduce_sum(tf.cast(tf.broadcast_to(mask, tf.shape(inputs)[:-1]), tf.float64))
