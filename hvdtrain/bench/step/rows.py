"""The arithmetic of `hvdtrain bench step`: from seconds a step to pace, efficiency and memory."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hvdtrain.bench.models.workloads import Workload
from hvdtrain.bench.report import Row, Spread
from hvdtrain.bench.step.contenders import ALONE, SILENT, WRAPPED, Entrant
from hvdtrain.bench.step.options import Options

WEAK, STRONG = "weak", "strong"

Seconds = Mapping[int, float]  # a step's, by round


@dataclass(frozen=True)
class Scaling:
    """What came of the rounds with one size of batch.

    Args:
        seconds: A step's, by contender and round.
        slowest: The same of its slowest process.
        ends: What the ranks of each contender said of themselves after the rounds.
    """

    seconds: dict[str, dict[int, float]] = field(default_factory=dict)
    slowest: dict[str, dict[int, float]] = field(default_factory=dict)
    ends: dict[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """What came of all rounds.

    Args:
        weak: Each rank has a batch of its own.
        strong: The batch of one is divided among all; a process by itself has the whole.
    """

    weak: Scaling = field(default_factory=Scaling)
    strong: Scaling = field(default_factory=Scaling)


def rows_of(entrant: Entrant, measured: Measured, options: Options) -> Iterator[Row]:
    """Sums up what one contender did.

    Args:
        entrant: Who.
        measured: What came of all rounds.
        options: What was asked for.
    """
    parts = (
        (WEAK, options.own, measured.weak, _weak),
        (STRONG, options.ranks * options.part, measured.strong, _strong),
    )
    for name, batch, scaling, values in parts:
        if entrant.name in scaling.ends and entrant.name in scaling.seconds:
            key = {"model": options.model, "batch": batch, "scaling": name}
            yield Row(key, entrant.name, values(entrant, scaling, options), _right(entrant, scaling))


def _right(entrant: Entrant, scaling: Scaling) -> bool:
    """Tells whether all numbers are finite and ranks that train together hold the same weights."""
    ends = scaling.ends[entrant.name]
    same = len({each["checksum"] for each in ends}) == 1
    return all(each["finite"] for each in ends) and (same or not entrant.together)


def _weak(entrant: Entrant, scaling: Scaling, options: Options) -> dict[str, Spread]:
    mine = scaling.seconds[entrant.name]
    values = _pace(mine, options.ranks * options.own, options.workload)
    values |= _spread("efficiency", _within_rounds(scaling.seconds.get(entrant.single, {}), mine))
    if entrant.together:
        values |= _spread("beside_slowest", _within_rounds(scaling.slowest.get(entrant.single, {}), mine))
    if entrant.together and entrant.single == ALONE:
        values |= _spread("beside_wrapped", _within_rounds(scaling.seconds.get(WRAPPED, {}), mine))
        computing = _within_rounds(scaling.seconds.get(SILENT, {}), mine)
        values |= _spread("communication", [1 - part for part in computing])
    return values | _memory(entrant, scaling)


def _strong(entrant: Entrant, scaling: Scaling, options: Options) -> dict[str, Spread]:
    mine, cores = scaling.seconds[entrant.name], options.ranks if entrant.together else 1
    values = _pace(mine, options.ranks * options.part, options.workload)
    gains = _within_rounds(scaling.seconds.get(entrant.single, {}), mine)
    return values | _spread("speedup", gains) | _spread("efficiency", [gain / cores for gain in gains])


def _pace(seconds: Seconds, samples: int, workload: Workload) -> dict[str, Spread]:
    units = samples * workload.units
    return {
        "step_ms": Spread.of([1e3 * each for each in seconds.values()]),
        f"{workload.unit}_per_s": Spread.of([units / each for each in seconds.values()]),
    }


def _within_rounds(others: Seconds, mine: Seconds) -> list[float]:
    """Divides round by round, so that what disturbs the machine for a while disturbs both."""
    return [others[number] / mine[number] for number in sorted(mine) if number in others]


def _spread(name: str, rounds: Sequence[float]) -> dict[str, Spread]:
    return {name: Spread.of(rounds)} if rounds else {}


def _memory(entrant: Entrant, scaling: Scaling) -> dict[str, Spread]:
    peak = _peak(scaling, entrant.name)
    values = {"peak_mib": Spread.of([peak / 2**20])}
    if entrant.single in scaling.ends:
        excess = peak - _peak(scaling, entrant.single)
        values |= _spread("excess_gradients", [excess / scaling.ends[entrant.name][0]["gradients"]])
    return values


def _peak(scaling: Scaling, name: str) -> int:
    return max(each["peak"] for each in scaling.ends[name])
