"""Compute the logs of `fit` and `evaluate` from the samples of all ranks, in place of the method of Keras."""

from collections.abc import Callable
from typing import Any, Protocol

import keras
import numpy as np

from hvdtrain.collectives.engine import Call, Engine
from hvdtrain.keras.metrics import combining

_METHOD = "_get_metrics_result_or_logs"


class LogsReader(Protocol):
    """An object that computes the logs of all ranks while `fit` or `evaluate` runs."""

    def of_all_ranks(self, compute: Callable[[Any], Any], logs: Any) -> Any:
        """Return the logs of all ranks.

        Args:
            compute: The original method of Keras.
            logs: The result of the last step.
        """


class LogsMethod:
    """Replacement for the method of a model by which `fit` and `evaluate` compute their final logs.

    Args:
        model: The model.
    """

    def __init__(self, model: keras.Model) -> None:
        self._compute = getattr(model, _METHOD)
        self.readers: list[LogsReader] = []

    def __call__(self, logs: Any) -> Any:
        """Return the logs that `fit` and `evaluate` report."""
        return self.readers[-1].of_all_ranks(self._compute, logs)


def begin(model: keras.Model, reader: LogsReader, alone: bool = False) -> None:
    """Let a reader compute the logs of a model; of several readers the last one added does.

    Args:
        model: The model.
        reader: The reader to add.
        alone: Whether to remove readers that an earlier `fit`, ended by an error, has left.
    """
    if alone:
        vars(model).pop(_METHOD, None)
    if _METHOD not in vars(model):
        vars(model)[_METHOD] = LogsMethod(model)
    vars(model)[_METHOD].readers.append(reader)


def end(model: keras.Model, reader: LogsReader) -> None:
    """Undo `begin`; without readers the model has its original method again."""
    method = vars(model).get(_METHOD)
    if method is not None and reader in method.readers:
        method.readers.remove(reader)
        if not method.readers:
            del vars(model)[_METHOD]


def exact(engine: Engine, model: keras.Model, logs: Any, stage: str, weight: float) -> dict[str, Any]:
    """Compute logs from the samples of all ranks. All ranks call this.

    A custom training step may return values under names that no metric of the model has. A value that equals the
    result of a metric is replaced by the combined result; other values are averaged over the ranks.

    Args:
        engine: The ranks.
        model: The model whose metrics have seen this rank's samples.
        logs: The result of the last step.
        stage: Name of the measurement, for messages.
        weight: Weight of this rank's values in an average, usually its number of samples.

    Returns:
        The logs, with plain numbers, the same on all ranks.
    """
    own = _results(model)
    with combining.of_all_ranks(engine, model.metrics, stage):
        whole = _results(model)
    if set(logs) == set(own):
        return whole
    sources = _sources(engine, own, logs, stage)
    rest = {name: value for name, value in logs.items() if name not in sources}
    averaged = average(engine, rest, stage, dict.fromkeys(rest, weight))
    return {name: whole[sources[name]] if name in sources else averaged[name] for name in logs}


def average(engine: Engine, logs: dict[str, Any], stage: str, weights: dict[str, float]) -> dict[str, Any]:
    """Average values over the ranks; values that are the same on all ranks are returned bit for bit.

    Args:
        engine: The ranks. All call this.
        logs: Numbers, by names that are the same on all ranks.
        stage: Name of the measurement, for messages.
        weights: Weight of this rank's value of each name.

    Raises:
        MismatchError: On every rank, if the names differ.
    """
    names = sorted(logs)
    engine.agree(Call(f"logs of {stage}", tuple(names)))
    everyone = engine.allgather_object(
        [(np.asarray(logs[name], np.float64), weights[name]) for name in names]
    )
    return {name: _mean([values[index] for values in everyone]) for index, name in enumerate(names)}


def _mean(parts: list[tuple[np.ndarray, float]]) -> Any:
    values = np.stack([value for value, _ in parts])
    weights = np.array([weight for _, weight in parts])
    if np.all(values == values[0]):
        return _plain(values[0])
    return _plain(np.average(values, axis=0, weights=weights if weights.sum() > 0 else None))


def _sources(engine: Engine, own: dict[str, Any], logs: dict[str, Any], stage: str) -> dict[str, str]:
    """Find for each name in the logs the metric that has the same value on every rank."""
    engine.agree(Call(f"logs of {stage}", tuple(sorted(logs))))
    mine = {name: [other for other in own if _same(own[other], logs[name])] for name in logs}
    everyone = engine.allgather_object(mine)
    shared = {
        name: [other for other in mine[name] if all(other in matches[name] for matches in everyone)]
        for name in logs
    }
    return {name: name if name in found else found[0] for name, found in shared.items() if found}


def _same(result: Any, value: Any) -> bool:
    result, value = np.asarray(result), np.asarray(value)
    return result.shape == value.shape and np.allclose(result, value, rtol=1e-6, atol=0, equal_nan=True)


def _results(model: keras.Model) -> dict[str, Any]:
    """Compute the results of all metrics as plain values, because the variables will change."""
    return {
        name: keras.tree.map_structure(_plain, value) for name, value in model.get_metrics_result().items()
    }


def _plain(value: Any) -> Any:
    array = np.asarray(keras.ops.convert_to_numpy(value))
    return array.item() if array.ndim == 0 else array.copy()
