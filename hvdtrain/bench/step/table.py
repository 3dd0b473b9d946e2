"""What `hvdtrain bench step` shows: weak scaling, strong scaling, and how the columns are to be read."""

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from hvdtrain.bench.models.workloads import WORKLOADS
from hvdtrain.bench.report import Report, Row
from hvdtrain.bench.step.contenders import SILENT, TF_KERAS, TORCH, WRAPPED
from hvdtrain.bench.step.rows import STRONG, WEAK

_READING = (
    "efficiency: the step of as many processes by themselves, at work at once, over this step. "
    "beside slowest: the same of the slowest of them, on whose core the others wait when they train together. "
    f"communication: what is left of a step without that of `{SILENT}`. "
    "over alone: peak memory beyond that of the process by itself, in units of all gradients."
)

_READING_FIT = f"beside wrapped: the epoch of `{WRAPPED}`, which starts without Keras' pause, over this one."


def render(report: Report, console: Console) -> None:
    """Prints the tables."""
    console.print(_table(report, WEAK))
    if any(row.key["scaling"] == STRONG for row in report.rows):
        console.print(_table(report, STRONG))
    console.print(_READING, markup=False)
    if report.options.get("fit"):
        console.print(_READING_FIT, markup=False)
    for name in dict.fromkeys(row.contender for row in report.wrong):
        console.print(
            f"WRONG: {name} ended with weights that differ between its ranks, or with numbers that are not finite.",
            markup=False,
        )


def _table(report: Report, scaling: str) -> Table:
    options, columns = report.options, _columns(report, scaling)
    rows = [row for row in report.rows if row.key["scaling"] == scaling]
    batch = f"{rows[0].key['batch']} a rank" if scaling == WEAK else f"{rows[0].key['batch']} for all ranks"
    table = Table(
        title=f"{options['model']}, {_turn(options)}a batch of {batch}, {report.ranks} ranks: medians of "
        f"{options['rounds']} rounds, and quartiles",
        title_justify="left",
    )
    table.add_column("", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if row.contender in (TORCH, TF_KERAS):
            table.add_section()
        table.add_row(row.contender, *(cell(row) for cell in columns.values()))
    return table


def _turn(options: Mapping[str, Any]) -> str:
    return f"epochs of {options['fit']} steps by fit, " if options.get("fit") else ""


def _columns(report: Report, scaling: str) -> dict[str, Callable[[Row], str]]:
    unit = WORKLOADS[report.options["model"]].unit
    step, quartiles = (
        {"ms a step": _median("step_ms", _number)},
        {"quartiles": _quartiles("step_ms", _number)},
    )
    pace = {f"{unit}/s": _median(f"{unit}_per_s", "{:.0f}".format)}
    efficiency = {
        "effi-\nciency": _median("efficiency", "{:.3f}".format),
        "quartiles ": _quartiles("efficiency", "{:.3f}".format),
    }
    wrapped = {"beside\nwrapped": _median("beside_wrapped", "{:.3f}".format)}
    right = {"right": lambda row: "yes" if row.right else "WRONG"}
    if scaling == STRONG:
        return {
            **step,
            **quartiles,
            **pace,
            "speed-\nup": _median("speedup", "{:.2f}".format),
            **efficiency,
            **right,
        }
    return {
        **step,
        **(wrapped if report.options.get("fit") else pace),
        **efficiency,
        "beside\nslowest": _median("beside_slowest", "{:.3f}".format),
        "commu-\nnication": _median("communication", "{:.1%}".format),
        "peak\nMiB": _median("peak_mib", "{:.0f}".format),
        "over\nalone": _median("excess_gradients", "{:+.2f}".format),
        **right,
    }


def _median(value: str, written: Callable[[float], str]) -> Callable[[Row], str]:
    return lambda row: written(row.values[value].median) if value in row.values else ""


def _quartiles(value: str, written: Callable[[float], str]) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        spread = row.values.get(value)
        return f"{written(spread.low)}-{written(spread.high)}" if spread else ""

    return cell


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"
