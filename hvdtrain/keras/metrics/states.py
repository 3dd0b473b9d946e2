"""Determine how each variable of a metric is combined over the ranks, and whether the result is right."""

from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.trainers.compile_utils import CompileMetrics

from hvdtrain.collectives.engine import Op

# The attribute by which a metric declares how its state is combined.
DECLARATION = "hvdtrain_combine"
OPERATIONS = {"sum": Op.SUM, "max": Op.MAX, "min": Op.MIN}
_TOLERANCE = 1e-3


def leaves(metrics: Iterable[Any]) -> list[Any]:
    """List metrics and the metrics inside them, each once, in the same order on all ranks."""
    found: dict[int, Any] = {}
    waiting = list(metrics)
    while waiting:
        metric = waiting.pop(0)
        if isinstance(metric, CompileMetrics):  # a list of metrics, without variables of its own
            waiting += metric.metrics
        elif id(metric) not in found:
            found[id(metric)] = metric
            waiting += metric._metrics
    return list(found.values())


def compiled(model: Any) -> list[Any]:
    """List what a model was compiled with as metrics: names, functions and metrics."""
    given = model._compile_metrics
    nests = [] if given is None else [given._user_metrics, given._user_weighted_metrics]
    return [metric for metric in keras.tree.flatten(nests) if metric is not None]


def is_custom(metric: Any) -> bool:
    """Return whether a metric has a custom `update_state`; the metrics of Keras only add."""
    return not type(metric).update_state.__module__.startswith("keras.")


def operation(metric: Any, start: np.ndarray) -> Op | None:
    """Return the operation that combines a variable over the ranks; None if it cannot be determined.

    A declaration of the metric has precedence. Otherwise `start`, the variable's value after a reset, decides. It
    must be the neutral element of the operation: 0 for a sum, -inf for a maximum, inf for a minimum.
    """
    declared = getattr(metric, DECLARATION, None)
    if declared is not None and not callable(declared):
        return _declared(metric, declared)
    if not is_custom(metric) or not np.any(start):
        return Op.SUM if start.dtype != bool else Op.MAX
    if start.dtype == bool:
        return Op.MIN if start.all() else None
    lowest, highest = _limits(start.dtype)
    if np.all(start <= lowest):
        return Op.MAX
    return Op.MIN if np.all(start >= highest) else None


def _limits(dtype: np.dtype) -> tuple[float, float]:
    if dtype.kind in "iu":
        return np.iinfo(dtype).min, np.iinfo(dtype).max
    limits = np.finfo(dtype if dtype.kind == "f" else np.float32)
    return float(limits.min), float(limits.max)


def _declared(metric: Any, declared: Any) -> Op:
    if declared not in OPERATIONS:
        raise ValueError(
            f"{type(metric).__name__}.{DECLARATION} must be one of {', '.join(map(repr, OPERATIONS))}, or a "
            f"method. Received: {declared!r}."
        )
    return OPERATIONS[declared]


class Watch:
    """Checks at the first batch whether the state of a custom metric, which is reset, adds up.

    A state that adds up grows by the same amount when the same batch is added a second time. This is tried once,
    on copies of the state, with the first batch that changes it; a maximum that starts from 0, for instance, fails.
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
        changed, equal = [], []
        for variable, *values in zip(variables, start, once, twice, strict=True):
            if operation(self._metric, self.start(variable)) is Op.SUM:
                before, middle, after = (tf.cast(value, tf.float64) for value in values)
                first, second = middle - before, after - middle
                changed.append(tf.reduce_any(first != 0))
                equal.append(tf.reduce_all(tf.abs(second - first) <= _TOLERANCE * tf.abs(first) + 1e-12))
        self._seen.assign(tf.reduce_any(changed))
        self._adds.assign(tf.reduce_all(equal))
        return tf.constant(True)

    def _after(self, values: list[Any], args: Any, kwargs: Any) -> list[Any]:
        mapping = list(zip(self._metric.variables, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping) as scope:
            self._update(*args, **kwargs)
        return [scope.get_current_value(variable) for variable, _ in mapping]


def watch(model: keras.Model) -> None:
    """Attach a `Watch` to each custom metric of a model that has none and declares nothing."""
    # `model.metrics` lacks compiled metrics that the first batch has not built yet.
    unbuilt = [metric for metric in compiled(model) if isinstance(metric, keras.metrics.Metric)]
    new = [
        Watch(metric)
        for metric in leaves([*model.metrics, *unbuilt])
        if is_custom(metric) and watch_of(metric) is None and not hasattr(metric, DECLARATION)
    ]
    if new:  # functions that were traced before do not call them
        model.train_function = model.test_function = None


def watch_of(metric: Any) -> Watch | None:
    """Return the `Watch` of a metric, or None."""
    return vars(metric).get("hvdtrain_watch")
