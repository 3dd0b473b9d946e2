"""Compute throughput, efficiency and memory from the measured step times (`hvdtrain bench step`)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hvdtrain.bench.models.workloads import Workload
from hvdtrain.bench.report import Row, Spread
from hvdtrain.bench.step.contenders import ALONE, COMPUTE_ONLY, WRAPPED, StepContender
from hvdtrain.bench.step.options import Options

WEAK, STRONG = "weak", "strong"

Seconds = Mapping[int, float]  # duration of a step, by round


@dataclass(frozen=True)
class ScalingTimes:
    """Measurements with one size of batch.

    Args:
        seconds: Mean duration of a step over the ranks, by contender and round.
        slowest: Duration of a step on the slowest rank, by contender and round.
        final_states: Answers of the ranks after the rounds, by contender: checksum of the weights, peak memory.
    """

    seconds: dict[str, dict[int, float]] = field(default_factory=dict)
    slowest: dict[str, dict[int, float]] = field(default_factory=dict)
    final_states: dict[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class StepTimes:
    """Measurements of all rounds.

    Args:
        weak: Each rank has its own batch.
        strong: One batch is divided among all ranks; an independent process has the whole batch.
    """

    weak: ScalingTimes = field(default_factory=ScalingTimes)
    strong: ScalingTimes = field(default_factory=ScalingTimes)


def rows_of(contender: StepContender, times: StepTimes, options: Options) -> Iterator[Row]:
    """Yield the rows of one contender, of weak and strong scaling.

    Args:
        contender: The contender.
        times: The measurements of all rounds.
        options: The options of the command.
    """
    parts = (
        (WEAK, options.weak_batch, times.weak, _weak_values),
        (STRONG, options.ranks * options.strong_batch, times.strong, _strong_values),
    )
    name = contender.name
    for scaling, batch, measured, values in parts:
        if name in measured.final_states and name in measured.seconds:
            key = {"model": options.model, "batch": batch, "scaling": scaling}
            yield Row(key, name, values(contender, measured, options), _right(contender, measured))


def _right(contender: StepContender, measured: ScalingTimes) -> bool:
    """Return whether all numbers are finite, and ranks that train one model have the same weights."""
    states = measured.final_states[contender.name]
    same = len({state["checksum"] for state in states}) == 1
    return all(state["finite"] for state in states) and (same or not contender.distributed)


def _weak_values(contender: StepContender, measured: ScalingTimes, options: Options) -> dict[str, Spread]:
    seconds, baseline = measured.seconds[contender.name], contender.baseline
    values = _throughput(seconds, options.ranks * options.weak_batch, options.workload)
    values |= _spread("efficiency", _ratios(measured.seconds.get(baseline, {}), seconds))
    if contender.distributed:
        values |= _spread("beside_slowest", _ratios(measured.slowest.get(baseline, {}), seconds))
    if contender.distributed and baseline == ALONE:
        values |= _spread("beside_wrapped", _ratios(measured.seconds.get(WRAPPED, {}), seconds))
        computing = _ratios(measured.seconds.get(COMPUTE_ONLY, {}), seconds)
        values |= _spread("communication", [1 - share for share in computing])
    return values | _memory(contender, measured)


def _strong_values(contender: StepContender, measured: ScalingTimes, options: Options) -> dict[str, Spread]:
    seconds, cores = measured.seconds[contender.name], options.ranks if contender.distributed else 1
    values = _throughput(seconds, options.ranks * options.strong_batch, options.workload)
    speedups = _ratios(measured.seconds.get(contender.baseline, {}), seconds)
    efficiencies = [speedup / cores for speedup in speedups]
    return values | _spread("speedup", speedups) | _spread("efficiency", efficiencies)


def _throughput(seconds: Seconds, samples: int, workload: Workload) -> dict[str, Spread]:
    units = samples * workload.units
    return {
        "step_ms": Spread.of([1e3 * time for time in seconds.values()]),
        f"{workload.unit}_per_s": Spread.of([units / time for time in seconds.values()]),
    }


def _ratios(others: Seconds, seconds: Seconds) -> list[float]:
    """Divide round by round, because a temporary disturbance of the machine slows down both contenders."""
    return [others[number] / seconds[number] for number in sorted(seconds) if number in others]


def _spread(name: str, rounds: Sequence[float]) -> dict[str, Spread]:
    return {name: Spread.of(rounds)} if rounds else {}


def _memory(contender: StepContender, measured: ScalingTimes) -> dict[str, Spread]:
    peak = _peak(measured, contender.name)
    values = {"peak_mib": Spread.of([peak / 2**20])}
    if contender.baseline in measured.final_states:
        excess = peak - _peak(measured, contender.baseline)
        gradients = measured.final_states[contender.name][0]["gradients"]
        values |= _spread("excess_gradients", [excess / gradients])
    return values


def _peak(measured: ScalingTimes, name: str) -> int:
    return max(state["peak"] for state in measured.final_states[name])
