"""Time the same work with each of several settings, one setting at a time, and compare the times."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from hvdtrain.bench import sizes
from hvdtrain.bench.contender_job import Contender
from hvdtrain.bench.models import WORKLOADS
from hvdtrain.bench.report import Spread, describe_machine
from hvdtrain.bench.scheduler import ENGINES, Progress, RankOptions, Scheduler, Work, seconds_of
from hvdtrain.bench.step_contenders import keras_contender
from hvdtrain.launch.tuned_settings import STEPS, SUMS

BASE = "as it is"

SIZES = (4 << 10, 64 << 10, 1 << 20, 16 << 20)  # bytes of the arrays to reduce
TURN_SECONDS = {SUMS: 0.15, STEPS: 1.0}  # aimed duration of a turn
REPEATS = (2, 2000)  # of the work in one turn

Environ = Mapping[str, str]
Times = Mapping[str, Sequence[float]]  # seconds by kind of work, in the order of the rounds


@dataclass(frozen=True)
class Options(RankOptions):
    """Options of `hvdtrain tune`."""

    model: str = "cnn"  # whose steps are timed
    rounds: int = 6  # number of turns of each setting
    engines: tuple[str, ...] = ENGINES  # whose settings are tried


@dataclass(frozen=True)
class TrialResult:
    """Result of a trial."""

    times: Mapping[str, Times]  # of the contenders that took part until the end
    left_out: Mapping[str, str]  # the other contenders, and why they did not
    machine: Mapping[str, Any]  # the result of `describe_machine`


def try_settings(
    options: Options, progress: Progress, shows: str, engine: str, settings: Mapping[str, Environ]
) -> TrialResult:
    """Time the work with each of several settings.

    Args:
        options: The options of the command.
        progress: Is called with a line about the current state.
        shows: `SUMS` or `STEPS`.
        engine: The engine of the contenders.
        settings: Environment variables of each contender, by the contender's name.
    """
    contenders = []
    for name, environ in settings.items():
        contenders.append(_contender(shows, engine, options.model, name, environ))
    with Scheduler(contenders, options.ranks, options.hosts, progress) as scheduler:
        works = _works(shows, options.model)
        measured = scheduler.measure(works, TURN_SECONDS[shows], REPEATS, options.rounds)
        machine = describe_machine(scheduler.hosts, scheduler.pinned)
    left_out = dict(scheduler.left_out)
    times: dict[str, dict[str, list[float]]] = {}
    for work, turns_of_work in measured.items():
        for name, turns in turns_of_work.items():
            # A repetition ends on all ranks at the same time.
            seconds = [statistics.fmean(seconds_of(answers)) for answers in turns]
            times.setdefault(name, {})[work] = seconds
            if not all(answer.get("right", True) for answers in turns for answer in answers):
                left_out[name] = f"{work} was WRONG"
    complete = {name: by_work for name, by_work in times.items() if name not in left_out}
    return TrialResult(complete, left_out, machine)


def gain(before: Times, after: Times) -> tuple[Spread, float]:
    """Compare two contenders of the same rounds.

    Returns:
        The speed-up of the second contender over all work, the geometric mean over the kinds of work by round; and
        its median speed-up for the kind of work that gains least.
    """
    ratios = {}
    for work, times in before.items():
        ratios[work] = [old / new for old, new in zip(times, after[work], strict=False)]
    means = []
    for ratios_of_round in zip(*ratios.values(), strict=False):
        means.append(math.exp(statistics.fmean(math.log(ratio) for ratio in ratios_of_round)))
    return Spread.of(means), min(statistics.median(values) for values in ratios.values())


def _contender(shows: str, engine: str, model: str, name: str, environ: Environ) -> Contender:
    if shows == STEPS:
        contender = keras_contender(model, name, "averaged", engine)
        return replace(contender, environ={**environ, **contender.environ})
    work = "hvdtrain.bench.allreduce_workers:engine"
    return Contender(name, work, environ={**environ, "HVDTRAIN_ENGINE": engine})


def _works(shows: str, model: str) -> dict[str, Work[Contender]]:
    if shows == STEPS:
        return {f"a step of {model}": lambda contender: {"batch": WORKLOADS[model].batch}}
    return {f"a sum of {sizes.format_size(size)}": partial(_sum, size) for size in SIZES}


def _sum(size: int, contender: Contender) -> dict[str, Any]:
    return {"bytes": size, "dtype": "float32"}
