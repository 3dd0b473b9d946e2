"""Lets the ranks work with each of several settings, by turns."""

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hvdtrain.bench import machine, sizes
from hvdtrain.bench.contender import Contender
from hvdtrain.bench.models.workloads import WORKLOADS
from hvdtrain.bench.scheduler import Answers, Field
from hvdtrain.launch.tunable_settings import STEPS, SUMS

BASE = "as it is"

SIZES = (4 << 10, 64 << 10, 1 << 20, 16 << 20)  # bytes of the sums
FEWEST, MOST = 2, 2000  # pieces of work in a turn

Environ = Mapping[str, str]
Times = dict[str, dict[str, list[float]]]  # by contender and piece of work, in the order of the rounds


@dataclass(frozen=True)
class Work:
    """One piece of work.

    Args:
        name: What people call it.
        request: What a worker is asked.
        often: The part of the request that says how often.
        seconds: What a turn shall take.
    """

    name: str
    request: Mapping[str, Any]
    often: str
    seconds: float

    def times(self, count: int) -> dict[str, Any]:
        """Returns the request for as many."""
        return {**self.request, self.often: count}


@dataclass(frozen=True)
class Found:
    """What came of a trial.

    Args:
        times: In seconds, of those that took part to the end.
        left_out: Why the others did not.
        machine: What `machine.describe` says.
    """

    times: Times
    left_out: Mapping[str, str]
    machine: Mapping[str, Any]


@dataclass(frozen=True)
class Trial:
    """Where and how all settings are tried.

    Args:
        ranks: How many ranks.
        hosts: Hosts and their slots, as for `hvdtrain run`.
        model: Whose steps are timed.
        rounds: How often each turn comes.
        say: Takes a line of progress.
    """

    ranks: int
    hosts: str | None
    model: str
    rounds: int
    say: Callable[[str], None]

    def run(self, shows: str, engine: str, settings: Mapping[str, Environ]) -> Found:
        """Measures.

        Args:
            shows: `SUMS` or `STEPS`.
            engine: The engine that does it.
            settings: What each contender finds in its environment, by the contender's name.
        """
        contenders = [_contender(shows, engine, self.model, name, each) for name, each in settings.items()]
        works = list(_works(shows, self.model))
        times: Times = {}
        wrong: dict[str, str] = {}
        with Field(contenders, self.ranks, self.hosts, self.say) as field:
            turns = [self._warm_up(field, work) for work in works]
            for number in range(self.rounds):
                for work, counts in zip(works, turns, strict=True):
                    self.say(f"{work.name}: round {number + 1} of {self.rounds}")
                    for name, answers in self._turn(field, number, work, counts):
                        times.setdefault(name, {}).setdefault(work.name, []).append(_seconds(answers))
                        if not all(each.get("right", True) for each in answers):
                            wrong[name] = f"{work.name} was WRONG"
            described = machine.describe(field)
            left_out = {**field.left_out, **wrong}
        return Found(
            {name: each for name, each in times.items() if name not in left_out}, left_out, described
        )

    def _warm_up(self, field: Field, work: Work) -> dict[str, int]:
        """Returns how often each contender does the work in a turn."""
        self.say(f"{work.name}: warming up")
        counts = {}
        for contender in field.present:
            answers = field.ask(contender, work.times(FEWEST))
            if answers is not None:
                counts[contender.name] = int(min(max(work.seconds / _seconds(answers), FEWEST), MOST))
        return counts

    def _turn(
        self, field: Field, number: int, work: Work, counts: Mapping[str, int]
    ) -> Iterator[tuple[str, Answers]]:
        """Gives each contender the floor once; who is first changes with the rounds."""
        present = field.present
        first = number % max(len(present), 1)
        for contender in present[first:] + present[:first]:
            answers = field.ask(contender, work.times(counts[contender.name]))
            if answers is not None:
                yield contender.name, answers


def _contender(shows: str, engine: str, model: str, name: str, environ: Environ) -> Contender:
    told = {**environ, "HVDTRAIN_ENGINE": engine}
    if shows == SUMS:
        return Contender(name, "hvdtrain.bench.work.engine_allreduce", environ=told)
    needs = ("tensorflow", "keras", *(["horovod"] if engine == "horovod" else []))
    settings, told = {"model": model, "way": "averaged"}, {**told, "KERAS_BACKEND": "tensorflow"}
    return Contender(name, "hvdtrain.bench.work.keras_step", settings, told, needs)


def _works(shows: str, model: str) -> Iterator[Work]:
    if shows == STEPS:
        yield Work(f"a step of {model}", {"batch": WORKLOADS[model].batch}, "steps", 1.0)
        return
    for size in SIZES:
        request = {"bytes": size, "dtype": "float32", "seed": 1}
        yield Work(f"a sum of {sizes.shown(size)}", request, "repeat", 0.15)


def _seconds(answers: Answers) -> float:
    """Returns the seconds of one piece of work, which end for all ranks together."""
    return statistics.fmean(each["seconds"] for each in answers)
