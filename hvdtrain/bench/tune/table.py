"""What `hvdtrain tune` shows: each setting with what it does, and what was written down."""

import shlex

from rich.console import Console
from rich.table import Table

from hvdtrain.bench.report import Report, Row


def render(report: Report, console: Console) -> None:
    """Prints the table, and what was made of it."""
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
    for line in _verdict(report):
        console.print(line, markup=False, soft_wrap=True)


def _cells(row: Row, helping: list[str]) -> tuple[str, ...]:
    gain, worst = row.values["gain"], row.values["worst"].median
    name = f"{row.contender}, {row.key['work']}" if row.key else row.contender
    return (
        name,
        f"{gain.median:.3f}",
        f"{gain.low:.3f} - {gain.high:.3f}",
        f"{worst:.3f}",
        "helps" if row.contender in helping else "",
    )


def _verdict(report: Report) -> list[str]:
    options = report.options
    if options["settings"]:
        words = " ".join(f"{name}={shlex.quote(value)}" for name, value in options["settings"].items())
        return [f"Written to {options['file']}, where `hvdtrain run` finds it: {words}"]
    if options["helping"]:
        return ["Together they help no longer: nothing is set."]
    return ["Nothing helps by more than noise: nothing is set."]
