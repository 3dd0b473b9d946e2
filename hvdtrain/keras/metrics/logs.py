"""The logs of `fit` and `evaluate` at the one point where Keras computes them, for the samples of all ranks."""

from collections.abc import Callable
from typing import Any, Protocol

import keras
import numpy as np

from hvdtrain.collectives.engine import Call, Engine
from hvdtrain.keras.metrics import combining

_SEAM = "_get_metrics_result_or_logs"


class Reader(Protocol):
    """Who turns a rank's logs into those of all ranks, while `fit` or `evaluate` runs."""

    def of_all_ranks(self, compute: Callable[[Any], Any], logs: Any) -> Any:
        """Returns the logs of all ranks.

        Args:
            compute: What Keras would do.
            logs: What the last step returned.
        """


class Seam:
    """Stands on a model in place of the method by which `fit` and `evaluate` compute their final logs.

    Args:
        model: The model.
    """

    def __init__(self, model: keras.Model) -> None:
        self._compute = getattr(model, _SEAM)
        self.readers: list[Reader] = []

    def __call__(self, logs: Any) -> Any:
        """Returns what `fit` and `evaluate` report."""
        return self.readers[-1].of_all_ranks(self._compute, logs)


def begin(model: keras.Model, reader: Reader, alone: bool = False) -> None:
    """Lets a reader stand between a model and its logs; the last one that came does the work.

    Args:
        model: The model.
        reader: Who reads.
        alone: Forgets readers that are there already, because an error kept them from ending.
    """
    if alone:
        vars(model).pop(_SEAM, None)
    if _SEAM not in vars(model):
        vars(model)[_SEAM] = Seam(model)
    vars(model)[_SEAM].readers.append(reader)


def end(model: keras.Model, reader: Reader) -> None:
    """Undoes `begin`; when no reader is left the model is as it was."""
    seam = vars(model).get(_SEAM)
    if seam is not None and reader in seam.readers:
        seam.readers.remove(reader)
        if not seam.readers:
            del vars(model)[_SEAM]


def exact(engine: Engine, model: keras.Model, logs: Any, stage: str, weight: float) -> dict[str, Any]:
    """Computes logs from the samples of all ranks. All ranks call this.

    What a step of the user's own returns under names that are none of the model's metrics is looked for among
    their results; what is none of them is averaged over the ranks.

    Args:
        engine: The ranks.
        model: The model whose metrics have seen this rank's samples.
        logs: What the last step returned.
        stage: What has been measured, for messages.
        weight: How much this rank's values weigh in an average, usually its number of samples.

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
    """Averages values over the ranks; those that are the same on all ranks stay as they are, to the bit.

    Args:
        engine: The ranks. All call this.
        logs: Numbers, by names that are the same on all ranks.
        stage: What has been measured, for messages.
        weights: How much this rank's value of each name weighs.

    Raises:
        MismatchError: On every rank, if the names differ.
    """
    names = sorted(logs)
    engine.agree(Call(f"logs of {stage}", tuple(names)))
    everyone = engine.allgather_object(
        [(np.asarray(logs[name], np.float64), weights[name]) for name in names]
    )
    return {name: _mean([each[index] for each in everyone]) for index, name in enumerate(names)}


def _mean(parts: list[tuple[np.ndarray, float]]) -> Any:
    values = np.stack([value for value, _ in parts])
    weights = np.array([weight for _, weight in parts])
    if np.all(values == values[0]):
        return _plain(values[0])
    return _plain(np.average(values, axis=0, weights=weights if weights.sum() > 0 else None))


def _sources(engine: Engine, own: dict[str, Any], logs: dict[str, Any], stage: str) -> dict[str, str]:
    """Finds, for each name in the logs, the metric whose result it is, on every rank."""
    engine.agree(Call(f"logs of {stage}", tuple(sorted(logs))))
    mine = {name: [other for other in own if _same(own[other], logs[name])] for name in logs}
    everyone = engine.allgather_object(mine)
    shared = {
        name: [other for other in mine[name] if all(other in each[name] for each in everyone)]
        for name in logs
    }
    return {name: name if name in found else found[0] for name, found in shared.items() if found}


def _same(result: Any, value: Any) -> bool:
    result, value = np.asarray(result), np.asarray(value)
    return result.shape == value.shape and np.allclose(result, value, rtol=1e-6, atol=0, equal_nan=True)


def _results(model: keras.Model) -> dict[str, Any]:
    """Computes the results of all metrics and takes them out of the variables, which are about to change."""
    return {
        name: keras.tree.map_structure(_plain, value) for name, value in model.get_metrics_result().items()
    }


def _plain(value: Any) -> Any:
    array = np.asarray(keras.ops.convert_to_numpy(value))
    return array.item() if array.ndim == 0 else array.copy()
