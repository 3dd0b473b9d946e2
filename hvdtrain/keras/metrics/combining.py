"""Compute logs from the samples of all ranks: combine the states of metrics, and average other values."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from hvdtrain.collectives.engine import Call, Engine, Op, ranks_text
from hvdtrain.keras.metrics.states import DECLARATION, is_custom, leaves, operation, watch_of

_ADVICE = (
    "Declare it in its class: hvdtrain_combine = 'sum', 'max' or 'min', if this operation combines each of its "
    "variables; or a method hvdtrain_combine(self, states) that gets the states of all ranks, each a list of "
    "NumPy arrays like the metric's variables, and returns the combined state in the same form."
)


class _State:
    """The own variables of one metric, without those of metrics inside it, and how each is combined.

    Attributes:
        combines: Whether the metric combines them by its method `hvdtrain_combine`.
        ops: The operation for each variable; None if unknown or if the metric combines them.
    """

    def __init__(self, metric: Any) -> None:
        self.metric = metric
        self.variables = list(metric._variables)
        self.combines = callable(getattr(metric, DECLARATION, None))
        self.ops = [None if self.combines else self._operation(variable) for variable in self.variables]

    def _operation(self, variable: Any) -> Op | None:
        watch = watch_of(self.metric)
        start = watch.start(variable) if watch else np.zeros(variable.shape, variable.dtype)
        return operation(self.metric, start)

    @property
    def problem(self) -> str:
        """Reason why this state cannot be combined; empty if it can."""
        if self.combines or not is_custom(self.metric):
            return ""
        unknown = [variable.name for variable, op in zip(self.variables, self.ops, strict=True) if op is None]
        watch = watch_of(self.metric)
        if unknown:
            return f"its variable {unknown[0]!r} starts neither from 0, as a sum, nor from inf or -inf"
        if watch is not None and not watch.adds:
            return "the same batch changes it differently the second time than the first time"
        return "" if self.metric.variables else "it keeps nothing in variables of add_weight"

    def described(self) -> list[str]:
        """Return lines with the facts that must be the same on all ranks."""
        head = f"metric {self.metric.name}, {type(self.metric).__name__}"
        lines = [head]
        for variable, op in zip(self.variables, self.ops, strict=True):
            way = "its own way" if op is None else op.name.lower()
            lines.append(f"{head}: {variable.name} {variable.dtype} {tuple(variable.shape)}, {way}")
        return lines


def exact_logs(engine: Engine, model: keras.Model, logs: Any, stage: str, weight: float) -> dict[str, Any]:
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

    Raises:
        ValueError: On every rank, if the state of a metric cannot be combined.
        MismatchError: On every rank, if the ranks have different metrics.
    """
    own = _results(model)
    with _states_of_all_ranks(engine, model.metrics, stage):
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
    mine = [(np.asarray(logs[name], np.float64), weights[name]) for name in names]
    everyone = engine.allgather_object(mine)
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
    sources = {}
    for name in logs:
        shared = [other for other in mine[name] if all(other in matches[name] for matches in everyone)]
        if shared:
            sources[name] = name if name in shared else shared[0]
    return sources


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


@contextlib.contextmanager
def _states_of_all_ranks(engine: Engine, metrics: Iterable[Any], stage: str) -> Iterator[None]:
    """Set metrics inside the block to the state of one process that had seen all samples."""
    states = [_State(metric) for metric in leaves(metrics)]
    local = [(variable, variable.numpy()) for state in states for variable in state.variables]
    whole = _combined(engine, states, stage)
    try:
        for variable, value in whole:
            variable.assign(np.asarray(value).astype(variable.numpy().dtype))
        yield
    finally:
        for variable, value in local:
            variable.assign(value)


def _combined(engine: Engine, states: Sequence[_State], stage: str) -> list[tuple[Any, Any]]:
    problems = np.array([bool(state.problem) for state in states], np.float64)
    call = Call(f"metrics of {stage}", tuple(line for state in states for line in state.described()))
    sums = _chosen(states, Op.SUM)
    problem_counts, *totals = engine.grouped_allreduce([problems, *map(_wide, sums)], Op.SUM, call)
    _refuse(engine, states, problem_counts)
    whole = list(zip(sums, totals, strict=True))
    for op in (Op.MAX, Op.MIN):
        chosen = _chosen(states, op)
        if chosen:
            values = [_wide(variable) for variable in chosen]
            whole += zip(chosen, engine.grouped_allreduce(values, op), strict=True)
    for state in states:
        if state.combines:
            everyone = engine.allgather_object([variable.numpy() for variable in state.variables])
            whole += zip(state.variables, state.metric.hvdtrain_combine(everyone), strict=True)
    return whole


def _refuse(engine: Engine, states: Sequence[_State], problem_counts: np.ndarray) -> None:
    """Raise ValueError on all ranks if a rank has met a problem; all ranks know the number of problems."""
    for state, count in zip(states, problem_counts, strict=True):
        if count:
            reasons = engine.allgather_object(state.problem)
            told = [(engine.ranks[i], reason) for i, reason in enumerate(reasons) if reason]
            raise ValueError(
                f"The state of the metric {state.metric.name!r} ({type(state.metric).__name__}) cannot be combined "
                f"over the ranks: {told[0][1]} ({ranks_text([rank for rank, _ in told])}). {_ADVICE}"
            )


def _chosen(states: Sequence[_State], op: Op) -> list[Any]:
    pairs = [pair for state in states for pair in zip(state.variables, state.ops, strict=True)]
    return [variable for variable, how in pairs if how is op]


def _wide(variable: Any) -> np.ndarray:
    """Return a value in a wide type, so that a sum over many ranks neither overflows nor loses digits."""
    value = np.asarray(variable.numpy())
    if value.dtype == bool:
        return value
    return value.astype(np.int64 if value.dtype.kind in "iu" else np.float64)
