"""List the variables of metrics, and choose the operation that combines each over the ranks."""

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from keras.src.trainers.compile_utils import CompileMetrics

from hvdtrain.collectives.engine import Op

# The attribute by which a metric declares how its state is combined.
DECLARATION = "hvdtrain_combine"
OPERATIONS = {"sum": Op.SUM, "max": Op.MAX, "min": Op.MIN}


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


def of_model(model: Any) -> list[Any]:
    """List a model's metrics, including compiled ones that the first batch has not built yet."""
    compiled = model._compile_metrics
    given = [compiled._user_metrics, compiled._user_weighted_metrics] if compiled is not None else []
    waiting = [metric for metric in keras.tree.flatten(given) if isinstance(metric, keras.metrics.Metric)]
    return leaves([*model.metrics, *waiting])


def variables(metric: Any) -> list[Any]:
    """List a metric's own variables, without those of the metrics inside it."""
    return list(metric._variables)


def is_custom(metric: Any) -> bool:
    """Return whether a metric has a custom `update_state`; the metrics of Keras only add."""
    return not type(metric).update_state.__module__.startswith("keras.")


def operation(metric: Any, start: np.ndarray) -> Op | None:
    """Return the operation that combines a variable over the ranks; None if it cannot be determined.

    A declaration of the metric has precedence. Otherwise the initial value of the variable decides, which must be
    the neutral element of the operation: 0 for a sum, -inf for a maximum, inf for a minimum.

    Args:
        metric: The metric.
        start: The variable's value when the metric is reset.
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
