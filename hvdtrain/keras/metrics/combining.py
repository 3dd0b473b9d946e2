"""Combine the states of all metrics over the ranks while results are computed from them."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvdtrain.collectives.engine import Call, Engine, Op, ranks_text
from hvdtrain.keras.metrics import states
from hvdtrain.keras.metrics.additivity import watch_of

_ADVICE = (
    "Declare it in its class: hvdtrain_combine = 'sum', 'max' or 'min', if this operation combines each of its "
    "variables; or a method hvdtrain_combine(self, states) that gets the states of all ranks, each a list of "
    "NumPy arrays like the metric's variables, and returns the combined state in the same form."
)


@dataclass(frozen=True)
class MetricState:
    """The state of one metric and how to combine it.

    Args:
        metric: The metric.
        variables: Its own variables.
        ops: The operation that combines each variable; None if unknown or if the metric combines them.
        custom: Whether the metric combines them by its method `hvdtrain_combine`.
    """

    metric: Any
    variables: Sequence[Any]
    ops: Sequence[Op | None]
    custom: bool

    @classmethod
    def by(cls, metric: Any) -> "MetricState":
        """Determine how a metric's state is combined."""
        variables, watch = states.variables(metric), watch_of(metric)
        if callable(getattr(metric, states.DECLARATION, None)):
            return cls(metric, variables, [None] * len(variables), custom=True)
        ops = []
        for variable in variables:
            start = watch.start(variable) if watch else np.zeros(variable.shape, variable.dtype)
            ops.append(states.operation(metric, start))
        return cls(metric, variables, ops, custom=False)

    @property
    def problem(self) -> str:
        """Reason why this state cannot be combined; empty if it can."""
        if self.custom or not states.is_custom(self.metric):
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
        ways = ["its own way" if op is None else op.name.lower() for op in self.ops]
        head = f"metric {self.metric.name}, {type(self.metric).__name__}"
        lines = [head]
        for variable, way in zip(self.variables, ways, strict=True):
            lines.append(f"{head}: {variable.name} {variable.dtype} {tuple(variable.shape)}, {way}")
        return lines


@contextlib.contextmanager
def of_all_ranks(engine: Engine, metrics: Iterable[Any], stage: str) -> Iterator[None]:
    """Set metrics inside the block to the state of one process that had seen all samples.

    Args:
        engine: The ranks. All call this.
        metrics: The metrics, alike on all ranks.
        stage: Name of the measurement, for messages.

    Raises:
        ValueError: On every rank, if the state of a metric cannot be combined.
        MismatchError: On every rank, if the ranks have different metrics.
    """
    metric_states = [MetricState.by(metric) for metric in states.leaves(metrics)]
    local = {
        id(variable): (variable, variable.numpy()) for state in metric_states for variable in state.variables
    }
    whole = _combined(engine, metric_states, stage)
    try:
        for variable, value in whole:
            variable.assign(np.asarray(value).astype(local[id(variable)][1].dtype))
        yield
    finally:
        for variable, value in local.values():
            variable.assign(value)


def _combined(engine: Engine, metric_states: Sequence[MetricState], stage: str) -> list[tuple[Any, Any]]:
    problems = np.array([bool(state.problem) for state in metric_states], np.float64)
    call = Call(f"metrics of {stage}", tuple(line for state in metric_states for line in state.described()))
    sums = _chosen(metric_states, Op.SUM)
    problem_counts, *totals = engine.grouped_allreduce([problems, *map(_wide, sums)], Op.SUM, call)
    _refuse(engine, metric_states, problem_counts)
    whole = list(zip(sums, totals, strict=True))
    for op in (Op.MAX, Op.MIN):
        chosen = _chosen(metric_states, op)
        if chosen:
            values = [_wide(variable) for variable in chosen]
            whole += zip(chosen, engine.grouped_allreduce(values, op), strict=True)
    for state in metric_states:
        if state.custom:
            everyone = engine.allgather_object([variable.numpy() for variable in state.variables])
            whole += zip(state.variables, state.metric.hvdtrain_combine(everyone), strict=True)
    return whole


def _refuse(engine: Engine, metric_states: Sequence[MetricState], problem_counts: np.ndarray) -> None:
    """Raise ValueError on all ranks if a rank has met a problem; all ranks know the number of problems."""
    for state, count in zip(metric_states, problem_counts, strict=True):
        if count:
            reasons = engine.allgather_object(state.problem)
            told = [(engine.ranks[i], reason) for i, reason in enumerate(reasons) if reason]
            raise ValueError(
                f"The state of the metric {state.metric.name!r} ({type(state.metric).__name__}) cannot be combined "
                f"over the ranks: {told[0][1]} ({ranks_text([rank for rank, _ in told])}). {_ADVICE}"
            )


def _chosen(metric_states: Sequence[MetricState], op: Op) -> list[Any]:
    variables = [pair for state in metric_states for pair in zip(state.variables, state.ops, strict=True)]
    return [variable for variable, how in variables if how is op]


def _wide(variable: Any) -> np.ndarray:
    """Return a value in a wide type, so that a sum over many ranks neither overflows nor loses digits."""
    value = np.asarray(variable.numpy())
    if value.dtype == bool:
        return value
    return value.astype(np.int64 if value.dtype.kind in "iu" else np.float64)
