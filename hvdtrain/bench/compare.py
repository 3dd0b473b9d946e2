"""`hvdtrain bench compare`: two reports side by side, and which of their differences are more than noise."""

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hvdtrain.bench import sizes
from hvdtrain.bench.output import console
from hvdtrain.bench.report import Report, ReportError, Row, Spread, load


def compare(before: str, after: str) -> int:
    """Prints the medians of two reports and their ratio.

    Args:
        before: A file that `--save` has written.
        after: Another, of the same benchmark.

    Returns:
        0, or 2 if one of the files is no report or they are of different benchmarks.
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
    render(*reports, (before, after), console())
    return 0


def render(first: Report, second: Report, names: tuple[str, str], out: Console) -> None:
    """Prints what differs in the circumstances, then each quantity that both have, then what only one has."""
    for line in circumstances(first, second):
        out.print(line, markup=False)
    pairs = list(matched(first, second))
    table = Table(title=f"bench {first.bench}: after over before", title_justify="left")
    for heading in ("", "contender", "quantity"):
        table.add_column(heading)
    for heading in (*names, "after / before"):
        table.add_column(Text(heading), justify="right")
    table.add_column()
    shown = None
    for one, other in pairs:
        key = described(one.key)
        for value in [name for name in one.values if name in other.values]:
            table.add_row(
                key if key != shown else "",
                one.contender,
                value,
                *_cells(one.values[value], other.values[value]),
            )
            shown = key
        table.add_section()
    out.print(table if pairs else "The two reports have no row in common.")
    out.print("* the quartiles do not overlap: more than the noise of the rounds.")
    for one_report, other_report, name in ((first, second, names[0]), (second, first, names[1])):
        for row in one_report.rows:
            if not any(_same(row, each) for each in other_report.rows):
                out.print(f"Only in {name}: {described(row.key)}, {row.contender}", markup=False)


def matched(first: Report, second: Report) -> Iterator[tuple[Row, Row]]:
    """Gives the rows of the same work by the same contender."""
    for one in first.rows:
        for other in second.rows:
            if _same(one, other):
                yield one, other


def circumstances(first: Report, second: Report) -> list[str]:
    """Says where machine, software, ranks or options differ, a line each."""
    pairs: list[tuple[str, Any, Any]] = [
        ("hvdtrain", first.hvdtrain, second.hvdtrain),
        ("ranks", first.ranks, second.ranks),
    ]
    for title, one, other in (
        ("machine", first.machine, second.machine),
        ("option", first.options, second.options),
    ):
        names = dict.fromkeys([*one, *other])
        pairs += [(f"{title} {name}", one.get(name), other.get(name)) for name in names]
    return [
        f"Different {name}: {_plain(one)}, then {_plain(other)}" for name, one, other in pairs if one != other
    ]


def apart(one: Spread, other: Spread) -> bool:
    """Tells whether the quartiles of two quantities do not overlap."""
    return one.high < other.low or other.high < one.low


def described(key: Mapping[str, Any]) -> str:
    """Writes what was done as people read it."""
    return ", ".join(
        sizes.shown(value) if name == "bytes" else f"{name} {_plain(value)}" for name, value in key.items()
    )


def _same(one: Row, other: Row) -> bool:
    return one.contender == other.contender and one.key == other.key


def _cells(one: Spread, other: Spread) -> tuple[str, ...]:
    ratio = f"{other.median / one.median:.3f}" if one.median else "-"
    return f"{one.median:.4g}", f"{other.median:.4g}", ratio, "*" if apart(one, other) else ""


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
