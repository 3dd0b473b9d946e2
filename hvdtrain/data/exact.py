"""Loss and metrics over samples where batches hold filler: what a Keras step must know beyond (x, y, weight)."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from hvdtrain.data.part import REAL, SHARE, WEIGHT


@dataclass(frozen=True)
class Step:
    """What is known while a model runs one step on a batch that may hold filler.

    Args:
        model: The model.
        weight: The samples' own weights, not scaled.
        real: Which rows are samples, bool of shape (rows,).
        share: How many samples of the global batch this rank's mean stands for.
    """

    model: keras.Model
    weight: Any
    real: tf.Tensor
    share: tf.Tensor

    def weighs(self, metric: Any) -> bool:
        """Tells whether Keras updates this metric with a mean loss and its number of rows.

        Of the losses of several outputs Keras knows that number only when it runs eagerly; in a graph it
        averages them over batches, and so it shall be.
        """
        if metric is self.model._loss_tracker:
            return True
        outputs = getattr(self.model._compile_loss, "metrics", ())
        return tf.executing_eagerly() and any(metric is each for each in outputs)

    def kept(self, value: Any) -> Any:
        """Returns a nest without the rows that are filler."""
        return keras.tree.map_structure(self._kept, value)

    def _kept(self, tensor: Any) -> Any:
        if tensor is None:
            return None
        result = tf.boolean_mask(tensor, self.real)
        if getattr(tensor, "_keras_mask", None) is not None:
            result._keras_mask = tf.boolean_mask(tensor._keras_mask, self.real)
        return result


current: ContextVar[Step | None] = ContextVar("step on a batch with filler", default=None)


def attach(model: keras.Model) -> None:
    """Makes a model's steps take batches of `Part.exact`; all other batches go through as they are."""
    if getattr(model.train_step, "hvdtrain_exact", False):
        return
    model.train_step = _understanding(model, model.train_step)
    model.test_step = _understanding(model, model.test_step)
    # What was traced before knows the steps of before.
    model.train_function = model.test_function = None


def _understanding(model: keras.Model, original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(original)
    def step(data: Any) -> Any:
        if not (isinstance(data, tuple | list) and len(data) == 3 and _is_exact(data[2])):
            return original(data)
        x, y, known = data
        share = known[SHARE][0]
        scale = tf.cast(tf.size(known[REAL]), share.dtype) / share
        scaled = keras.tree.map_structure(lambda each: each * tf.cast(scale, each.dtype), known[WEIGHT])
        with _during(Step(model, known[WEIGHT], known[REAL], share)):
            return original((x, y, scaled))

    step.hvdtrain_exact = True  # type: ignore[attr-defined]
    return step


def as_keras(batch: Any) -> Any:
    """Returns a batch, or what describes one, without what only a model's steps understand."""
    if isinstance(batch, tuple | list) and len(batch) == 3 and _is_exact(batch[2]):
        return batch[0], batch[1], batch[2][WEIGHT]
    return batch


def _is_exact(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {WEIGHT, REAL, SHARE}


@contextlib.contextmanager
def _during(step: Step) -> Iterator[None]:
    token = current.set(step)
    try:
        yield
    finally:
        current.reset(token)


def mean_update(original: Callable[..., Any]) -> Callable[..., Any]:
    """Changes `keras.metrics.Mean.update_state`: a mean loss weighs as much as the samples it stands for."""

    @functools.wraps(original)
    def update_state(self: Any, values: Any, sample_weight: Any = None) -> Any:
        step = current.get()
        if step is not None and step.weighs(self):
            sample_weight = tf.cast(step.share, self.dtype)
        return original(self, values, sample_weight)

    return update_state


def metrics_update(original: Callable[..., Any]) -> Callable[..., Any]:
    """Changes the update of compiled metrics: they see the samples and the user's weights, and no filler."""

    @functools.wraps(original)
    def update_state(self: Any, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        step = current.get()
        if step is None or self is not step.model._compile_metrics:
            return original(self, y_true, y_pred, sample_weight)
        return original(self, step.kept(y_true), step.kept(y_pred), step.kept(step.weight))

    return update_state
