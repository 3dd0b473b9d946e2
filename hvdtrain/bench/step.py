"""Let all contenders train, one at a time, and compute throughput and efficiency (`hvdtrain bench step`)."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from hvdtrain.bench import output, tables
from hvdtrain.bench.models import WORKLOADS
from hvdtrain.bench.report import Report, Row, Spread, describe_machine
from hvdtrain.bench.scheduler import ANSWER_SECONDS, Answers, Progress, Scheduler, seconds_of
from hvdtrain.bench.step_contenders import (
    ALONE,
    COMPUTE_ONLY,
    STRONG,
    WEAK,
    WRAPPED,
    Options,
    StepContender,
    check,
    step_contenders,
)

TURN_SECONDS = 1.0  # aimed duration of a turn
STEPS = (2, 50)  # steps in a turn
STEP_SECONDS = 30.0  # no step takes longer


@dataclass(frozen=True)
class ScalingTimes:
    """Measurements with one size of batch, by contender."""

    seconds: dict[str, list[float]] = field(default_factory=dict)  # of a step by round, the mean over ranks
    slowest: dict[str, list[float]] = field(default_factory=dict)  # the same on the slowest rank
    final_states: dict[str, Answers] = field(default_factory=dict)  # checksums of the weights and peak memory


def step(options: Options, as_json: bool = False, save: str | None = None) -> int:
    """Measure, and show, print or write the report; `output.run` describes the arguments and the exit code."""
    return output.run(lambda progress: measure(options, progress), tables.render_step, as_json, save)


def measure(options: Options, progress: Progress) -> Report:
    """Let all contenders train.

    The `values` of the report are `step_ms`, `images_per_s` or `tokens_per_s`, and `efficiency`; of weak scaling
    also `beside_slowest`, `beside_wrapped`, `communication`, `peak_mib` and `excess_gradients`, of strong scaling
    `speedup`.
    """
    check(options)
    contenders = list(step_contenders(options))
    limit = ANSWER_SECONDS + STEP_SECONDS * (options.steps_per_turn or 0)
    times = {}
    with Scheduler(contenders, options.ranks, options.hosts, progress, limit) as scheduler:
        times[WEAK] = _train(scheduler, options, WEAK, progress)
        if options.scales_strongly:
            times[STRONG] = _train(scheduler, options, STRONG, progress)
        machine = describe_machine(scheduler.hosts, scheduler.pinned)
    rows = [
        row for scaling, measured in times.items() for row in rows_of(contenders, scaling, measured, options)
    ]
    return Report("step", options.ranks, machine, asdict(options), rows, scheduler.left_out)


def _train(
    scheduler: Scheduler[StepContender], options: Options, scaling: str, progress: Progress
) -> ScalingTimes:
    """Let all contenders train with one size of batch, and ask at the end for the state of the models."""
    title = {WEAK: "a batch for each rank", STRONG: "one batch for all"}[scaling]
    steps = options.steps_per_turn
    repeats = (steps, steps) if steps else STEPS
    # The first turn, which is not counted, also builds the train function, and its first step is verified.
    works = {title: partial(_request, scaling, options)}
    times = ScalingTimes()
    for name, turns in scheduler.measure(works, TURN_SECONDS, repeats, options.rounds)[title].items():
        seconds = [seconds_of(answers) for answers in turns]
        times.seconds[name] = [statistics.fmean(by_rank) for by_rank in seconds]
        times.slowest[name] = [max(by_rank) for by_rank in seconds]
    for contender in scheduler.present:
        progress(f"{title}: {contender.name}: comparing weights")
        states = scheduler.ask(contender, {"end": True})
        if states is not None:
            times.final_states[contender.name] = states
    return times


def _request(scaling: str, options: Options, contender: StepContender) -> dict[str, Any] | None:
    if scaling == WEAK:
        return {"batch": options.weak_batch, "fit": bool(options.fit)}
    if contender.distributed:
        return {"batch": options.strong_batch}
    whole = {"batch": options.ranks * options.strong_batch, "first_only": True}
    return whole if contender.strong else None


def rows_of(
    contenders: Iterable[StepContender], scaling: str, measured: ScalingTimes, options: Options
) -> Iterator[Row]:
    """Yield the rows of the contenders that were measured with one size of batch."""
    values, batch = _weak_values, options.weak_batch
    if scaling == STRONG:
        values, batch = _strong_values, options.ranks * options.strong_batch
    key = {"model": options.model, "batch": batch, "scaling": scaling}
    for contender in contenders:
        name = contender.name
        if name in measured.final_states and name in measured.seconds:
            yield Row(key, name, values(contender, measured, options), _right(contender, measured))


def _right(contender: StepContender, measured: ScalingTimes) -> bool:
    """Return whether all numbers are finite, and ranks that train one model have the same weights."""
    states = measured.final_states[contender.name]
    same = len({state["checksum"] for state in states}) == 1
    return all(state["finite"] for state in states) and (same or not contender.distributed)


def _weak_values(contender: StepContender, measured: ScalingTimes, options: Options) -> dict[str, Spread]:
    seconds, baseline = measured.seconds[contender.name], contender.baseline
    values = _throughput(seconds, options.ranks * options.weak_batch, options)
    values |= _spread("efficiency", _ratios(measured.seconds.get(baseline, []), seconds))
    if contender.distributed:
        values |= _spread("beside_slowest", _ratios(measured.slowest.get(baseline, []), seconds))
    if contender.distributed and baseline == ALONE:
        values |= _spread("beside_wrapped", _ratios(measured.seconds.get(WRAPPED, []), seconds))
        computing = _ratios(measured.seconds.get(COMPUTE_ONLY, []), seconds)
        values |= _spread("communication", [1 - share for share in computing])
    peak = _peak(measured, contender.name)
    values["peak_mib"] = Spread.of([peak / 2**20])
    if baseline in measured.final_states:
        gradients = measured.final_states[contender.name][0]["gradients"]
        values["excess_gradients"] = Spread.of([(peak - _peak(measured, baseline)) / gradients])
    return values


def _strong_values(contender: StepContender, measured: ScalingTimes, options: Options) -> dict[str, Spread]:
    seconds, cores = measured.seconds[contender.name], options.ranks if contender.distributed else 1
    values = _throughput(seconds, options.ranks * options.strong_batch, options)
    speedups = _ratios(measured.seconds.get(contender.baseline, []), seconds)
    efficiencies = [speedup / cores for speedup in speedups]
    return values | _spread("speedup", speedups) | _spread("efficiency", efficiencies)


def _throughput(seconds: Sequence[float], samples: int, options: Options) -> dict[str, Spread]:
    workload = WORKLOADS[options.model]
    return {
        "step_ms": Spread.of([1e3 * time for time in seconds]),
        f"{workload.unit}_per_s": Spread.of([samples * workload.units / time for time in seconds]),
    }


def _ratios(others: Sequence[float], seconds: Sequence[float]) -> list[float]:
    """Divide round by round, because a temporary disturbance of the machine slows down both contenders."""
    return [other / own for other, own in zip(others, seconds, strict=False)]


def _spread(name: str, rounds: Sequence[float]) -> dict[str, Spread]:
    return {name: Spread.of(rounds)} if rounds else {}


def _peak(measured: ScalingTimes, name: str) -> int:
    return max(state["peak"] for state in measured.final_states[name])
