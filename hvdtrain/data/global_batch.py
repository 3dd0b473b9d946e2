"""Provide a training step with this rank's number of samples in the global batch, so that each sample counts once.

The ranks' parts of a last batch that is not full differ in size, and the mean of their means is not the mean over
the samples. So each rank's gradient is weighted by its number of samples before it is averaged. Nothing is added to
the batch, for any shape of targets, losses and weights.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from hvdtrain.collectives.engine import Engine

Tensor = Any


class Dealt(NamedTuple):
    """One rank's part of a global batch, with the numbers of samples of this rank and of the global batch.

    If this rank holds no sample, the batch is one row with weight 0.
    """

    batch: Any  # x, (x, y) or (x, y, sample_weight)
    samples: Any  # int64 of shape (2,)


def as_keras(batch: Any) -> Any:
    """Return a batch, or its specification, in the form that Keras expects."""
    return batch.batch if isinstance(batch, Dealt) else batch


def packed(x: Any, y: Any, weight: Any) -> Any:
    """Return x, (x, y) or (x, y, sample_weight), as a training step of Keras takes it."""
    if weight is not None:
        return x, y, weight
    if y is not None:
        return x, y
    return (x,) if isinstance(x, tuple) else x


def refuse_both(sample_weight: Any) -> None:
    """Raise ValueError if there are sample weights where class weights are given."""
    if sample_weight is not None:
        raise ValueError("hvd.shard: give class_weight or a sample_weight, not both, as Keras demands.")


@dataclass(frozen=True)
class GlobalBatch:
    """The global batch of the step that a model runs."""

    model: keras.Model
    engine: Engine  # the ranks that hold the global batch
    batch: Any  # this rank's x, (x, y) or (x, y, sample_weight)
    own: Tensor  # how many samples this rank holds, int64 scalar
    total: Tensor  # how many samples the global batch holds, int64 scalar
    partial: bool  # whether some global batch may not be full; else the ranks' parts are equal
    together: bool  # whether all ranks run this step, so that it may communicate
    losses: Any  # the `Losses` of the model; see `losses.py`

    @property
    def weight(self) -> Tensor:
        """Weight of this rank's mean in the mean over ranks, float64 scalar: 1 if all parts are equal."""
        return tf.cast(self.own * self.engine.size, tf.float64) / tf.cast(self.total, tf.float64)

    @property
    def times_own(self) -> Tensor:
        """Size of the global batch divided by the size of this rank's part, float64 scalar."""
        return tf.cast(self.total, tf.float64) / tf.cast(tf.maximum(self.own, 1), tf.float64)

    def held(self, value: Any) -> Any:
        """Return a nest of tensors without the row of weight 0 on a rank without samples."""
        if not self.partial:
            return value
        return keras.tree.map_structure(self._held, value)

    def _held(self, tensor: Any) -> Any:
        if tensor is None:
            return None
        rows = tf.minimum(self.own, 1) * tf.shape(tensor, tf.int64)[0]
        result = tensor[:rows]
        if getattr(tensor, "_keras_mask", None) is not None:
            result._keras_mask = tensor._keras_mask[:rows]
        return result

    def counts_rows(self, metric: Any) -> bool:
        """Return whether Keras updates a metric with the mean loss of a batch."""
        outputs = getattr(self.model._compile_loss, "metrics", ())
        return metric is self.model._loss_tracker or any(metric is output for output in outputs)


_current: ContextVar[GlobalBatch | None] = ContextVar("the global batch of the step that runs", default=None)


def current() -> GlobalBatch | None:
    """Return the global batch of the running step; None outside of steps on sharded data."""
    return _current.get()


@contextlib.contextmanager
def bound(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    """Set a context variable inside the block."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def during(step: GlobalBatch) -> contextlib.AbstractContextManager[None]:
    """Set the result of `current` inside the block."""
    return bound(_current, step)


def outside_of_batches() -> contextlib.AbstractContextManager[None]:
    """Let `current` return None inside the block."""
    return bound(_current, None)


def weighted(grads: Sequence[Any]) -> list[Any]:
    """Weight one rank's gradients by its number of samples; to be called before they are averaged over ranks.

    Args:
        grads: Tensors, `tf.IndexedSlices` or None, of a mean over this rank's samples.

    Returns:
        A list like `grads`; the same tensors outside of steps on sharded data.
    """
    step = current()
    if step is None or not step.partial:
        return list(grads)
    # Most batches are full: then no multiplication is done, and each gradient can be sent as soon as it is ready.
    equal = tf.equal(step.own * step.engine.size, step.total)
    return [grad if grad is None else _times(grad, step.weight, equal) for grad in grads]


def _times(grad: Any, weight: Tensor, equal: Tensor) -> Any:
    if isinstance(grad, tf.IndexedSlices):
        return tf.IndexedSlices(_times(grad.values, weight, equal), grad.indices, grad.dense_shape)
    result = tf.cond(equal, lambda: grad, lambda: grad * tf.cast(weight, grad.dtype))
    return tf.ensure_shape(result, grad.shape)


@contextlib.contextmanager
def weighted_statistics(step: GlobalBatch) -> Iterator[None]:
    """Weight the step's update of BatchNormalization's moving statistics by this rank's number of samples.

    A rank without samples keeps its statistics. Layers that normalize over all ranks already apply these weights.
    """
    if not step.partial:
        yield
        return
    statistics = [
        variable
        for layer in step.model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization) and layer.built
        if not getattr(layer, "combines_ranks", False)
        for variable in (layer.moving_mean, layer.moving_variance)
    ]
    before = [tf.identity(variable.value) for variable in statistics]
    yield
    for old, variable in zip(before, statistics, strict=True):
        weight = tf.cast(step.weight, old.dtype)
        variable.assign(old + weight * (variable.value - old))


def mean_update(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace `keras.metrics.Mean.update_state`: weight a mean loss by its number of samples."""

    @functools.wraps(original)
    def update_state(self: Any, values: Any, sample_weight: Any = None) -> Any:
        step = current()
        if step is not None and step.partial and step.counts_rows(self):
            if sample_weight is None:
                # In a graph Keras does not know the number of rows and averages the losses of outputs over batches.
                values = values * tf.cast(step.weight, values.dtype)
            else:
                sample_weight = tf.cast(step.own, self.dtype)
        return original(self, values, sample_weight)

    return update_state


def metrics_update(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace the update of compiled metrics: a rank without samples adds nothing."""

    @functools.wraps(original)
    def update_state(self: Any, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        step = current()
        if step is None or self is not step.model._compile_metrics:
            return original(self, y_true, y_pred, sample_weight)
        return original(self, step.held(y_true), step.held(y_pred), step.held(sample_weight))

    return update_state
