"""Time the same work with each of several settings, one setting at a time."""

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hvdtrain.bench import machine, sizes
from hvdtrain.bench.contender import Contender
from hvdtrain.bench.models.workloads import WORKLOADS
from hvdtrain.bench.scheduler import Answers, Scheduler
from hvdtrain.launch.tuned_settings import STEPS, SUMS

BASE = "as it is"

SIZES = (4 << 10, 64 << 10, 1 << 20, 16 << 20)  # bytes of the arrays to reduce
MIN_COUNT, MAX_COUNT = 2, 2000  # repetitions of the work in one turn

Environ = Mapping[str, str]
Times = dict[str, dict[str, list[float]]]  # seconds by contender and kind of work, in the order of the rounds


@dataclass(frozen=True)
class Work:
    """One kind of work.

    Args:
        name: The name in progress lines and messages.
        request: The request to a worker, without the number of repetitions.
        count_field: The field of the request that holds the number of repetitions.
        seconds: Aimed duration of a turn.
    """

    name: str
    request: Mapping[str, Any]
    count_field: str
    seconds: float

    def repeated(self, count: int) -> dict[str, Any]:
        """Return the request for a number of repetitions."""
        return {**self.request, self.count_field: count}


@dataclass(frozen=True)
class TrialResult:
    """Result of a trial.

    Args:
        times: Seconds, of the contenders that took part until the end.
        left_out: The other contenders, and why they did not.
        machine: The result of `machine.describe`.
    """

    times: Times
    left_out: Mapping[str, str]
    machine: Mapping[str, Any]


@dataclass(frozen=True)
class Trial:
    """Conditions under which all settings are tried.

    Args:
        ranks: Number of ranks.
        hosts: Hosts and their slots, as for `hvdtrain run`.
        model: The model whose steps are timed.
        rounds: Number of turns of each setting.
        progress: Is called with a line about the current state.
    """

    ranks: int
    hosts: str | None
    model: str
    rounds: int
    progress: Callable[[str], None]

    def run(self, shows: str, engine: str, settings: Mapping[str, Environ]) -> TrialResult:
        """Measure.

        Args:
            shows: `SUMS` or `STEPS`.
            engine: The engine of the contenders.
            settings: Environment variables of each contender, by the contender's name.
        """
        contenders = []
        for name, environ in settings.items():
            contenders.append(_contender(shows, engine, self.model, name, environ))
        works = list(_works(shows, self.model))
        times: Times = {}
        wrong: dict[str, str] = {}
        with Scheduler(contenders, self.ranks, self.hosts, self.progress) as scheduler:
            counts = [self._warm_up(scheduler, work) for work in works]
            for number in range(self.rounds):
                for work, counts_of_work in zip(works, counts, strict=True):
                    self.progress(f"{work.name}: round {number + 1} of {self.rounds}")
                    for name, answers in self._turns(scheduler, number, work, counts_of_work):
                        times.setdefault(name, {}).setdefault(work.name, []).append(_seconds(answers))
                        if not all(answer.get("right", True) for answer in answers):
                            wrong[name] = f"{work.name} was WRONG"
            description = machine.describe(scheduler)
        left_out = {**scheduler.left_out, **wrong}
        complete = {name: by_work for name, by_work in times.items() if name not in left_out}
        return TrialResult(complete, left_out, description)

    def _warm_up(self, scheduler: Scheduler, work: Work) -> dict[str, int]:
        """Return the number of repetitions in a turn, by contender."""
        self.progress(f"{work.name}: warming up")
        counts = {}
        for contender in scheduler.present:
            answers = scheduler.ask(contender, work.repeated(MIN_COUNT))
            if answers is not None:
                counts[contender.name] = int(min(max(work.seconds / _seconds(answers), MIN_COUNT), MAX_COUNT))
        return counts

    def _turns(
        self, scheduler: Scheduler, number: int, work: Work, counts: Mapping[str, int]
    ) -> Iterator[tuple[str, Answers]]:
        """Ask each contender once; each round starts with another contender."""
        for contender in scheduler.in_turn(number):
            answers = scheduler.ask(contender, work.repeated(counts[contender.name]))
            if answers is not None:
                yield contender.name, answers


def _contender(shows: str, engine: str, model: str, name: str, environ: Environ) -> Contender:
    variables = {**environ, "HVDTRAIN_ENGINE": engine}
    if shows == SUMS:
        return Contender(name, "hvdtrain.bench.work.engine_allreduce", environ=variables)
    needs = ("tensorflow", "keras", *(["horovod"] if engine == "horovod" else []))
    settings, variables = {"model": model, "mode": "averaged"}, {**variables, "KERAS_BACKEND": "tensorflow"}
    return Contender(name, "hvdtrain.bench.work.keras_step", settings, variables, needs)


def _works(shows: str, model: str) -> Iterator[Work]:
    if shows == STEPS:
        yield Work(f"a step of {model}", {"batch": WORKLOADS[model].batch}, "steps", 1.0)
        return
    for size in SIZES:
        request = {"bytes": size, "dtype": "float32", "seed": 1}
        yield Work(f"a sum of {sizes.format_size(size)}", request, "repeat", 0.15)


def _seconds(answers: Answers) -> float:
    """Return the mean over ranks of the seconds of one repetition, which ends on all ranks at the same time."""
    return statistics.fmean(answer["seconds"] for answer in answers)
