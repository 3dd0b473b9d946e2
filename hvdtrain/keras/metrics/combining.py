"""The ranks' states of all metrics become one, for as long as results are computed from it."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvdtrain.collectives.engine import Call, Engine, Op, ranks_text
from hvdtrain.keras.metrics import states
from hvdtrain.keras.metrics.additivity import watch_of

_CURE = (
    "Say how in its class: hvdtrain_combine = 'sum', 'max' or 'min', if one of these makes the whole of its "
    "variables; or a method hvdtrain_combine(self, states) that gets the states of all ranks, each a list of "
    "NumPy arrays like the metric's variables, and returns the whole in the same form."
)


@dataclass(frozen=True)
class Kept:
    """What one metric keeps.

    Args:
        metric: The metric.
        variables: Its own variables.
        ops: How each is combined, None where that is not known.
        own_way: Whether the metric combines them itself.
    """

    metric: Any
    variables: Sequence[Any]
    ops: Sequence[Op | None]
    own_way: bool

    @classmethod
    def by(cls, metric: Any) -> "Kept":
        """Finds out how a metric's state is combined."""
        variables, watch = states.variables(metric), watch_of(metric)
        starts = [watch.start(each) if watch else np.zeros(each.shape, each.dtype) for each in variables]
        own_way = callable(getattr(metric, states.DECLARATION, None))
        ops = [None if own_way else states.operation(metric, start) for start in starts]
        return cls(metric, variables, ops, own_way)

    @property
    def problem(self) -> str:
        """Says what stands in the way of combining this state; nothing if all is well."""
        if self.own_way or not states.is_custom(self.metric):
            return ""
        unknown = [each.name for each, op in zip(self.variables, self.ops, strict=True) if op is None]
        watch = watch_of(self.metric)
        if unknown:
            return f"its variable {unknown[0]!r} starts neither from 0, as a sum, nor from inf or -inf"
        if watch is not None and not watch.adds:
            return "a batch that comes a second time does not change it as it did the first time"
        return "" if self.metric.variables else "it keeps nothing in variables that add_weight made"

    def described(self) -> list[str]:
        """Says in lines what must be the same on all ranks."""
        ways = ["its own way" if op is None else op.name.lower() for op in self.ops]
        head = f"metric {self.metric.name}, {type(self.metric).__name__}"
        lines = zip(self.variables, ways, strict=True)
        return [
            head,
            *(f"{head}: {each.name} {each.dtype} {tuple(each.shape)}, {way}" for each, way in lines),
        ]


@contextlib.contextmanager
def of_all_ranks(engine: Engine, metrics: Iterable[Any], stage: str) -> Iterator[None]:
    """Gives metrics, for a while, the state that they would have if one process had seen all samples.

    Args:
        engine: The ranks. All call this.
        metrics: The metrics, alike on all ranks.
        stage: What has been measured, for messages.

    Raises:
        ValueError: On every rank, if the state of a metric cannot be combined.
        MismatchError: On every rank, if the ranks do not measure the same.
    """
    kept = [Kept.by(metric) for metric in states.leaves(metrics)]
    local = {id(each): (each, each.numpy()) for part in kept for each in part.variables}
    whole = _combined(engine, kept, stage)
    try:
        for variable, value in whole:
            variable.assign(np.asarray(value).astype(local[id(variable)][1].dtype))
        yield
    finally:
        for variable, value in local.values():
            variable.assign(value)


def _combined(engine: Engine, kept: Sequence[Kept], stage: str) -> list[tuple[Any, Any]]:
    problems = np.array([bool(each.problem) for each in kept], np.float64)
    call = Call(f"metrics of {stage}", tuple(line for each in kept for line in each.described()))
    sums = _chosen(kept, Op.SUM)
    against, *totals = engine.grouped_allreduce([problems, *map(_wide, sums)], Op.SUM, call)
    _refuse(engine, kept, against)
    whole = list(zip(sums, totals, strict=True))
    for op in (Op.MAX, Op.MIN):
        if chosen := _chosen(kept, op):
            whole += zip(chosen, engine.grouped_allreduce([_wide(each) for each in chosen], op), strict=True)
    for each in kept:
        if each.own_way:
            everyone = engine.allgather_object([variable.numpy() for variable in each.variables])
            whole += zip(each.variables, each.metric.hvdtrain_combine(everyone), strict=True)
    return whole


def _refuse(engine: Engine, kept: Sequence[Kept], against: np.ndarray) -> None:
    """Raises on all ranks alike, since all know how many ranks have met a problem."""
    for each, ranks in zip(kept, against, strict=True):
        if ranks:
            told = [
                (engine.ranks[i], text)
                for i, text in enumerate(engine.allgather_object(each.problem))
                if text
            ]
            raise ValueError(
                f"The state of the metric {each.metric.name!r} ({type(each.metric).__name__}) cannot be combined "
                f"over the ranks: {told[0][1]} ({ranks_text([rank for rank, _ in told])}). {_CURE}"
            )


def _chosen(kept: Sequence[Kept], op: Op) -> list[Any]:
    return [
        variable for each in kept for variable, how in zip(each.variables, each.ops, strict=True) if how is op
    ]


def _wide(variable: Any) -> np.ndarray:
    """Returns a value in a type in which a sum over many ranks neither overflows nor rounds much."""
    value = np.asarray(variable.numpy())
    if value.dtype == bool:
        return value
    return value.astype(np.int64 if value.dtype.kind in "iu" else np.float64)
