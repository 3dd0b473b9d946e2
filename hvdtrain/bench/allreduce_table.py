"""What `hvdtrain bench allreduce` shows: each size with all contenders, and our engine's lead over them."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from hvdtrain.bench import sizes
from hvdtrain.bench.report import Report, Row, Spread

OURS = "hvdtrain mpi"
RAW, BEST = "raw MPI", "best MPI"
COPY, ADD, LINK = "one core copies", "one core adds", "link between hosts"
LIMITS = (COPY, ADD, LINK)


def render(report: Report, console: Console) -> None:
    """Prints the tables."""
    console.print(_measured(report))
    lead = _lead(report)
    if lead is not None:
        console.print(lead)


def best_mpi(rows: Sequence[Row]) -> Row | None:
    """Finds the way of calling MPI that was the fastest, among the rows of one size."""
    ways = [row for row in rows if row.contender == RAW or row.contender.startswith("MPI, ")]
    return min(ways, key=_latency, default=None)


def of_sizes(report: Report) -> Iterator[tuple[int, list[Row]]]:
    """Gives the rows of each size, the smallest first."""
    for size in sorted({row.key["bytes"] for row in report.rows}):
        yield size, [row for row in report.rows if row.key["bytes"] == size]


def _measured(report: Report) -> Table:
    table = Table(
        title=f"allreduce of {report.options['dtype']}, {report.ranks} ranks: medians of "
        f"{report.options['rounds']} rounds, and quartiles",
        title_justify="left",
    )
    for heading in (
        "size",
        "",
        "time, µs",
        "quartiles",
        "algorithm, GB/s",
        "bus, GB/s",
        "quartiles",
        "right",
    ):
        table.add_column(heading, justify="left" if heading in ("", "right") else "right")
    for size, rows in of_sizes(report):
        best = best_mpi(rows)
        shown = [row for row in rows if not row.contender.startswith("MPI, ")]
        shown[_after_raw(shown) : _after_raw(shown)] = [best] if best else []
        for number, row in enumerate(shown):
            name = f"{BEST} ({_way(row)})" if row is best and number == _after_raw(shown) else row.contender
            table.add_row(sizes.shown(size) if number == 0 else "", name, *_cells(row))
        table.add_section()
    return table


def _after_raw(rows: Sequence[Row]) -> int:
    return next((index + 1 for index, row in enumerate(rows) if row.contender == RAW), len(rows))


def _way(row: Row) -> str:
    return "one call" if row.contender == RAW else row.contender.removeprefix("MPI, ")


def _cells(row: Row) -> tuple[str, ...]:
    latency, bus = row.values["latency_us"], row.values["bus_gb_s"]
    algorithm = row.values["algorithm_gb_s"].median
    right = ("" if row.contender in LIMITS else "yes") if row.right else "WRONG"
    return (
        _number(latency.median),
        _quartiles(latency),
        _number(algorithm),
        _number(bus.median),
        _quartiles(bus),
        right,
    )


def _lead(report: Report) -> Table | None:
    """Sets our engine's bus bandwidth over that of each other, by size."""
    others = [
        name for name in dict.fromkeys(row.contender for row in report.rows) if not name.startswith("MPI, ")
    ]
    others = [name for name in others if name != OURS]
    if len(others) == len({row.contender for row in report.rows if not row.contender.startswith("MPI, ")}):
        return None
    if RAW in others:
        others.insert(others.index(RAW) + 1, BEST)
    table = Table(title=f"bus bandwidth of {OURS}, as a multiple of", title_justify="left")
    table.add_column("size", justify="right", no_wrap=True)
    for name in others:
        table.add_column(name, justify="right")
    for size, rows in of_sizes(report):
        buses = {row.contender: row.values["bus_gb_s"].median for row in rows}
        best = best_mpi(rows)
        if best:
            buses[BEST] = buses[best.contender]
        cells = [f"{buses[OURS] / buses[each]:.2f}" if {each, OURS} <= set(buses) else "" for each in others]
        table.add_row(sizes.shown(size), *cells)
    return table


def _latency(row: Row) -> float:
    return row.values["latency_us"].median


def _number(value: float) -> str:
    """Writes three figures, or all there are before the point."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"


def _quartiles(spread: Spread) -> str:
    return f"{_number(spread.low)} - {_number(spread.high)}"
