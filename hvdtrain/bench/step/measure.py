"""Let all contenders train, one at a time, and collect step times and final states (`hvdtrain bench step`)."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from hvdtrain.bench import machine, output
from hvdtrain.bench.contender import Contender
from hvdtrain.bench.report import Report
from hvdtrain.bench.scheduler import ANSWER_SECONDS, Answers, Scheduler
from hvdtrain.bench.step import table
from hvdtrain.bench.step.contenders import StepContender, step_contenders
from hvdtrain.bench.step.options import Options, check
from hvdtrain.bench.step.rows import STRONG, ScalingTimes, StepTimes, rows_of

TURN_SECONDS = 1.0  # aimed duration of a turn
MIN_STEPS, MAX_STEPS = 2, 50  # steps in a turn
STEP_SECONDS = 30.0  # no step takes longer

# Returns the request to a contender for a turn, without the number of steps; None if it has no turn.
TurnRequest = Callable[[Contender], dict[str, Any] | None]


def step(options: Options, as_json: bool = False, save: str | None = None) -> int:
    """Measure, and show, print or write the report.

    Args:
        options: The options of the command.
        as_json: Whether to print JSON instead of the tables.
        save: A file for the JSON; a plot is written beside it.

    Returns:
        0; 1 if ranks ended with different weights or an engine of hvdtrain failed; 2 if nothing could be measured;
        128 plus the number of the signal that ended the measurement.
    """
    return output.run(lambda progress: measure(options, progress), table.render, as_json, save)


def measure(options: Options, progress: Callable[[str], None]) -> Report:
    """Let all contenders train.

    Args:
        options: The options of the command.
        progress: Is called with a line about the current state.

    Returns:
        The report. `values` are `step_ms`, `images_per_s` or `tokens_per_s`, and `efficiency`; of weak scaling
        also `beside_slowest`, `beside_wrapped`, `communication`, `peak_mib` and `excess_gradients`, of strong
        scaling `speedup`.

    Raises:
        LaunchError: If the options cannot be measured on this machine.
    """
    check(options)
    participants = list(step_contenders(options.model, options.engines, options.peers, options.xla))
    by_name = {participant.name: participant for participant in participants}
    contenders = [participant.contender for participant in participants]
    limit = ANSWER_SECONDS + STEP_SECONDS * (options.steps_per_turn or 0)
    with Scheduler(contenders, options.ranks, options.hosts, progress, limit) as scheduler:
        times = _measure_scalings(scheduler, by_name, options, progress)
        description = machine.describe(scheduler)
    rows = [row for participant in participants for row in rows_of(participant, times, options)]
    rows.sort(key=lambda row: row.key["scaling"] == STRONG)
    return Report("step", options.ranks, description, asdict(options), rows, scheduler.left_out)


def _measure_scalings(
    scheduler: Scheduler,
    by_name: Mapping[str, StepContender],
    options: Options,
    progress: Callable[[str], None],
) -> StepTimes:
    def weak_request(contender: Contender) -> dict[str, Any]:
        return {"batch": options.weak_batch} | ({"fit": True} if options.fit else {})

    def strong_request(contender: Contender) -> dict[str, Any] | None:
        participant = by_name[contender.name]
        if participant.distributed:
            return {"batch": options.strong_batch}
        whole = {"batch": options.ranks * options.strong_batch, "first_only": True}
        return whole if participant.strong else None

    times = StepTimes()
    _train(
        scheduler, options, weak_request, times.weak, lambda text: progress(f"a batch for each rank: {text}")
    )
    if options.ranks > 1 and options.strong_batch and not options.fit:
        _train(
            scheduler,
            options,
            strong_request,
            times.strong,
            lambda text: progress(f"one batch for all: {text}"),
        )
    return times


def _train(
    scheduler: Scheduler,
    options: Options,
    turn_request: TurnRequest,
    measured: ScalingTimes,
    progress: Callable[[str], None],
) -> None:
    """Warm up all contenders, measure round after round, and ask at the end for the state of the models."""
    steps = _warm_up(scheduler, options, turn_request, progress)

    def request(contender: Contender, number: int) -> dict[str, Any] | None:
        turn = turn_request(contender)
        return {**turn, "steps": steps[contender.name]} if turn is not None else None

    for number, contender, answers in scheduler.rounds(request, options.rounds):
        progress(f"round {number + 1} of {options.rounds}, {contender.name}")
        measured.seconds.setdefault(contender.name, {})[number] = statistics.fmean(_seconds(answers))
        measured.slowest.setdefault(contender.name, {})[number] = max(_seconds(answers))
    for contender in scheduler.present:
        progress(f"{contender.name}: comparing weights")
        states = scheduler.ask(contender, {"end": True})
        if states is not None:
            measured.final_states[contender.name] = states


def _warm_up(
    scheduler: Scheduler, options: Options, turn_request: TurnRequest, progress: Callable[[str], None]
) -> dict[str, int]:
    """Run steps that are not counted, and return the number of steps in a turn, by contender."""
    steps = {}
    for contender in scheduler.present:
        turn = turn_request(contender)
        if turn is None:
            continue
        progress(f"{contender.name} warms up")
        # The step before those that are timed builds the train function, and the first one is verified.
        answers = scheduler.ask(contender, {**turn, "steps": MIN_STEPS})
        if answers is not None:
            fitting = int(min(max(TURN_SECONDS / max(_seconds(answers)), MIN_STEPS), MAX_STEPS))
            steps[contender.name] = options.steps_per_turn or fitting
    return steps


def _seconds(answers: Answers) -> list[float]:
    """Return the seconds of a step on each rank that had a turn; ranks that train one model take equally long."""
    return [answer["seconds"] for answer in answers if "seconds" in answer]
