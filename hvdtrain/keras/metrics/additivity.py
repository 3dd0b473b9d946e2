"""Determine from the first batch whether the state of a custom metric can be summed over ranks."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdtrain.collectives.engine import Op
from hvdtrain.keras.metrics import states

_TOLERANCE = 1e-3


class Watch:
    """Checks at the first batch whether the state of a custom metric adds up.

    A state that adds up grows by the same amount when the same batch is added a second time. This is tried once,
    on copies of the state, with the first batch that changes it; a maximum that starts from 0, for instance, fails.

    Args:
        metric: The metric, which is reset.
    """

    def __init__(self, metric: Any) -> None:
        self._metric = metric
        self._update: Callable[..., Any] = metric.update_state
        metric.reset_state()
        self._start = {id(variable): variable.numpy() for variable in metric.variables}
        self._seen = tf.Variable(False, trainable=False)
        self._adds = tf.Variable(True, trainable=False)
        vars(metric).update(update_state=self._update_and_judge, hvdtrain_watch=self)

    @property
    def adds(self) -> bool:
        """Whether the state adds up; True until a batch has shown the contrary."""
        return bool(self._adds)

    def start(self, variable: Any) -> np.ndarray:
        """Return a variable's value after a reset; zeros, if the variable was created later."""
        return self._start.get(id(variable), np.zeros(variable.shape, variable.dtype))

    def _update_and_judge(self, *args: Any, **kwargs: Any) -> Any:
        result = self._update(*args, **kwargs)
        if not keras.src.backend.in_stateless_scope():
            tf.cond(self._seen, lambda: tf.constant(True), lambda: self._judge(args, kwargs))
        return result

    def _judge(self, args: Any, kwargs: Any) -> Any:
        variables = self._metric.variables
        start = [tf.convert_to_tensor(self.start(variable)) for variable in variables]
        once = self._after(start, args, kwargs)
        twice = self._after(once, args, kwargs)
        steps = []
        for variable, *values in zip(variables, start, once, twice, strict=True):
            if states.operation(self._metric, self.start(variable)) is Op.SUM:
                steps.append(_steps(*values))
        self._seen.assign(tf.reduce_any([tf.reduce_any(first != 0) for first, _ in steps]))
        self._adds.assign(tf.reduce_all([_equal(first, second) for first, second in steps]))
        return tf.constant(True)

    def _after(self, values: list[Any], args: Any, kwargs: Any) -> list[Any]:
        mapping = list(zip(self._metric.variables, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping) as scope:
            self._update(*args, **kwargs)
        return [scope.get_current_value(variable) for variable, _ in mapping]


def watch(model: keras.Model) -> None:
    """Attach a `Watch` to each custom metric of a model that has none and declares nothing."""
    new = [
        Watch(metric)
        for metric in states.of_model(model)
        if states.is_custom(metric) and watch_of(metric) is None and not hasattr(metric, states.DECLARATION)
    ]
    if new:  # functions that were traced before do not call them
        model.train_function = model.test_function = None


def watch_of(metric: Any) -> Watch | None:
    """Return the `Watch` of a metric, or None."""
    return vars(metric).get("hvdtrain_watch")


def _steps(start: Any, once: Any, twice: Any) -> tuple[Any, Any]:
    start, once, twice = (tf.cast(value, tf.float64) for value in (start, once, twice))
    return once - start, twice - once


def _equal(first: Any, second: Any) -> Any:
    return tf.reduce_all(tf.abs(second - first) <= _TOLERANCE * tf.abs(first) + 1e-12)
