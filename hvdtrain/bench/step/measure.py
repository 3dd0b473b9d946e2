"""Lets everyone train by turns, and gathers what it cost."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from hvdtrain.bench import machine, output
from hvdtrain.bench.contender import Contender
from hvdtrain.bench.report import Report
from hvdtrain.bench.scheduler import LIMIT, Answers, Field
from hvdtrain.bench.step import table
from hvdtrain.bench.step.contenders import Entrant, entrants
from hvdtrain.bench.step.options import Options, check
from hvdtrain.bench.step.rows import STRONG, Measured, Scaling, rows_of

SECONDS = 1.0  # what a turn shall take
MOST, FEWEST = 50, 2  # steps a turn
PATIENCE = 30.0  # seconds; no step takes longer

# What a contender is asked for a turn, less the number of steps; None where it has no turn.
Work = Callable[[Contender], dict[str, Any] | None]


def step(options: Options, as_json: bool = False, save: str | None = None) -> int:
    """Measures, and shows, prints or writes what was found.

    Args:
        options: What was asked for.
        as_json: Whether to print JSON in place of the tables.
        save: A file for the JSON; a plot is written beside it.

    Returns:
        0; 1 if ranks ended with different weights or an engine of hvdtrain failed; 2 if nothing could be measured;
        128 plus the number of a signal that ended it.
    """
    return output.run(lambda say: measure(options, say), table.render, as_json, save)


def measure(options: Options, say: Callable[[str], None]) -> Report:
    """Lets all contenders train.

    Args:
        options: What was asked for.
        say: Takes a line of progress.

    Returns:
        The report. `values` are `step_ms`, `images_per_s` or `tokens_per_s`, and `efficiency`; of weak scaling
        also `beside_slowest`, `beside_wrapped`, `communication`, `peak_mib` and `excess_gradients`, of strong
        scaling `speedup`.

    Raises:
        LaunchError: If what was asked for cannot be measured here.
    """
    check(options)
    everyone = {
        each.name: each for each in entrants(options.model, options.engines, options.peers, options.xla)
    }
    contenders = [each.contender for each in everyone.values()]
    limit = LIMIT + PATIENCE * (options.turn or 0)
    with Field(contenders, options.ranks, options.hosts, say, limit) as field:
        measured = _measured(field, everyone, options, say)
        described = machine.describe(field)
    rows = [row for each in everyone.values() for row in rows_of(each, measured, options)]
    rows.sort(key=lambda row: row.key["scaling"] == STRONG)
    return Report("step", options.ranks, described, asdict(options), rows, field.left_out)


def _measured(
    field: Field, everyone: Mapping[str, Entrant], options: Options, say: Callable[[str], None]
) -> Measured:
    def whole(contender: Contender) -> dict[str, Any]:
        return {"batch": options.own} | ({"fit": True} if options.fit else {})

    def divided(contender: Contender) -> dict[str, Any] | None:
        entrant = everyone[contender.name]
        if entrant.together:
            return {"batch": options.part}
        return {"batch": options.ranks * options.part, "first_only": True} if entrant.shares else None

    measured = Measured()
    _train(field, options, whole, measured.weak, lambda text: say(f"a batch for each rank: {text}"))
    if options.ranks > 1 and options.part and not options.fit:
        _train(field, options, divided, measured.strong, lambda text: say(f"one batch for all: {text}"))
    return measured


def _train(field: Field, options: Options, work: Work, scaling: Scaling, say: Callable[[str], None]) -> None:
    """Lets everyone warm up, measures round after round, and looks in the end at what became of the models."""
    steps = _warm_up(field, options, work, say)

    def request(contender: Contender, number: int) -> dict[str, Any] | None:
        asked = work(contender)
        return {**asked, "steps": steps[contender.name]} if asked is not None else None

    for number, contender, answers in field.rounds(request, options.rounds):
        say(f"round {number + 1} of {options.rounds}, {contender.name}")
        scaling.seconds.setdefault(contender.name, {})[number] = statistics.fmean(_seconds(answers))
        scaling.slowest.setdefault(contender.name, {})[number] = max(_seconds(answers))
    for contender in field.present:
        say(f"{contender.name}: comparing weights")
        ends = field.ask(contender, {"end": True})
        if ends is not None:
            scaling.ends[contender.name] = ends


def _warm_up(field: Field, options: Options, work: Work, say: Callable[[str], None]) -> dict[str, int]:
    """Runs steps that do not count, and returns how many make a turn, by contender."""
    steps = {}
    for contender in field.present:
        asked = work(contender)
        if asked is None:
            continue
        say(f"{contender.name} warms up")
        # The step before those that are timed makes the train function, and the first one is verified.
        answers = field.ask(contender, {**asked, "steps": FEWEST})
        if answers is not None:
            fitting = int(min(max(SECONDS / max(_seconds(answers)), FEWEST), MOST))
            steps[contender.name] = options.turn or fitting
    return steps


def _seconds(answers: Answers) -> list[float]:
    """Returns the seconds of a step on each rank that had a turn; ranks that train together take equally long."""
    return [each["seconds"] for each in answers if "seconds" in each]
