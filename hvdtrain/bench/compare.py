"""Compare two reports, and mark the differences that exceed the noise (`hvdtrain bench compare`)."""

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from hvdtrain.bench import sizes
from hvdtrain.bench.output import open_console
from hvdtrain.bench.report import Report, ReportError, Row, Spread, load
from hvdtrain.bench.tables import new_table


def compare(before: str, after: str) -> int:
    """Print the medians of two reports and their ratio.

    Args:
        before: A file that `--save` has written.
        after: Another such file, of the same benchmark.

    Returns:
        0, or 2 if one of the files is not a report or they are of different benchmarks.
    """
    try:
        reports = load(before), load(after)
        if reports[0].bench != reports[1].bench:
            raise ReportError(
                f"{before} is of bench {reports[0].bench}, {after} of bench {reports[1].bench}; "
                "expected two reports of the same benchmark."
            )
    except ReportError as error:
        print(f"hvdtrain: {error}", file=sys.stderr)
        return 2
    _render(*reports, (before, after), open_console())
    return 0


def _render(first: Report, second: Report, names: tuple[str, str], console: Console) -> None:
    """Print the conditions that differ, each quantity that both reports have, and the rows that only one has."""
    for line in differing_conditions(first, second):
        console.print(line, markup=False)
    pairs = list(matching_rows(first, second))
    console.print(_table(first.bench, pairs, names) if pairs else "The two reports have no row in common.")
    console.print("* the quartiles do not overlap: more than the noise of the rounds.")
    for report, other, name in ((first, second, names[0]), (second, first, names[1])):
        for row in report.rows:
            if not any(_same(row, other_row) for other_row in other.rows):
                console.print(f"Only in {name}: {_key_text(row.key)}, {row.contender}", markup=False)


def matching_rows(first: Report, second: Report) -> Iterator[tuple[Row, Row]]:
    """Yield the pairs of rows of the same work by the same contender."""
    for row in first.rows:
        for other in second.rows:
            if _same(row, other):
                yield row, other


def differing_conditions(first: Report, second: Report) -> list[str]:
    """Return a line for each difference in version, ranks, machine and options."""
    before, after = _conditions(first), _conditions(second)
    lines = []
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name), after.get(name)
        if old != new:
            lines.append(f"Different {name}: {_value_text(old)}, then {_value_text(new)}")
    return lines


def _conditions(report: Report) -> dict[str, Any]:
    conditions: dict[str, Any] = {"hvdtrain": report.hvdtrain, "ranks": report.ranks}
    conditions |= {f"machine {name}": value for name, value in report.machine.items()}
    return conditions | {f"option {name}": value for name, value in report.options.items()}


def quartiles_apart(first: Spread, second: Spread) -> bool:
    """Return whether the quartiles of two quantities do not overlap."""
    return first.high < second.low or second.high < first.low


def _table(bench: str, pairs: list[tuple[Row, Row]], names: tuple[str, str]) -> Table:
    left = ("", "contender", "quantity")
    table = new_table(f"bench {bench}: after over before", [*left, *names, "after / before", ""], left)
    last_key = None
    for before, after in pairs:
        key = _key_text(before.key)
        for quantity in before.values:
            if quantity not in after.values:
                continue
            cells = _cells(before.values[quantity], after.values[quantity])
            table.add_row(key if key != last_key else "", before.contender, quantity, *cells)
            last_key = key
        table.add_section()
    return table


def _same(row: Row, other: Row) -> bool:
    return row.contender == other.contender and row.key == other.key


def _cells(before: Spread, after: Spread) -> tuple[str, ...]:
    ratio = f"{after.median / before.median:.3f}" if before.median else "-"
    mark = "*" if quartiles_apart(before, after) else ""
    return f"{before.median:.4g}", f"{after.median:.4g}", ratio, mark


def _value_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _key_text(key: Mapping[str, Any]) -> str:
    """Return the key of a row as text: "16 MiB", or "model cnn, batch 64"."""
    return ", ".join(
        sizes.format_size(value) if name == "bytes" else f"{name} {_value_text(value)}"
        for name, value in key.items()
    )
