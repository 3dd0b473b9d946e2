"""Print the tables of `hvdtrain bench allreduce`: all contenders at each size, and ratios of bus bandwidths."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from hvdtrain.bench import sizes
from hvdtrain.bench.report import Report, Row, Spread

OURS = "hvdtrain mpi"
RAW, BEST = "raw MPI", "best MPI"
VARIANT = "MPI, "  # prefix of the contenders that call MPI in another way than one plain call
COPY, ADD, LINK = "one core copies", "one core adds", "link between hosts"
LIMITS = (COPY, ADD, LINK)


def render(report: Report, console: Console) -> None:
    """Print the tables."""
    console.print(_time_table(report))
    ratios = _ratio_table(report)
    if ratios is not None:
        console.print(ratios)


def best_mpi(rows: Sequence[Row]) -> Row | None:
    """Return the fastest way of calling MPI, among the rows of one size."""
    ways = [row for row in rows if row.contender == RAW or row.contender.startswith(VARIANT)]
    return min(ways, key=lambda row: row.values["latency_us"].median, default=None)


def rows_by_size(report: Report) -> Iterator[tuple[int, list[Row]]]:
    """Yield each size in bytes and its rows, in ascending order."""
    for size in sorted({row.key["bytes"] for row in report.rows}):
        yield size, [row for row in report.rows if row.key["bytes"] == size]


def _time_table(report: Report) -> Table:
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
    for size, rows in rows_by_size(report):
        for number, (name, row) in enumerate(_named_rows(rows)):
            table.add_row(sizes.format_size(size) if number == 0 else "", name, *_cells(row))
        table.add_section()
    return table


def _named_rows(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    """Return the rows of one size with their names; "best MPI" follows raw MPI and replaces all variants."""
    named = [(row.contender, row) for row in rows if not row.contender.startswith(VARIANT)]
    best = best_mpi(rows)
    if best is not None:
        way = "one call" if best.contender == RAW else best.contender.removeprefix(VARIANT)
        names = [name for name, _ in named]
        position = names.index(RAW) + 1 if RAW in names else len(names)
        named.insert(position, (f"{BEST} ({way})", best))
    return named


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


def _ratio_table(report: Report) -> Table | None:
    """Return the bus bandwidth of our engine over that of each other contender, by size; None without ours."""
    names = dict.fromkeys(row.contender for row in report.rows if not row.contender.startswith(VARIANT))
    if OURS not in names:
        return None
    others = [name for name in names if name != OURS]
    if RAW in others:
        others.insert(others.index(RAW) + 1, BEST)
    table = Table(title=f"bus bandwidth of {OURS}, as a multiple of", title_justify="left")
    table.add_column("size", justify="right", no_wrap=True)
    for name in others:
        table.add_column(name, justify="right")
    for size, rows in rows_by_size(report):
        bandwidths = {row.contender: row.values["bus_gb_s"].median for row in rows}
        best = best_mpi(rows)
        if best:
            bandwidths[BEST] = bandwidths[best.contender]
        cells = []
        for name in others:
            both = name in bandwidths and OURS in bandwidths
            cells.append(f"{bandwidths[OURS] / bandwidths[name]:.2f}" if both else "")
        table.add_row(sizes.format_size(size), *cells)
    return table


def _number(value: float) -> str:
    """Return a number with three significant figures, or all its figures before the decimal point."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"


def _quartiles(spread: Spread) -> str:
    return f"{_number(spread.low)} - {_number(spread.high)}"
