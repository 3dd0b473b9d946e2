"""Print the tables of `hvdtrain bench step`: weak scaling, strong scaling, and an explanation of the columns."""

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from hvdtrain.bench.models.workloads import WORKLOADS
from hvdtrain.bench.report import Report, Row
from hvdtrain.bench.step.contenders import COMPUTE_ONLY, TF_KERAS, TORCH, WRAPPED
from hvdtrain.bench.step.rows import STRONG, WEAK

_EXPLANATION = (
    "efficiency: the step of the same number of independent processes, running at the same time, over this step. "
    "beside slowest: the same with the slowest of these processes, on whose core all ranks would have to wait. "
    f"communication: the part of a step that `{COMPUTE_ONLY}` does not have. "
    "over alone: peak memory beyond that of the independent process, in units of all gradients."
)

_EXPLANATION_FIT = (
    f"beside wrapped: the epoch of `{WRAPPED}`, which starts without Keras' pause, over this epoch."
)


def render(report: Report, console: Console) -> None:
    """Print the tables."""
    console.print(_table(report, WEAK))
    if any(row.key["scaling"] == STRONG for row in report.rows):
        console.print(_table(report, STRONG))
    console.print(_EXPLANATION, markup=False)
    if report.options.get("fit"):
        console.print(_EXPLANATION_FIT, markup=False)
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
        title=f"{options['model']}, {_fit_title(options)}a batch of {batch}, {report.ranks} ranks: medians of "
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


def _fit_title(options: Mapping[str, Any]) -> str:
    return f"epochs of {options['fit']} steps by fit, " if options.get("fit") else ""


def _columns(report: Report, scaling: str) -> dict[str, Callable[[Row], str]]:
    unit = WORKLOADS[report.options["model"]].unit
    step = {"ms a step": _median("step_ms", _number)}
    throughput = {f"{unit}/s": _median(f"{unit}_per_s", "{:.0f}".format)}
    efficiency = {
        "effi-\nciency": _median("efficiency", "{:.3f}".format),
        "quartiles ": _quartiles("efficiency", "{:.3f}".format),
    }
    wrapped = {"beside\nwrapped": _median("beside_wrapped", "{:.3f}".format)}
    right = {"right": lambda row: "yes" if row.right else "WRONG"}
    if scaling == STRONG:
        return {
            **step,
            "quartiles": _quartiles("step_ms", _number),
            **throughput,
            "speed-\nup": _median("speedup", "{:.2f}".format),
            **efficiency,
            **right,
        }
    return {
        **step,
        **(wrapped if report.options.get("fit") else throughput),
        **efficiency,
        "beside\nslowest": _median("beside_slowest", "{:.3f}".format),
        "commu-\nnication": _median("communication", "{:.1%}".format),
        "peak\nMiB": _median("peak_mib", "{:.0f}".format),
        "over\nalone": _median("excess_gradients", "{:+.2f}".format),
        **right,
    }


def _median(quantity: str, formatted: Callable[[float], str]) -> Callable[[Row], str]:
    return lambda row: formatted(row.values[quantity].median) if quantity in row.values else ""


def _quartiles(quantity: str, formatted: Callable[[float], str]) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        spread = row.values.get(quantity)
        return f"{formatted(spread.low)}-{formatted(spread.high)}" if spread else ""

    return cell


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"
