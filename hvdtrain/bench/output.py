"""From a measurement to what its user gets: tables or JSON, files, one exit code."""

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from hvdtrain.bench import machine
from hvdtrain.bench.report import Report, ReportError
from hvdtrain.bench.scheduler import FAILED
from hvdtrain.launch.hosts import LaunchError
from hvdtrain.launch.supervision.interrupt import Interrupted, hearing

WIDE = 120  # columns where nobody looks on at a terminal


def run(
    measure: Callable[[Callable[[str], None]], Report],
    render: Callable[[Report, Console], None],
    as_json: bool,
    save: str | None,
) -> int:
    """Measures, and shows what was found.

    Args:
        measure: Makes the report; takes what takes a line of progress.
        render: Draws its tables.
        as_json: Whether to print JSON in place of the tables.
        save: A file for the JSON; a plot is written beside it.

    Returns:
        0; 1 if a result was wrong or an engine of hvdtrain failed; 2 if nothing could be measured, or not be
        written; 128 plus the number of a signal that ended it.
    """
    try:
        file = _target(save) if save is not None else None
        with hearing(), _progress() as say:
            report = measure(say)
    except (LaunchError, ReportError) as error:
        return _refused(str(error))
    except Interrupted as stop:
        print(f"hvdtrain: {signal.Signals(stop.number).name} ended the measurement.", file=sys.stderr)
        return 128 + stop.number
    failure = _write(report, file) if file else ""
    if as_json:
        print(report.to_json(), end="")
    else:
        show(report, render, console())
    return _refused(failure) if failure else _verdict(report)


def show(report: Report, render: Callable[[Report, Console], None], out: Console) -> None:
    """Prints the tables between what machine it was and who did not take part."""
    for line in (
        machine.summary(report.machine),
        f"{report.ranks} ranks on {machine.placement(report.machine)}",
    ):
        out.print(line, markup=False)
    render(report, out)
    for name, reason in report.left_out.items():
        out.print(f"Left out: {name}: {reason}", markup=False)


def console() -> Console:
    """Opens standard output, wide enough for a table where it is no terminal."""
    return Console(
        width=None if sys.stdout.isatty() else max(WIDE, shutil.get_terminal_size((WIDE, 24)).columns),
        highlight=False,
        soft_wrap=False,
    )


def _verdict(report: Report) -> int:
    """Says on standard error what is wrong, and gives the exit code."""
    for row in report.wrong:
        where = ", ".join(f"{name} {value}" for name, value in row.key.items())
        print(f"hvdtrain: WRONG: {row.contender}, {where}: a result is not what it must be.", file=sys.stderr)
    if not report.rows:
        return _refused("nobody was left to measure; what was left out is named above.")
    ours = any(
        name.startswith("hvdtrain") and why.startswith(FAILED) for name, why in report.left_out.items()
    )
    return int(bool(report.wrong or ours))


def _target(save: str) -> Path:
    """Finds out before the measurement whether its report can be written."""
    path = Path(save)
    path = path.with_suffix(".json") if path.suffix in (".json", ".png") else Path(f"{save}.json")
    if not save or save.endswith(os.sep) or path.is_dir() or not path.absolute().parent.is_dir():
        raise ReportError(
            f"--save {save!r}: {path} cannot be written; expected the name of a file in a folder that is there."
        )
    was_there = path.exists()
    try:
        path.open("a").close()
        if not was_there:
            path.unlink()
    except OSError as error:
        raise ReportError(f"--save {save}: {path} cannot be written: {error.strerror}.") from error
    return path


def _write(report: Report, path: Path) -> str:
    """Writes the report and a plot of it, and returns what went wrong."""
    picture = path.with_suffix(".png")
    try:
        path.write_text(report.to_json())
        from hvdtrain.bench import plot

        plot.draw(report, picture)
    except ImportError:
        print(f"hvdtrain: wrote {path}, but no plot: type `pip install 'hvdtrain[bench]'`.", file=sys.stderr)
        return ""
    except OSError as error:
        return f"--save: {error.filename or path} cannot be written: {error.strerror}."
    print(f"hvdtrain: wrote {path} and {picture}.", file=sys.stderr)
    return ""


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Shows what is going on while it goes on, and keeps only what somebody must know."""
    err = Console(stderr=True, highlight=False)
    with err.status("starting") as status:
        yield lambda line: status.update(line)


def _refused(sentence: str) -> int:
    print(f"hvdtrain: {sentence}", file=sys.stderr)
    return 2
