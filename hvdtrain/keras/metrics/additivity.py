"""Finds out from a training's first batch whether what a user's own metric keeps can be added up over the ranks."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdtrain.collectives.engine import Op
from hvdtrain.keras.metrics import states

_TOLERANCE = 1e-3


class Watch:
    """Stands beside a metric of the user's own and judges whether its state adds up.

    A state that adds up grows by the same amount when the same batch comes a second time. That is tried once,
    aside, on the first batch that changes the state at all; a maximum kept from 0 on, for instance, fails.

    Args:
        metric: The metric, which is reset.
    """

    def __init__(self, metric: Any) -> None:
        self._metric = metric
        self._update: Callable[..., Any] = metric.update_state
        metric.reset_state()
        self._start = {id(each): each.numpy() for each in metric.variables}
        self._seen = tf.Variable(False, trainable=False)
        self._adds = tf.Variable(True, trainable=False)
        vars(metric).update(update_state=self._update_and_judge, hvdtrain_watch=self)

    @property
    def adds(self) -> bool:
        """False once a batch has shown that the state does not add up."""
        return bool(self._adds)

    def start(self, variable: Any) -> np.ndarray:
        """Returns a variable's value after a reset: zeros, if the metric had not made it yet."""
        return self._start.get(id(variable), np.zeros(variable.shape, variable.dtype))

    def _update_and_judge(self, *args: Any, **kwargs: Any) -> Any:
        result = self._update(*args, **kwargs)
        if not keras.src.backend.in_stateless_scope():
            tf.cond(self._seen, lambda: tf.constant(True), lambda: self._judge(args, kwargs))
        return result

    def _judge(self, args: Any, kwargs: Any) -> Any:
        start = [tf.convert_to_tensor(self.start(each)) for each in self._metric.variables]
        once = self._after(start, args, kwargs)
        twice = self._after(once, args, kwargs)
        summed = [
            states.operation(self._metric, self.start(each)) is Op.SUM for each in self._metric.variables
        ]
        steps = [
            _steps(*each)
            for each, adds in zip(zip(start, once, twice, strict=True), summed, strict=True)
            if adds
        ]
        self._seen.assign(tf.reduce_any([tf.reduce_any(first != 0) for first, _ in steps]))
        self._adds.assign(tf.reduce_all([_equal(first, second) for first, second in steps]))
        return tf.constant(True)

    def _after(self, values: list[Any], args: Any, kwargs: Any) -> list[Any]:
        mapping = list(zip(self._metric.variables, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping) as scope:
            self._update(*args, **kwargs)
        return [scope.get_current_value(each) for each, _ in mapping]


def watch(model: keras.Model) -> None:
    """Puts a watch beside each of a model's metrics that is the user's own, unless there is one."""
    new = [
        Watch(metric)
        for metric in states.of_model(model)
        if states.is_custom(metric) and watch_of(metric) is None and not hasattr(metric, states.DECLARATION)
    ]
    if new:  # what was traced before does not know them
        model.train_function = model.test_function = None


def watch_of(metric: Any) -> Watch | None:
    """Returns the watch beside a metric, if there is one."""
    return vars(metric).get("hvdtrain_watch")


def _steps(start: Any, once: Any, twice: Any) -> tuple[Any, Any]:
    start, once, twice = (tf.cast(each, tf.float64) for each in (start, once, twice))
    return once - start, twice - once


def _equal(first: Any, second: Any) -> Any:
    return tf.reduce_all(tf.abs(second - first) <= _TOLERANCE * tf.abs(first) + 1e-12)
