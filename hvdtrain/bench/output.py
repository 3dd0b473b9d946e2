"""Run a measurement, show its report as tables or JSON, write files, and return the exit code."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from hvdtrain.bench.report import Report, ReportError
from hvdtrain.bench.scheduler import FAILED, Progress
from hvdtrain.launch.hosts import LaunchError
from hvdtrain.launch.supervision.job import Interrupted, hearing

MIN_WIDTH = 120  # columns, if the output is not a terminal


def run(
    measure: Callable[[Progress], Report],
    render: Callable[[Report, Console], None],
    as_json: bool,
    save: str | None,
) -> int:
    """Measure, and show the report.

    Args:
        measure: Returns the report; its argument is a function that shows a line of progress on standard error.
        render: Prints the tables of the report.
        as_json: Whether to print JSON instead of the tables.
        save: A file for the JSON; a plot is written beside it.

    Returns:
        0; 1 if a result was wrong or an engine of hvdtrain failed; 2 if nothing could be measured, or the report
        could not be written; 128 plus the number of the signal that ended the measurement.
    """
    try:
        path = _report_path(save) if save is not None else None
        with hearing(), Console(stderr=True, highlight=False).status("starting") as status:
            report = measure(status.update)
    except (LaunchError, ReportError) as error:
        return _refuse(str(error))
    except Interrupted as stop:
        print(f"hvdtrain: {signal.Signals(stop.number).name} ended the measurement.", file=sys.stderr)
        return 128 + stop.number
    failure = _write(report, path) if path else ""
    if as_json:
        print(report.to_json(), end="")
    else:
        _show(report, render, open_console())
    return _refuse(failure) if failure else _exit_code(report)


def open_console() -> Console:
    """Return a console on standard output, wide enough for a table if the output is not a terminal."""
    columns = max(MIN_WIDTH, shutil.get_terminal_size((MIN_WIDTH, 24)).columns)
    return Console(width=None if sys.stdout.isatty() else columns, highlight=False, soft_wrap=False)


def _show(report: Report, render: Callable[[Report, Console], None], console: Console) -> None:
    for line in (report.machine_line, report.ranks_line):
        console.print(line, markup=False)
    render(report, console)
    for name, reason in report.left_out.items():
        console.print(f"Left out: {name}: {reason}", markup=False)


def _exit_code(report: Report) -> int:
    """Return the exit code, and print what is wrong to standard error."""
    for row in report.wrong:
        key = ", ".join(f"{name} {value}" for name, value in row.key.items())
        print(f"hvdtrain: WRONG: {row.contender}, {key}: a result is not the expected one.", file=sys.stderr)
    if not report.rows:
        return _refuse("no contender could be measured; each is named above with the reason.")
    for name, reason in report.left_out.items():
        if name.startswith("hvdtrain") and reason.startswith(FAILED):
            return 1
    return 1 if report.wrong else 0


def _report_path(save: str) -> Path:
    """Return the path of the JSON file, and check before the measurement that it can be written."""
    path = Path(save)
    path = path.with_suffix(".json") if path.suffix in (".json", ".png") else Path(f"{save}.json")
    if not save or save.endswith(os.sep) or path.is_dir() or not path.absolute().parent.is_dir():
        raise ReportError(
            f"--save {save!r}: {path} cannot be written; expected the name of a file in an existing folder."
        )
    existed = path.exists()
    try:
        path.open("a").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise ReportError(f"--save {save}: {path} cannot be written: {error.strerror}.") from error
    return path


def _write(report: Report, path: Path) -> str:
    """Write the report and its plot; return an error message, empty if both are written."""
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


def _refuse(message: str) -> int:
    print(f"hvdtrain: {message}", file=sys.stderr)
    return 2
