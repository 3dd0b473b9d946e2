"""Normalise by the statistics of all ranks: in each batch, with a layer; or before validation, with a callback."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdtrain import runtime
from hvdtrain.backends.tensorflow import differentiable
from hvdtrain.collectives.engine import Call, Op
from hvdtrain.collectives.reduction import Reduction
from hvdtrain.data import global_batch
from hvdtrain.keras.membership import engine_of


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
        samples = _samples(inputs, mask, self._reduction_axes)
        reduction = Reduction(Op.SUM)
        return moments_of_all(
            mean, variance, samples, lambda sums: differentiable.allreduce(engine, sums, reduction)
        )


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


def moments_of_all(
    mean: Any, variance: Any, samples: Any, sum_over_ranks: Callable[[Any], Any]
) -> tuple[Any, Any]:
    """Return mean and variance of the samples of all ranks.

    Args:
        mean: Mean of this rank's samples, of shape (channels,).
        variance: Their variance, likewise.
        samples: Their number, a float64 scalar.
        sum_over_ranks: Sums a float64 vector of sums, sums of squares and the number over the ranks.
    """
    # In float64, because the mean of squares minus the square of the mean loses digits.
    own_mean, own_variance = tf.cast(mean, tf.float64), tf.cast(variance, tf.float64)
    # The mean of a rank without samples is NaN.
    sums = tf.math.multiply_no_nan(tf.concat([own_mean, own_variance + own_mean**2], axis=0), samples)
    total = sum_over_ranks(tf.concat([sums, samples[None]], axis=0))
    mean_of_all, square = tf.split(total[:-1] / total[-1], 2)
    variance_of_all = tf.maximum(square - mean_of_all**2, 0)
    return tf.cast(mean_of_all, mean.dtype), tf.cast(variance_of_all, mean.dtype)


class AverageBatchNormStatistics(keras.callbacks.Callback):
    """Averages BatchNormalization's moving statistics, so that all ranks validate and save the same model.

    In training each rank normalises by its own batch, so its moving mean and variance differ from those of other
    ranks. Before each validation, and at the end of each epoch before the callbacks that follow (put it first),
    they are replaced by the statistics of all ranks' samples: the mean of the means, and the variance around it,
    mean(variance + mean²) - mean². Frozen layers are not changed, nor is `hvd.SyncBatchNormalization`, whose
    statistics are the same on all ranks already. `hvd.callbacks.distributed` adds this callback.

    Args:
        save_freq: `"epoch"`, or a number of batches after which to average too, as for a `ModelCheckpoint` with
            the same `save_freq`.
    """

    def __init__(self, save_freq: str | int = "epoch") -> None:
        super().__init__()
        self.save_freq = save_freq
        self._differ = False
        self._seen = self._last = 0

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Record that the statistics differ between ranks, and average every `save_freq` batches."""
        self._differ = True
        if self.save_freq == "epoch":
            return
        self._seen += batch - self._last if batch > self._last else batch + 1  # as ModelCheckpoint counts
        self._last = batch
        if self._seen >= int(self.save_freq):
            self._seen = 0
            self._average()

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Average before a validation."""
        self._average()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Average before other callbacks save the model at the end of an epoch."""
        self._average()

    def _average(self) -> None:
        engine = engine_of(self.model)
        if engine.size == 1 or not self._differ:
            return
        self._differ = False
        layers = [layer for layer in self.model._flatten_layers() if _has_own_statistics(layer)]
        means = [layer.moving_mean.numpy().astype(np.float64) for layer in layers]
        squares = [
            layer.moving_variance.numpy().astype(np.float64) + mean**2
            for layer, mean in zip(layers, means, strict=True)
        ]
        call = Call(
            "statistics of BatchNormalization",
            tuple(f"{layer.name} {layer.moving_mean.shape}" for layer in layers),
        )
        both = engine.grouped_allreduce([*means, *squares], "average", call)
        for layer, mean, square in zip(layers, both, both[len(layers) :], strict=False):
            layer.moving_mean.assign(mean)
            layer.moving_variance.assign(np.maximum(square - mean**2, 0))


def _has_own_statistics(layer: Any) -> bool:
    normalises = isinstance(layer, keras.layers.BatchNormalization)
    return normalises and not isinstance(layer, SyncBatchNormalization) and layer.built and layer.trainable
